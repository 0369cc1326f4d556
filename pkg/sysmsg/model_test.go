package sysmsg

import (
	"fmt"
	"iter"
	"testing"
	"time"
)

// This file runs the Sentry's side of the protocol as it is, the stub's side as
// the package comment has it, and if need be an attacker, in every order of their
// accesses of the word that there is.

// model is a slot's word and who sleeps on it.
type model struct {
	word   uint32
	actors []*actor

	// The slot's contents, and who is at it.
	data         int
	stubIn, ours bool
	failure      string
	known        bool // all that follows was looked at before

	// sent is how often the stub was sent on an errand, gone how often it went.
	sent, gone int

	// timeouts is how many sleeps may still time out.
	timeouts int
}

// actor is one side. It stops before each of its accesses.
type actor struct {
	m       *model
	next    func() (struct{}, bool)
	stop    func()
	yield   func(struct{}) bool
	asleep  bool
	timeout bool
	done    bool
	steps   int
	// seen are the results of its accesses: what it does next follows from them.
	seen []uint32
}

// saw notes the result of an access, and returns it.
func (a *actor) saw(v uint32) uint32 {
	a.seen = append(a.seen, v)
	return v
}

// atRound says that what a does next follows from i alone.
func (a *actor) atRound(i int) { a.seen = []uint32{uint32(i)} }

// key is what all that can still happen follows from.
func (m *model) key() string {
	k := fmt.Sprint(m.word, m.timeouts, m.data, m.stubIn, m.ours, m.sent, m.gone)
	for _, a := range m.actors {
		k += fmt.Sprint(a.asleep, a.timeout, a.done, a.seen)
	}
	return k
}

func (m *model) start(f func(a *actor)) {
	a := &actor{m: m}
	a.next, a.stop = iter.Pull(func(yield func(struct{}) bool) {
		a.yield = yield
		defer func() {
			if r := recover(); r != nil && r != errStopped {
				panic(r)
			}
		}()
		f(a)
	})
	m.actors = append(m.actors, a)
	a.run()
}

var errStopped = fmt.Errorf("stopped")

// run lets a make its next access and go on to the one after it.
func (a *actor) run() {
	_, more := a.next()
	a.done = !more
	a.steps++
}

// step is the place before an access.
func (a *actor) step() {
	if !a.yield(struct{}{}) {
		panic(errStopped)
	}
}

func (m *model) fail(format string, args ...any) {
	if m.failure == "" {
		m.failure = fmt.Sprintf(format, args...)
	}
}

// The accesses.

func (a *actor) load() uint32 { a.step(); return a.saw(a.m.word) }

func (a *actor) swap(v uint32) uint32 {
	a.step()
	old := a.m.word
	a.m.word = v
	return a.saw(old)
}

func (a *actor) cas(old, v uint32) bool {
	a.step()
	if a.saw(a.m.word) != old {
		return false
	}
	a.m.word = v
	return true
}

func (a *actor) spin(v, n uint32) uint32 {
	w := a.load()
	for ; w == v && n > 1; n-- {
		w = a.load()
	}
	return w
}

func (a *actor) wait(v uint32) bool {
	a.step()
	if a.saw(a.m.word) != v {
		return true
	}
	a.asleep, a.timeout = true, false
	a.step()
	if a.timeout {
		a.saw(1)
	}
	return !a.timeout
}

func (a *actor) late(*time.Time) bool { return false }

func (a *actor) wake() {
	a.step()
	for _, b := range a.m.actors {
		b.asleep = false
	}
}

// stub is the stub's side: it has an event, and waits for the answer, rounds
// times; the last one it does not wait for.
func stub(a *actor, rounds int, spins uint32) {
	m := a.m
	for i := 0; ; i++ {
		a.atRound(i)
		// A slot is the Sentry's at first, as after an event.
		if i > 0 {
			if m.ours {
				m.fail("the stub has the slot while the Sentry has it")
			}
			if m.data != 2*i-1 {
				m.fail("the stub sees %d in round %d", m.data, i)
			}
			m.data = 2 * i
			m.stubIn = false
			if a.swap(Sentry) == StubSentryWaits {
				a.wake()
			}
			if i == rounds {
				return
			}
		}
	wait:
		s := uint32(Sentry)
		for n := uint32(0); n < spins && s == Sentry; n++ {
			s = a.load()
		}
		if s == Sentry {
			a.cas(Sentry, SentryStubWaits)
			s = a.load()
		}
		for ; s == SentryStubWaits; s = a.load() {
			a.wait(SentryStubWaits)
		}
		if s == Errand {
			a.cas(Errand, Sentry)
			m.gone++
			goto wait
		}
		if s == Sentry {
			goto wait
		}
		m.stubIn = true
	}
}

