package systrap

import "testing"

// turns makes n turns, with a request in every k-th if k is not 0, and returns in how
// many it is better to look.
func turns(p *pace, n, k int) (looked int) {
	for i := range n {
		if k > 0 && i%k == 0 {
			p.request()
		}
		if p.turn() {
			looked++
		}
	}
	return looked
}

func TestPace(t *testing.T) {
	p := newPace()
	if got := turns(p, maxPace, 0); got != 0 {
		t.Errorf("at first: looked in %d turns of %d", got, maxPace)
	}
	if got := turns(p, 1000, 0); got != 1000 {
		t.Errorf("without requests: looked in %d turns of 1000", got)
	}
	turns(p, 2*maxPace, 1)
	if got := turns(p, 1000, 1); got != 1000 {
		t.Errorf("with a request in every turn, as before: looked in %d of 1000", got)
	}
	for range 2 * maxPace {
		p.request()
	}
	if got := turns(p, 1000, 1); got != 0 {
		t.Errorf("with a request in every turn, after many: looked in %d of 1000", got)
	}
	if got := turns(p, 1000, 0); got < 1000-2*maxPace {
		t.Errorf("without requests again: looked in %d of 1000", got)
	}
	if got := turns(p, 10000, 2); got != 10000 {
		t.Errorf("with a request in every other turn: looked in %d of 10000", got)
	}
}
