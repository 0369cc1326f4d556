package mm

import (
	"slices"
	"sort"

	"github.com/ringfence/ringfence/pkg/hostarch"
)

// segment is a range of addresses with a value.
type segment[V any] struct {
	hostarch.AddrRange
	v V
}

// maxChunk is how many segments a chunk holds: few enough to move around, many
// enough that there are few chunks.
const maxChunk = 128

// chunk is a run of segments. It is never empty.
type chunk[V any] struct {
	segs []*segment[V]

	// gap is the widest gap between two segments of the chunk, in bytes, or
	// unknownGap.
	gap uint64
}

const unknownGap = ^uint64(0)

// set is an ordered set of segments that do not overlap: a list of short lists.
// Looking up takes O(log n); changing it moves at most one chunk's segments and
// the list of chunks. The zero value, with the functions filled in, is empty.
type set[V any] struct {
	// advance makes v, a copy of the value of a segment, that of the part of the
	// segment which starts n bytes later.
	advance func(v *V, n uint64)

	// merges reports whether b, which starts where a ends, continues a. If so the
	// segment of a is extended, and drop is called for the value of b.
	merges func(a, b *segment[V]) bool
	drop   func(v *V)

	chunks []*chunk[V]
	count  int
}

// pos is a position in a set. It is good until the set changes.
type pos struct{ c, i int }

// find returns the position of the first segment that ends after addr.
func (s *set[V]) find(addr hostarch.Addr) pos {
	c := sort.Search(len(s.chunks), func(i int) bool {
		segs := s.chunks[i].segs
		return segs[len(segs)-1].End > addr
	})
	if c == len(s.chunks) {
		return pos{c, 0}
	}
	segs := s.chunks[c].segs
	return pos{c, sort.Search(len(segs), func(i int) bool { return segs[i].End > addr })}
}

// at returns the segment at p, or nil behind the last one.
func (s *set[V]) at(p pos) *segment[V] {
	if p.c < 0 || p.c >= len(s.chunks) {
		return nil
	}
	return s.chunks[p.c].segs[p.i]
}

// next returns the position after p.
func (s *set[V]) next(p pos) pos {
	if p.i++; p.i == len(s.chunks[p.c].segs) {
		return pos{p.c + 1, 0}
	}
	return p
}

// prev returns the position before p; at of it is nil before the first one.
func (s *set[V]) prev(p pos) pos {
	if p.i > 0 {
		return pos{p.c, p.i - 1}
	}
	if p.c == 0 {
		return pos{-1, 0}
	}
	return pos{p.c - 1, len(s.chunks[p.c-1].segs) - 1}
}

// lookup returns the segment that holds addr, or nil.
func (s *set[V]) lookup(addr hostarch.Addr) *segment[V] {
	if seg := s.at(s.find(addr)); seg != nil && seg.Start <= addr {
		return seg
	}
	return nil
}

// overlapping calls f for the segments that overlap ar, in order, until it
// returns false. f must not change the set.
func (s *set[V]) overlapping(ar hostarch.AddrRange, f func(*segment[V]) bool) {
	for p := s.find(ar.Start); ; p = s.next(p) {
		seg := s.at(p)
		if seg == nil || seg.Start >= ar.End || !f(seg) {
			return
		}
	}
}

// isFree reports whether no segment overlaps ar.
func (s *set[V]) isFree(ar hostarch.AddrRange) bool {
	seg := s.at(s.find(ar.Start))
	return seg == nil || seg.Start >= ar.End
}

// insert adds seg, which must not overlap another one.
func (s *set[V]) insert(seg *segment[V]) {
	s.count++
	p := s.find(seg.Start)
	if p.c == len(s.chunks) {
		if p.c == 0 {
			s.chunks = append(s.chunks, &chunk[V]{segs: []*segment[V]{seg}, gap: unknownGap})
			return
		}
		p.c-- // append to the last chunk
		p.i = len(s.chunks[p.c].segs)
	}
	c := s.chunks[p.c]
	c.gap = unknownGap
	c.segs = slices.Insert(c.segs, p.i, seg)
	if len(c.segs) < maxChunk {
		return
	}
	// What is appended in sequence leaves full chunks behind.
	at := len(c.segs) / 2
	if p.i == len(c.segs)-1 {
		at = p.i
	}
	tail := &chunk[V]{segs: slices.Clone(c.segs[at:]), gap: unknownGap}
	clear(c.segs[at:])
	c.segs = c.segs[:at]
	s.chunks = slices.Insert(s.chunks, p.c+1, tail)
}

