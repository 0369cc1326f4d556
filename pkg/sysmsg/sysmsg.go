// Package sysmsg is the protocol by which the Sentry and a stub hand a thread's
// state, a slot of shared memory, to and fro: one word says whose the slot is.
//
//	        stub: event (swap)               Sentry: sleeps (CAS)
//	Sentry <------------------ Stub ------------------> StubSentryWaits
//	| ^  ^                      ^                              |
//	| |  |                      | Sentry: resume (swap)        |
//	| |  +----------------------|------------------------------+
//	| |    stub: event (swap), and it wakes the Sentry
//	| |                         |
//	+-|--> SentryStubWaits -----+
//	| |stub: sleeps (CAS)       |  Sentry: resume (swap), and it wakes the stub
//	| |                         |
//	+-|--> Errand --------------+
//	  +------+
//	Sentry: errand (CAS), stub: goes (CAS)
//
// A stub that looks at the word can be sent on an errand: it does something that was
// agreed upon, and looks again. Anybody in the Sentry may send it, at any time: if the
// slot is given to the stub before it has seen that, it does not go.
//
// A side changes what the other one reads of the slot only while it owns it. It gives
// the slot away with a swap, which also says whether the other side sleeps and must
// be woken; it takes it when it loads a state that says so. Before a side sleeps it
// says so with a compare-and-swap of the state that it has seen, and then sleeps
// with futex(2) as long as the state is that one: the wake-up cannot be lost. All
// accesses of the word are sequentially consistent, so that what was written
// before a slot is given away is seen by the side that takes it: sync/atomic's
// operations here, XCHG, LOCK CMPXCHG and plain loads in a stub on amd64.
//
// The stub's side, which has no Go, is:
//
//	event:
//		if swap(word, Sentry) == StubSentryWaits { futex_wake(word, all) }
//	wait:
//		for a while: if word != Sentry { goto changed }
//		compare_and_swap(word, Sentry, SentryStubWaits)
//	changed:
//		for word == SentryStubWaits { futex_wait(word, SentryStubWaits) }
//		if word == Errand { compare_and_swap(word, Errand, Sentry); errand(); goto wait }
//		if word == Sentry { goto wait }
//
// The application can write the word at any time, and wake those who sleep on
// it. It can make the Sentry take a slot too early, and then see nonsense in it;
// not make it loop: a value that does not belong there is an error, and a Wait
// that nobody ends returns after a time.
//
// It depends on golang.org/x/sys. It must not know what else is in a slot.
package sysmsg

import (
	"errors"
	"sync/atomic"
	"time"
)

// Values of a slot's word.
const (
	// Sentry says that the slot is the Sentry's, and that the stub looks at the
	// word.
	Sentry = 1 + iota
	// SentryStubWaits is Sentry while the stub sleeps.
	SentryStubWaits
	// Stub says that the slot is the stub's, and that the Sentry looks at the word
	// or will do so.
	Stub
	// StubSentryWaits is Stub while the Sentry sleeps.
	StubSentryWaits
	// Errand is Sentry while the stub, which looks at the word, has something else to do
	// first.
	Errand
)

// Outcome is why Wait returned.
type Outcome int

const (
	// TimedOut says that nothing has happened for a time.
	TimedOut Outcome = iota
	// Spun says that the slot is the Sentry's, and that it has not slept for it.
	Spun
	// Slept says that the slot is the Sentry's, after the Sentry has slept.
	Slept
)

// ErrViolation is returned when the word has a value that the stub never gives
// it.
var ErrViolation = errors.New("the state of a shared slot was forged")

// Word is the word of a slot, as the Sentry accesses it.
type Word struct{ ops ops }

// ops are the operations that the protocol is made of.
type ops interface {
	load() uint32
	swap(v uint32) uint32
	cas(old, v uint32) bool
	// spin loads the word until it is not v, at most n times.
	spin(v, n uint32) uint32
	// wait sleeps while the word is v. It may return early, and returns false when
	// it has slept for too long.
	wait(v uint32) bool
	// late sets *woken to now if it is not set, and reports whether that was too long ago.
	late(woken *time.Time) bool
	wake()
}

// NewWord returns the Word at p, in memory that is shared with a stub. Wait
// returns TimedOut after timeout.
func NewWord(p *atomic.Uint32, timeout time.Duration) Word { return Word{&shared{p, timeout}} }

// Init makes a new slot the Sentry's.
func (w Word) Init() { w.ops.swap(Sentry) }

// Resume gives the slot to the stub.
//
// Preconditions: it is the Sentry's.
func (w Word) Resume() {
	if w.ops.swap(Stub) != Sentry {
		w.ops.wake()
	}
}

// Errand sends the stub on an errand, if the slot is the Sentry's and the stub looks at
// the word. It reports whether it did; the stub does not go if Resume comes first.
func (w Word) Errand() bool { return w.ops.cas(Sentry, Errand) }

// Wait waits until the slot is the Sentry's: it looks at the word up to spins
// times, and then sleeps. After TimedOut it may be called again.
func (w Word) Wait(spins uint32) (Outcome, error) {
	outcome, marked := Spun, false
	var woken time.Time
	s := w.ops.spin(Stub, spins)
	for {
		switch {
		case s == Sentry || s == SentryStubWaits || s == Errand:
			return outcome, nil
		case s == Stub && !marked:
			marked = w.ops.cas(Stub, StubSentryWaits)
		case s == StubSentryWaits:
			// From here on only the stub's event changes the word. But the application can
			// wake us for nothing, and do that for ever.
			if outcome == Slept && w.ops.late(&woken) {
				return TimedOut, nil
			}
			outcome, marked = Slept, true
			if !w.ops.wait(s) {
				return TimedOut, nil
			}
		default:
			return 0, ErrViolation
		}
		s = w.ops.load()
	}
}

// Abort makes a Wait that is under way return ErrViolation, unless the stub has
// given the slot away.
func (w Word) Abort() {
	w.ops.swap(0)
	w.ops.wake()
}

// shared implements ops on shared memory.
type shared struct {
	p       *atomic.Uint32
	timeout time.Duration
}

func (s *shared) load() uint32           { return s.p.Load() }
func (s *shared) swap(v uint32) uint32   { return s.p.Swap(v) }
func (s *shared) cas(old, v uint32) bool { return s.p.CompareAndSwap(old, v) }
func (s *shared) wake()                  { FutexWake(s.p) }

func (s *shared) spin(v, n uint32) uint32 { return SpinWhile(s.p, v, n) }

func (s *shared) late(woken *time.Time) bool {
	if woken.IsZero() {
		*woken = time.Now()
	}
	return time.Since(*woken) > s.timeout
}

func (s *shared) wait(v uint32) bool { return FutexWait(s.p, v, s.timeout) }
