package systrap

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/affinity"
	"github.com/ringfence/ringfence/pkg/sysmsg"
)

// The Sentry and a stub's thread that both find the slot theirs while they look at
// it, each on a CPU of its own, are fastest. When they have to wake each other
// instead they are best off on one CPU (package affinity), and do not look.

// BindThread implements platform.ThreadBinder.BindThread.
func (c *threadContext) BindThread() {
	c.osThread = unix.Gettid()
	if c.thread != nil {
		c.unpair()
		c.pair()
	}
}

// pair is called when the Context has got a thread.
func (c *threadContext) pair() {
	if c.osThread != 0 {
		c.thread.pair = affinity.New(c.osThread, c.thread.tid, &c.thread.as.group)
	}
}

// unpair is called before the Context loses its thread.
func (c *threadContext) unpair() {
	c.thread.pair.Release()
	c.thread.pair.Forget()
	c.thread.pair = nil
}

// PrepareSleep implements platform.Context.PrepareSleep: the thread sleeps by
// itself.
func (c *threadContext) PrepareSleep() {
	if t := c.thread; t != nil {
		t.pair.Sleep()
		// What wakes it is not measured.
		t.trial.turns = 0
		if t.trial.state != together {
			t.trial.state = together
			t.pair.Release()
		}
	}
}

// A trial finds out whether a thread that is pinned together with its Context's
// would be better off apart: what it takes to get there, since at first each has to
// wake the other, looks as if they were not.
type trial struct {
	// state is what goes on, turns how many there were since it began, and start when
	// the block of turns began that is measured, in nanoseconds since epoch.
	state trialState
	turns int
	start int64
	// together is how long the last block took while they were pinned, in nanoseconds.
	together int64
	// failures is how often in a row they were not better off apart.
	failures uint
}

type trialState int

const (
	together trialState = iota // pinned, or as package affinity decides
	parting                    // apart, both looking for long
	parted                     // apart, measured
	apart                      // apart, since that is faster
)

const (
	// blockTurns is how many turns are measured at a time.
	blockTurns = 64
	// togetherTurns is for how many the two are pinned before being apart is tried: that
	// doubles with each failure in a row, up to maxFailures. apartTurns is how long they
	// are apart when that was found to be faster.
	togetherTurns = 8 * blockTurns
	maxFailures   = 4
	apartTurns    = 128 * blockTurns
)

var epoch = time.Now()

func nanotime() int64 { return int64(time.Since(epoch)) }

// turn is called before each turn in which the two are pinned, or not as the trial
// wants it. clock returns nanoseconds.
func (r *trial) turn(clock func() int64) {
	r.turns++
	if r.turns%blockTurns != 0 {
		return
	}
	now := clock()
	took := now - r.start
	r.start = now
	switch {
	case r.state == together && r.turns < togetherTurns<<r.failures:
		r.together = took
		return
	case r.state == together:
		r.state = parting
	case r.state == parting:
		r.state = parted
	case r.state == parted && took < r.together:
		r.state, r.failures = apart, 0
	case r.state == parted:
		r.state, r.failures = together, min(r.failures+1, maxFailures)
	case r.turns < apartTurns:
		return
	default:
		r.state = together
	}
	r.turns = 0
}

// spins returns how often to look at the slot before sleeping, for both sides.
func (t *thread) spins() uint32 {
	limit := spinLimit()
	if t.trial.state == together {
		if !t.pair.Pin() {
			t.trial.turns = 0
			return t.spinner.Next(limit)
		}
		t.trial.turn(nanotime)
		t.spinner = sysmsg.Spinner{} // for the time after
		if t.trial.state == together || limit == 0 {
			return 0
		}
		t.pair.Part()
		return limit
	}
	if t.trial.turn(nanotime); t.trial.state == together || t.trial.state == apart && t.trial.turns == 0 {
		t.pair.Release()
	}
	if t.trial.state == parting {
		return limit
	}
	return t.spinner.Next(limit)
}

// turned says that an event has come, and whether the thread and then the Sentry
// had to be woken.
func (t *thread) turned(o sysmsg.Outcome, woke bool) {
	if woke || o == sysmsg.Slept {
		t.pair.Slow()
	} else {
		t.pair.Fast()
	}
	t.spinner.Report(o)
}
