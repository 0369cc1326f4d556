package platformtest

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/usermem"
)

const pageSize = hostarch.PageSize

// file is a memmap.File: a memfd, mapped as a whole.
type file struct {
	fd   int
	data []byte

	// refs holds the reference counts as differences: the count of a page is the
	// sum of the entries at and below its offset.
	mu   sync.Mutex
	refs map[uint64]int
	errs []error
}

// newFile returns a file of size bytes, all zero; pages that nobody touches use
// no memory.
func newFile(size uint64) (*file, error) {
	fd, err := unix.MemfdCreate("platformtest", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("ftruncate of a memfd to %d bytes: %w", size, err)
	}
	data, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("mmap of a memfd of %d bytes: %w", size, err)
	}
	return &file{fd: fd, data: data, refs: make(map[uint64]int)}, nil
}

// close frees f. The error says if references were not balanced.
func (f *file) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for off, n := range f.refs {
		f.errs = append(f.errs, fmt.Errorf("memory file: reference counts change by %+d at offset %#x when all must be 0", n, off))
	}
	if err := unix.Munmap(f.data); err != nil {
		f.errs = append(f.errs, fmt.Errorf("munmap of a memory file: %w", err))
	}
	if err := unix.Close(f.fd); err != nil {
		f.errs = append(f.errs, fmt.Errorf("memory file: the descriptor %d was closed by someone else: %w", f.fd, err))
	}
	f.data, f.fd = nil, -1
	if len(f.errs) > 0 {
		return f.errs[0]
	}
	return nil
}

func (f *file) addRef(fr memmap.FileRange, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for off, d := range map[uint64]int{fr.Start: n, fr.End: -n} {
		if f.refs[off] += d; f.refs[off] == 0 {
			delete(f.refs, off)
		}
	}
	if n > 0 {
		return
	}
	offs := make([]uint64, 0, len(f.refs))
	for off := range f.refs {
		offs = append(offs, off)
	}
	slices.Sort(offs)
	sum := 0
	for _, off := range offs {
		if sum += f.refs[off]; sum < 0 {
			f.errs = append(f.errs, fmt.Errorf("memory file: DecRef(%v) drops a reference that was not held, at offset %#x", fr, off))
			return
		}
	}
}

// IncRef implements memmap.File.IncRef.
func (f *file) IncRef(fr memmap.FileRange) { f.addRef(fr, 1) }

// DecRef implements memmap.File.DecRef.
func (f *file) DecRef(fr memmap.FileRange) { f.addRef(fr, -1) }

// MapInternal implements memmap.File.MapInternal.
func (f *file) MapInternal(fr memmap.FileRange, _ hostarch.AccessType) ([][]byte, error) {
	if !fr.WellFormed() || fr.End > uint64(len(f.data)) {
		return nil, fmt.Errorf("memory file: no range %v in %#x bytes: %w", fr, len(f.data), unix.EINVAL)
	}
	return [][]byte{f.data[fr.Start:fr.End]}, nil
}

// FD implements memmap.File.FD.
func (f *file) FD() int { return f.fd }

// load and store access the word at off as application code does.
func (f *file) load(off uint64) uint64     { return word(f.data, off).Load() }
func (f *file) store(off uint64, v uint64) { word(f.data, off).Store(v) }

// fileRange returns length bytes from off on.
func fileRange(off, length uint64) memmap.FileRange {
	return memmap.FileRange{Start: off, End: off + length}
}

// vma is one mapping.
type vma struct {
	ar   hostarch.AddrRange
	f    memmap.File
	off  uint64
	at   hostarch.AccessType
	hint string
}

// fileRange returns the part of v's file at ar, which v contains.
func (v *vma) fileRange(ar hostarch.AddrRange) memmap.FileRange {
	off := v.off + uint64(ar.Start-v.ar.Start)
	return memmap.FileRange{Start: off, End: off + ar.Length()}
}

// memoryManager is a platform.MemoryManager that maps at once what it is told
// to, and holds the references that AddressSpace.MapFile demands.
type memoryManager struct {
	as platform.AddressSpace

	mu       sync.RWMutex
	vmas     []vma // in order of addresses
	released bool  // as.Release was called

	// anon are the files made by MMap, and for code that was patched.
	anon []*file

	textState platform.TextState
	patches   map[hostarch.Addr]patch
}

// AddressSpace implements platform.MemoryManager.AddressSpace.
func (mm *memoryManager) AddressSpace() platform.AddressSpace { return mm.as }

