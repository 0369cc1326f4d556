package mm

import (
	"context"
	"errors"
	"fmt"
	"math/bits"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/pgalloc"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// pma is a range of pages of a vma: the part of a File that stands behind it.
// Each holds a reference on its pages.
type pma struct {
	file memmap.File
	// off is the offset in file of the pma's start.
	off uint64

	// max is the most that the pages can be mapped with.
	max hostarch.AccessType

	// private says that the pages are in the memory file and belong to this
	// address space, or to it and to what was forked from it.
	private bool

	// cow says that the pages must not be written, whatever max says: a write gets
	// a copy, or the page itself if nobody else has it. Pages that are not private
	// but in a private vma are always so.
	cow bool

	// mapped is what the AddressSpace has the pages mapped with.
	mapped hostarch.AccessType

	// revoked says that the pages were mapped until mprotect(2) took all access away.
	revoked bool
}

func (p *pma) advance(n uint64) { p.off += n }

func pmasMerge(a, b *segment[pma]) bool {
	next := a.v
	next.off += a.Length()
	return next == b.v
}

// fileRange returns the part of the File behind ar, which is in seg.
func fileRange(seg *segment[pma], ar hostarch.AddrRange) memmap.FileRange {
	start := seg.v.off + uint64(ar.Start-seg.Start)
	return memmap.FileRange{Start: start, End: start + ar.Length()}
}

// Sizes of what is done around a fault, in bytes; all are powers of two.
const (
	// Anonymous memory is allocated in blocks that start small and grow with
	// what is allocated next to them. Pages take memory when they are written.
	minBlock = 64 << 10
	maxBlock = hostarch.HugePageSize

	// A write copies a block, which grows in the same way.
	minCopy = 16 << 10
	maxCopy = 256 << 10

	// maxCommit is how much memory at most is made present around one fault.
	maxCommit = 1 << 20

	// fileBlock is how much of a file is asked for; it says itself how much it
	// wants to give.
	fileBlock = 16 << 20
)

// block returns the aligned block of the given size around addr, cut to ar, or ar if
// that is no larger.
func block(addr hostarch.Addr, size uint64, ar hostarch.AddrRange) hostarch.AddrRange {
	if ar.Length() <= size {
		return ar
	}
	start := addr &^ hostarch.Addr(size-1)
	return hostarch.AddrRange{Start: max(start, ar.Start), End: min(start+hostarch.Addr(size), ar.End)}
}

// growBlock returns the size of a block next to seg: at least size, and with what
// is there up to limit.
func growBlock(seg *segment[pma], size, limit uint64) uint64 {
	return max(size, min(uint64(1)<<(bits.Len64(seg.Length())-1), limit))
}

func pageAt(addr hostarch.Addr) hostarch.AddrRange {
	return hostarch.AddrRange{Start: addr, End: addr + hostarch.PageSize}
}

// addPMA inserts seg, whose references it takes over.
//
// Preconditions: mm.activeMu is locked for writing.
func (mm *MemoryManager) addPMA(seg *segment[pma]) {
	mm.pmas.insert(seg)
	if n := mm.resident.Add(seg.Length()); n > mm.peak.Load() {
		mm.peak.Store(n)
	}
}

// extend returns span, which may be empty, and seg if that is mapped, with what
// lies between them. seg comes after span.
func extend(span hostarch.AddrRange, seg *segment[pma]) hostarch.AddrRange {
	if !seg.v.mapped.Any() {
		return span
	}
	if span.Empty() {
		return seg.AddrRange
	}
	span.End = seg.End
	return span
}

// takePMAs removes the pmas in ar, and unmaps them. The caller has to drop the
// references.
func (mm *MemoryManager) takePMAs(ar hostarch.AddrRange) []*segment[pma] {
	removed := mm.pmas.remove(ar)
	var mapped hostarch.AddrRange
	for _, seg := range removed {
		mm.resident.Add(-seg.Length())
		mapped = extend(mapped, seg)
		seg.v.mapped = hostarch.NoAccess
	}
	mm.unmapAS(mapped)
	return removed
}

// unmapAS removes ar from the AddressSpace.
func (mm *MemoryManager) unmapAS(ar hostarch.AddrRange) {
	if as := mm.AddressSpace(); as != nil && !ar.Empty() {
		as.Unmap(ar.Start, ar.Length())
	}
}

func decRefPMAs(segs []*segment[pma]) {
	for _, seg := range segs {
		seg.v.file.DecRef(fileRange(seg, seg.AddrRange))
	}
}

// dropLocked removes the pmas in ar.
//
// Preconditions: mm.activeMu is locked for writing.
func (mm *MemoryManager) dropLocked(ar hostarch.AddrRange) { decRefPMAs(mm.takePMAs(ar)) }

// forgetMappedLocked notes that the AddressSpace is empty.
func (mm *MemoryManager) forgetMappedLocked() {
	for p := (pos{}); mm.pmas.at(p) != nil; p = mm.pmas.next(p) {
		mm.pmas.at(p).v.mapped = hostarch.NoAccess
	}
}

// want returns what seg is to be mapped with in a vma with perms.
func want(seg *segment[pma], perms hostarch.AccessType) hostarch.AccessType {
	at := perms.Effective().Intersect(seg.v.max)
	if seg.v.cow {
		at.Write = false
	}
	return at
}

// mapLocked maps seg with at. After an error it is not mapped.
//
// Preconditions: mm.activeMu is locked for writing.
func (mm *MemoryManager) mapLocked(seg *segment[pma], at hostarch.AccessType, precommit bool) error {
	as := mm.AddressSpace()
	if as == nil {
		return nil
	}
	if !at.Any() {
		if seg.v.mapped.Any() {
			mm.unmapAS(seg.AddrRange)
			seg.v.mapped = hostarch.NoAccess
		}
		return nil
	}
	err := as.MapFile(seg.Start, seg.v.file, fileRange(seg, seg.AddrRange), at, precommit)
	if errors.Is(err, unix.ENOMEM) {
		// Too many mappings for the host, perhaps. It is a cache: start afresh.
		as.Unmap(mm.layout.min, uint64(mm.layout.max-mm.layout.min))
		mm.forgetMappedLocked()
		err = as.MapFile(seg.Start, seg.v.file, fileRange(seg, seg.AddrRange), at, precommit)
	}
	if err != nil {
		mm.unmapAS(seg.AddrRange)
		seg.v.mapped = hostarch.NoAccess
		return fmt.Errorf("map %v of the application: %w", seg.AddrRange, err)
	}
	seg.v.mapped, seg.v.revoked = at, false
	return nil
}

// HandleUserFault makes the page at addr accessible after a fault there. nil
// means that the access can be tried again; *FaultError is SIGSEGV,
// *memmap.BusError SIGBUS; anything else wraps an errno of the host, or ENOMEM.
// sp is the stack pointer; Linux does not look at it, nor do we.
func (mm *MemoryManager) HandleUserFault(ctx context.Context, addr hostarch.Addr, at hostarch.AccessType, _ hostarch.Addr) error {
	if !at.Any() {
		at.Read = true
	}
	return mm.withVMA(addr, at, false, func(v *segment[vma]) error {
		mm.activeMu.Lock()
		defer mm.activeMu.Unlock()
		page := addr.RoundDown()
		seg, changed, err := mm.pageLocked(ctx, v, page, at)
		if err != nil {
			return err
		}
		if changed == unchanged && !seg.v.private && seg.v.mapped.SupersetOf(at) {
			// The page was mapped, and the application could not use it all the
			// same: the file may have shrunk.
			mm.dropLocked(pageAt(page))
			if seg, _, err = mm.pageLocked(ctx, v, page, at); err != nil {
				return err
			}
		}
		mm.entered.Store(true)
		mm.hot.note(access{page, at.Write})
		allowed := want(seg, v.v.perms)
		around := mm.around(v, seg, page)
		// A copy may be mapped already. What is, and was not touched, may have got lost.
		again := changed == unchanged && seg.v.mapped == allowed
		if again || seg.v.mapped != allowed {
			ms := append([]mapping{{v, around, changed == committed}}, mm.takeExpectedLocked(ctx)...)
			if mm.mapAllLocked(ms) != nil || again {
				mm.pmas.isolate(around)
				err = mm.mapLocked(mm.pmas.lookup(page), allowed, changed == committed)
				mm.pmas.merge(around)
			}
		}
		if err == nil && !allowed.SupersetOf(at) {
			err = &FaultError{Addr: addr, Mapped: true} // more than the file allows
		}
		return err
	})
}

// Prefault makes the page at addr accessible without a fault, if it holds
// something already: an access is expected.
func (mm *MemoryManager) Prefault(ctx context.Context, addr hostarch.Addr, at hostarch.AccessType) {
	mm.activeMu.RLock()
	seg := mm.pmas.lookup(addr.RoundDown())
	known := seg != nil
	done := known && seg.v.mapped.SupersetOf(at)
	mm.activeMu.RUnlock()
	if !done && (known || !at.Write) {
		mm.HandleUserFault(ctx, addr, at, addr) // an error is for the access to find
	}
}

// withVMA calls f with the vma at addr if it allows at, or with force whatever
// it allows; a stack grows to have it. mappingMu is locked for reading
// meanwhile.
func (mm *MemoryManager) withVMA(addr hostarch.Addr, at hostarch.AccessType, force bool, f func(*segment[vma]) error) error {
	mm.mappingMu.RLock()
	seg := mm.vmas.at(mm.vmas.find(addr))
	for seg == nil || seg.Start > addr {
		mm.mappingMu.RUnlock()
		if seg == nil || !seg.v.growsDown || addr < mm.layout.min {
			return &FaultError{Addr: addr}
		}
		mm.mappingMu.Lock()
		err := mm.growStackLocked(addr)
		mm.mappingMu.Unlock()
		if err != nil {
			return &FaultError{Addr: addr}
		}
		mm.mappingMu.RLock()
		seg = mm.vmas.at(mm.vmas.find(addr))
	}
	defer mm.mappingMu.RUnlock()
	if !force && !seg.v.perms.Effective().SupersetOf(at) {
		return &FaultError{Addr: addr, Mapped: true}
	}
	return f(seg)
}

// change is what pageLocked has done.
type change int

const (
	unchanged change = iota
	changed
	// committed: the pma is new, and all of it is worth being present.
	committed
)

// pageLocked returns the pma of a page of v, ready for an access at: it is made
// if there is none, and copied if need be.
//
// Preconditions: mm.mappingMu is locked; mm.activeMu is locked for writing.
func (mm *MemoryManager) pageLocked(ctx context.Context, v *segment[vma], page hostarch.Addr, at hostarch.AccessType) (seg *segment[pma], did change, err error) {
	seg = mm.pmas.lookup(page)
	if seg != nil && !v.v.private && !seg.v.max.SupersetOf(at) {
		// A Mappable may give more when it is asked for more.
		mm.dropLocked(block(page, minBlock, v.AddrRange))
		seg = nil
	}
	if seg == nil {
		if seg, did, err = mm.fillLocked(ctx, v, page, at); err != nil {
			return nil, unchanged, err
		}
	}
	if at.Write && seg.v.cow {
		if seg, did, err = mm.breakCOWLocked(v, seg, page); err != nil {
			return nil, unchanged, err
		}
	}
	return seg, did, nil
}

// fillLocked makes a pma for a page that has none.
func (mm *MemoryManager) fillLocked(ctx context.Context, v *segment[vma], page hostarch.Addr, at hostarch.AccessType) (*segment[pma], change, error) {
	// The room around the page, and what is next to it.
	room := v.AddrRange
	p := mm.pmas.find(page)
	prev, next := mm.pmas.at(mm.pmas.prev(p)), mm.pmas.at(p)
	if prev != nil {
		room.Start = max(room.Start, prev.End)
	}
	if next != nil {
		room.End = min(room.End, next.Start)
	}
	if v.v.mappable == nil {
		return mm.fillAnonLocked(page, room, v, prev, next)
	}
	offsetOf := func(addr hostarch.Addr) uint64 { return v.v.off + uint64(addr-v.Start) }
	mappableRange := func(ar hostarch.AddrRange) memmap.MappableRange {
		return memmap.MappableRange{Start: offsetOf(ar.Start), End: offsetOf(ar.End)}
	}
	if v.v.private {
		at = hostarch.Read // writes are copied, and execution needs no more
	}
	around := block(page, fileBlock, room)
	optional := mappableRange(around)
	required := mappableRange(pageAt(page))
	ts, err := v.v.mappable.Translate(ctx, required, optional, at)
	for _, t := range ts {
		start, end := max(t.Source.Start, optional.Start), min(t.Source.End, optional.End)
		if start >= end {
			continue
		}
		seg := &segment[pma]{
			hostarch.AddrRange{
				Start: around.Start + hostarch.Addr(start-optional.Start),
				End:   around.Start + hostarch.Addr(end-optional.Start),
			},
			pma{file: t.File, off: t.Offset + start - t.Source.Start, max: t.Perms},
		}
		seg.v.cow = v.v.private
		if !mm.pmas.isFree(seg.AddrRange) {
			continue // a Mappable that contradicts itself
		}
		t.File.IncRef(memmap.FileRange{Start: seg.v.off, End: seg.v.off + seg.Length()})
		mm.addPMA(seg)
	}
	if seg := mm.pmas.lookup(page); seg != nil && seg.v.max.SupersetOf(at) {
		return seg, changed, nil
	}
	if err == nil {
		err = &memmap.BusError{Err: fmt.Errorf("no page at offset %#x", required.Start)}
	}
	return nil, unchanged, err
}

// fillAnonLocked allocates private memory for a page of v.
func (mm *MemoryManager) fillAnonLocked(page hostarch.Addr, room hostarch.AddrRange, v *segment[vma], prev, next *segment[pma]) (*segment[pma], change, error) {
	size := uint64(minBlock)
	hint := uint64(pgalloc.NoHint)
	if prev != nil && prev.End == room.Start && prev.v.private {
		size = growBlock(prev, size, maxBlock)
	}
	if next != nil && next.Start == room.End && next.v.private {
		size = growBlock(next, size, maxBlock)
	}
	// Small mappings are used as a whole, and what is used from the start to the
	// end so far will be to its end.
	did, allocate := changed, mm.mf.AllocateAt
	inOrder := prev != nil && prev.End == page && prev.v.private && prev.v.mapped.Write
	small := room == v.AddrRange && room.Length() <= minBlock
	if v.v.perms.Write && !v.v.growsDown && (inOrder || small) {
		did, allocate = committed, mm.mf.AllocateCommitted
		size = min(size, maxCommit)
	}
	ar := block(page, size, room)
	if v.v.growsDown && room.Length() > size {
		// What is used next lies below.
		start := max(page-min(page, hostarch.Addr(size/4*3)), room.Start)
		ar = hostarch.AddrRange{Start: start, End: min(start+hostarch.Addr(size), room.End)}
	}
	switch {
	case prev != nil && prev.v.private && prev.End == ar.Start:
		hint = prev.v.off + prev.Length()
	case next != nil && next.v.private && next.Start == ar.End && next.v.off >= ar.Length():
		hint = next.v.off - ar.Length()
	}
	fr, err := allocate(ar.Length(), hint)
	if err != nil && ar.Length() > hostarch.PageSize {
		ar = pageAt(page)
		fr, err = mm.mf.Allocate(ar.Length())
	}
	if err != nil {
		return nil, unchanged, err
	}
	seg := &segment[pma]{ar, pma{file: mm.mf, off: fr.Start, max: hostarch.AnyAccess, private: true}}
	mm.addPMA(seg)
	return seg, did, nil
}

// breakCOWLocked makes a page writable that must not be written where it is.
// seg is its pma.
func (mm *MemoryManager) breakCOWLocked(v *segment[vma], seg *segment[pma], page hostarch.Addr) (*segment[pma], change, error) {
	near := seg.Intersect(v.AddrRange)
	if seg.v.private {
		near = block(page, maxBlock, near)
		for near.Start <= page {
			n, alone := mm.mf.Exclusive(fileRange(seg, near))
			run := hostarch.AddrRange{Start: near.Start, End: near.Start + hostarch.Addr(n)}
			if page >= run.End {
				near.Start = run.End
				continue
			}
			if alone {
				mm.pmas.isolate(run)
				seg = mm.pmas.lookup(page)
				seg.v.cow = false
				return seg, changed, nil
			}
			near = run
			break
		}
	} else if seg.v.max.Write {
		near = pageAt(page) // changes of the file are to be seen in other pages
	}
	size := uint64(minCopy)
	if prev := mm.pmas.at(mm.pmas.prev(mm.pmas.find(page))); prev != nil && prev.End == page && prev.v.private && !prev.v.cow {
		size = growBlock(prev, size, maxCopy)
	}
	if !seg.v.private && v.Length() <= minBlock {
		size = minBlock // the data of a program or library
	}
	copied, err := mm.copyLocked(v, seg, block(page, size, near))
	if err != nil {
		copied, err = mm.copyLocked(v, seg, pageAt(page))
	}
	return copied, committed, err
}

// copyLocked replaces the part ar of seg by a private copy.
func (mm *MemoryManager) copyLocked(v *segment[vma], seg *segment[pma], ar hostarch.AddrRange) (*segment[pma], error) {
	hint := uint64(pgalloc.NoHint)
	if prev := mm.pmas.at(mm.pmas.prev(mm.pmas.find(ar.Start))); prev != nil && prev.v.private && prev.End == ar.Start {
		hint = prev.v.off + prev.Length()
	}
	fr, err := mm.mf.AllocateDirty(ar.Length(), hint)
	if err != nil {
		return nil, err
	}
	if err := mm.copyTo(fr, seg, ar); err != nil {
		mm.mf.DecRef(fr)
		return nil, err
	}

	mm.pmas.isolate(ar)
	old := mm.pmas.remove(ar)
	var mapped bool
	for _, o := range old {
		mm.resident.Add(-o.Length())
		mapped = mapped || o.v.mapped.Any()
	}
	seg = &segment[pma]{ar, pma{file: mm.mf, off: fr.Start, max: hostarch.AnyAccess, private: true}}
	mm.addPMA(seg)
	if mapped {
		// What is mapped must not be the old page any more. An error leaves it
		// unmapped, and a fault will try again.
		mm.mapLocked(seg, want(seg, v.v.perms), true)
	}
	decRefPMAs(old)
	return seg, nil
}

// fillFrom copies src to all of the memory fr.
func (mm *MemoryManager) fillFrom(fr memmap.FileRange, src [][]byte) error {
	for _, s := range src {
		for len(s) > 0 {
			dst, err := mm.mf.Bytes(fr)
			if err != nil {
				return err
			}
			n, err := usermem.SafeCopy(dst, s)
			if err != nil {
				return &memmap.BusError{Err: err}
			}
			if n == 0 {
				return &memmap.BusError{Err: unix.EFAULT} // a File that gives more than it was asked for
			}
			s = s[n:]
			fr.Start += uint64(n)
		}
	}
	if fr.Start < fr.End { // what is behind it may be somebody else's
		return &memmap.BusError{Err: unix.EFAULT}
	}
	return nil
}

// remapLocked changes what is mapped of the pmas in ar to what target gives for
// each. More than is mapped now may be left to a fault, less never is.
//
// Preconditions: mm.activeMu is locked for writing; the ends of ar are
// boundaries of pmas.
func (mm *MemoryManager) remapLocked(ar hostarch.AddrRange, target func(*segment[pma]) hostarch.AccessType) {
	var change []*segment[pma]
	var span hostarch.AddrRange // of those that get less
	mm.pmas.overlapping(ar, func(seg *segment[pma]) bool {
		if !seg.v.mapped.Any() {
			return true
		}
		at := target(seg)
		if at == seg.v.mapped {
			return true
		}
		change = append(change, seg)
		if !at.SupersetOf(seg.v.mapped) {
			span = extend(span, seg)
		}
		return true
	})
	switch {
	case len(change) <= mm.maxRemaps():
		var r remapping
		for _, seg := range change {
			if at := target(seg); at.Any() {
				r.add(seg, at, false)
			} else {
				mm.unmapAS(seg.AddrRange)
				seg.v.mapped = hostarch.NoAccess
			}
		}
		mm.remapAllLocked(&r) // an error leaves it unmapped
	case !span.Empty():
		mm.unmapAS(span)
		mm.pmas.overlapping(span, func(seg *segment[pma]) bool {
			seg.v.mapped = hostarch.NoAccess
			return true
		})
	}
}

// protectLocked follows a change of the permissions in ar.
func (mm *MemoryManager) protectLocked(ar hostarch.AddrRange, perms hostarch.AccessType) {
	mm.pmas.isolate(ar)
	if !perms.Any() {
		var mapped hostarch.AddrRange
		mm.pmas.overlapping(ar, func(seg *segment[pma]) bool {
			mapped = extend(mapped, seg)
			seg.v.revoked = seg.v.revoked || seg.v.mapped.Any()
			seg.v.mapped = hostarch.NoAccess
			return true
		})
		mm.unmapAS(mapped)
	} else {
		mm.remapLocked(ar, func(seg *segment[pma]) hostarch.AccessType { return want(seg, perms) })
		// What gets access back is about to be used again.
		var r remapping
		mm.pmas.overlapping(ar, func(seg *segment[pma]) bool {
			if at := want(seg, perms); seg.v.revoked && at.Any() && len(r.segs) < mm.maxRemaps() {
				r.add(seg, at, false)
			}
			seg.v.revoked = false
			return true
		})
		mm.remapAllLocked(&r) // an error leaves it unmapped
	}
	mm.pmas.merge(ar)
}

// Populating is bounded, in bytes: it is a hint, and a hint must not take the
// memory of the host.
const (
	maxPrecommit = 64 << 20 // made present
	maxPopulate  = 1 << 30  // mapped
)

// populate makes the pages of ar present as far as that works. at says how they
// are accessed, or why not.
func (mm *MemoryManager) populate(ctx context.Context, ar hostarch.AddrRange, at func(*vma) (hostarch.AccessType, error)) error {
	if ar.Length() > maxPopulate {
		ar.End = ar.Start + maxPopulate
	}
	for addr := ar.Start; addr < ar.End; {
		err := mm.withVMA(addr, hostarch.NoAccess, true, func(v *segment[vma]) error {
			at, err := at(&v.v)
			if err != nil {
				return err
			}
			mm.activeMu.Lock()
			defer mm.activeMu.Unlock()
			seg, _, err := mm.pageLocked(ctx, v, addr, at)
			if err != nil {
				return err
			}
			part := seg.Intersect(v.AddrRange).Intersect(hostarch.AddrRange{Start: addr, End: ar.End})
			mm.pmas.isolate(part)
			seg = mm.pmas.lookup(addr)
			err = mm.mapLocked(seg, want(seg, v.v.perms), addr-ar.Start < maxPrecommit)
			mm.pmas.merge(part)
			addr = part.End
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// populateNew is populate for MAP_POPULATE, which knows no errors. Private
// memory that can be written is copied, as Linux does.
func (mm *MemoryManager) populateNew(ctx context.Context, ar hostarch.AddrRange) {
	mm.populate(ctx, ar, func(v *vma) (hostarch.AccessType, error) {
		if !v.perms.Any() {
			return hostarch.NoAccess, unix.EFAULT
		}
		return hostarch.AccessType{Read: true, Write: v.perms.Write}, nil
	})
}

// populateAdvised is populate for MADV_POPULATE_READ and MADV_POPULATE_WRITE.
func (mm *MemoryManager) populateAdvised(ctx context.Context, ar hostarch.AddrRange, at hostarch.AccessType) error {
	err := mm.populate(ctx, ar, func(v *vma) (hostarch.AccessType, error) {
		if !v.perms.Effective().SupersetOf(at) {
			return hostarch.NoAccess, unix.EINVAL
		}
		return at, nil
	})
	var fault *FaultError
	var bus *memmap.BusError
	switch {
	case errors.As(err, &fault):
		return unix.ENOMEM
	case errors.As(err, &bus):
		return unix.EFAULT
	}
	return err
}

// Invalidate implements memmap.MappingSpace.Invalidate.
func (mm *MemoryManager) Invalidate(ar hostarch.AddrRange) {
	mm.activeMu.Lock()
	defer mm.activeMu.Unlock()
	mm.dropLocked(ar)
}
