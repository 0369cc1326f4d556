// Package pgalloc holds the memory of applications: one host memory file whose
// pages are handed out with reference counts.
//
// It depends on hostarch, memmap and usermem, and on the host's memfd_create(2) and
// fallocate(2). It knows nothing of addresses or tasks: package mm says which
// page is mapped where.
package pgalloc

import (
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/usermem"
)

const (
	// chunkSize is the unit, in bytes, in which the file grows and in which the
	// Sentry maps it: address space, not memory.
	chunkSize     = 64 << 20
	pagesPerChunk = chunkSize / hostarch.PageSize

	// maxAllocation bounds one allocation, in bytes.
	maxAllocation = 1 << 30

	// Freed pages are given back to the host when there are this many bytes, or
	// ranges, of them: one fallocate(2) is cheaper than many.
	maxFreedBytes  = 4 << 20
	maxFreedRanges = 256

	// maxKept bounds the freed memory that is kept from the host, in bytes, because
	// zeroing it takes a tenth of the time of giving it back and getting other.
	maxKept = 8 << 20

	// trimAfter is how long freed memory is held that nobody asks for.
	trimAfter = time.Second
)

// chunk is one part of the file.
type chunk struct {
	// refs are the references on each page, protected by MemoryFile.mu.
	refs [pagesPerChunk]int32
	// mapping is the Sentry's view, made when first needed.
	mapping atomic.Pointer[[]byte]
}

// MemoryFile is a file of memory, all zeros at first. It implements memmap.File.
// Methods are safe for concurrent use.
type MemoryFile struct {
	fd    int
	zeros []byte

	// chunks only grows; it is replaced under mu and read without.
	chunks atomic.Pointer[[]*chunk]

	mu sync.Mutex
	// taken has a bit per page, set unless the page is free and zero.
	taken []uint64
	// cursor is the page behind the last allocation: the next one is looked for
	// from there, so that what is allocated in sequence lies in sequence.
	cursor uint64
	// used counts the pages with references.
	used  uint64
	limit uint64 // pages
	// freed are the ranges, freedBytes in all, that nobody references but that
	// may still hold data.
	freed      []memmap.FileRange
	freedBytes uint64
	// committed has a bit per page that allocateDirty gave; such pages are
	// kept when they are freed, keptBytes in all, and still hold data.
	committed []uint64
	kept      []memmap.FileRange
	keptBytes uint64
	destroyed bool
	// trimmer runs if there is freed memory; wanted says that some of it was used
	// again since it was started.
	trimmer *time.Timer
	wanted  bool

	// trimMu is held by trim. It is taken before mu.
	trimMu sync.Mutex

	// mapMu makes chunk mappings once. It is taken after mu, or alone.
	mapMu sync.Mutex
}

// New returns an empty MemoryFile. name shows up in the host's
// /proc/PID/maps. The error wraps the host's errno.
func New(name string) (*MemoryFile, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if err == unix.EINVAL { // Linux before 6.3 does not know MFD_NOEXEC_SEAL
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("create memory file %q: memfd_create: %w", name, err)
	}
	mf := &MemoryFile{fd: fd, limit: ^uint64(0)}
	if mf.zeros, err = zeros(); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("create memory file %q: mmap of zeros: %w", name, err)
	}
	mf.chunks.Store(new([]*chunk))
	return mf, nil
}

// SetLimit makes allocations fail with ENOMEM when more than limit bytes would
// be in use. 0 means no limit but the host's.
func (mf *MemoryFile) SetLimit(limit uint64) {
	mf.mu.Lock()
	defer mf.mu.Unlock()
	mf.limit = limit / hostarch.PageSize
	if limit == 0 {
		mf.limit = ^uint64(0)
	}
}

// Allocate returns length bytes of zeros in one range, with one reference on
// each page. The error is ENOMEM when the limit is reached or the host refuses.
//
// Preconditions: length is page-aligned, not 0, and no more than 1 GiB.
func (mf *MemoryFile) Allocate(length uint64) (memmap.FileRange, error) {
	return mf.AllocateAt(length, NoHint)
}

// NoHint is the hint of an allocation that may lie anywhere.
const NoHint = ^uint64(0)

