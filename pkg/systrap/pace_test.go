package systrap

import (
	"testing"

	"github.com/ringfence/ringfence/pkg/sysmsg"
)

// turns makes n turns, with a request in every k-th if k is not 0, each of which ends
// with o, and returns in how many the slot was looked at.
func turns(p *pace, n, k int, o sysmsg.Outcome) (looked int) {
	requests := p.requests
	for i := range n {
		if k > 0 && i%k == 0 {
			requests++
		}
		spins := p.next(requests, 1000)
		if spins > 0 {
			looked++
		}
		p.report(spins, o)
	}
	return looked
}

func TestPace(t *testing.T) {
	var p pace
	if got := turns(&p, 1000, 0, sysmsg.Spun); got != 1000 {
		t.Errorf("without requests: looked in %d of 1000 turns", got)
	}
	turns(&p, maxPace, 2, sysmsg.Spun)
	if got := turns(&p, 1000, 2, sysmsg.Spun); got != 0 {
		t.Errorf("with a request in every other turn: looked in %d of 1000", got)
	}
	if got := turns(&p, 1000, 0, sysmsg.Spun); got < 1000-2*maxPace {
		t.Errorf("without requests again: looked in %d of 1000", got)
	}
	if got := turns(&p, 10000, 10*requestCost, sysmsg.Spun); got != 10000 {
		t.Errorf("with a request now and then: looked in %d of 10000", got)
	}
	// What was decided by other means than looking says nothing about it.
	turns(&p, maxPace, 1, sysmsg.Spun)
	turns(&p, maxPace, 0, sysmsg.Slept)
	if got := turns(&p, 1, 0, sysmsg.Slept); got != 1 {
		t.Error("looking is given up although it was not tried")
	}
	turns(&p, 100, 0, sysmsg.Slept)
	if got := turns(&p, 1000, 0, sysmsg.Slept); got > 50 {
		t.Errorf("in vain: looked in %d of 1000 turns", got)
	}
}

func TestPaceLimit(t *testing.T) {
	var p pace
	for range 100 {
		if got := p.next(0, 0); got != 0 {
			t.Fatalf("looks %d times, none are allowed", got)
		}
	}
	// A count that has come around, or is that of another AddressSpace.
	p.next(1<<31, 1000)
	if p.score != -maxPace {
		t.Errorf("score %d", p.score)
	}
}
