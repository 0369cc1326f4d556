package mm

import (
	"context"
	"slices"
	"sync"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// A request to the host costs far more than what it maps. So whatever is expected
// to be used is mapped along with what is: a page that the parent or another child
// has used lately, the mapping of a file that was made since the last fault.

// access is a page, and whether it was written.
type access struct {
	page  hostarch.Addr
	write bool
}

const (
	// maxHot bounds the pages that are remembered, and those that are mapped at a time
	// because they are expected.
	maxHot = 256

	// minExpected is how many of them are expected to be used by a child at least.
	minExpected = 16
	// forgetForks is the number of forks after which one page less is.
	forgetForks = 8

	// maxRemapBatch and maxRemapSingle are how many pieces of the AddressSpace are
	// mapped anew rather than unmapped when their permissions change, in one request
	// or one by one.
	maxRemapBatch, maxRemapSingle = 64, 8
)

// hotPages are the pages of the last faults, the latest one last. A process shares
// them with those that it forks, which run the same code, until they call execve.
//
// Who is forked is expected to use the last ones: so many that what the others use
// leads to no more faults, and no more. What is mapped without being used is not
// known; so now and then one page less is.
type hotPages struct {
	mu       sync.Mutex
	pages    []access
	expected int
	forks    int
}

// note adds a page.
func (h *hotPages) note(a access) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if i := slices.IndexFunc(h.pages, func(b access) bool { return a.page == b.page }); i >= 0 {
		if len(h.pages)-i > h.expected {
			h.expected++ // it was forgotten too soon
		}
		a.write = a.write || h.pages[i].write
		h.pages = slices.Delete(h.pages, i, i+1)
	} else if len(h.pages) == maxHot {
		h.pages = slices.Delete(h.pages, 0, 1)
	}
	h.pages = append(h.pages, a)
}

// fork returns what a child is expected to use, the latest first.
func (h *hotPages) fork() []access {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.forks++; h.forks%forgetForks == 0 {
		h.expected--
	}
	h.expected = max(h.expected, minExpected)
	pages := slices.Clone(h.pages[max(0, len(h.pages)-h.expected):])
	slices.Reverse(pages)
	return pages
}

// Expect says that the application, and whoever it forks, is about to access addr.
func (mm *MemoryManager) Expect(addr hostarch.Addr, at hostarch.AccessType) {
	mm.hot.note(access{addr.RoundDown(), at.Write})
	mm.activeMu.Lock()
	mm.expectLocked(expectation{page: addr.RoundDown()})
	mm.activeMu.Unlock()
}

// expectation is a page that is to be mapped with the next one.
type expectation struct {
	page hostarch.Addr
	// present says that it, and what is around it, takes memory already.
	present bool
	// fresh says that it is in a new mapping, all of which is going to be used.
	fresh bool
}

// expectLocked makes the next fault map a page as well.
//
// Preconditions: mm.mappingMu is locked for writing, or mm.activeMu is.
func (mm *MemoryManager) expectLocked(e expectation) {
	if len(mm.expected) < maxHot && !slices.Contains(mm.expected, e) {
		mm.expected = append(mm.expected, e)
	}
}

// mapping are pages of a vma that are to be mapped.
type mapping struct {
	v         *segment[vma]
	ar        hostarch.AddrRange
	precommit bool
}

// takeExpectedLocked returns what is expected, as far as it is there or cheap to get.
//
// Preconditions: mm.mappingMu is locked; mm.activeMu is locked for writing.
func (mm *MemoryManager) takeExpectedLocked(ctx context.Context) []mapping {
	var ms []mapping
	for _, e := range mm.expected {
		v := mm.vmas.lookup(e.page)
		if v == nil || !v.v.perms.Any() {
			continue
		}
		seg := mm.pmas.lookup(e.page)
		if e.fresh || seg == nil && v.v.mappable != nil {
			var did change
			var err error
			if seg, did, err = mm.useLocked(ctx, v, e.page); err != nil {
				continue
			}
			e.present = did == committed
		}
		if seg != nil { // else a page of zeros
			ms = append(ms, mapping{v, mm.around(v, seg, e.page), e.present})
		}
	}
	mm.expected = nil
	return ms
}

