package mm

import (
	"context"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
)

// Madvise is madvise(2).
func (mm *MemoryManager) Madvise(ctx context.Context, addr hostarch.Addr, length uint64, advice int32) error {
	// Each advice says what it does with a vma, or a part of it.
	var f func(v *segment[vma], ar hostarch.AddrRange) error
	set := func(change func(v *vma)) func(*segment[vma], hostarch.AddrRange) error {
		return func(_ *segment[vma], ar hostarch.AddrRange) error {
			if mm.vmas.count+2 > maxVMAs {
				return unix.ENOMEM
			}
			// Else a child could have patches, and not what they jump to.
			mm.activeMu.Lock()
			mm.loseTextLocked(ar)
			mm.activeMu.Unlock()
			mm.vmas.isolate(ar)
			change(&mm.vmas.lookup(ar.Start).v)
			return nil
		}
	}
	var populate hostarch.AccessType
	switch advice {
	case linux.MADV_NORMAL, linux.MADV_RANDOM, linux.MADV_SEQUENTIAL, linux.MADV_WILLNEED,
		linux.MADV_MERGEABLE, linux.MADV_UNMERGEABLE, linux.MADV_HUGEPAGE, linux.MADV_NOHUGEPAGE,
		linux.MADV_DONTDUMP, linux.MADV_DODUMP, linux.MADV_COLD, linux.MADV_PAGEOUT, linux.MADV_COLLAPSE:
		f = func(*segment[vma], hostarch.AddrRange) error { return nil }
	case linux.MADV_DONTNEED, linux.MADV_DONTNEED_LOCKED:
		f = func(v *segment[vma], ar hostarch.AddrRange) error { mm.discard(v, ar); return nil }
	case linux.MADV_FREE:
		f = func(v *segment[vma], ar hostarch.AddrRange) error {
			if v.v.mappable != nil {
				return unix.EINVAL
			}
			mm.discard(v, ar)
			return nil
		}
	case linux.MADV_REMOVE:
		f = func(v *segment[vma], ar hostarch.AddrRange) error {
			s, ok := v.v.mappable.(*sharedAnon)
			switch {
			case v.v.mappable == nil || v.v.private:
				return unix.EINVAL
			case !v.v.perms.Write:
				return unix.EACCES
			case !ok:
				return unix.EOPNOTSUPP
			}
			start := v.v.off + uint64(ar.Start-v.Start)
			return s.zero(memmap.MappableRange{Start: start, End: start + ar.Length()})
		}
	case linux.MADV_DONTFORK:
		f = set(func(v *vma) { v.dontFork = true })
	case linux.MADV_DOFORK:
		f = set(func(v *vma) { v.dontFork = false })
	case linux.MADV_WIPEONFORK:
		wipe := set(func(v *vma) { v.wipeOnFork = true })
		f = func(v *segment[vma], ar hostarch.AddrRange) error {
			if v.v.mappable != nil {
				return unix.EINVAL
			}
			return wipe(v, ar)
		}
	case linux.MADV_KEEPONFORK:
		f = set(func(v *vma) { v.wipeOnFork = false })
	case linux.MADV_POPULATE_READ:
		populate = hostarch.Read
	case linux.MADV_POPULATE_WRITE:
		populate = hostarch.Write
	default:
		return unix.EINVAL
	}
	ar, err := mm.userRange(addr, length, unix.EINVAL)
	if err != nil || ar.Empty() {
		return err
	}
	if populate.Any() {
		return mm.populateAdvised(ctx, ar, populate)
	}

	mm.mappingMu.Lock()
	err = mm.eachVMA(ar, f)
	mm.vmas.merge(ar)
	mm.mappingMu.Unlock()
	return err
}

// eachVMA calls f for the part of each vma in ar, which f may split. Parts where
// nothing is mapped give ENOMEM after all others are done (madvise(2),
// msync(2)).
func (mm *MemoryManager) eachVMA(ar hostarch.AddrRange, f func(*segment[vma], hostarch.AddrRange) error) error {
	var hole error
	for addr := ar.Start; addr < ar.End; {
		seg := mm.vmas.at(mm.vmas.find(addr))
		if seg == nil || seg.Start >= ar.End {
			return unix.ENOMEM
		}
		if seg.Start > addr {
			hole = unix.ENOMEM
		}
		part := seg.Intersect(ar)
		part.Start = max(part.Start, addr)
		if err := f(seg, part); err != nil {
			return err
		}
		addr = part.End
	}
	return hole
}

