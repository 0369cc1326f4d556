package mm

import (
	"math/rand/v2"
	"testing"

	"github.com/ringfence/ringfence/pkg/hostarch"
)

// A set of numbers, compared with an array that has one per address.
func TestSet(t *testing.T) {
	const size = 3000
	for seed := range uint64(5) {
		r := rand.New(rand.NewPCG(seed, 1))
		type value struct{ id, off int }
		drops := 0
		s := set[value]{
			advance: func(v *value, n uint64) { v.off += int(n) },
			merges: func(a, b *segment[value]) bool {
				return a.v.id == b.v.id && a.v.off+int(a.Length()) == b.v.off
			},
			drop: func(*value) { drops++ },
		}
		var exp [size]value // id 0: nothing
		for i := range 4000 {
			start := r.IntN(size)
			n := 1 + r.IntN(min(8, size-start))
			if r.IntN(200) == 0 {
				n = r.IntN(size - start)
			}
			ar := hostarch.AddrRange{Start: hostarch.Addr(start), End: hostarch.Addr(start + n)}
			switch r.IntN(8) {
			case 0, 1, 2, 3, 4:
				s.remove(ar)
				if n > 0 {
					s.insert(&segment[value]{ar, value{i + 1, 100}})
				}
				for j := range n {
					exp[start+j] = value{i + 1, 100 + j}
				}
			case 5:
				want := 0
				for j := range n {
					if exp[start+j].id != 0 {
						want++
					}
					exp[start+j] = value{}
				}
				got := 0
				for _, seg := range s.remove(ar) {
					if !ar.IsSupersetOf(seg.AddrRange) {
						t.Fatalf("remove(%v) gave %v", ar, seg.AddrRange)
					}
					got += int(seg.Length())
				}
				if got != want {
					t.Fatalf("remove(%v) gave %d addresses, want %d", ar, got, want)
				}
			case 6:
				s.isolate(ar)
			case 7:
				before := s.count
				drops = 0
				s.merge(ar)
				if before-drops != s.count {
					t.Fatalf("merge left %d of %d, dropped %d", s.count, before, drops)
				}
			}
			checkSet(t, &s)
			lo, hi, length := r.IntN(size/2), size/2+r.IntN(size/2), 1+r.IntN(20)
			got, ok := s.gapBelow(hostarch.Addr(lo), hostarch.Addr(hi), uint64(length), func(seg *segment[value]) hostarch.Addr { return seg.Start })
			want, run := -1, 0
			for a := hi - 1; a >= lo && want < 0; a-- {
				if run++; exp[a].id != 0 {
					run = 0
				}
				if run == length {
					want = a
				}
			}
			if ok != (want >= 0) || ok && int(got) != want {
				t.Fatalf("gapBelow(%d, %d, %d) = %d, %v; want %d", lo, hi, length, got, ok, want)
			}
		}
		for a := range exp {
			seg := s.lookup(hostarch.Addr(a))
			if (seg != nil) != (exp[a].id != 0) {
				t.Fatalf("lookup(%d) = %v, want %v", a, seg, exp[a])
			}
			if seg != nil && (seg.v.id != exp[a].id || seg.v.off+a-int(seg.Start) != exp[a].off) {
				t.Fatalf("lookup(%d) = %+v, want %+v", a, seg, exp[a])
			}
		}
		s.merge(hostarch.AddrRange{End: size})
		s.overlapping(hostarch.AddrRange{End: size}, func(a *segment[value]) bool {
			if b := s.lookup(a.End); b != nil && s.merges(a, b) {
				t.Errorf("%v and %v were not merged", a, b)
			}
			return true
		})
	}
}

// Space is found beside, not in, the room of a stack.
func TestGapBelowStack(t *testing.T) {
	s := set[vma]{advance: (*vma).advance}
	s.insert(&segment[vma]{hostarch.AddrRange{Start: 0x10000000, End: 0x10010000}, vma{growsDown: true}})
	if got, ok := s.gapBelow(0x1000, 0x10010000, 0x1000, low); !ok || got != 0x10000000-stackGuardGap-0x1000 {
		t.Errorf("gapBelow = %v, %v", got, ok)
	}
	if got, ok := s.gapBelow(0x1000, 0x20000000, 0x1000, low); !ok || got != 0x20000000-0x1000 {
		t.Errorf("gapBelow above the stack = %v, %v", got, ok)
	}
	if got, ok := s.gapBelow(0x10000000-stackGuardGap, 0x10010000, 0x1000, low); ok {
		t.Errorf("gapBelow in the stack's room = %v", got)
	}
}
