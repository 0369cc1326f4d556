package kvm

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/pagetables"
)

// Guest-physical memory.
const (
	// tablesBase is where page tables and the kernel window are, in chunks.
	tablesBase     = 4 << 30
	tablesPerChunk = 1024
	chunkSize      = tablesPerChunk * hostarch.PageSize
	maxChunks      = 1024

	// dummyBase is where the slot is whose moves flush (see machine.flush).
	dummyBase = 12 << 30

	// regionsBase is where files are, in regions.
	regionsBase = 64 << 30
	regionSize  = 64 << 20

	// windowRegions is how many regions a memory slot has room for. KVM needs 2 MiB for
	// the GiB where it shadows page tables.
	windowRegions = 16
)

// slots hands out the numbers of memory slots.
type slots struct {
	mu   sync.Mutex
	free []uint32
	next uint32
	max  uint32
}

// addSlot makes a slot.
func (m *machine) addSlot(gpa uint64, mem []byte) (uint32, error) {
	s := &m.slots
	s.mu.Lock()
	var n uint32
	switch {
	case len(s.free) > 0:
		n, s.free = s.free[len(s.free)-1], s.free[:len(s.free)-1]
	case s.next < s.max:
		n = s.next
		s.next++
	default:
		s.mu.Unlock()
		return 0, fmt.Errorf("all %d memory slots of the VM are used: map fewer files: %w", s.max, unix.ENOSPC)
	}
	s.mu.Unlock()
	if err := m.setSlot(n, gpa, uint64(len(mem)), hostAddress(mem)); err != nil {
		m.freeSlot(n)
		return 0, err
	}
	return n, nil
}

func (m *machine) freeSlot(n uint32) {
	m.slots.mu.Lock()
	m.slots.free = append(m.slots.free, n)
	m.slots.mu.Unlock()
}

// setSlot makes, moves or (with size 0) deletes a slot.
func (m *machine) setSlot(n uint32, gpa, size, hva uint64) error {
	mr := memoryRegion{slot: n, gpa: gpa, size: size, hva: hva}
	for {
		errno := m.failure(kvmSetUserMemoryRegion)
		if errno == 0 {
			errno = ioctlStruct(m.vm, kvmSetUserMemoryRegion, &mr)
		}
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return fmt.Errorf("ioctl(KVM_SET_USER_MEMORY_REGION) of %#x bytes at guest-physical %#x: %w", size, gpa, errno)
	}
}

// failure returns what a test has a request fail with.
func (m *machine) failure(req uintptr) unix.Errno {
	if m.fail == nil {
		return 0
	}
	return m.fail(req)
}

// flush makes all vCPUs forget what they know of page tables, and returns when
// none uses it any more. Stores into page tables come before it, whatever may be
// reused after it.
//
// Where KVM shadows page tables it does not see our stores, and no instruction of
// the guest makes it look (it takes pages that the guest has not written for
// unchanged). Moving a memory slot makes it drop the shadow of the whole VM. Where
// the CPU walks our tables that would be right too, but drops what KVM knows of the
// host's memory; a vCPU that enters the guest anew with another CR4 is enough.
func (m *machine) flush() error {
	m.flushMu.Lock()
	defer m.flushMu.Unlock()
	waiting := m.tables.waiting() // those that come later are for the next flush
	if err := m.flushCPUs(); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	m.tables.flushed(waiting)
	return nil
}

// flushCPUs is the flush itself.
func (m *machine) flushCPUs() error {
	if m.omit.flush {
		return nil
	}
	if m.walked {
		m.flushes.Add(1)
		for _, v := range m.pool.all {
			if v.awaited = v.runs.Load(); v.awaited%2 != 0 {
				v.kick()
			}
		}
		for _, v := range m.pool.all {
			v.waitForRun()
		}
		return nil
	}
	next := m.dummyGPA ^ hostarch.PageSize
	if err := m.setSlot(m.dummySlot, next, hostarch.PageSize, hostAddress(m.dummy)); err != nil {
		return err
	}
	m.dummyGPA = next
	return nil
}

