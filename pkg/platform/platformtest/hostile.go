package platformtest

import (
	"time"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// hostileSubjects: the application does its worst. Whatever it does is a signal
// or a ContextError for its own Context; others go on.
var hostileSubjects = []subject{
	{"WildStackPointer", testWildStackPointer},
	{"WildIP", testWildIP},
	{"RandomCode", testRandomCode},
	{"RandomRegisters", testRandomRegisters},
	{"RandomFloatingPoint", testRandomFloatingPoint},
}

// wildAddrs are addresses that an application may have in a register but that
// are nobody's.
func wildAddrs() []uint64 {
	return []uint64{0, 1, 7, 4095, 1 << 31, 1 << 46, 1<<47 - 4096, 1<<47 - 1, 1 << 47, 1<<47 + 1, 0xdeadbeefdeadbeef, kernelAddr, 1<<63 - 1, 1 << 63, ^uint64(0) - 4095, ^uint64(0) - 7, ^uint64(0)}
}

// witness is a Context that must go on whatever others do.
type witness struct {
	*thread
	calls uint64
}

func (sp *space) newWitness() *witness { return &witness{thread: sp.newThread(progCount)} }

func (w *witness) check(after string) {
	w.t.Helper()
	w.calls++
	if a := w.report(); a[0] != w.calls {
		w.t.Fatalf("after %s the other Context is at call %d, want %d", after, a[0], w.calls)
	}
}

// The stack pointer is a register like others to code that uses no stack.
func testWildStackPointer(t *T) {
	sp := t.newSpace()
	th, w := sp.newThread(progCount), sp.newWitness()
	for _, v := range wildAddrs() {
		th.edit(func(ac *arch.Context64) {
			ac.SetIP(t.s.text.addr(progSyscall))
			ac.SetStack(uintptr(v))
		})
		th.syscall()
		th.pull()
		if got := th.ac.Stack(); got != uintptr(v) {
			t.Fatalf("the stack pointer is %#x after a system call, was %#x", got, v)
		}
		th.edit(func(ac *arch.Context64) { ac.SetIP(t.s.text.addr(progIllegal)) })
		if e := th.next(); e.signal() == 0 {
			t.Fatalf("with the stack pointer %#x an illegal instruction gives %v", v, e)
		}
		th.edit(func(ac *arch.Context64) { ac.SetIP(t.s.text.addr(progSpin)) })
		th.interruptUntil(1, func() {})
		w.check("a wild stack pointer")
	}
}

func testWildIP(t *T) {
	sp := t.newSpace()
	th, w := sp.newThread(progCount), sp.newWitness()
	for _, v := range wildAddrs() {
		th.start(progJump, v)
		if e := th.next(); e.signal() == 0 {
			t.Fatalf("a jump to %#x gives %v", v, e)
		}
		// The Sentry sets it: the handler of a signal may be anywhere.
		th.edit(func(ac *arch.Context64) { ac.SetIP(uintptr(v)) })
		if e := th.next(); e.signal() == 0 && e.contextError() == nil {
			t.Fatalf("IP %#x gives %v", v, e)
		} else if e.contextError() != nil {
			t.Logf("IP %#x gives %v", v, e)
			th = sp.newThread(progCount)
		}
		w.check("a wild IP")
	}
}

// bounded runs th for one event and interrupts it every millisecond, as a Sentry
// does with a timer.
func (th *thread) bounded() event {
	th.t.Helper()
	stop := make(chan struct{})
	done := th.t.worker(func() {
		for {
			select {
			case <-stop:
				return
			case <-th.t.failed:
				return
			case <-time.After(time.Millisecond):
				th.c.Interrupt()
			}
		}
	})
	e := th.switchOnce()
	close(stop)
	<-done
	return e
}

// hostileRounds bounds the random tests.
const hostileRounds = 150

func testRandomCode(t *T) {
	sp := t.newSpace()
	w := sp.newWitness()
	// Its own space for each few rounds: code may well spoil its own memory.
	victim := t.newSpace()
	other := victim.newWitness()
	f := t.newFile(2 * pageSize)
	victim.mustMap(dataBase, f, 0, 2*pageSize, hostarch.AnyAccess)
	th := victim.newThread(progCount)
	rnd := random(60)
	for i := range hostileRounds {
		for j := range f.data {
			f.data[j] = byte(rnd.Uint32())
		}
		th.edit(func(ac *arch.Context64) {
			randomRegs(ac, rnd)
			for j, r := range generalRegs(ac) {
				if rnd.IntN(2) == 0 && j < 8 {
					*r.v = uint64(dataBase) + rnd.Uint64N(2*pageSize)
				}
			}
			ac.SetStack(uintptr(dataBase + pageSize))
			ac.SetIP(uintptr(dataBase) + uintptr(rnd.UintN(pageSize)))
		})
		for range 5 {
			if e := th.bounded(); e.contextError() != nil {
				t.Fatalf("round %d: random code got its Context %v", i, e)
			}
		}
		w.check("random code in another AddressSpace")
		other.check("random code in the same AddressSpace")
		if i%10 == 9 {
			// It may have changed what arch.New gives: selectors, for one.
			th.pull()
			th.ac = arch.New()
			th.ac.SetIP(t.s.text.addr(progCount))
			th.c.FullStateChanged()
			th.report()
		}
	}
}

// tryState runs a state that the Sentry made, which may not be possible: the
// thread gets a signal, an error or nothing, and nobody else notices.
func (sp *space) tryState(w *witness, name string, change func(ac *arch.Context64)) event {
	sp.t.Helper()
	th := sp.newThread(progCount)
	th.report()
	th.edit(change)
	e := th.bounded()
	w.check(name)
	if e.contextError() == nil {
		// The Context must be fit for a good state again.
		th.pull()
		th.ac = arch.New()
		th.ac.SetIP(sp.t.s.text.addr(progCount))
		th.c.FullStateChanged()
		if a := th.report(); a[0] != 1 {
			sp.t.Fatalf("after %s the Context makes call %d with a new state, want 1", name, a[0])
		}
	}
	th.release()
	return e
}

func testRandomRegisters(t *T) {
	sp := t.newSpace()
	w := sp.newWitness()
	rnd := random(61)
	for range hostileRounds {
		sp.tryState(w, "random registers", func(ac *arch.Context64) {
			scrambleRegs(ac, rnd)
			if rnd.IntN(2) == 0 {
				ac.SetIP(sp.t.s.text.addr(progCount))
			}
		})
	}
}

func testRandomFloatingPoint(t *T) {
	sp := t.newSpace()
	w := sp.newWitness()
	rnd := random(62)
	for i := range hostileRounds {
		e := sp.tryState(w, "random floating point state", func(ac *arch.Context64) {
			fp := ac.FloatingPointData()
			switch i % 3 {
			case 0:
				for j := range fp {
					fp[j] = byte(rnd.Uint32())
				}
			case 1:
				for j := range fp {
					fp[j] = 0xff
				}
			default:
				for range 4 {
					fp[rnd.IntN(len(fp))] ^= byte(rnd.Uint32())
				}
			}
		})
		if e.err == platform.ErrContextCPUPreempted {
			t.Fatalf("got %v", e)
		}
	}
}
