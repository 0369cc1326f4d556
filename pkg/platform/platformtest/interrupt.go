package platformtest

import (
	"runtime"
	"sync/atomic"
	"time"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

var interruptSubjects = []subject{
	{"Before", testInterruptBefore},
	{"During", testInterruptDuring},
	{"Between", testInterruptBetween},
	{"Unused", testInterruptUnused},
	{"NotLostSpinning", func(t *T) { testInterruptNotLost(t, progBeat) }},
	{"NotLostInSyscalls", func(t *T) { testInterruptNotLost(t, progCount) }},
	{"NotLostInFaults", func(t *T) { testInterruptNotLost(t, progIllegal) }},
	{"SyscallsNotLost", testSyscallsNotLost},
	{"Storm", testInterruptStorm},
	{"SingleStepping", testInterruptSingleStepping},
}

// Interrupt before the first Switch: that returns at once and runs nothing.
func testInterruptBefore(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	for _, prog := range []program{progSpin, progCount, progIllegal} {
		th := sp.newThread(prog, uint64(dataBase))
		want := th.ac.Fork()
		th.c.Interrupt()
		if e := th.switchOnce(); e.err != platform.ErrContextInterrupt {
			t.Fatalf("after Interrupt, Switch returned %v", e)
		}
		th.pull()
		if th.ac.IP() != want.IP() {
			t.Errorf("the interrupted Switch moved IP from %#x to %#x", want.IP(), th.ac.IP())
		}
	}
	// Several at once may count as one, and must not count for ever.
	th := sp.newThread(progCount)
	for range 10 {
		th.c.Interrupt()
	}
	if e := th.switchOnce(); e.err != platform.ErrContextInterrupt {
		t.Fatalf("after 10 Interrupts, Switch returned %v", e)
	}
	th.report()
}

func testInterruptDuring(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progBeat, uint64(dataBase))
	for range 50 {
		events := make(chan event, 1)
		t.worker(func() { events <- th.switchOnce() })
		t.beating(sp.data, 0)
		th.c.Interrupt()
		if e := t.receive(events); e.err != platform.ErrContextInterrupt {
			t.Fatalf("got %v instead of the interrupt", e)
		}
		v := sp.data.load(0)
		runtime.Gosched()
		if sp.data.load(0) != v {
			t.Fatalf("the thread runs on after Switch has returned")
		}
	}
}

// Interrupt while the Sentry handles a system call.
func testInterruptBetween(t *T) {
	th := t.newSpace().newThread(progCount)
	for i := range uint64(50) {
		if a := th.report(); a[0] != i+1 || i > 0 && a[1] != i {
			t.Fatalf("call %d with last result %d, want %d and %d", a[0], a[1], i+1, i)
		}
		th.ac.SetReturn(uintptr(i + 1))
		th.c.Interrupt()
		if e := th.switchOnce(); e.err != platform.ErrContextInterrupt {
			t.Fatalf("round %d: after Interrupt, Switch returned %v", i, e)
		}
	}
}

// A Context that never ran is interrupted and released.
func testInterruptUnused(t *T) {
	sp := t.newSpace()
	for range 20 {
		th := sp.newThread(progSpin)
		th.c.Interrupt()
		th.c.Interrupt()
		th.release()
	}
	th := sp.newThread(progCount)
	th.report()
	th.c.Interrupt()
	th.release()
}

// Every Interrupt is followed by an ErrContextInterrupt, whatever the thread
// does.
func testInterruptNotLost(t *T, prog program) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(prog, uint64(dataBase))
	var seen atomic.Uint64
	var stopping atomic.Bool
	done := th.run(func(e event) bool {
		if e.err == platform.ErrContextInterrupt {
			seen.Add(1)
		}
		return stopping.Load()
	})
	rnd := random(50)
	for range 300 {
		before := seen.Load()
		th.c.Interrupt()
		t.until(func() bool { return seen.Load() != before })
		for range rnd.IntN(20) {
			runtime.Gosched()
		}
	}
	stopping.Store(true)
	th.halt(done)
}

// Interrupts come at any moment, and each system call is still seen once, with
// the result of the one before.
func testSyscallsNotLost(t *T) {
	th := t.newSpace().newThread(progCount)
	stop := make(chan struct{})
	rnd := random(51)
	done := t.worker(func() {
		for {
			select {
			case <-stop:
				return
			case <-t.failed:
				return
			default:
			}
			th.c.Interrupt()
			for range rnd.IntN(100) {
				runtime.Gosched()
			}
		}
	})
	for i := uint64(1); i <= 2000; {
		e := th.switchOnce()
		if e.err == platform.ErrContextInterrupt {
			continue
		}
		if e.err != nil {
			t.Fatalf("got %v", e)
		}
		if a := th.args(); a[0] != i || i > 1 && a[1] != i-1 {
			t.Fatalf("call %d with last result %d, want %d and %d", a[0], a[1], i, i-1)
		}
		if i%16 == 0 {
			th.pull()
		}
		th.ac.SetReturn(uintptr(i))
		i++
	}
	close(stop)
	t.wait(done)
}

// Many goroutines interrupt one Context as fast as they can; when it is over,
// nothing of it is left.
func testInterruptStorm(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progBeat, uint64(dataBase))
	other := sp.newThread(progCount)
	var running atomic.Int64
	for range 8 {
		running.Add(1)
		t.worker(func() {
			defer running.Add(-1)
			for range 500 {
				th.c.Interrupt()
				runtime.Gosched()
			}
		})
	}
	done := th.run(func(e event) bool {
		if e.err != platform.ErrContextInterrupt {
			t.Fatalf("got %v", e)
		}
		return running.Load() == 0
	})
	for i := uint64(1); i <= 200; i++ {
		if a := other.report(); a[0] != i {
			t.Fatalf("the other Context is at call %d, want %d", a[0], i)
		}
	}
	th.halt(done)
	th.start(progCount, 0)
	interrupts := 0
	for i := uint64(1); i <= 20; {
		switch e := th.switchOnce(); {
		case e.err == nil:
			if a := th.args(); a[0] != i {
				t.Fatalf("call %d, want %d", a[0], i)
			}
			i++
		case e.err == platform.ErrContextInterrupt && interrupts < 10:
			interrupts++
		default:
			t.Fatalf("got %v after %d interrupts although the storm is over", e, interrupts)
		}
	}
}

// Interrupts of a thread that single-steps neither skip a step nor make one.
func testInterruptSingleStepping(t *T) {
	th := t.newSpace().newThread(progNops)
	base := t.s.text.addr(progNops)
	stop := make(chan struct{})
	done := t.worker(func() {
		for !t.over() {
			select {
			case <-stop:
				return
			default:
				th.c.Interrupt()
				time.Sleep(20 * time.Microsecond)
			}
		}
	})
	for range 20 {
		th.start(progNops)
		th.edit(func(ac *arch.Context64) { ac.SetSingleStep() })
		for i := range numNops - 1 {
			var e event
			for {
				if e = th.switchOnce(); e.err != platform.ErrContextInterrupt {
					break
				}
			}
			if got, want := th.ac.IP(), base+uintptr(i+1)*nopLen; e.signal() != linux.SIGTRAP || got != want {
				t.Fatalf("step %d: got %v at IP %#x, want SIGTRAP at %#x", i, e, got, want)
			}
		}
	}
	close(stop)
	t.wait(done)
}
