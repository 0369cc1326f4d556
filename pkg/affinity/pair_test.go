package affinity

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// other starts an OS thread that does nothing, and returns its id. It ends with the test,
// since it may be left on one CPU.
func other(t *testing.T) int {
	t.Helper()
	id, done := make(chan int), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		id <- unix.Gettid()
		<-done
	}()
	t.Cleanup(func() { close(done) })
	return <-id
}

func cpusOf(t *testing.T, tid int) (set unix.CPUSet) {
	t.Helper()
	if err := unix.SchedGetaffinity(tid, &set); err != nil {
		t.Fatal(err)
	}
	return set
}

// heat has p pinned. A machine that stops for long may need several attempts.
func heat(t *testing.T, p *Pair) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; {
		for range HotTurns + 1 {
			p.Turn()
		}
		if p.Pin() {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("it is never pinned")
		}
	}
}

func TestPair(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	self, callee := unix.Gettid(), other(t)
	all := cpusOf(t, self)
	p := New(self, callee)
	if p.Pin() {
		t.Error("pinned before its first turn")
	}
	if all.Count() < 2 {
		for range HotTurns + 1 {
			p.Turn()
		}
		if p.Pin() {
			t.Error("pinned, although there is one CPU")
		}
		return
	}
	heat(t, p)
	if one := cpusOf(t, self); one.Count() != 1 || cpusOf(t, callee) != one {
		t.Errorf("pinned, the caller can run on %v and the callee on %v", one, cpusOf(t, callee))
	}
	p.Sleep()
	if got := cpusOf(t, self); got != all {
		t.Errorf("asleep, the caller can run on %v", got)
	}
	if p.Pin() {
		t.Error("pinned although it has just slept")
	}
	if got := cpusOf(t, callee); got != all {
		t.Errorf("no longer pinned, the callee can run on %v", got)
	}
	heat(t, p)
	for deadline := time.Now().Add(30 * time.Second); Pinned() > 0; time.Sleep(sweepPeriod) {
		if time.Now().After(deadline) {
			t.Fatal("the sweeper leaves a pair pinned")
		}
	}
	if a, b := cpusOf(t, self), cpusOf(t, callee); a != all || b != all {
		t.Errorf("after the sweeper they can run on %v and %v", a, b)
	}
	heat(t, p)
	for range pinnedTurns {
		p.Turn()
	}
	if p.Pin() {
		t.Error("pinned for ever")
	}
	heat(t, p)
	p.Release()
	p.Forget()
	if a, b := cpusOf(t, self), cpusOf(t, callee); a != all || b != all || Pinned() != 0 {
		t.Errorf("released, they can run on %v and %v; %d are pinned", a, b, Pinned())
	}
	var none *Pair
	none.Turn()
	none.Sleep()
	none.Release()
	none.Forget()
	if none.Pin() {
		t.Error("no pair is pinned")
	}
}
