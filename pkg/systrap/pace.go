package systrap

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ringfence/ringfence/pkg/sysmsg"
)

// The Sentry and a stub's thread that both find the slot theirs while they look at
// it, each on a CPU of its own, are fastest. But whoever looks is in the way when more
// threads want to run than there are CPUs; and a program that starts changes its memory
// with about every turn, and keeps two CPUs busy then for little. Then they sleep, and
// wake each other on one CPU.

const (
	// spinTime is how long the Sentry and a stub look at a slot before they sleep:
	// longer than it takes to wake a thread on an idle CPU, or they would never meet.
	spinTime = 60 * time.Microsecond

	// followTime is for how long a thread that was woken on the Sentry's CPU stays
	// there while the Sentry sleeps: others may want that CPU, and another be idle.
	followTime = 2 * time.Millisecond

	// maxPace is how far a pace remembers.
	maxPace = 128
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

// pace says what an AddressSpace's Contexts do more: requests to the system call
// thread, or turns. A new one expects requests, since programs map a lot when they
// start.
type pace struct{ score atomic.Int32 }

func newPace() *pace {
	p := new(pace)
	p.score.Store(-maxPace)
	return p
}

// request counts a request. That several threads may count at once does no harm.
func (p *pace) request() { p.score.Store(max(p.score.Load()-1, -maxPace)) }

// turn counts a turn. It reports whether looking at slots is better than to sleep.
func (p *pace) turn() bool {
	n := min(p.score.Load()+1, maxPace)
	p.score.Store(n)
	return n > 0
}

// spins returns how often to look at the thread's slot before sleeping, for both
// sides. If not at all, both are kept on one CPU: the thread by its follower, and,
// since the scheduler wakes the Sentry on an idle CPU if there is one, the caller by
// its holder.
func (t *thread) spins(c *threadContext) (n uint32) {
	if limit := spinLimit(); t.as.pace.turn() && limit > 0 {
		n = c.spinner.Next(limit)
	}
	if n == 0 {
		c.holder.Turn(t.follower)
		return 0
	}
	c.holder.Free()
	if !t.met {
		t.follower.Avoid()
	}
	return n
}
