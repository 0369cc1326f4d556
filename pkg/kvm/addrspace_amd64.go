package kvm

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/pagetables"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// maxUserAddr is TASK_SIZE_MAX with 4-level page tables.
const maxUserAddr = hostarch.Addr(0x7fff_ffff_f000)

// addressSpace implements platform.AddressSpace.
type addressSpace struct {
	platform.NoAddressSpaceIO

	m *machine

	// mu protects the page tables.
	mu sync.Mutex
	pt *pagetables.PageTables

	// root is the guest-physical address of the top table.
	root uint64

	// dropped and added are what became of pages in the change under way. No vCPU can
	// reach the dropped ones only after the flush.
	dropped map[*region]int
	added   int

	// stale are the single pages that need a flush: runs of guest-physical memory.
	stale      []run
	stalePages int

	runMu sync.Mutex
	// running are the Contexts that are in Switch.
	running map[*vcpuContext]struct{}
	// dead is why nothing runs here any more, if so; gone says that it is.
	dead error
	gone atomic.Bool

	// slots are those of the vCPUs' shims, slotPages where they are.
	slots     []*slot
	slotPages []uint64
}

// run is a run of pages, by guest-physical addresses.
type run struct{ start, end uint64 }

// Beyond these a flush of everything is cheaper than one of single pages.
const (
	maxStalePages = 64
	maxStaleRuns  = 4
)

// minUserAddr returns the lowest address that an application can map.
func minUserAddr() hostarch.Addr {
	return max(platform.SystemMMapMinAddr(), slotsAddr+maxShims*slotSize)
}

func (m *machine) newAddressSpace() (*addressSpace, error) {
	pt, err := m.window.NewSharing()
	if err != nil {
		return nil, err
	}
	as := &addressSpace{m: m, pt: pt, root: pt.Root(), dropped: make(map[*region]int), running: make(map[*vcpuContext]struct{})}
	if _, err := pt.Map(lowAddr, hostarch.PageSize, kernelCode, m.low); err != nil {
		pt.Release(m.tables.freeLater)
		return nil, err
	}
	if err := as.mapSlots(); err != nil {
		pt.Release(m.tables.freeLater)
		as.freeSlots()
		return nil, err
	}
	pt.Count, pt.Stale, pt.KeepEmpty = as.count, as.addStale, true
	return as, nil
}

// count implements pagetables.PageTables.Count.
func (as *addressSpace) count(phys, length uint64, delta int) {
	pages := int(length / hostarch.PageSize)
	if delta > 0 {
		as.added += pages
	} else if r := as.m.regions.at(phys); r != nil {
		as.dropped[r] += pages
	}
}

// addStale implements pagetables.PageTables.Stale.
func (as *addressSpace) addStale(phys uint64) {
	as.stalePages++
	if n := len(as.stale); n > 0 && as.stale[n-1].end == phys {
		as.stale[n-1].end += hostarch.PageSize
	} else if n <= maxStaleRuns {
		as.stale = append(as.stale, run{phys, phys + hostarch.PageSize})
	}
}

// flushPages flushes the stale pages alone if that can be, and is better: where KVM
// shadows page tables, that is.
//
// The host forgets them in our mapping of the file, which loses nothing of a shared
// one, and so KVM makes every vCPU forget them. That is enough when nothing runs in
// the AddressSpace: a vCPU that is handling a fault may have read the page table
// before our stores, and would enter the page after the host's flush.
func (as *addressSpace) flushPages() bool {
	if as.m.walked || as.pt.NeedsFlush() || as.stalePages > maxStalePages || len(as.stale) > maxStaleRuns {
		return false
	}
	// Threads in the shim are not beyond doubt there.
	for c := as.anyRunning(); c != nil; c = as.anyRunning() {
		if !c.tryLeave(as) {
			return false
		}
	}
	as.runMu.Lock()
	defer as.runMu.Unlock()
	if len(as.running) > 0 {
		return false
	}
	if as.m.omit.flush {
		return true
	}
	for _, s := range as.stale {
		r := as.m.regions.at(s.start)
		if r == nil || s.end > r.gpa+regionSize || unix.Madvise(r.mem[s.start-r.gpa:s.end-r.gpa], unix.MADV_DONTNEED) != nil {
			return false
		}
	}
	return true
}

// enter says that c is going to run here. It returns an error if the AddressSpace
// was released or given up.
func (as *addressSpace) enter(c *vcpuContext) error {
	as.runMu.Lock()
	defer as.runMu.Unlock()
	if as.dead != nil {
		return as.dead
	}
	as.running[c] = struct{}{}
	return nil
}

func (as *addressSpace) leave(c *vcpuContext) {
	as.runMu.Lock()
	defer as.runMu.Unlock()
	delete(as.running, c)
}

// isDead returns why nothing runs here any more, or nil.
func (as *addressSpace) isDead() error {
	as.runMu.Lock()
	defer as.runMu.Unlock()
	return as.dead
}

