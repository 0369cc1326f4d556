package mm

import (
	"cmp"
	"context"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/pgalloc"
)

// maxForkCopy bounds the memory that is copied in a fork, in bytes: a fault costs
// more than to copy a few pages that are surely written, and it spares the parent
// one as well.
const maxForkCopy = 2 << 20

// Fork returns a copy of mm with one user (fork(2)). Private pages are shared
// until one of both writes them, those aside that are likely to be written at once.
func (mm *MemoryManager) Fork(ctx context.Context) (*MemoryManager, error) {
	child := newMM(mm.p, mm.mf)
	if err := child.prepare(); err != nil {
		return nil, err
	}
	mm.mappingMu.Lock()
	child.layout = mm.layout
	child.limits = mm.limits
	child.heap = mm.heap
	child.hot = mm.hot
	child.SetMetadata(mm.Metadata())
	err := mm.forkVMAs(child)
	if err == nil {
		mm.forkPMAs(child)
	}
	mm.mappingMu.Unlock()
	if err != nil {
		child.DecUsers(ctx)
		return nil, err
	}
	return child, nil
}

// forkVMAs copies the vmas.
//
// Preconditions: mm.mappingMu is locked for writing; nobody uses child yet.
func (mm *MemoryManager) forkVMAs(child *MemoryManager) error {
	for p := (pos{}); ; p = mm.vmas.next(p) {
		seg := mm.vmas.at(p)
		if seg == nil {
			return nil
		}
		if seg.v.dontFork {
			continue
		}
		if m := seg.v.mappable; m != nil {
			if err := m.CopyMapping(child, seg.AddrRange, seg.AddrRange, seg.v.off, seg.v.canShareWrites()); err != nil {
				return err
			}
		}
		child.addVMA(&segment[vma]{seg.AddrRange, seg.v.clone()})
	}
}

// forkPMAs gives child the private pages of mm.
//
// Preconditions: mm.mappingMu is locked for writing; child has copies of the
// vmas.
func (mm *MemoryManager) forkPMAs(child *MemoryManager) {
	mm.activeMu.Lock()
	defer mm.activeMu.Unlock()
	child.activeMu.Lock()
	defer child.activeMu.Unlock()
	if as := mm.AddressSpace(); as != nil {
		as.PreFork()
		defer as.PostFork()
	}
	copied := mm.forkCopies(child)
	var lower hostarch.AddrRange // where the parent must not write any more
	for p := (pos{}); ; p = mm.pmas.next(p) {
		seg := mm.pmas.at(p)
		if seg == nil {
			break
		}
		if !seg.v.private || child.pmas.lookup(seg.Start) != nil {
			continue // the child asks the Mappable, or has a copy
		}
		// A pma may reach into vmas that the child does not get.
		child.vmas.overlapping(seg.AddrRange, func(v *segment[vma]) bool {
			if v.v.wipeOnFork || !v.v.private {
				return true
			}
			ar := v.Intersect(seg.AddrRange)
			fr := fileRange(seg, ar)
			mm.mf.IncRef(fr)
			c := &segment[pma]{ar, seg.v}
			c.v.off = fr.Start
			c.v.cow = true
			c.v.mapped, c.v.revoked = hostarch.NoAccess, false
			child.addPMA(c)
			seg.v.cow = true
			return true
		})
		if seg.v.cow && seg.v.mapped.Write {
			if lower.Empty() {
				lower.Start = seg.Start
			}
			lower.End = seg.End
		}
	}
	mm.forkText(child)
	mm.remapLocked(lower, func(seg *segment[pma]) hostarch.AccessType {
		at := seg.v.mapped
		at.Write = at.Write && !seg.v.cow
		return at
	})
	for _, ar := range copied {
		mm.pmas.merge(ar)
		child.pmas.merge(ar)
	}
}

// forkCopies tells child what it is expected to use, and gives it copies of what it
// is expected to write: pages that nobody writes meanwhile, so that a copy is what
// they were at one time. It returns where; these are boundaries of pmas in both.
func (mm *MemoryManager) forkCopies(child *MemoryManager) []hostarch.AddrRange {
	alone := !mm.Shared()
	length := uint64(0)
	known := make(map[hostarch.AddrRange]bool)
	var blocks []hostarch.AddrRange
	for _, a := range mm.hot.fork() {
		seg, v := mm.pmas.lookup(a.page), child.vmas.lookup(a.page)
		if seg == nil || v == nil || v.v.wipeOnFork {
			continue
		}
		ar := block(a.page, minCopy, seg.Intersect(v.AddrRange))
		written := a.write || seg.v.private && seg.v.mapped.Write
		if !known[ar] && written && v.v.private && v.v.perms.Write && length+ar.Length() <= maxForkCopy &&
			(alone || seg.v.cow) && // nobody writes there now
			(seg.v.private || !seg.v.max.Write) { // changes of the file are not to be seen
			length += ar.Length()
			blocks = append(blocks, ar)
			known[ar] = true
		}
		child.expectLocked(expectation{page: a.page, present: known[ar]})
	}
	if len(blocks) == 0 {
		return nil
	}
	slices.SortFunc(blocks, func(a, b hostarch.AddrRange) int { return cmp.Compare(a.Start, b.Start) })
	room, err := mm.mf.AllocateDirty(length, pgalloc.NoHint)
	if err != nil {
		return nil // it is shared, then
	}
	for _, ar := range blocks {
		mm.pmas.isolate(ar)
		fr := memmap.FileRange{Start: room.Start, End: room.Start + ar.Length()}
		room.Start = fr.End
		if mm.copyTo(fr, mm.pmas.lookup(ar.Start), ar) != nil {
			mm.mf.DecRef(fr)
			continue
		}
		child.addPMA(&segment[pma]{ar, pma{file: mm.mf, off: fr.Start, max: hostarch.AnyAccess, private: true}})
	}
	return blocks
}

// copyTo copies the part ar of seg to fr.
func (mm *MemoryManager) copyTo(fr memmap.FileRange, seg *segment[pma], ar hostarch.AddrRange) error {
	from := fileRange(seg, ar)
	if seg.v.file != memmap.File(mm.mf) {
		return mm.readTo(fr, seg.v.file.FD(), from.Start)
	}
	src, err := seg.v.file.MapInternal(from, hostarch.Read)
	if err != nil {
		return err
	}
	return mm.fillFrom(fr, src)
}

// readTo copies what the host file fd has from off on to all of the memory fr. To read
// a few pages takes less than to map them.
//
// Preconditions: fr and off are multiples of the page size.
func (mm *MemoryManager) readTo(fr memmap.FileRange, fd int, off uint64) error {
	for fr.Start < fr.End {
		dst, err := mm.mf.Bytes(fr)
		if err != nil {
			return err
		}
		n, err := unix.Pread(fd, dst, int64(off))
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return &memmap.BusError{Err: err}
		case n == 0:
			rest := -fr.Start & (hostarch.PageSize - 1)
			if rest == 0 {
				return &memmap.BusError{Err: unix.EFAULT} // a page behind the end of the file
			}
			clear(dst[:rest])
			n = int(rest)
		}
		fr.Start += uint64(n)
		off += uint64(n)
	}
	return nil
}
