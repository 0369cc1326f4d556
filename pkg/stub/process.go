package stub

import (
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Process is a stub that several goroutines use, until it is released, or given up
// because something failed. It is safe for concurrent use.
type Process struct {
	// Zygote is the one that the stub was cloned off.
	Zygote *Zygote
	// PID is the process's id.
	PID int

	// killed is called after a SIGKILL was sent, with mu held, to wake those who
	// wait for the stub.
	killed func()

	// users is the number of goroutines between Enter and Leave. gone says that dead is
	// set. Enter and Leave are part of every system call: no lock is taken there.
	users atomic.Int64
	gone  atomic.Bool

	mu sync.Mutex
	// quiet is signalled when there are no users, if gone.
	quiet sync.Cond
	// dead is why the stub was given up, or that it was released.
	dead     error
	released bool
	reaped   bool
}

// NewProcess returns the stub pid, which Zygote.Fork has returned.
func NewProcess(z *Zygote, pid int, killed func()) *Process {
	p := &Process{Zygote: z, PID: pid, killed: killed}
	p.quiet.L = &p.mu
	return p
}

// Enter keeps the stub from being reaped until Leave. It returns an error if it was
// released or given up.
func (p *Process) Enter() error {
	p.users.Add(1)
	if p.gone.Load() {
		p.Leave()
		return p.Err()
	}
	return nil
}

// Leave ends what Enter began.
func (p *Process) Leave() {
	if p.users.Add(-1) == 0 && p.gone.Load() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.quiet.Broadcast()
	}
}

// Err returns why the stub was given up, or that it was released, or nil.
func (p *Process) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dead
}

// Fail kills the stub and gives it up because of err, unless it was before, and
// returns the reason.
func (p *Process) Fail(err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.giveUp(err)
	p.kill()
	return p.dead
}

// giveUp makes err the reason, unless there is one. mu is held.
func (p *Process) giveUp(err error) bool {
	if p.dead != nil {
		return false
	}
	p.dead = err
	p.gone.Store(true)
	return true
}

// FailKilled is Fail because the process has ended. status is that of wait4(2).
func (p *Process) FailKilled(status unix.WaitStatus) error {
	if status.Signaled() {
		sig := status.Signal()
		return p.Fail(fmt.Errorf("stub process %d was killed by signal %d (%v): %w", p.PID, int(sig), sig, unix.ESRCH))
	}
	return p.Fail(fmt.Errorf("stub process %d exited with status %d: %w", p.PID, status.ExitStatus(), unix.ESRCH))
}

// Kill kills the stub: nothing that is waited for in it goes on for long.
func (p *Process) Kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.kill()
}

func (p *Process) kill() {
	if p.reaped {
		return // The id may be that of another process.
	}
	Kill(p.PID)
	if p.killed != nil {
		p.killed()
	}
}

// Retire makes Enter fail from now on. first says that this was not done before:
// it is then up to the caller to kill the process and to Reap it. If intact, the stub
// was neither given up nor in use, and was not killed; otherwise it was killed, and
// Retire has waited until nobody uses it.
func (p *Process) Retire() (first, intact bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.released {
		return false, false
	}
	p.released = true
	// Whoever enters from here on leaves at once.
	intact = p.giveUp(fmt.Errorf("the AddressSpace was released: %w", unix.ESRCH)) && p.users.Load() == 0
	if intact {
		return true, true
	}
	p.kill()
	for p.users.Load() > 0 {
		p.quiet.Wait()
	}
	return true, false
}

// Reap waits for the end of the process, which was killed and all of whose traced
// threads were reaped.
func (p *Process) Reap() {
	p.mu.Lock()
	p.reaped = true
	p.mu.Unlock()
	p.Zygote.Release(p.PID)
}