// kill gives the AddressSpace up because of err.
func (as *addressSpace) kill(err error) {
	as.runMu.Lock()
	defer as.runMu.Unlock()
	if as.dead == nil {
		as.dead = err
		as.gone.Store(true)
	}
	for c := range as.running {
		c.poke()
	}
}

// wait waits until nothing runs in an AddressSpace that was given up. as.mu must be
// free: what still runs may need it.
func (as *addressSpace) wait() {
	for {
		c := as.anyRunning()
		if c == nil {
			return
		}
		c.leaveFor(as)
	}
}

// anyRunning returns a Context that is in the AddressSpace, or nil.
func (as *addressSpace) anyRunning() *vcpuContext {
	as.runMu.Lock()
	defer as.runMu.Unlock()
	for c := range as.running {
		return c
	}
	return nil
}

// finish ends a change of the page tables. If it cannot be made to count it gives
// the AddressSpace up: tables and regions then stay as they are until Release.
func (as *addressSpace) finish(flush bool) error {
	if flush && !as.flushPages() {
		if err := as.m.flush(); err != nil {
			as.kill(err)
			return err
		}
		as.pt.Flushed()
	}
	as.stale, as.stalePages = as.stale[:0], 0
	for r, n := range as.dropped {
		as.m.regions.drop(r, n)
	}
	clear(as.dropped)
	return nil
}

func checkRange(addr hostarch.Addr, length uint64) (hostarch.AddrRange, error) {
	ar, ok := addr.ToRange(length)
	if !ok || length == 0 || !ar.IsPageAligned() || ar.Start < minUserAddr() || ar.End > maxUserAddr {
		return ar, fmt.Errorf("%#x bytes at %v: not whole pages that an application can have: %w", length, addr, unix.EINVAL)
	}
	return ar, nil
}

// MapFile implements platform.AddressSpace.MapFile.
func (as *addressSpace) MapFile(addr hostarch.Addr, f memmap.File, fr memmap.FileRange, at hostarch.AccessType, precommit bool) error {
	if !fr.WellFormed() || fr.Start&hostarch.PageMask != 0 || !at.Any() {
		return fmt.Errorf("MapFile of the bytes %v with access %v: %w", fr, at, unix.EINVAL)
	}
	if _, err := checkRange(addr, fr.Length()); err != nil {
		return fmt.Errorf("MapFile: %w", err)
	}
	err := as.mapFile(addr, f, fr, at, precommit)
	if err == nil {
		return nil
	}
	if as.isDead() != nil {
		as.wait()
	}
	return fmt.Errorf("MapFile of %#x bytes at %v with access %v: %w", fr.Length(), addr, at, withErrno(err))
}

func (as *addressSpace) mapFile(addr hostarch.Addr, f memmap.File, fr memmap.FileRange, at hostarch.AccessType, precommit bool) error {
	as.mu.Lock()
	defer as.mu.Unlock()
	if err := as.isDead(); err != nil {
		return err
	}
	flush := false
	var err error
	for start := fr.Start; start < fr.End && err == nil; {
		end := min(fr.End, start/regionSize*regionSize+regionSize)
		var fl bool
		fl, err = as.mapPart(addr+hostarch.Addr(start-fr.Start), f, memmap.FileRange{Start: start, End: end}, at, precommit)
		flush = flush || fl
		start = end
	}
	if e := as.finish(flush); e != nil {
		err = e
	}
	return err
}

// Memory that is mapped in ranges of such sizes, in bytes, is made present at once: it
// is what memory managers map when the pages before it were used one after the other.
// A page costs half of what it does when the guest touches it first. Larger ranges are
// rather memory that is there already, and may have holes.
const (
	minPopulate = 512 << 10
	maxPopulate = hostarch.HugePageSize
)

// mapPart maps a range that lies in one region.
func (as *addressSpace) mapPart(addr hostarch.Addr, f memmap.File, fr memmap.FileRange, at hostarch.AccessType, precommit bool) (bool, error) {
	pages := int(fr.Length() / hostarch.PageSize)
	r, err := as.m.regions.get(f, fr.Start/regionSize, at.Write, pages)
	if err != nil {
		return false, err
	}
	off := fr.Start % regionSize
	if precommit || at.Write && r.ram && fr.Length() >= minPopulate && fr.Length() <= maxPopulate {
		advice := unix.MADV_POPULATE_READ
		if at.Write && !r.ram {
			// Of memory a read maps pages writable, and 16 of them at once that are there.
			advice = unix.MADV_POPULATE_WRITE
		}
		// It is no more than advice, and Linux before 5.14 does not know it.
		unix.Madvise(r.mem[off:off+fr.Length()], advice)
	}
	as.added = 0
	flush, err := as.pt.Map(addr, fr.Length(), pagetables.MapOpts{Access: at, User: true}, r.gpa+off)
	if as.added < pages {
		as.dropped[r] += pages - as.added
	}
	return flush, err
}