// mapFile maps fr of f at addr, and keeps account of it.
func (mm *memoryManager) mapFile(addr hostarch.Addr, f memmap.File, fr memmap.FileRange, at hostarch.AccessType, precommit bool) error {
	mm.mu.Lock()
	defer mm.mu.Unlock()
	return mm.mapLocked(vma{ar: hostarch.AddrRange{Start: addr, End: addr + hostarch.Addr(fr.Length())}, f: f, off: fr.Start, at: at}, precommit)
}

func (mm *memoryManager) mapLocked(v vma, precommit bool) error {
	fr := v.fileRange(v.ar)
	v.f.IncRef(fr)
	// What was there is no longer mapped only after MapFile.
	err := mm.as.MapFile(v.ar.Start, v.f, fr, v.at, precommit)
	if err != nil {
		v.f.DecRef(fr)
		mm.as.Unmap(v.ar.Start, v.ar.Length())
	}
	mm.forgetLocked(v.ar)
	if err != nil {
		return err
	}
	i, _ := slices.BinarySearchFunc(mm.vmas, v.ar.Start, func(v vma, a hostarch.Addr) int {
		if v.ar.Start < a {
			return -1
		}
		return 1
	})
	mm.vmas = slices.Insert(mm.vmas, i, v)
	return nil
}

// forgetLocked drops the account of ar, which is not mapped any more.
func (mm *memoryManager) forgetLocked(ar hostarch.AddrRange) {
	var kept []vma
	for _, v := range mm.vmas {
		hole := v.ar.Intersect(ar)
		if hole.Empty() {
			kept = append(kept, v)
			continue
		}
		v.f.DecRef(v.fileRange(hole))
		for _, rest := range []hostarch.AddrRange{{Start: v.ar.Start, End: hole.Start}, {Start: hole.End, End: v.ar.End}} {
			if !rest.Empty() {
				n := v
				n.ar, n.off = rest, v.fileRange(rest).Start
				kept = append(kept, n)
			}
		}
	}
	mm.vmas = kept
}

// unmap unmaps length bytes at addr.
func (mm *memoryManager) unmap(addr hostarch.Addr, length uint64) {
	mm.mu.Lock()
	defer mm.mu.Unlock()
	mm.as.Unmap(addr, length)
	mm.forgetLocked(hostarch.AddrRange{Start: addr, End: addr + hostarch.Addr(length)})
}

// protect changes the access to ar, which must be mapped as a whole.
func (mm *memoryManager) protect(ar hostarch.AddrRange, at hostarch.AccessType) error {
	mm.mu.Lock()
	defer mm.mu.Unlock()
	for _, v := range slices.Clone(mm.vmas) {
		if part := v.ar.Intersect(ar); !part.Empty() {
			n := v
			n.ar, n.off, n.at = part, v.fileRange(part).Start, at
			if err := mm.mapLocked(n, false); err != nil {
				return err
			}
		}
	}
	return nil
}

// release gives everything up, the AddressSpace with it.
func (mm *memoryManager) release() error {
	mm.mu.Lock()
	defer mm.mu.Unlock()
	if !mm.released {
		mm.released = true
		mm.as.Release()
	}
	mm.forgetLocked(hostarch.AddrRange{End: ^hostarch.Addr(0)})
	var err error
	for _, f := range mm.anon {
		if e := f.close(); err == nil {
			err = e
		}
	}
	mm.anon = nil
	return err
}

// MMap implements platform.MemoryManager.MMap for anonymous memory.
func (mm *memoryManager) MMap(_ context.Context, opts memmap.MMapOpts) (hostarch.Addr, error) {
	length, ok := hostarch.PageRoundUp(opts.Length)
	if !ok || length == 0 || opts.Mappable != nil || !opts.Addr.IsPageAligned() {
		return 0, unix.EINVAL
	}
	mm.mu.Lock()
	defer mm.mu.Unlock()
	free := func(a hostarch.Addr) bool {
		ar, ok := a.ToRange(length)
		return ok && !slices.ContainsFunc(mm.vmas, func(v vma) bool { return v.ar.Overlaps(ar) })
	}
	addr := opts.Addr
	switch {
	case opts.Fixed && !opts.Unmap && !free(addr):
		return 0, unix.EEXIST
	case !opts.Fixed && (addr == 0 || !free(addr)):
		for addr = mmapBase; !free(addr); addr += hostarch.Addr(length) {
		}
	}
	f, err := newFile(length)
	if err != nil {
		return 0, err
	}
	mm.anon = append(mm.anon, f)
	v := vma{ar: hostarch.AddrRange{Start: addr, End: addr + hostarch.Addr(length)}, f: f, at: opts.Perms, hint: opts.Hint}
	return addr, mm.mapLocked(v, opts.Precommit)
}

