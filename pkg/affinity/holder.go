package affinity

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Holder keeps the calling thread where it is while it alternates with one that
// follows it: the scheduler wakes a thread on an idle CPU if there is one. The zero
// value holds nothing. It is not safe for concurrent use: one goroutine calls its
// methods. Nothing that fails here matters.
type Holder struct {
	// turns are those since the thread was last set free.
	turns int
	held  bool
	// tid is the thread, cpu where it is held, allowed where it could run before.
	tid     int
	cpu     int
	allowed unix.CPUSet
}

const (
	// heldAfter is after how many turns the thread is held: it costs as much as a turn
	// and a half, twice.
	heldAfter = 4
	// heldTurns is how many turns later it is set free in any case, to let the
	// scheduler move it.
	heldTurns = 500
)

// Turn says that the calling thread is about to wait for the one of f, which is made to
// follow it. While it is held the goroutine is locked to it.
func (h *Holder) Turn(f *Follower) {
	h.turns++
	switch {
	case h.held && h.turns > heldAfter+heldTurns:
		h.Free()
	case !h.held && h.turns >= heldAfter:
		h.hold()
	}
	if h.held {
		f.keep(h.cpu, false)
	} else {
		f.Follow()
	}
}

func (h *Holder) hold() {
	runtime.LockOSThread()
	h.tid = unix.Gettid()
	cpu, err := CurrentCPU()
	if err == nil {
		err = unix.SchedGetaffinity(h.tid, &h.allowed)
	}
	if err == nil {
		var one unix.CPUSet
		one.Set(cpu)
		err = unix.SchedSetaffinity(h.tid, &one)
	}
	h.cpu = cpu
	if h.held = err == nil; !h.held {
		runtime.UnlockOSThread()
		h.turns = 0
	}
}

// Free lets the thread run where it could before.
func (h *Holder) Free() {
	h.turns = 0
	if h.held {
		unix.SchedSetaffinity(h.tid, &h.allowed)
		runtime.UnlockOSThread()
		h.held = false
	}
}