// sentry is the Sentry's side.
func sentry(a *actor, rounds int, spins uint32) error {
	m := a.m
	w := Word{a}
	for i := range rounds {
		a.atRound(i)
		m.data = 2*i + 1
		m.ours = false
		w.Resume()
		for {
			o, err := w.Wait(spins)
			if err != nil {
				return err
			}
			if o != TimedOut {
				break
			}
		}
		m.ours = true
		if m.stubIn {
			m.fail("the Sentry has the slot while the stub has it")
		}
		if m.data != 2*i+2 {
			m.fail("the Sentry sees %d in round %d", m.data, i)
		}
	}
	return nil
}

// explore runs setup's actors in every order, and calls check at the end of each:
// when nobody can go on. What can follow from a state is looked at once. It
// returns how many states there are.
func explore(t *testing.T, setup func(m *model), check func(m *model)) int {
	t.Helper()
	// path are the choices of the current run, width how many there were.
	var path, width []int
	states := make(map[string]bool)
	for {
		m := &model{word: Sentry}
		setup(m)
		for depth := 0; ; depth++ {
			var can []func()
			for _, a := range m.actors {
				switch {
				case a.done:
				case !a.asleep:
					can = append(can, a.run)
				case m.timeouts > 0:
					can = append(can, func() { m.timeouts--; a.asleep, a.timeout = false, true; a.run() })
				}
			}
			if len(can) == 0 || m.failure != "" {
				break
			}
			if depth > 400 {
				m.fail("does not end")
				break
			}
			if depth == len(path) {
				k := m.key()
				if states[k] {
					m.known = true
					break
				}
				states[k] = true
				path, width = append(path, 0), append(width, len(can))
			}
			can[path[depth]]()
		}
		if !m.known {
			check(m)
		}
		for _, a := range m.actors {
			a.stop()
		}
		if m.failure != "" {
			t.Fatalf("%s, after %v", m.failure, path)
		}
		for len(path) > 0 && path[len(path)-1]+1 == width[len(path)-1] {
			path, width = path[:len(path)-1], width[:len(width)-1]
		}
		if len(path) == 0 {
			return len(states)
		}
		path[len(path)-1]++
	}
}

// In no order do both sides have the slot, is something not seen, or do both sleep
// for ever.
func TestEveryInterleaving(t *testing.T) {
	for _, timeouts := range []int{0, 2} {
		testEveryInterleaving(t, timeouts)
	}
}

func testEveryInterleaving(t *testing.T, timeouts int) {
	for _, spins := range []uint32{0, 1, 2} {
		for rounds := 1; rounds <= 3; rounds++ {
			states := explore(t, func(m *model) {
				m.ours, m.timeouts = true, timeouts
				m.start(func(a *actor) { stub(a, rounds, spins) })
				m.start(func(a *actor) {
					if err := sentry(a, rounds, spins); err != nil {
						m.fail("%v", err)
					}
				})
			}, func(m *model) {
				for i, a := range m.actors {
					if !a.done {
						m.fail("actor %d sleeps for ever, the word is %d", i, m.word)
					}
				}
			})
			t.Logf("%d rounds, spinning %d times: %d states", rounds, spins, states)
		}
	}
}