// kvmRun runs the guest until KVM_RUN returns. It begins with a flush if there was one
// since it last did.
func (v *vcpu) kvmRun() unix.Errno {
	if errno := v.m.failure(kvmRun); errno != 0 {
		return errno
	}
	if !v.m.walked {
		_, errno := ioctl(v.fd, kvmRun, 0)
		return errno
	}
	v.runs.Add(1) // before the load: who flushes counts up, and then looks at runs
	if n := v.m.flushes.Load(); n != v.flushed {
		v.flushed = n
		v.sregs.cr4 ^= cr4PGE
		v.run.sregs.cr4 = v.sregs.cr4
		v.run.dirtyRegs |= syncSRegs
	}
	_, errno := ioctl(v.fd, kvmRun, 0)
	v.runs.Add(1)
	return errno
}

// waitForRun returns when the kvmRun that was under way, if any, has ended.
func (v *vcpu) waitForRun() {
	if v.awaited%2 == 0 {
		return
	}
	for i := 0; v.runs.Load() == v.awaited; i++ {
		// It takes microseconds, unless the thread has to wait for a CPU.
		if i < 100 {
			runtime.Gosched()
		} else {
			time.Sleep(50 * time.Microsecond)
		}
	}
}

// tableMemory implements pagetables.Allocator. It is safe for concurrent use.
type tableMemory struct {
	m *machine

	mu   sync.Mutex
	free []uint64
	// limbo are tables that nobody has, and vCPUs may still hold.
	limbo  []uint64
	used   int // chunks
	mapped [][]byte
	chunks [maxChunks]atomic.Pointer[[tablesPerChunk]pagetables.Table]
}

// New implements pagetables.Allocator.New.
func (t *tableMemory) New() (uint64, *pagetables.Table, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.free) == 0 {
		if err := t.grow(); err != nil {
			return 0, nil, err
		}
	}
	phys := t.free[len(t.free)-1]
	t.free = t.free[:len(t.free)-1]
	table := t.Lookup(phys)
	clear(table[:])
	return phys, table, nil
}

// grow adds a chunk.
func (t *tableMemory) grow() error {
	if t.used == maxChunks {
		return fmt.Errorf("page tables: %d MiB are used: %w", maxChunks*chunkSize>>20, unix.ENOMEM)
	}
	mem, err := unix.Mmap(-1, 0, chunkSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("mmap of memory for page tables: %w", err)
	}
	base := uint64(tablesBase + t.used*chunkSize)
	if _, err := t.m.addSlot(base, mem); err != nil {
		unix.Munmap(mem)
		return err
	}
	t.mapped = append(t.mapped, mem)
	t.chunks[t.used].Store(tablesOf(mem))
	t.used++
	for i := tablesPerChunk - 1; i >= 0; i-- {
		t.free = append(t.free, base+uint64(i)*hostarch.PageSize)
	}
	return nil
}

// Lookup implements pagetables.Allocator.Lookup.
func (t *tableMemory) Lookup(phys uint64) *pagetables.Table {
	i := (phys - tablesBase) / hostarch.PageSize
	return &t.chunks[i/tablesPerChunk].Load()[i%tablesPerChunk]
}

// Free implements pagetables.Allocator.Free.
func (t *tableMemory) Free(phys uint64) {
	t.mu.Lock()
	t.free = append(t.free, phys)
	t.mu.Unlock()
}

// freeLater frees tables once the next flush is done.
func (t *tableMemory) freeLater(phys uint64) {
	t.mu.Lock()
	t.limbo = append(t.limbo, phys)
	t.mu.Unlock()
}

// waiting returns how many tables wait for a flush.
func (t *tableMemory) waiting() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.limbo)
}

// flushed frees the first n tables that wait for a flush: it began when there were so
// many.
func (t *tableMemory) flushed(n int) {
	t.mu.Lock()
	t.free = append(t.free, t.limbo[:n]...)
	t.limbo = append(t.limbo[:0], t.limbo[n:]...)
	t.mu.Unlock()
}

// maxLimbo is how many tables may wait for a flush that is due for something else.
const maxLimbo = 1024

// trim flushes if too many tables wait for it. If that fails they wait on.
func (t *tableMemory) trim() {
	if t.waiting() > maxLimbo {
		t.m.flush()
	}
}

// region is a part of a file that is guest-physical memory.
type region struct {
	key regionKey
	gpa uint64
	mem []byte
	// readOnly says that the file is not open for writing.
	readOnly bool
	// ram says that the file is nothing but memory.
	ram bool
	// refs is the number of pages of it that are mapped, as often as they are.
	refs int
}

