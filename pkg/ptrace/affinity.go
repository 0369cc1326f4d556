package ptrace

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/affinity"
)

// A tracer and its thread never run at the same time, so they are best off on
// one CPU: waking a thread on an idle one takes several times as long as a switch
// between two on the same. Linux's scheduler does the opposite. RATIONALE.md has
// the figures.
//
// So once the two alternate quickly both are pinned to the CPU that they are on,
// and they are set free as soon as either runs for longer, or sleeps: other
// threads must not have to wait for that CPU while another is idle. From time to
// time they are set free in any case, to let the scheduler move them.
const (
	// hotPeriod is the most time from one return of Switch to the next that counts
	// as quick.
	hotPeriod = 200 * time.Microsecond
	// hotCount is how many quick ones in a row there must be.
	hotCount = 8
	// pinnedCount is for how many the two stay pinned.
	pinnedCount = 2000
	// sweepPeriod is how often the sweeper looks for pairs that are no longer
	// quick, and the least time after which it sets them free.
	sweepPeriod = 2 * time.Millisecond
)

// pair is a tracing OS thread and the thread that it traces. Its methods but
// release are called on the former.
type pair struct {
	tracer, tracee int

	// last is when Switch last returned, in nanoseconds since epoch.
	last atomic.Int64
	// quick is the number of quick returns in a row.
	quick int

	// mu guards what follows.
	mu sync.Mutex
	// pinned says that the tracer may run on one CPU only.
	pinned bool
	// cpu is the one that the tracee may run on, or free.
	cpu atomic.Int32
	// allowed is where both may run when not pinned.
	allowed unix.CPUSet
}

// free is no CPU.
const free = -1

// pinning is switched off to measure what it gains.
var pinning = true

var epoch = time.Now()

// returned says that Switch is about to return.
func (p *pair) returned() {
	now := int64(time.Since(epoch))
	if now-p.last.Swap(now) < int64(hotPeriod) {
		p.quick++
	} else {
		p.quick = 0
	}
}

// pin is called before the tracee runs.
func (p *pair) pin() {
	switch {
	case p.quick < hotCount || !pinning:
		p.release()
		return
	case p.quick >= pinnedCount:
		p.quick = 0
		p.release()
		return
	}
	p.mu.Lock()
	done := p.pinned
	p.mu.Unlock()
	if done {
		return
	}
	var allowed, one unix.CPUSet
	cpu, err := affinity.CurrentCPU()
	if err != nil || unix.SchedGetaffinity(0, &allowed) != nil || allowed.Count() < 2 {
		p.quick = 0
		return
	}
	cpu = pinned.leastUsed(p, cpu, &allowed)
	one.Set(cpu)
	// None of this has to succeed.
	p.mu.Lock()
	p.allowed = allowed
	if p.cpu.Load() != int32(cpu) && unix.SchedSetaffinity(p.tracee, &one) == nil {
		p.cpu.Store(int32(cpu))
	}
	p.pinned = p.cpu.Load() == int32(cpu) && unix.SchedSetaffinity(0, &one) == nil
	p.mu.Unlock()
	p.last.Store(int64(time.Since(epoch)))
	pinned.add(p)
}

// releaseTracer sets the tracer free, and leaves the tracee where it is until the
// sweeper comes.
func (p *pair) releaseTracer() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.unpinTracer()
}

func (p *pair) unpinTracer() {
	if p.pinned {
		unix.SchedSetaffinity(p.tracer, &p.allowed)
		p.pinned = false
	}
}

// release sets both free.
func (p *pair) release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.unpinTracer()
	if p.cpu.Load() != free {
		unix.SchedSetaffinity(p.tracee, &p.allowed)
		p.cpu.Store(free)
	}
}

// pinned are the pairs that may be pinned. Their sweeper lives while there are
// any.
var pinned sweeper

type sweeper struct {
	// mu is taken before a pair's.
	mu    sync.Mutex
	pairs map[*pair]bool
}

func (s *sweeper) add(p *pair) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pairs == nil {
		s.pairs = make(map[*pair]bool)
		go s.run()
	}
	s.pairs[p] = true
}

// leastUsed returns the one of the allowed CPUs that the fewest pairs other than
// self are pinned to, cpu if that is one.
func (s *sweeper) leastUsed(self *pair, cpu int, allowed *unix.CPUSet) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pairs) == 0 || len(s.pairs) == 1 && s.pairs[self] {
		return cpu
	}
	used := make(map[int]int)
	for p := range s.pairs {
		if p != self {
			used[int(p.cpu.Load())]++
		}
	}
	best := cpu
	for i, left := 0, allowed.Count(); left > 0 && used[best] > 0; i++ {
		if allowed.IsSet(i) {
			left--
			if used[i] < used[best] {
				best = i
			}
		}
	}
	return best
}

// forget makes sure that p's threads, whose numbers may be used again, are not
// touched.
func (s *sweeper) forget(p *pair) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pairs, p)
}

func (s *sweeper) run() {
	for s.sweep(int64(time.Since(epoch) - sweepPeriod)) {
		time.Sleep(sweepPeriod)
	}
}

// sweep sets free what has not been quick since the given time. It returns false
// when nothing is left.
func (s *sweeper) sweep(since int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for p := range s.pairs {
		if p.last.Load() < since {
			p.release()
			delete(s.pairs, p)
		}
	}
	if len(s.pairs) == 0 {
		s.pairs = nil
		return false
	}
	return true
}
