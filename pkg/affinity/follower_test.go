package affinity

import (
	"os"
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
	f := NewFollower(os.Getpid(), tid)
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
	f := NewFollower(os.Getpid(), 1<<22-1)
	f.Follow()
	if f.Kept() {
		t.Error("it follows")
	}
	f.cpu.Store(0)
	f.Free()
	if f.Kept() {
		t.Error("it follows after it was set free")
	}
}

// A thread of another process, whose id it has now, is left alone.
func TestFollowerOfAnother(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tid := other(t)
	all := cpusOf(t, tid)
	f := NewFollower(os.Getppid(), tid)
	f.Follow()
	if got := cpusOf(t, tid); f.Kept() || got != all {
		t.Errorf("it follows, and can run on %v", got)
	}
}

// Two threads that join are on one CPU, where the caller is not, and stay there while it
// is not; without another CPU nothing changes.
func TestJoin(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	all := cpusOf(t, 0)
	defer unix.SchedSetaffinity(0, &all)
	f, g := NewFollower(os.Getpid(), other(t)), NewFollower(os.Getpid(), other(t))
	for _, prepare := range []func(){func() {}, g.Avoid, g.Follow, f.Follow, func() {}, f.Free} {
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
			prepare()
			before := [2]unix.CPUSet{cpusOf(t, f.tid), cpusOf(t, g.tid)}
			f.Join(g)
			after := [2]unix.CPUSet{cpusOf(t, f.tid), cpusOf(t, g.tid)}
			switch {
			case all.Count() == 1:
				if after != before {
					t.Fatalf("with one CPU the two could run on %v, and after they join on %v", before, after)
				}
			case after[0] != after[1] || after[0].Count() != 1 || after[0].IsSet(cpu):
				t.Fatalf("the caller is on CPU %d, and those that join can run on %v", cpu, after)
			case before[1].Count() == 1 && !before[1].IsSet(cpu) && after[1] != before[1]:
				t.Fatalf("from %v it was moved to %v", before[1], after[1])
			}
		}
	}
	for _, f := range []*Follower{f, g} {
		if f.Free(); cpusOf(t, f.tid) != all {
			t.Errorf("set free it can run on %v", cpusOf(t, f.tid))
		}
	}
}