// discard makes private memory in ar, a part of v, what it was at first, and
// forgets the pages of a file.
func (mm *MemoryManager) discard(v *segment[vma], ar hostarch.AddrRange) {
	mm.activeMu.Lock()
	defer mm.activeMu.Unlock()
	mm.loseTextLocked(ar)
	if v.v.mappable == nil && ar.Length() <= maxBlock {
		// A few pages that nobody else has can be emptied where they are, and
		// stay mapped: that is one call of the host's instead of three and a fault.
		var keep []*segment[pma]
		whole := true
		mm.pmas.overlapping(ar, func(seg *segment[pma]) bool {
			part := seg.Intersect(ar)
			n, alone := mm.mf.Exclusive(fileRange(seg, part))
			if !alone || n < part.Length() {
				whole = false
				return false
			}
			keep = append(keep, &segment[pma]{part, pma{file: seg.v.file, off: fileRange(seg, part).Start}})
			return true
		})
		if whole {
			for _, seg := range keep {
				if mm.mf.Decommit(fileRange(seg, seg.AddrRange)) != nil {
					whole = false
					break
				}
			}
		}
		if whole {
			return
		}
	}
	mm.dropLocked(ar)
}

// MSync is msync(2).
func (mm *MemoryManager) MSync(ctx context.Context, addr hostarch.Addr, length uint64, flags int32) error {
	if flags&^(linux.MS_ASYNC|linux.MS_INVALIDATE|linux.MS_SYNC) != 0 ||
		flags&linux.MS_ASYNC != 0 && flags&linux.MS_SYNC != 0 {
		return unix.EINVAL
	}
	if !addr.IsPageAligned() {
		return unix.EINVAL
	}
	length, _ = hostarch.PageRoundUp(length) // what wraps is nothing, as in Linux
	ar, ok := addr.ToRange(length)
	if !ok {
		return unix.ENOMEM
	}
	if ar.Empty() {
		return nil
	}
	// Files are written without locks.
	type piece struct {
		id memmap.MappingIdentity
		mr memmap.MappableRange
	}
	var sync []piece
	mm.mappingMu.RLock()
	err := mm.eachVMA(ar, func(v *segment[vma], part hostarch.AddrRange) error {
		if flags&linux.MS_SYNC != 0 && !v.v.private && v.v.id != nil {
			v.v.id.IncRef()
			start := v.v.off + uint64(part.Start-v.Start)
			sync = append(sync, piece{v.v.id, memmap.MappableRange{Start: start, End: start + part.Length()}})
		}
		return nil
	})
	mm.mappingMu.RUnlock()
	for _, p := range sync {
		if serr := p.id.Msync(ctx, p.mr); serr != nil && err == nil {
			err = serr
		}
		p.id.DecRef()
	}
	return err
}

// Mincore is mincore(2): it returns a byte per page, 1 if the page is there.
// Callers bound length.
func (mm *MemoryManager) Mincore(_ context.Context, addr hostarch.Addr, length uint64) ([]byte, error) {
	ar, err := mm.userRange(addr, length, unix.ENOMEM)
	if err != nil {
		return nil, err
	}
	mm.mappingMu.RLock()
	defer mm.mappingMu.RUnlock()
	if err := mm.eachVMA(ar, func(*segment[vma], hostarch.AddrRange) error { return nil }); err != nil {
		return nil, err
	}
	vec := make([]byte, ar.Length()/hostarch.PageSize)
	mm.activeMu.RLock()
	defer mm.activeMu.RUnlock()
	mm.pmas.overlapping(ar, func(seg *segment[pma]) bool {
		part := seg.Intersect(ar)
		first := uint64(part.Start-ar.Start) / hostarch.PageSize
		for i := range part.Length() / hostarch.PageSize {
			vec[first+i] = 1
		}
		return true
	})
	return vec, nil
}

// MLock is mlock2(2); MLockNone is munlock(2). Nothing is ever paged out by the
// Sentry, so that only the checks are made.
func (mm *MemoryManager) MLock(_ context.Context, addr hostarch.Addr, length uint64, mode memmap.MLockMode) error {
	length, _ = hostarch.PageRoundUp(length + addr.PageOffset()) // what wraps is nothing, as in Linux
	ar, ok := addr.RoundDown().ToRange(length)
	if !ok {
		return unix.EINVAL
	}
	mm.mappingMu.RLock()
	defer mm.mappingMu.RUnlock()
	if mode != memmap.MLockNone {
		if mm.limits.MemLock == 0 {
			return unix.EPERM
		}
		if ar.Length() > mm.limits.MemLock {
			return unix.ENOMEM
		}
	}
	return mm.eachVMA(ar, func(*segment[vma], hostarch.AddrRange) error { return nil })
}
