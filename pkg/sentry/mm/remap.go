package mm

import (
	"context"
	"math"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
)

// MRemapMove says whether mremap(2) may move a mapping.
type MRemapMove int

// The values of MRemapMove: no flag, MREMAP_MAYMOVE, and that with MREMAP_FIXED.
const (
	MRemapNoMove MRemapMove = iota
	MRemapMayMove
	MRemapFixed
)

// MRemapOpts are the options of MRemap.
type MRemapOpts struct {
	Move MRemapMove
	// NewAddr is where to, with MRemapFixed; without, and with DontUnmap, it is
	// a suggestion, or 0.
	NewAddr hostarch.Addr
	// DontUnmap is MREMAP_DONTUNMAP: the old mapping stays, without its pages.
	DontUnmap bool
}

// MRemap is mremap(2).
func (mm *MemoryManager) MRemap(_ context.Context, oldAddr hostarch.Addr, oldSize, newSize uint64, opts MRemapOpts) (hostarch.Addr, error) {
	oldSize, _ = hostarch.PageRoundUp(oldSize) // what wraps is 0, as in Linux
	newSize, _ = hostarch.PageRoundUp(newSize)
	if newSize == 0 || newSize > uint64(mm.layout.max) || !oldAddr.IsPageAligned() {
		return 0, unix.EINVAL
	}
	if opts.DontUnmap && (opts.Move == MRemapNoMove || oldSize != newSize) {
		return 0, unix.EINVAL
	}
	oldAR, ok := oldAddr.ToRange(oldSize)
	if !ok {
		oldAR.End = hostarch.Addr(math.MaxUint64).RoundDown() // beyond every mapping
	}
	var newAR hostarch.AddrRange
	if opts.Move == MRemapFixed {
		newAR, ok = opts.NewAddr.ToRange(newSize)
		if !ok || !opts.NewAddr.IsPageAligned() || newAR.End > mm.layout.max || newAR.Overlaps(oldAR) {
			return 0, unix.EINVAL
		}
		if newAR.Start < mm.layout.min {
			return 0, unix.EPERM
		}
	}
	mm.mappingMu.Lock()
	addr, removed, err := mm.mremapLocked(oldAR, newAR, newSize, opts)
	mm.mappingMu.Unlock()
	releaseVMAs(removed)
	return addr, err
}

func (mm *MemoryManager) mremapLocked(oldAR, newAR hostarch.AddrRange, newSize uint64, opts MRemapOpts) (_ hostarch.Addr, removed []*segment[vma], _ error) {
	seg := mm.vmas.lookup(oldAR.Start)
	if seg == nil {
		return 0, nil, unix.EFAULT
	}
	copies := oldAR.Empty() // the same pages a second time
	if copies && seg.v.private {
		return 0, nil, unix.EINVAL
	}
	if mm.vmas.count+3 > maxVMAs {
		return 0, nil, unix.ENOMEM
	}
	if opts.Move == MRemapFixed {
		removed = mm.unmapLocked(newAR) // may split the vma
		seg = mm.vmas.lookup(oldAR.Start)
	}
	if opts.Move != MRemapFixed && !opts.DontUnmap && oldAR.Length() >= newSize {
		tail := hostarch.AddrRange{Start: oldAR.Start + hostarch.Addr(newSize), End: oldAR.End}
		if tail.Empty() {
			return oldAR.Start, nil, nil
		}
		if tail.End > mm.layout.max {
			return 0, nil, unix.EINVAL
		}
		return oldAR.Start, mm.unmapLocked(tail), nil
	}
	if opts.Move == MRemapFixed && oldAR.Length() > newSize {
		if oldAR.End > mm.layout.max {
			return 0, removed, unix.EINVAL
		}
		cut := oldAR.Start + hostarch.Addr(newSize)
		removed = append(removed, mm.unmapLocked(hostarch.AddrRange{Start: cut, End: oldAR.End})...)
		oldAR.End = cut
		seg = mm.vmas.lookup(oldAR.Start)
	}
	// From here on the mapping keeps its size or grows.
	if seg == nil || oldAR.End > seg.End {
		return 0, removed, unix.EFAULT
	}
	v := seg.v
	off := v.off + uint64(oldAR.Start-seg.Start)
	if v.mappable != nil && (off+newSize < off || off+newSize > math.MaxInt64) {
		return 0, removed, unix.EINVAL
	}
	more := newSize - oldAR.Length()
	if opts.DontUnmap {
		more = newSize
	}
	if err := mm.mayExpandLocked(more, v.isData()); err != nil {
		return 0, removed, err
	}
	if opts.Move != MRemapFixed && !opts.DontUnmap && !copies && oldAR.End == seg.End {
		grown := hostarch.AddrRange{Start: seg.End, End: oldAR.Start + hostarch.Addr(newSize)}
		next := mm.vmas.at(mm.vmas.find(grown.Start))
		if grown.End > grown.Start && grown.End <= mm.layout.max && (next == nil || low(next) >= grown.End) {
			return oldAR.Start, removed, mm.extendLocked(seg, grown)
		}
	}
	switch {
	case opts.Move == MRemapNoMove:
		return 0, removed, unix.ENOMEM
	case opts.Move == MRemapMayMove:
		addr, err := mm.findSpaceLocked(opts.NewAddr, newSize, false)
		if err != nil {
			return 0, removed, err
		}
		newAR = hostarch.AddrRange{Start: addr, End: addr + hostarch.Addr(newSize)}
	}

	moved := v.clone()
	if moved.mappable != nil {
		moved.off = off
		if err := moved.mappable.AddMapping(mm, newAR, off, moved.canShareWrites()); err != nil {
			moved.release() // not the last reference
			return 0, removed, err
		}
	}
	if !copies {
		mm.activeMu.Lock()
		mm.movePMAsLocked(oldAR, newAR.Start)
		mm.activeMu.Unlock()
		if !opts.DontUnmap {
			removed = append(removed, mm.takeVMAs(oldAR)...)
		}
	}
	mm.addVMA(&segment[vma]{newAR, moved})
	mm.vmas.merge(newAR)
	return newAR.Start, removed, nil
}

// extendLocked makes seg reach over grown, which is free and begins at its end.
func (mm *MemoryManager) extendLocked(seg *segment[vma], grown hostarch.AddrRange) error {
	if m := seg.v.mappable; m != nil {
		if err := m.AddMapping(mm, grown, seg.v.off+seg.Length(), seg.v.canShareWrites()); err != nil {
			return err
		}
	}
	seg.End = grown.End
	mm.usage += grown.Length()
	if seg.v.isData() {
		mm.dataUsage += grown.Length()
	}
	mm.vmas.merge(grown)
	return nil
}

// movePMAsLocked moves private pages from ar to dst. Others are forgotten: their
// Mappable may have been asked to invalidate one address and not the other.
//
// Preconditions: mm.activeMu is locked for writing; nothing is at dst.
func (mm *MemoryManager) movePMAsLocked(ar hostarch.AddrRange, dst hostarch.Addr) {
	mm.loseTextLocked(ar)
	mm.restoreTextLocked(context.Background(), ar, false) // what cannot be stays as it is
	var drop []*segment[pma]
	for _, seg := range mm.takePMAs(ar) {
		if !seg.v.private {
			drop = append(drop, seg)
			continue
		}
		length := hostarch.Addr(seg.Length())
		seg.Start = dst + (seg.Start - ar.Start)
		seg.End = seg.Start + length
		mm.addPMA(seg)
	}
	decRefPMAs(drop)
}
