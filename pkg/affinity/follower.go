package affinity

import "golang.org/x/sys/unix"

// Follower keeps a thread that is about to be woken on the CPU of whoever wakes it, if
// that one sleeps then, or on another, if it goes on. It is not safe for concurrent
// use. Nothing that fails here matters.
type Follower struct {
	tid int
	// cpu is the one that the thread may run on, or all but which if away; or free.
	cpu  int
	away bool
	// allowed is where it could run before.
	allowed unix.CPUSet
}

// NewFollower returns the Follower of an OS thread, by its id.
func NewFollower(tid int) Follower { return Follower{tid: tid, cpu: free} }

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

// keep keeps the thread on cpu, or away from it.
func (f *Follower) keep(cpu int, away bool) {
	if cpu == f.cpu && away == f.away {
		return
	}
	if f.allowed == (unix.CPUSet{}) && unix.SchedGetaffinity(f.tid, &f.allowed) != nil {
		return
	}
	var set unix.CPUSet
	set.Set(cpu)
	if away {
		set = f.allowed
		set.Clear(cpu)
	}
	if unix.SchedSetaffinity(f.tid, &set) == nil {
		f.cpu, f.away = cpu, away
	}
}

// Kept reports whether there are CPUs that the thread is kept on, or from.
func (f *Follower) Kept() bool { return f.cpu != free }

// Free lets the thread run where it could before.
func (f *Follower) Free() {
	if f.cpu != free {
		unix.SchedSetaffinity(f.tid, &f.allowed)
		f.cpu = free
	}
}