// AllocateAt is Allocate and takes the range that begins at offset hint if that
// is free: adjacent memory that is adjacent in the file as well needs only one
// mapping of the host.
func (mf *MemoryFile) AllocateAt(length, hint uint64) (memmap.FileRange, error) {
	n := length / hostarch.PageSize
	if n == 0 || length%hostarch.PageSize != 0 || length > maxAllocation {
		return memmap.FileRange{}, fmt.Errorf("allocate %#x bytes of memory: %w", length, unix.EINVAL)
	}
	mf.mu.Lock()
	defer mf.mu.Unlock()
	if mf.destroyed || n > mf.limit || mf.used > mf.limit-n {
		return memmap.FileRange{}, fmt.Errorf("allocate %#x bytes of memory, limit reached: %w", length, unix.ENOMEM)
	}
	p, err := mf.findLocked(n, hint)
	if err != nil {
		return memmap.FileRange{}, fmt.Errorf("allocate %#x bytes of memory: %w", length, err)
	}
	mark(mf.taken, p, n, true)
	mf.cursor = p + n
	fr := memmap.FileRange{Start: p * hostarch.PageSize, End: (p + n) * hostarch.PageSize}
	mf.useLocked(fr)
	return fr, nil
}

// useLocked gives each page of fr its first reference.
func (mf *MemoryFile) useLocked(fr memmap.FileRange) {
	mf.used += fr.Length() / hostarch.PageSize
	mf.forEachRefs(fr, func(refs []int32) {
		for i := range refs {
			refs[i] = 1
		}
	})
}

// AllocateDirty is AllocateAt for memory that is going to be written at once, all
// of it, and holds anything until then. It may be memory that the host gave before.
func (mf *MemoryFile) AllocateDirty(length, hint uint64) (memmap.FileRange, error) {
	fr, _, err := mf.allocateDirty(length, hint)
	return fr, err
}

// AllocateCommitted is AllocateDirty, but the memory is zero, and the host holds it.
func (mf *MemoryFile) AllocateCommitted(length, hint uint64) (memmap.FileRange, error) {
	fr, dirty, err := mf.allocateDirty(length, hint)
	if err != nil {
		return fr, err
	}
	if !dirty {
		mf.commit(fr)
		return fr, nil
	}
	for rest := fr; rest.Start < rest.End; {
		b, err := mf.Bytes(rest)
		if err == nil {
			err = usermem.SafeZero(b)
		}
		if err != nil { // the host has taken it away
			mf.DecRef(fr)
			return memmap.FileRange{}, fmt.Errorf("allocate %#x bytes of memory (%v): %w", length, err, unix.ENOMEM)
		}
		rest.Start += uint64(len(b))
	}
	return fr, nil
}

