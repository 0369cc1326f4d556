package systrap

import "testing"

// stay runs r for n turns, each of which takes the time given for its state, and
// returns how many turns it was in each state.
func stay(r *trial, n int, took map[trialState]int64) map[trialState]int {
	var now int64
	turns := make(map[trialState]int)
	for range n {
		r.turn(func() int64 { return now })
		turns[r.state]++
		now += took[r.state]
	}
	return turns
}

func TestTrialApart(t *testing.T) {
	var r trial
	turns := stay(&r, 100000, map[trialState]int64{together: 8000, parting: 20000, parted: 3000, apart: 3000})
	if turns[apart] < 90000 || turns[together] < togetherTurns {
		t.Errorf("when being apart is faster: turns %v", turns)
	}
}

func TestTrialTogether(t *testing.T) {
	var r trial
	turns := stay(&r, 100000, map[trialState]int64{together: 8000, parting: 20000, parted: 20000, apart: 20000})
	if turns[apart] != 0 || turns[together] < 95000 {
		t.Errorf("when being together is faster: turns %v", turns)
	}
	// It goes on trying.
	if turns[parted] < blockTurns*2 || r.failures != maxFailures {
		t.Errorf("turns %v, %d failures", turns, r.failures)
	}
	turns = stay(&r, 100000, map[trialState]int64{together: 8000, parted: 3000, apart: 3000})
	if turns[apart] < 80000 {
		t.Errorf("when being apart has become faster: turns %v", turns)
	}
}
