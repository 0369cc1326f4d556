package affinity

import "golang.org/x/sys/unix"

// Follower keeps a thread that sleeps on the CPU of whoever is about to wake it and
// to sleep in its turn. It is not safe for concurrent use. Nothing that fails here
// matters.
type Follower struct {
	tid int
	// cpu is the one that the thread may run on, or free; allowed is where it could
	// before.
	cpu     int
	allowed unix.CPUSet
}

// NewFollower returns the Follower of an OS thread, by its id.
func NewFollower(tid int) Follower { return Follower{tid: tid, cpu: free} }

// Follow lets the thread run on the calling thread's CPU only.
func (f *Follower) Follow() {
	cpu, err := CurrentCPU()
	if err != nil || cpu == f.cpu {
		return
	}
	if f.allowed == (unix.CPUSet{}) && unix.SchedGetaffinity(f.tid, &f.allowed) != nil {
		return
	}
	var one unix.CPUSet
	one.Set(cpu)
	if unix.SchedSetaffinity(f.tid, &one) == nil {
		f.cpu = cpu
	}
}

// Following reports whether the thread is kept on a CPU.
func (f *Follower) Following() bool { return f.cpu != free }

// Free lets the thread run where it could before.
func (f *Follower) Free() {
	if f.cpu != free {
		unix.SchedSetaffinity(f.tid, &f.allowed)
		f.cpu = free
	}
}