// useLocked is pageLocked for a page that is used in the way its mapping most likely
// is: small private ones are written, unless changes of the file could be missed.
func (mm *MemoryManager) useLocked(ctx context.Context, v *segment[vma], page hostarch.Addr) (*segment[pma], change, error) {
	written := v.v.private && v.v.perms.Write && v.Length() <= minBlock
	if v.v.mappable == nil && written {
		return mm.pageLocked(ctx, v, page, hostarch.Write)
	}
	seg, did, err := mm.pageLocked(ctx, v, page, hostarch.Read)
	if err == nil && written && !seg.v.max.Write && !v.v.perms.Execute {
		return mm.pageLocked(ctx, v, page, hostarch.Write)
	}
	return seg, did, err
}

// useNew maps a small mapping that was just made: it is used at once.
func (mm *MemoryManager) useNew(ctx context.Context, addr hostarch.Addr) {
	// An error is for the access to find.
	mm.withVMA(addr, hostarch.NoAccess, true, func(v *segment[vma]) error {
		mm.activeMu.Lock()
		defer mm.activeMu.Unlock()
		seg, did, err := mm.useLocked(ctx, v, addr)
		if err != nil {
			return err
		}
		ms := []mapping{{v, mm.around(v, seg, addr), did == committed}}
		return mm.mapAllLocked(append(ms, mm.takeExpectedLocked(ctx)...))
	})
}

// around returns how much of seg, in v, is mapped with a page.
func (mm *MemoryManager) around(v *segment[vma], seg *segment[pma], page hostarch.Addr) hostarch.AddrRange {
	ar := seg.Intersect(v.AddrRange)
	if unit := mm.p.MapUnit(); unit != 0 {
		ar = block(page, unit, ar)
	}
	return ar
}

// mapAllLocked maps all of ms that is not yet mapped as it may be. After an error
// none of it is.
//
// Preconditions: mm.mappingMu is locked; mm.activeMu is locked for writing.
func (mm *MemoryManager) mapAllLocked(ms []mapping) error {
	for _, m := range ms {
		mm.pmas.isolate(m.ar)
	}
	var r remapping
	for _, m := range ms {
		mm.pmas.overlapping(m.ar, func(seg *segment[pma]) bool {
			if at := want(seg, m.v.v.perms); at.Any() && at != seg.v.mapped {
				r.add(seg, at, m.precommit)
			}
			return true
		})
	}
	err := mm.remapAllLocked(&r)
	for _, m := range ms {
		mm.pmas.merge(m.ar)
	}
	return err
}

// remapping is a change of what is mapped.
type remapping struct {
	segs []*segment[pma]
	reqs []platform.FileMapping
}

// add has seg mapped with at, which must be something.
func (r *remapping) add(seg *segment[pma], at hostarch.AccessType, precommit bool) {
	req := platform.FileMapping{Addr: seg.Start, File: seg.v.file, Range: fileRange(seg, seg.AddrRange), Access: at, Precommit: precommit, Mapped: seg.v.mapped.Any()}
	seg.v.mapped, seg.v.revoked = at, false
	r.segs = append(r.segs, seg)
	if n := len(r.reqs); n > 0 {
		// One mapping of the host if it can be.
		last := r.reqs[n-1]
		last.Range.End += req.Range.Length()
		if last.Addr+hostarch.Addr(last.Range.Length()) == seg.End && last.Range.End == req.Range.End &&
			last.File == req.File && last.Access == at && last.Precommit == precommit && last.Mapped == req.Mapped {
			r.reqs[n-1] = last
			return
		}
	}
	r.reqs = append(r.reqs, req)
}

// remapAllLocked does what was added to r, in one request if the platform can.
// After an error none of it is mapped.
//
// Preconditions: mm.activeMu is locked for writing.
func (mm *MemoryManager) remapAllLocked(r *remapping) error {
	as := mm.AddressSpace()
	var err error
	switch b, ok := as.(platform.BatchMapper); {
	case as == nil:
		for _, seg := range r.segs {
			seg.v.mapped = hostarch.NoAccess
		}
		return nil
	case ok && len(r.reqs) > 0:
		err = b.MapFiles(r.reqs)
	default:
		for _, q := range r.reqs {
			if err = as.MapFile(q.Addr, q.File, q.Range, q.Access, q.Precommit); err != nil {
				break
			}
		}
	}
	if err != nil {
		for _, q := range r.reqs {
			as.Unmap(q.Addr, q.Range.Length())
		}
		for _, seg := range r.segs {
			seg.v.mapped = hostarch.NoAccess
		}
	}
	return err
}

// maxRemaps returns how many pieces are mapped anew at a time.
func (mm *MemoryManager) maxRemaps() int {
	if _, ok := mm.AddressSpace().(platform.BatchMapper); ok {
		return maxRemapBatch
	}
	return maxRemapSingle
}
