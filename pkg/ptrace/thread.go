package ptrace

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/affinity"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/stub"
)

// thread is a thread of a stub process, traced by one OS thread of ours: all
// methods must be called from that. Between calls it is stopped.
type thread struct {
	as  *addressSpace
	tid int

	// owner is the Context whose floating point state the thread has, if any, and
	// lazy the one that may have state nowhere else.
	owner, lazy *threadContext

	// inSyscall says that the thread is stopped for a system call that it has made.
	inSyscall bool

	pair *affinity.Pair

	// gone says that the thread has ended and was reaped.
	gone bool
}

// Options of PTRACE_SEIZE: the stub dies with its tracer, and stops at system
// calls can be told from those for a SIGTRAP.
const seizeOptions = unix.PTRACE_O_EXITKILL | unix.PTRACE_O_TRACESYSGOOD

// attach attaches to the thread tid, tells remember before anything else can go
// wrong, and stops it.
func (as *addressSpace) attach(tid int, remember func(t *thread)) (*thread, error) {
	if err := seize(tid); err != nil {
		err = fmt.Errorf("ptrace(PTRACE_SEIZE) of thread %d of stub process %d: %w", tid, as.PID, err)
		if errors.Is(err, unix.ESRCH) {
			return nil, as.Fail(err)
		}
		return nil, fmt.Errorf("%w: allow ptrace(2) in the seccomp filter or security module, set sysctl kernel.yama.ptrace_scope to 0 or 1, and let no debugger follow our children (strace -f)", err)
	}
	t := &thread{as: as, tid: tid, pair: affinity.New(unix.Gettid(), tid)}
	remember(t)
	if err := ptraceCall(unix.PTRACE_INTERRUPT, tid, 0, 0); err != nil {
		return nil, t.fail("PTRACE_INTERRUPT", err)
	}
	if _, err := t.wait(); err != nil {
		return nil, err
	}
	l := &as.Zygote.Layout
	var regs arch.Registers
	if err := getRegs(tid, &regs); err != nil {
		return nil, t.fail("reading the general registers", err)
	}
	if ip := instructionPointer(&regs) - l.Park; ip <= l.ParkSize {
		return t, nil
	}
	// It has not come so far, and may not have set its signal stack.
	if _, err := t.call(l.Call, unix.SYS_SIGALTSTACK, l.AltStack, 0); err != nil {
		return nil, t.fail("sigaltstack", err)
	}
	return t, nil
}

// seize makes the calling OS thread the tracer of tid.
func seize(tid int) error {
	for try := 0; ; try++ {
		err := ptraceCall(unix.PTRACE_SEIZE, tid, 0, seizeOptions)
		if err != unix.EPERM || try == 3 {
			return err
		}
		// A thread that is just ending gives this as well, and soon ESRCH.
		time.Sleep(time.Millisecond)
	}
}

// setSignalMask says which signals the thread blocks: bit n-1 is signal n.
func (t *thread) setSignalMask(mask uint64) error {
	if err := setSigMask(t.tid, &mask); err != nil {
		return t.fail("ptrace(PTRACE_SETSIGMASK)", err)
	}
	return nil
}

// fail gives up the AddressSpace, because the host refused op, and returns the
// error.
func (t *thread) fail(op string, err error) error {
	if errors.Is(err, unix.ESRCH) && op != "wait4" {
		// It is dying, and wait says of what.
		t.as.Kill()
		if _, werr := t.wait(); werr != nil {
			return werr
		}
	}
	return t.as.Fail(fmt.Errorf("%s of stub process %d: %w", op, t.as.PID, err))
}

// wait waits until the thread stops.
func (t *thread) wait() (unix.WaitStatus, error) {
	if t.gone {
		return 0, t.as.Fail(fmt.Errorf("stub process %d has died: %w", t.as.PID, unix.ESRCH))
	}
	status, err := wait4(t.tid)
	switch {
	case err != nil:
		t.gone = true
		return 0, t.fail("wait4", err)
	case status.Stopped():
		return status, nil
	}
	t.gone = true
	return 0, t.as.FailKilled(status)
}

// reap waits for the thread's end. Any OS thread may call it once the stub process
// was killed and nobody else uses the thread.
func (t *thread) reap() {
	t.pair.Forget()
	if !t.gone {
		stub.Reap(t.tid)
		t.gone = true
	}
}

// syscallStop is what wait4 reports for a system call with
// PTRACE_O_TRACESYSGOOD.
const syscallStop = unix.SIGTRAP | 0x80

// signalStop reports whether status is that of a thread that is about to get a
// signal. Otherwise, leaving system calls aside, it is an event of ptrace's:
// nothing but a stop by job control, which we end at once.
func signalStop(status unix.WaitStatus) bool { return status>>16 == 0 }

// call makes the thread execute a system call of the host and returns the
// result. gadget is Layout.Call or Layout.Clone. The general registers are lost.
//
// The error is an Errno when the call itself failed; otherwise the AddressSpace
// was given up.
func (t *thread) call(gadget uintptr, nr uintptr, args ...uintptr) (uintptr, error) {
	if c := t.lazy; c != nil {
		if c.lazy.regs == t {
			if err := c.pullRegs(); err != nil {
				return 0, err
			}
		}
		if !callKeepsFP && c.lazy.fp == t {
			if err := c.pullFP(); err != nil {
				return 0, err
			}
		}
	}
	if !callKeepsFP {
		t.owner = nil
	}
	if err := t.leaveSyscall(); err != nil {
		return 0, err
	}
	var regs arch.Registers
	injectRegs(&regs, gadget, nr, args)
	if err := setRegs(t.tid, &regs); err != nil {
		return 0, t.fail("writing the general registers", err)
	}
	for {
		if err := ptraceCall(unix.PTRACE_CONT, t.tid, 0, 0); err != nil {
			return 0, t.fail("ptrace(PTRACE_CONT)", err)
		}
		status, err := t.wait()
		if err != nil {
			return 0, err
		}
		// Anything else is a signal from outside, or one of Interrupt's that came
		// too late: not for us.
		if !signalStop(status) || status.StopSignal() != unix.SIGTRAP {
			continue
		}
		if err := getRegs(t.tid, &regs); err != nil {
			return 0, t.fail("reading the general registers", err)
		}
		result, done := injectResult(&regs, gadget)
		if !done {
			continue
		}
		if result > ^uintptr(4095) {
			return 0, unix.Errno(-result)
		}
		return result, nil
	}
}

// probe checks what New relies on.
func (t *thread) probe() error {
	if err := t.probeFP(); err != nil {
		return err
	}
	if err := ptraceCall(ptraceSysemu, t.tid, 0, 0); err != nil {
		return fmt.Errorf("ptrace(PTRACE_SYSEMU): %w: the kernel is too old", err)
	}
	if err := ptraceCall(unix.PTRACE_INTERRUPT, t.tid, 0, 0); err != nil {
		return t.fail("ptrace(PTRACE_INTERRUPT)", err)
	}
	_, err := t.wait()
	return err
}