// The same while somebody sends the stub on errands: it goes at most as often as it is
// sent, and each time if nobody resumes it.
func TestErrands(t *testing.T) {
	for _, spins := range []uint32{0, 1, 2} {
		for rounds := range 3 {
			went := 0
			states := explore(t, func(m *model) {
				m.ours = true
				m.start(func(a *actor) { stub(a, rounds+1, spins) })
				m.start(func(a *actor) {
					if err := sentry(a, rounds, spins); err != nil {
						m.fail("%v", err)
					}
				})
				m.start(func(a *actor) {
					for range 2 {
						if (Word{a}).Errand() {
							m.sent++
						}
					}
				})
			}, func(m *model) {
				for i, a := range m.actors[1:] {
					if !a.done {
						m.fail("actor %d sleeps for ever, the word is %d", i+1, m.word)
					}
				}
				if m.gone > m.sent || rounds == 0 && m.gone != m.sent {
					m.fail("the stub was sent on %d errands, and went on %d", m.sent, m.gone)
				}
				if !m.actors[0].asleep {
					m.fail("the stub does not wait at the end, the word is %d", m.word)
				}
				went = max(went, m.gone)
			})
			t.Logf("%d rounds, spinning %d times: %d states, %d errands at most", rounds, spins, states, went)
			if went != 2 {
				t.Errorf("%d rounds, spinning %d times: %d errands at most", rounds, spins, went)
			}
		}
	}
}

// The same while somebody wakes both without cause.
func TestSpuriousWakeUps(t *testing.T) {
	states := explore(t, func(m *model) {
		m.ours = true
		m.start(func(a *actor) { stub(a, 2, 0) })
		m.start(func(a *actor) {
			if err := sentry(a, 2, 0); err != nil {
				m.fail("%v", err)
			}
		})
		m.start(func(a *actor) { a.wake() })
	}, func(m *model) {
		for i, a := range m.actors {
			if !a.done {
				m.fail("actor %d sleeps for ever, the word is %d", i, m.word)
			}
		}
	})
	t.Logf("%d states", states)
}

// Whatever is written to the word, and whenever: the Sentry gets the slot, or an
// error, or sleeps until its time is over. It never loops.
func TestForgery(t *testing.T) {
	values := []uint32{0, Sentry, SentryStubWaits, Stub, StubSentryWaits, Errand, 6, 1 << 31}
	states := 0
	for _, x := range values {
		for _, y := range values {
			states += explore(t, func(m *model) {
				m.start(func(a *actor) {
					w := Word{a}
					for range 2 {
						w.Resume()
						if _, err := w.Wait(1); err != nil {
							return
						}
					}
				})
				m.start(func(a *actor) {
					a.swap(x)
					a.wake()
					a.swap(y)
					a.wake()
				})
			}, func(m *model) {
				// Eight accesses for a wait, and what two changes may add.
				if a := m.actors[0]; a.steps > 30 {
					m.fail("the Sentry has made %d accesses", a.steps)
				}
			})
		}
	}
	t.Logf("%d states", states)
}

// A Wait is over once it is aborted, at whatever moment.
func TestAbort(t *testing.T) {
	explore(t, func(m *model) {
		m.word = Stub
		m.start(func(a *actor) {
			if _, err := (Word{a}).Wait(1); err != ErrViolation {
				m.fail("Wait: %v", err)
			}
		})
		m.start(func(a *actor) { Word{a}.Abort() })
	}, func(m *model) {
		if !m.actors[0].done {
			m.fail("Wait sleeps on after Abort, the word is %d", m.word)
		}
	})
}

// The checker finds what is broken: a sleep that is not announced, and a wake-up
// that is left out.
func TestCheckerFinds(t *testing.T) {
	for _, broken := range []string{"announce", "wake"} {
		found := false
		explore(t, func(m *model) {
			m.start(func(a *actor) {
				if a.swap(Sentry) == StubSentryWaits && broken != "wake" {
					a.wake()
				}
			})
			m.word = Stub
			m.start(func(a *actor) {
				for s := a.load(); s == Stub || s == StubSentryWaits; s = a.load() {
					if broken == "announce" {
						// The word may change between this and the sleep.
						a.step()
						a.asleep = true
						a.step()
						continue
					}
					a.cas(Stub, StubSentryWaits)
					a.wait(StubSentryWaits)
				}
			})
		}, func(m *model) { found = found || !m.actors[1].done })
		if !found {
			t.Errorf("without %q nobody sleeps for ever", broken)
		}
	}
}