// withErrno returns err, which wraps an errno at the latest then.
func withErrno(err error) error {
	if errors.As(err, new(unix.Errno)) {
		return err
	}
	return fmt.Errorf("%w: %w", err, unix.ENOMEM)
}

// Unmap implements platform.AddressSpace.Unmap.
func (as *addressSpace) Unmap(addr hostarch.Addr, length uint64) {
	if err := as.unmap(addr, length); err != nil {
		as.kill(fmt.Errorf("Unmap of %#x bytes at %v: %w", length, addr, withErrno(err)))
		as.wait()
	}
}

func (as *addressSpace) unmap(addr hostarch.Addr, length uint64) error {
	if _, err := checkRange(addr, length); err != nil {
		return err
	}
	as.mu.Lock()
	defer as.mu.Unlock()
	if as.isDead() != nil {
		return nil // Nothing runs in it any more.
	}
	flush, err := as.pt.Unmap(addr, length)
	if e := as.finish(flush); e != nil {
		err = e
	}
	return err
}

// Release implements platform.AddressSpace.Release.
func (as *addressSpace) Release() {
	as.kill(fmt.Errorf("the AddressSpace was released: %w", unix.ESRCH))
	as.wait()
	as.mu.Lock()
	defer as.mu.Unlock()
	if as.pt == nil {
		return
	}
	// No vCPU is going to be in these tables. But some may still hold what they knew of
	// them, so that they can be used for another only after a flush.
	as.pt.Release(as.m.tables.freeLater)
	as.freeSlots()
	as.m.tables.trim()
	for r, n := range as.dropped {
		as.m.regions.drop(r, n)
	}
	as.pt = nil
}

// PreFork implements platform.AddressSpace.PreFork.
func (*addressSpace) PreFork() {}

// PostFork implements platform.AddressSpace.PostFork.
func (*addressSpace) PostFork() {}

// read copies the application's memory at addr to b, regardless of permissions. It
// returns false if it is not there.
func (as *addressSpace) read(addr hostarch.Addr, b []byte) bool {
	as.mu.Lock()
	defer as.mu.Unlock()
	for len(b) > 0 {
		if as.pt == nil {
			return false
		}
		phys, _, _, ok := as.pt.Lookup(addr)
		r := as.m.regions.at(phys)
		if !ok || r == nil {
			return false
		}
		n := min(uint64(len(b)), hostarch.PageSize-addr.PageOffset())
		if _, err := usermem.SafeCopy(b[:n], r.mem[phys-r.gpa:][:n]); err != nil {
			return false
		}
		b = b[n:]
		addr += hostarch.Addr(n)
	}
	return true
}

// cause is what a page fault is for.
type cause int

const (
	causeNone       cause = iota // the access is possible, now
	causeUnmapped                // nothing is there
	causePermission              // something is there that forbids the access
	causeTruncated               // the file has ended
)

// whyFault finds out why an access faulted.
func (as *addressSpace) whyFault(addr hostarch.Addr, at hostarch.AccessType) cause {
	if addr < minUserAddr() || addr >= maxUserAddr {
		return causeUnmapped
	}
	as.mu.Lock()
	defer as.mu.Unlock()
	if as.pt == nil {
		return causeUnmapped
	}
	if phys, ok := as.pt.Hidden(addr); ok {
		if !as.newSizes().has(phys) {
			return causeTruncated
		}
		as.pt.Unhide(addr)
	}
	_, _, opts, ok := as.pt.Lookup(addr)
	switch {
	case !ok:
		return causeUnmapped
	case !opts.Access.SupersetOf(at):
		return causePermission
	}
	return causeNone
}

// hideTruncated hides the pages that are beyond the ends of their files. KVM cannot
// say which page it was that it did not get; the CPU can.
func (as *addressSpace) hideTruncated() error {
	as.mu.Lock()
	defer as.mu.Unlock()
	if err := as.isDead(); err != nil {
		return err
	}
	sizes := as.newSizes()
	start := minUserAddr()
	flush, err := as.pt.Hide(start, uint64(maxUserAddr-start), func(phys uint64) bool { return !sizes.has(phys) })
	if e := as.finish(flush); e != nil {
		err = e
	}
	return err
}

// sizes are the sizes of files, in pages rounded up, each asked for once.
type sizes struct {
	m     *machine
	known map[memmap.File]uint64
}

func (as *addressSpace) newSizes() sizes { return sizes{as.m, make(map[memmap.File]uint64)} }

// has reports whether the file behind phys has the page.
func (s sizes) has(phys uint64) bool {
	r := s.m.regions.at(phys)
	if r == nil {
		return true // the window's
	}
	size, ok := s.known[r.key.file]
	if !ok {
		size = ^uint64(0)
		var st unix.Stat_t
		if unix.Fstat(r.key.file.FD(), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG {
			size = uint64(st.Size)
		}
		s.known[r.key.file] = size
	}
	return r.key.part*regionSize+(phys-r.gpa) < size
}
