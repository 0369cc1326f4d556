package systrap

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ringfence/ringfence/pkg/sysmsg"
)

// The Sentry and a stub's thread that both find the slot theirs while they look at
// it, each on a CPU of its own, are fastest. Two things make that slow: when more
// threads want to run than there are CPUs, whoever looks is in the way; and when the
// stub's memory changes often, since the CPU of a thread that runs has to be
// interrupted each time. Then they sleep, and wake each other on one CPU.

const (
	// spinTime is how long the Sentry and a stub look at a slot before they sleep:
	// longer than it takes to wake a thread on an idle CPU, or they would never meet.
	spinTime = 60 * time.Microsecond

	// followTime is for how long a thread that was woken on the Sentry's CPU stays
	// there while the Sentry sleeps: others may want that CPU, and another be idle.
	followTime = 2 * time.Millisecond

	// requestCost is how many turns it takes to make up for what a request to the
	// system call thread loses when threads run on two CPUs. maxPace is how far a
	// pace remembers.
	requestCost = 8
	maxPace     = 64
)

// switches is the number of Switches under way in this process.
var switches atomic.Int32

// spinLimit returns how often to look at a word before sleeping, at most.
func spinLimit() uint32 {
	if n := runtime.NumCPU(); 2*int(switches.Load()) > n || n < 2 {
		return 0
	}
	return maxSpins()
}

var maxSpins = sync.OnceValue(func() uint32 { return sysmsg.Spins(spinTime) })

// pace is how a Context waits for its thread.
type pace struct {
	spinner sysmsg.Spinner
	// requests is the AddressSpace's number of requests at the last turn; score is
	// positive if turns are more frequent than they are by requestCost.
	requests uint32
	score    int
}

// next is called before a turn, with the AddressSpace's number of requests. It returns
// how often to look at the slot, limit at most.
func (p *pace) next(requests, limit uint32) uint32 {
	// Both are bounded, so that nothing overflows.
	p.score += 1 - requestCost*int(min(requests-p.requests, maxPace))
	p.score = max(min(p.score, maxPace), -maxPace)
	p.requests = requests
	if limit == 0 || p.score <= 0 {
		return 0
	}
	return p.spinner.Next(limit)
}

// report is called after a turn, for which the slot was looked at up to spins times.
func (p *pace) report(spins uint32, o sysmsg.Outcome) {
	if spins > 0 {
		p.spinner.Report(o)
	}
}

// spins returns how often to look at the slot before sleeping, for both sides.
func (t *thread) spins(p *pace) uint32 {
	n := p.next(t.as.requests.Load(), spinLimit())
	if n == 0 {
		t.follower.Follow()
	} else {
		t.follower.Free()
	}
	return n
}
