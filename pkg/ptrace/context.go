package ptrace

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/interrupt"
)

// threadContext implements platform.Context.
type threadContext struct {
	forwarder interrupt.Forwarder

	// pid and tid are the stub's thread that is to be interrupted. They are set
	// while forwarder is disabled.
	pid, tid int

	// sent says that an interrupt was sent to tid.
	sent atomic.Bool

	// late says that Switch returned something else although an interrupt was
	// sent: the next Switch returns it.
	late bool

	// ac is the state that the last Switch had. Its floating point state, unless
	// fpChanged, is what the thread has whose owner this Context is.
	ac        *arch.Context64
	fpChanged bool
}

// NotifyInterrupt implements interrupt.Receiver.
func (c *threadContext) NotifyInterrupt() {
	c.sent.Store(true)
	// If it fails the thread is dead, and Switch finds out.
	unix.Tgkill(c.pid, c.tid, unix.Signal(platform.SignalInterrupt))
}

// Interrupt implements platform.Context.Interrupt.
func (c *threadContext) Interrupt() { c.forwarder.NotifyInterrupt() }

// Switch implements platform.Context.Switch.
func (c *threadContext) Switch(_ context.Context, mm platform.MemoryManager, ac *arch.Context64, _ int32) (*linux.SignalInfo, hostarch.AccessType, error) {
	if c.late {
		c.late = false
		return nil, hostarch.NoAccess, platform.ErrContextInterrupt
	}
	as, ok := mm.AddressSpace().(*addressSpace)
	if !ok {
		return nil, hostarch.NoAccess, contextError(fmt.Errorf("Switch in an AddressSpace of another platform, or none: %w", unix.EINVAL))
	}
	if err := as.enter(); err != nil {
		return nil, hostarch.NoAccess, contextError(err)
	}
	defer as.leave()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	t, err := as.thread()
	if err != nil {
		return nil, hostarch.NoAccess, contextError(err)
	}
	c.pid, c.tid = as.pid, t.tid
	if !c.forwarder.Enable(c) {
		return nil, hostarch.NoAccess, platform.ErrContextInterrupt
	}
	info, at, err := t.run(c, ac)
	c.forwarder.Disable()
	c.late = c.sent.Swap(false) && err != platform.ErrContextInterrupt
	return info, at, err
}

// contextError returns err as a platform.ContextError.
func contextError(err error) error {
	errno := unix.EIO
	errors.As(err, &errno)
	return &platform.ContextError{Err: err, Errno: errno}
}

// run runs the thread with the state ac until the Sentry must see it.
func (t *thread) run(c *threadContext, ac *arch.Context64) (*linux.SignalInfo, hostarch.AccessType, error) {
	refused := func(what string, err error) (*linux.SignalInfo, hostarch.AccessType, error) {
		if err == unix.EIO || err == unix.EINVAL || err == unix.EFAULT {
			// What the CPU would not take: as Linux does in rt_sigreturn(2).
			return protectionFault(ac), hostarch.NoAccess, platform.ErrContextSignal
		}
		return nil, hostarch.NoAccess, contextError(t.fail(what, err))
	}
	if err := setRegs(t.tid, &ac.Regs); err != nil {
		return refused("writing the general registers", err)
	}
	if t.owner != c || c.ac != ac || c.fpChanged {
		t.owner = nil
		if err := setRegSet(t.tid, fpRegSet, ac.FloatingPointData()); err != nil {
			return refused("writing the floating point state", err)
		}
		t.owner, c.ac, c.fpChanged = c, ac, false
	}
	for {
		if err := ptraceCall(ptraceSysemu, t.tid, 0, 0); err != nil {
			return nil, hostarch.NoAccess, contextError(t.fail("ptrace(PTRACE_SYSEMU)", err))
		}
		status, err := t.wait()
		if err != nil {
			return nil, hostarch.NoAccess, contextError(err)
		}
		if !signalStop(status) {
			continue
		}
		info, at, done, err := t.stopped(c, ac, status.StopSignal())
		if err != nil && err != platform.ErrContextSignal && err != platform.ErrContextInterrupt {
			return nil, hostarch.NoAccess, contextError(err)
		}
		if done {
			return info, at, err
		}
	}
}

// stopped looks at a thread that stopped for a system call or a signal. done is
// false when it is to go on.
func (t *thread) stopped(c *threadContext, ac *arch.Context64, sig unix.Signal) (info *linux.SignalInfo, at hostarch.AccessType, done bool, err error) {
	if sig == syscallStop {
		if err := t.getState(ac); err != nil {
			return nil, at, true, err
		}
		native, err := t.nativeSyscall(&ac.Regs)
		if err != nil {
			return nil, at, true, err
		}
		if !native {
			return foreignSyscall(ac), at, true, platform.ErrContextSignal
		}
		return nil, at, true, nil
	}
	info = new(linux.SignalInfo)
	if err := getSigInfo(t.tid, info); err != nil {
		return nil, at, true, t.fail("ptrace(PTRACE_GETSIGINFO)", err)
	}
	switch sig {
	case unix.Signal(platform.SignalInterrupt):
		if !c.sent.Swap(false) {
			return nil, at, false, nil // from an earlier Switch, or from outside
		}
		if err := t.getState(ac); err != nil {
			return nil, at, true, err
		}
		return nil, at, true, platform.ErrContextInterrupt
	case unix.SIGSEGV, unix.SIGBUS, unix.SIGFPE, unix.SIGILL, unix.SIGTRAP, unix.SIGSYS:
		if info.Code <= 0 {
			return nil, at, false, nil // somebody else sent it
		}
	default:
		return nil, at, false, nil // somebody else sent it
	}
	if err := t.getState(ac); err != nil {
		return nil, at, true, err
	}
	if sig == unix.SIGSYS {
		if isFakeSyscall(info, ac) {
			return nil, at, true, nil
		}
		return info, at, true, platform.ErrContextSignal
	}
	ac.Fault, at, err = t.fault(ac, sig, info)
	if err != nil {
		return nil, at, true, err
	}
	return info, at, true, platform.ErrContextSignal
}

// getState reads all registers.
func (t *thread) getState(ac *arch.Context64) error {
	if err := getRegs(t.tid, &ac.Regs); err != nil {
		return t.fail("reading the general registers", err)
	}
	if _, err := getRegSet(t.tid, fpRegSet, ac.FloatingPointData()); err != nil {
		return t.fail("reading the floating point state", err)
	}
	return nil
}

// PullFullState implements platform.Context.PullFullState: Switch leaves nothing
// out, since a caller that comes on another OS thread could not have it.
func (*threadContext) PullFullState(platform.AddressSpace, *arch.Context64) error { return nil }

// FullStateChanged implements platform.Context.FullStateChanged.
func (c *threadContext) FullStateChanged() { c.fpChanged = true }

// Release implements platform.Context.Release. The thread that ran the Context is
// for others that come on the same OS thread.
func (*threadContext) Release() {}

// PrepareSleep implements platform.Context.PrepareSleep.
func (*threadContext) PrepareSleep() {}