// FindVMAByName implements platform.MemoryManager.FindVMAByName.
func (mm *memoryManager) FindVMAByName(ar hostarch.AddrRange, hint string) (hostarch.Addr, uint64, error) {
	mm.mu.RLock()
	defer mm.mu.RUnlock()
	for _, v := range mm.vmas {
		if v.hint == hint && v.ar.Overlaps(ar) {
			return v.ar.Start, v.off, nil
		}
	}
	return 0, 0, unix.ENOENT
}

// access calls f with the memory at addr, block by block, until length bytes are
// done or memory is missing or forbids at.
func (mm *memoryManager) access(addr hostarch.Addr, length uint64, at hostarch.AccessType, opts usermem.IOOpts, f func(b []byte, done uint64) error) (uint64, error) {
	mm.mu.RLock()
	defer mm.mu.RUnlock()
	done := uint64(0)
	for _, v := range mm.vmas {
		if done == length {
			break
		}
		at0 := addr + hostarch.Addr(done)
		if !v.ar.Contains(at0) {
			continue
		}
		if !opts.IgnorePermissions && !v.at.Effective().SupersetOf(at) {
			break
		}
		n := min(length-done, uint64(v.ar.End-at0))
		blocks, err := v.f.MapInternal(v.fileRange(hostarch.AddrRange{Start: at0, End: at0 + hostarch.Addr(n)}), at)
		if err != nil {
			return done, err
		}
		for _, b := range blocks {
			if err := f(b, done); err != nil {
				return done, err
			}
			done += uint64(len(b))
		}
	}
	if done < length {
		return done, unix.EFAULT
	}
	return done, nil
}

// CopyOut implements usermem.IO.CopyOut.
func (mm *memoryManager) CopyOut(_ context.Context, addr hostarch.Addr, src []byte, opts usermem.IOOpts) (int, error) {
	n, err := mm.access(addr, uint64(len(src)), hostarch.Write, opts, func(b []byte, done uint64) error {
		_, err := usermem.SafeCopy(b, src[done:])
		return err
	})
	return int(n), err
}

// CopyIn implements usermem.IO.CopyIn.
func (mm *memoryManager) CopyIn(_ context.Context, addr hostarch.Addr, dst []byte, opts usermem.IOOpts) (int, error) {
	n, err := mm.access(addr, uint64(len(dst)), hostarch.Read, opts, func(b []byte, done uint64) error {
		_, err := usermem.SafeCopy(dst[done:], b)
		return err
	})
	return int(n), err
}

// ZeroOut implements usermem.IO.ZeroOut.
func (mm *memoryManager) ZeroOut(_ context.Context, addr hostarch.Addr, toZero int64, opts usermem.IOOpts) (int64, error) {
	n, err := mm.access(addr, uint64(toZero), hostarch.Write, opts, func(b []byte, _ uint64) error { return usermem.SafeZero(b) })
	return int64(n), err
}

// atomically calls f with the aligned 4 bytes at addr.
func (mm *memoryManager) atomically(addr hostarch.Addr, at hostarch.AccessType, opts usermem.IOOpts, f func(b []byte) (uint32, error)) (v uint32, err error) {
	if addr%4 != 0 {
		return 0, unix.EINVAL
	}
	_, err = mm.access(addr, 4, at, opts, func(b []byte, _ uint64) (err error) {
		v, err = f(b)
		return err
	})
	return v, err
}

// SwapUint32 implements usermem.IO.SwapUint32.
func (mm *memoryManager) SwapUint32(_ context.Context, addr hostarch.Addr, new uint32, opts usermem.IOOpts) (uint32, error) {
	return mm.atomically(addr, hostarch.ReadWrite, opts, func(b []byte) (uint32, error) { return usermem.SafeSwapUint32(b, new) })
}

// CompareAndSwapUint32 implements usermem.IO.CompareAndSwapUint32.
func (mm *memoryManager) CompareAndSwapUint32(_ context.Context, addr hostarch.Addr, old, new uint32, opts usermem.IOOpts) (uint32, error) {
	return mm.atomically(addr, hostarch.ReadWrite, opts, func(b []byte) (uint32, error) { return usermem.SafeCompareAndSwapUint32(b, old, new) })
}

// LoadUint32 implements usermem.IO.LoadUint32.
func (mm *memoryManager) LoadUint32(_ context.Context, addr hostarch.Addr, opts usermem.IOOpts) (uint32, error) {
	return mm.atomically(addr, hostarch.Read, opts, usermem.SafeLoadUint32)
}
