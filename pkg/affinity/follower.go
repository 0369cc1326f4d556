package affinity

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Follower keeps a thread that is about to be woken on the CPU of whoever wakes it, if
// that one sleeps then, or on another, if it goes on. Nothing that fails here matters.
type Follower struct {
	pid, tid int

	// cpu is the one that the thread may run on, or all but which if away; or free.
	// It changes while mu is held, which guards the rest.
	cpu  atomic.Int32
	mu   sync.Mutex
	away bool
	// allowed is where it could run before.
	allowed unix.CPUSet
}

// NewFollower returns the Follower of an OS thread, by the ids of its process, which is
// not reaped as long as the Follower is in use, and its own.
func NewFollower(pid, tid int) *Follower {
	f := &Follower{pid: pid, tid: tid}
	f.cpu.Store(free)
	return f
}

// Follow lets the thread run on the calling thread's CPU only.
func (f *Follower) Follow() { f.keepHere(false) }

// Avoid lets the thread run where the calling thread is not. If there is no such CPU,
// it does nothing.
func (f *Follower) Avoid() { f.keepHere(true) }

func (f *Follower) keepHere(away bool) {
	if cpu, err := CurrentCPU(); err == nil {
		f.keep(cpu, away)
	}
}

// Join lets the thread and that of g run on one CPU only, where the calling thread is
// not. If there is no such CPU, it does nothing.
func (f *Follower) Join(g *Follower) {
	if here, err := CurrentCPU(); err == nil {
		if cpu := g.leave(here); cpu != free {
			f.keep(cpu, false)
		}
	}
}

// leave keeps the thread on one CPU that is not here, the same as before if it can be,
// and returns that, or free.
func (f *Follower) leave(here int) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if cpu := int(f.cpu.Load()); cpu != free && !f.away && cpu != here {
		return cpu
	}
	if !f.known() {
		return free
	}
	n := len(f.allowed) * 64
	for i := 1; i < n; i++ {
		if cpu := (here + i) % n; f.allowed.IsSet(cpu) {
			f.set(cpu, false)
			return int(f.cpu.Load())
		}
	}
	return free
}

// keep keeps the thread on cpu, or away from it.
func (f *Follower) keep(cpu int, away bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if cpu != int(f.cpu.Load()) || away != f.away {
		f.set(cpu, away)
	}
}

// known reports whether f.allowed is known.
//
// Preconditions: f.mu is held.
func (f *Follower) known() bool {
	return f.allowed != (unix.CPUSet{}) || unix.SchedGetaffinity(f.tid, &f.allowed) == nil
}

// pin is sched_setaffinity(2). If the thread has died its id may be that of another one.
func (f *Follower) pin(set *unix.CPUSet) error {
	if err := unix.Tgkill(f.pid, f.tid, 0); err != nil {
		return err
	}
	return unix.SchedSetaffinity(f.tid, set)
}

// set is keep, whatever was before.
//
// Preconditions: f.mu is held.
func (f *Follower) set(cpu int, away bool) {
	if !f.known() {
		return
	}
	var set unix.CPUSet
	set.Set(cpu)
	if away {
		set = f.allowed
		set.Clear(cpu)
	}
	if f.pin(&set) == nil {
		f.cpu.Store(int32(cpu))
		f.away = away
	}
}

// Kept reports whether there are CPUs that the thread is kept on, or from.
func (f *Follower) Kept() bool { return f.cpu.Load() != free }

// Free lets the thread run where it could before.
func (f *Follower) Free() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.Kept() {
		f.pin(&f.allowed)
		f.cpu.Store(free)
	}
}