// split makes addr a boundary.
func (s *set[V]) split(addr hostarch.Addr) {
	seg := s.lookup(addr)
	if seg == nil || seg.Start == addr {
		return
	}
	tail := &segment[V]{hostarch.AddrRange{Start: addr, End: seg.End}, seg.v}
	s.advance(&tail.v, uint64(addr-seg.Start))
	seg.End = addr
	s.insert(tail)
}

// isolate makes both ends of ar boundaries.
func (s *set[V]) isolate(ar hostarch.AddrRange) {
	s.split(ar.Start)
	s.split(ar.End)
}

// remove takes out the part of the set in ar and returns it.
func (s *set[V]) remove(ar hostarch.AddrRange) []*segment[V] {
	s.isolate(ar)
	var out []*segment[V]
	first := s.find(ar.Start)
	p := first
	for p.c < len(s.chunks) {
		c := s.chunks[p.c]
		n := sort.Search(len(c.segs)-p.i, func(i int) bool { return c.segs[p.i+i].Start >= ar.End })
		if n == 0 {
			break
		}
		out = append(out, c.segs[p.i:p.i+n]...)
		c.segs = slices.Delete(c.segs, p.i, p.i+n)
		c.gap = unknownGap
		if p.i < len(c.segs) {
			break
		}
		p = pos{p.c + 1, 0}
	}
	s.count -= len(out)
	if len(out) == 0 {
		return nil
	}
	// Chunks that lost all they had go, and small neighbours become one.
	lo := max(first.c-1, 0)
	hi := min(p.c+1, len(s.chunks))
	kept := s.chunks[lo:lo]
	for _, c := range s.chunks[lo:hi] {
		if len(c.segs) == 0 {
			continue
		}
		if n := len(kept); n > 0 && len(kept[n-1].segs)+len(c.segs) <= maxChunk/2 {
			kept[n-1].segs = append(kept[n-1].segs, c.segs...)
			kept[n-1].gap = unknownGap
			continue
		}
		kept = append(kept, c)
	}
	s.chunks = slices.Delete(s.chunks, lo+len(kept), hi)
	return out
}

// removeAt takes out the segment that starts at addr.
func (s *set[V]) removeAt(p pos) {
	c := s.chunks[p.c]
	c.segs = slices.Delete(c.segs, p.i, p.i+1)
	c.gap = unknownGap
	s.count--
	if len(c.segs) == 0 {
		s.chunks = slices.Delete(s.chunks, p.c, p.c+1)
	}
}

// merge joins segments that touch in ar, its ends included.
func (s *set[V]) merge(ar hostarch.AddrRange) {
	p := s.prev(s.find(ar.Start))
	if s.at(p) == nil {
		p = pos{}
	}
	for {
		a := s.at(p)
		if a == nil || a.Start >= ar.End {
			return
		}
		n := s.next(p)
		b := s.at(n)
		if b == nil {
			return
		}
		if a.End != b.Start || !s.merges(a, b) {
			p = n
			continue
		}
		a.End = b.End
		s.chunks[p.c].gap = unknownGap
		s.drop(&b.v)
		s.removeAt(n)
	}
}

// gapBelow returns the highest address at which size bytes are free in [lo, hi).
// low gives the address below a segment up to which the space is its own.
func (s *set[V]) gapBelow(lo, hi hostarch.Addr, size uint64, low func(*segment[V]) hostarch.Addr) (hostarch.Addr, bool) {
	fits := func(start, end hostarch.Addr) bool {
		start = max(start, lo)
		return start < end && uint64(end-start) >= size
	}
	// The first segment that matters is the last one that starts below hi.
	p := s.find(hi)
	if seg := s.at(p); seg != nil {
		if l := low(seg); l < hi {
			hi = l
		}
	}
	for p = s.prev(p); p.c >= 0 && hi > lo; {
		c := s.chunks[p.c]
		seg := c.segs[p.i]
		if fits(seg.End, hi) {
			return hi - hostarch.Addr(size), true
		}
		if p.i == len(c.segs)-1 && c.widest() < size {
			hi = min(hi, low(c.segs[0]))
			p = s.prev(pos{p.c, 0})
			continue
		}
		hi = min(hi, low(seg))
		p = s.prev(p)
	}
	if fits(lo, hi) {
		return hi - hostarch.Addr(size), true
	}
	return 0, false
}

// widest returns the widest gap between two segments of c.
func (c *chunk[V]) widest() uint64 {
	if c.gap == unknownGap {
		c.gap = 0
		for i := 1; i < len(c.segs); i++ {
			c.gap = max(c.gap, uint64(c.segs[i].Start-c.segs[i-1].End))
		}
	}
	return c.gap
}