// zeros returns what commit writes. All pages of it are there: for those of a variable
// the kernel would fault several times each.
var zeros = sync.OnceValues(func() ([]byte, error) {
	return unix.Mmap(-1, 0, 64<<10, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
})

// commit makes the host hold fr, which is zero: to write zeros takes it half the time
// that page faults do. If it refuses, whoever touches a page will see.
func (mf *MemoryFile) commit(fr memmap.FileRange) {
	for fr.Start < fr.End {
		n, err := unix.Pwrite(mf.fd, mf.zeros[:min(fr.Length(), uint64(len(mf.zeros)))], int64(fr.Start))
		if err == unix.EINTR {
			continue
		}
		if err != nil || n <= 0 {
			return
		}
		fr.Start += uint64(n)
	}
}

func (mf *MemoryFile) allocateDirty(length, hint uint64) (fr memmap.FileRange, dirty bool, err error) {
	if fr, ok := mf.takeKept(length); ok {
		return fr, true, nil
	}
	if fr, err = mf.AllocateAt(length, hint); err == nil {
		mf.mu.Lock()
		mark(mf.committed, fr.Start/hostarch.PageSize, length/hostarch.PageSize, true)
		mf.mu.Unlock()
	}
	return fr, false, err
}

// takeKept takes length bytes of what was kept, with a reference on each page.
func (mf *MemoryFile) takeKept(length uint64) (memmap.FileRange, bool) {
	mf.mu.Lock()
	defer mf.mu.Unlock()
	n := length / hostarch.PageSize
	if mf.destroyed || n == 0 || length%hostarch.PageSize != 0 || n > mf.limit || mf.used > mf.limit-n {
		return memmap.FileRange{}, false
	}
	for i := len(mf.kept) - 1; i >= 0; i-- {
		k := &mf.kept[i]
		if k.Length() < length {
			continue
		}
		fr := memmap.FileRange{Start: k.Start, End: k.Start + length}
		if k.Start = fr.End; k.Length() == 0 {
			mf.kept = slices.Delete(mf.kept, i, i+1)
		}
		mf.keptBytes -= length
		mf.wanted = true
		mf.useLocked(fr)
		return fr, true
	}
	return memmap.FileRange{}, false
}

// keepLocked keeps a range that was freed, if it is to be.
func (mf *MemoryFile) keepLocked(fr memmap.FileRange) bool {
	p, n := fr.Start/hostarch.PageSize, fr.Length()/hostarch.PageSize
	if fr.Length() > maxKept || next(mf.committed, p, p+n, false) != p+n {
		return false
	}
	// What was kept for longest has to go.
	drop := 0
	for mf.keptBytes+fr.Length() > maxKept || len(mf.kept)-drop >= maxFreedRanges {
		mf.keptBytes -= mf.kept[drop].Length()
		mf.queueLocked(mf.kept[drop])
		drop++
	}
	mf.kept = slices.Delete(mf.kept, 0, drop)
	if i := len(mf.kept) - 1; i >= 0 && mf.kept[i].End == fr.Start {
		mf.kept[i].End = fr.End
	} else {
		mf.kept = append(mf.kept, fr)
	}
	mf.keptBytes += fr.Length()
	return true
}

// findLocked returns the first of n free pages.
func (mf *MemoryFile) findLocked(n, hint uint64) (uint64, error) {
	size := uint64(len(mf.taken)) * 64
	if hint != NoHint {
		p := hint / hostarch.PageSize
		if p < size && n <= size-p && next(mf.taken, p, p+n, true) == p+n {
			return p, nil
		}
	}
	if p, ok := mf.runLocked(mf.cursor, size, n); ok {
		return p, nil
	}
	// What lies before the cursor, but only while more of it is free than what
	// the file would grow by: a full file is not searched again and again.
	searched := size-mf.used >= n+pagesPerChunk/2
	if searched {
		if p, ok := mf.runLocked(0, min(mf.cursor+n, size), n); ok {
			return p, nil
		}
	}
	for start := min(mf.cursor, size); ; {
		if err := mf.growLocked(); err != nil {
			if p, ok := mf.runLocked(0, size, n); ok && !searched {
				return p, nil
			}
			return 0, err
		}
		size += pagesPerChunk
		if p, ok := mf.runLocked(start, size, n); ok {
			return p, nil
		}
	}
}

// growLocked adds a chunk.
func (mf *MemoryFile) growLocked() error {
	old := *mf.chunks.Load()
	size := int64(len(old)+1) * chunkSize
	if size < 0 {
		return unix.ENOMEM
	}
	if err := ignoringEINTR(func() error { return unix.Ftruncate(mf.fd, size) }); err != nil {
		return fmt.Errorf("grow memory file to %d bytes (%v): %w", size, err, unix.ENOMEM)
	}
	grown := append(slices.Clip(old), new(chunk))
	mf.chunks.Store(&grown)
	mf.taken = append(mf.taken, make([]uint64, pagesPerChunk/64)...)
	mf.committed = append(mf.committed, make([]uint64, pagesPerChunk/64)...)
	return nil
}

// runLocked looks for n free pages in [p, end).
func (mf *MemoryFile) runLocked(p, end, n uint64) (uint64, bool) {
	for p < end && n <= end-p {
		p = next(mf.taken, p, end, false)
		if p >= end || n > end-p {
			break
		}
		q := next(mf.taken, p, p+n, true)
		if q == p+n {
			return p, true
		}
		p = q
	}
	return 0, false
}

// next returns the first page in [p, end) whose bit is set, or is not; end if
// there is none.
func next(bitmap []uint64, p, end uint64, set bool) uint64 {
	for p < end {
		w := bitmap[p/64]
		if !set {
			w = ^w
		}
		if w >>= p % 64; w != 0 {
			return min(p+uint64(bits.TrailingZeros64(w)), end)
		}
		p = (p/64 + 1) * 64
	}
	return end
}

// mark sets the bits of n pages.
func mark(bitmap []uint64, p, n uint64, set bool) {
	for n > 0 {
		k := min(64-p%64, n)
		mask := (^uint64(0) >> (64 - k)) << (p % 64)
		if set {
			bitmap[p/64] |= mask
		} else {
			bitmap[p/64] &^= mask
		}
		p, n = p+k, n-k
	}
}

// forEachRefs calls f with the counts of the pages of fr, in parts.
func (mf *MemoryFile) forEachRefs(fr memmap.FileRange, f func(refs []int32)) {
	chunks := *mf.chunks.Load()
	for start := fr.Start; start < fr.End; {
		c := start / chunkSize
		end := min(fr.End, (c+1)*chunkSize)
		f(chunks[c].refs[start%chunkSize/hostarch.PageSize:][:(end-start)/hostarch.PageSize])
		start = end
	}
}

// IncRef implements memmap.File.IncRef.
//
// Preconditions: every page of fr has a reference.
func (mf *MemoryFile) IncRef(fr memmap.FileRange) {
	mf.mu.Lock()
	defer mf.mu.Unlock()
	mf.forEachRefs(fr, func(refs []int32) {
		for i := range refs {
			if refs[i] <= 0 {
				panic(fmt.Sprintf("pgalloc: IncRef of free page in %v", fr))
			}
			refs[i]++
		}
	})
}

// DecRef implements memmap.File.DecRef. Pages without references are free, and
// zero when they are allocated again.
func (mf *MemoryFile) DecRef(fr memmap.FileRange) {
	mf.mu.Lock()
	page := fr.Start
	free := memmap.FileRange{Start: page, End: page}
	mf.forEachRefs(fr, func(refs []int32) {
		for i := range refs {
			if refs[i] <= 0 {
				panic(fmt.Sprintf("pgalloc: DecRef of free page in %v", fr))
			}
			refs[i]--
			if refs[i] > 0 {
				mf.freeLocked(free)
				free.Start = page + hostarch.PageSize
			}
			page += hostarch.PageSize
			free.End = page
		}
	})
	mf.freeLocked(free)
	var freed []memmap.FileRange
	if mf.freedBytes >= maxFreedBytes || len(mf.freed) >= maxFreedRanges {
		freed, mf.freed, mf.freedBytes = mf.freed, nil, 0
	}
	mf.mu.Unlock()
	mf.clean(freed)
}

// freeLocked takes pages without references back.
func (mf *MemoryFile) freeLocked(fr memmap.FileRange) {
	if fr.Length() == 0 {
		return
	}
	mf.used -= fr.Length() / hostarch.PageSize
	if !mf.keepLocked(fr) {
		mf.queueLocked(fr)
	}
	if mf.trimmer == nil {
		mf.wanted = false
		mf.trimmer = time.AfterFunc(trimAfter, mf.trim)
	}
}

// trim gives freed memory back to the host if none of it is in demand.
func (mf *MemoryFile) trim() {
	mf.trimMu.Lock()
	defer mf.trimMu.Unlock()
	mf.mu.Lock()
	if mf.destroyed {
		mf.mu.Unlock()
		return
	}
	if mf.wanted {
		mf.wanted = false
		mf.trimmer.Reset(trimAfter)
		mf.mu.Unlock()
		return
	}
	mf.trimmer = nil
	for _, fr := range mf.kept {
		mf.queueLocked(fr)
	}
	mf.kept, mf.keptBytes = nil, 0
	freed := mf.freed
	mf.freed, mf.freedBytes = nil, 0
	mf.mu.Unlock()
	mf.clean(freed)
}

// queueLocked queues pages to be given back to the host.
func (mf *MemoryFile) queueLocked(fr memmap.FileRange) {
	mf.freedBytes += fr.Length()
	if n := len(mf.freed); n > 0 && mf.freed[n-1].End == fr.Start {
		mf.freed[n-1].End = fr.End
		return
	}
	mf.freed = append(mf.freed, fr)
}

// clean zeroes freed pages and makes them free.
func (mf *MemoryFile) clean(freed []memmap.FileRange) {
	slices.SortFunc(freed, func(a, b memmap.FileRange) int {
		if a.Start < b.Start {
			return -1
		}
		return 1
	})
	for i := 0; i < len(freed); {
		fr := freed[i]
		for i++; i < len(freed) && freed[i].Start == fr.End; i++ {
			fr.End = freed[i].End
		}
		if err := mf.Decommit(fr); err != nil {
			continue // never used again: what is in it must not be seen
		}
		mf.mu.Lock()
		mark(mf.taken, fr.Start/hostarch.PageSize, fr.Length()/hostarch.PageSize, false)
		mark(mf.committed, fr.Start/hostarch.PageSize, fr.Length()/hostarch.PageSize, false)
		mf.mu.Unlock()
	}
}

// Decommit sets fr to zeros, for everyone who maps it, and gives its memory back
// to the host until it is written again. The error wraps the host's errno.
//
// Preconditions: fr is page-aligned and the caller owns every page of it.
func (mf *MemoryFile) Decommit(fr memmap.FileRange) error {
	err := ignoringEINTR(func() error {
		return unix.Fallocate(mf.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(fr.Start), int64(fr.Length()))
	})
	if err != nil {
		return fmt.Errorf("give back memory %v: fallocate: %w", fr, err)
	}
	return nil
}

// Exclusive looks at the references on fr: alone says whether the first page has
// only one, and n is the number of bytes from the start of fr for which that
// holds as well.
//
// Preconditions: the caller holds a reference on every page of fr. A count of 1
// is then the caller's own and cannot grow behind its back.
func (mf *MemoryFile) Exclusive(fr memmap.FileRange) (n uint64, alone bool) {
	mf.mu.Lock()
	defer mf.mu.Unlock()
	done := false
	mf.forEachRefs(fr, func(refs []int32) {
		for _, r := range refs {
			if n == 0 {
				alone = r == 1
			}
			if done = done || (r == 1) != alone; done {
				return
			}
			n += hostarch.PageSize
		}
	})
	return n, alone
}

// MapInternal implements memmap.File.MapInternal.
func (mf *MemoryFile) MapInternal(fr memmap.FileRange, _ hostarch.AccessType) ([][]byte, error) {
	blocks := make([][]byte, 0, 1)
	for fr.Start < fr.End {
		b, err := mf.Bytes(fr)
		if err != nil {
			return nil, err
		}
		blocks = append(blocks, b)
		fr.Start += uint64(len(b))
	}
	return blocks, nil
}

// Bytes returns the memory of fr, or of as much of its start as the Sentry has
// in one piece. MapInternal's rules apply.
func (mf *MemoryFile) Bytes(fr memmap.FileRange) ([]byte, error) {
	c := fr.Start / chunkSize
	chunks := *mf.chunks.Load()
	if c >= uint64(len(chunks)) {
		return nil, fmt.Errorf("map memory %v, which is not allocated: %w", fr, unix.EFAULT)
	}
	m := chunks[c].mapping.Load()
	if m == nil {
		var err error
		if m, err = mf.mapChunk(c, chunks[c]); err != nil {
			return nil, err
		}
	}
	start := fr.Start % chunkSize
	end := min(start+fr.Length(), chunkSize)
	return (*m)[start:end:end], nil
}

// mapChunk maps chunk number i.
func (mf *MemoryFile) mapChunk(i uint64, c *chunk) (*[]byte, error) {
	mf.mapMu.Lock()
	defer mf.mapMu.Unlock()
	if m := c.mapping.Load(); m != nil {
		return m, nil
	}
	if mf.fd < 0 {
		return nil, fmt.Errorf("map memory file for the Sentry: %w", unix.EBADF)
	}
	m, err := unix.Mmap(mf.fd, int64(i*chunkSize), chunkSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map memory file for the Sentry: %w", err)
	}
	c.mapping.Store(&m)
	return &m, nil
}

// FD implements memmap.File.FD.
func (mf *MemoryFile) FD() int { return mf.fd }

// UsedBytes returns the size of all pages with references. The host may hold
// less: a page takes memory when it is first written.
func (mf *MemoryFile) UsedBytes() uint64 {
	mf.mu.Lock()
	defer mf.mu.Unlock()
	return mf.used * hostarch.PageSize
}

// Destroy closes the file and unmaps it from the Sentry.
//
// Preconditions: nobody uses memory of the file any more, nor calls a method.
func (mf *MemoryFile) Destroy() {
	mf.trimMu.Lock()
	defer mf.trimMu.Unlock()
	mf.mu.Lock()
	defer mf.mu.Unlock()
	mf.mapMu.Lock()
	defer mf.mapMu.Unlock()
	if mf.destroyed {
		return
	}
	mf.destroyed = true
	if mf.trimmer != nil {
		mf.trimmer.Stop()
	}
	for _, c := range *mf.chunks.Load() {
		if m := c.mapping.Load(); m != nil {
			unix.Munmap(*m) // cannot fail on what Mmap returned
		}
	}
	unix.Close(mf.fd)
	mf.fd = -1
}

func ignoringEINTR(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}
