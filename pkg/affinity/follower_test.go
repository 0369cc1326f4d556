package affinity

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFollower(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	all := cpusOf(t, 0)
	defer unix.SchedSetaffinity(0, &all)
	tid := other(t)
	f := NewFollower(tid)
	f.Free()
	if f.Kept() || cpusOf(t, tid) != all {
		t.Errorf("at first it can run on %v", cpusOf(t, tid))
	}
	for cpu, left := 0, all.Count(); left > 0; cpu++ {
		if !all.IsSet(cpu) {
			continue
		}
		left--
		var one unix.CPUSet
		one.Set(cpu)
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			t.Fatal(err)
		}
		f.Follow()
		if got := cpusOf(t, tid); got != one || !f.Kept() {
			t.Errorf("it follows a thread on CPU %d, and can run on %v", cpu, got)
		}
		others := all
		others.Clear(cpu)
		if others.Count() == 0 {
			others = one
		}
		f.Avoid()
		if got := cpusOf(t, tid); got != others {
			t.Errorf("it avoids a thread on CPU %d, and can run on %v", cpu, got)
		}
	}
	f.Free()
	if got := cpusOf(t, tid); got != all || f.Kept() {
		t.Errorf("set free it can run on %v", got)
	}
}

// A thread that is gone follows nobody, even if it did before.
func TestFollowerGone(t *testing.T) {
	f := NewFollower(1<<22 - 1)
	f.Follow()
	if f.Kept() {
		t.Error("it follows")
	}
	f.cpu = 0
	f.Free()
	if f.Kept() {
		t.Error("it follows after it was set free")
	}
}
