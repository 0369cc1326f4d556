package affinity

import (
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Once two threads alternate quickly both are pinned to one CPU, and they are set
// free as soon as either runs for longer, or sleeps: other threads must not have to
// wait for that CPU while another is idle. From time to time they are set free in
// any case, to let the scheduler move them.
const (
	// hotPeriod is the most time from one turn to the next that counts as quick.
	hotPeriod = 200 * time.Microsecond
	// HotTurns is after how many quick turns in a row the two are pinned.
	HotTurns = 8
	// pinnedTurns is for how many turns the two stay pinned.
	pinnedTurns = 2000
	// sweepPeriod is how often the sweeper looks for pairs that are no longer
	// quick, and the least time after which it sets them free.
	sweepPeriod = 2 * time.Millisecond
)

// Pair is a thread of ours, the caller, and another one, the callee, that does
// something for it while it waits. Methods are called on the caller, if not said
// otherwise; they do nothing if the Pair is nil. Nothing that fails here matters.
type Pair struct {
	caller, callee int

	// last is when the last turn that counts ended, in nanoseconds since epoch.
	last atomic.Int64
	// quick is how many quick turns there were in a row, HotTurns at most, turns how many
	// since the two were pinned.
	quick, turns int

	// mu guards what follows.
	mu sync.Mutex
	// pinned says that the caller may run on one CPU only.
	pinned bool
	// cpu is the one that the callee may run on, or free.
	cpu atomic.Int32
	// allowed is where both may run when not pinned.
	allowed unix.CPUSet
}

// free is no CPU.
const free = -1

// Disabled switches pinning off, to measure what it gains.
var Disabled bool

var epoch = time.Now()

// New returns the pair of two OS threads, by their ids.
func New(caller, callee int) *Pair {
	p := &Pair{caller: caller, callee: callee}
	p.cpu.Store(free)
	return p
}

// Turn says that a turn has ended, for which each had to wake the other.
func (p *Pair) Turn() {
	if p == nil {
		return
	}
	now := int64(time.Since(epoch))
	if now-p.last.Swap(now) < int64(hotPeriod) {
		p.quick = min(p.quick+1, HotTurns)
	} else {
		p.quick = 0
	}
	p.turns++
}

// Sleep says that the caller is about to wait for something else.
func (p *Pair) Sleep() {
	if p == nil {
		return
	}
	p.quick = 0
	p.ReleaseCaller()
}

// Pin is called before a turn. It reports whether both are on one CPU.
func (p *Pair) Pin() bool {
	switch {
	case p == nil:
		return false
	case p.quick < HotTurns || Disabled:
		p.Release()
		return false
	case p.turns >= pinnedTurns:
		p.quick, p.turns = 0, 0
		p.Release()
		return false
	}
	p.mu.Lock()
	done := p.pinned
	p.mu.Unlock()
	if done {
		return true
	}
	var allowed, one unix.CPUSet
	cpu, err := CurrentCPU()
	if err != nil || unix.SchedGetaffinity(0, &allowed) != nil || allowed.Count() < 2 {
		p.quick = 0
		return false
	}
	cpu = pinned.choose(p, cpu, &allowed)
	one.Set(cpu)
	p.mu.Lock()
	p.allowed = allowed
	if p.cpu.Load() != int32(cpu) && unix.SchedSetaffinity(p.callee, &one) == nil {
		p.cpu.Store(int32(cpu))
	}
	p.pinned = p.cpu.Load() == int32(cpu) && unix.SchedSetaffinity(0, &one) == nil
	done = p.pinned
	p.mu.Unlock()
	p.last.Store(int64(time.Since(epoch)))
	p.turns = 0
	pinned.add(p)
	return done
}

// ReleaseCaller sets the caller free, and leaves the callee where it is until the
// sweeper comes.
func (p *Pair) ReleaseCaller() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.releaseCaller()
}

func (p *Pair) releaseCaller() {
	if p.pinned {
		unix.SchedSetaffinity(p.caller, &p.allowed)
		p.pinned = false
	}
}

// Release sets both free. Any thread may call it.
func (p *Pair) Release() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.releaseCaller()
	if p.cpu.Load() != free {
		unix.SchedSetaffinity(p.callee, &p.allowed)
		p.cpu.Store(free)
	}
}

// Forget makes sure that the threads, whose ids may be used again, are not touched
// any more. Any thread may call it.
func (p *Pair) Forget() {
	if p != nil {
		pinned.forget(p)
	}
}

// pinned are the pairs that may be pinned. Their sweeper lives while there are
// any.
var pinned sweeper

type sweeper struct {
	// mu is taken before a pair's.
	mu    sync.Mutex
	pairs map[*Pair]bool
}

func (s *sweeper) add(p *Pair) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pairs == nil {
		s.pairs = make(map[*Pair]bool)
		go s.run()
	}
	s.pairs[p] = true
}

// choose returns the CPU for self, one of those allowed: the one that the fewest other
// pairs are pinned to, cpu if that is one.
func (s *sweeper) choose(self *Pair, cpu int, allowed *unix.CPUSet) int {
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

func (s *sweeper) forget(p *Pair) {
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
			p.Release()
			delete(s.pairs, p)
		}
	}
	if len(s.pairs) == 0 {
		s.pairs = nil
		return false
	}
	return true
}

// Pinned returns the number of pairs that may be pinned.
func Pinned() int {
	pinned.mu.Lock()
	defer pinned.mu.Unlock()
	return len(pinned.pairs)
}