// regionKey is a file and the number of the part.
type regionKey struct {
	file memmap.File
	part uint64
}

// regions are all regions.
type regions struct {
	m *machine

	mu     sync.Mutex
	byKey  map[regionKey]*region
	byPart []*region // by guest-physical address
	free   []int
	max    int
	// windows are our addresses for the memory of the VM.
	windows [][]byte
}

// get returns the region for part of f, and adds refs to it.
func (rs *regions) get(f memmap.File, part uint64, write bool, refs int) (*region, error) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	key := regionKey{f, part}
	r := rs.byKey[key]
	if r == nil {
		var err error
		if r, err = rs.add(key); err != nil {
			return nil, err
		}
	}
	if write && r.readOnly {
		rs.dropLocked(r, 0)
		return nil, fmt.Errorf("descriptor %d is not open for writing: %w", f.FD(), unix.EACCES)
	}
	r.refs += refs
	return r, nil
}

func (rs *regions) add(key regionKey) (*region, error) {
	i, err := rs.place()
	if err != nil {
		return nil, err
	}
	r := &region{key: key, gpa: regionsBase + uint64(i)*regionSize}
	r.mem = rs.windows[i/windowRegions][i%windowRegions*regionSize:][:regionSize:regionSize]
	fd, off := key.file.FD(), int64(key.part*regionSize)
	const flags = unix.MAP_SHARED | unix.MAP_NORESERVE
	err = mapOver(r.mem, fd, off, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err == unix.EACCES {
		r.readOnly = true
		err = mapOver(r.mem, fd, off, unix.PROT_READ, flags)
	}
	if err != nil {
		rs.free = append(rs.free, i)
		return nil, fmt.Errorf("mmap of descriptor %d at offset %#x: %w", fd, off, err)
	}
	// Only files of shmem have seals (fcntl(2)).
	_, errno := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	r.ram = errno == nil
	rs.byPart[i] = r
	rs.byKey[key] = r
	return r, nil
}

// place returns a place for a region. Guest-physical memory comes in windows, each a
// memory slot for our addresses where nothing is mapped: to map a file there then
// needs nothing of KVM, which takes long to change slots.
func (rs *regions) place() (int, error) {
	if n := len(rs.free); n > 0 {
		i := rs.free[n-1]
		rs.free = rs.free[:n-1]
		return i, nil
	}
	i := len(rs.byPart)
	if i+windowRegions > rs.max {
		return 0, fmt.Errorf("the VM's %d GiB of memory are used: %w", rs.max*regionSize>>30, unix.ENOSPC)
	}
	mem, err := unix.Mmap(-1, 0, windowRegions*regionSize, unix.PROT_NONE, noMemory)
	if err != nil {
		return 0, fmt.Errorf("mmap of room for memory of the VM: %w", err)
	}
	if _, err := rs.m.addSlot(regionsBase+uint64(i)*regionSize, mem); err != nil {
		unix.Munmap(mem)
		return 0, err
	}
	rs.windows = append(rs.windows, mem)
	rs.byPart = append(rs.byPart, make([]*region, windowRegions)...)
	for k := i + windowRegions - 1; k > i; k-- {
		rs.free = append(rs.free, k)
	}
	return i, nil
}

// noMemory are the flags of a mapping of nothing.
const noMemory = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE

// drop takes refs off r, and frees it when nothing of it is mapped any more and no
// vCPU can reach it.
func (rs *regions) drop(r *region, refs int) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	rs.dropLocked(r, refs)
}

func (rs *regions) dropLocked(r *region, refs int) {
	if r.refs -= refs; r.refs > 0 {
		return
	}
	delete(rs.byKey, r.key)
	// With the mapping goes what KVM knows of it. If it cannot be replaced, which is the
	// host's, it stays, and its place is never used again.
	if mapOver(r.mem, -1, 0, unix.PROT_NONE, noMemory) == nil {
		i := int((r.gpa - regionsBase) / regionSize)
		rs.byPart[i] = nil
		rs.free = append(rs.free, i)
	}
}

// at returns the region of a guest-physical address, or nil. The caller holds a
// reference on it.
func (rs *regions) at(phys uint64) *region {
	if phys < regionsBase {
		return nil
	}
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return rs.byPart[(phys-regionsBase)/regionSize]
}
