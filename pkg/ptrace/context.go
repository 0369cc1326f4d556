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

	// osThread is the OS thread that the Context is bound to, or 0.
	osThread int

	// ac is the state that the last Switch had. Its floating point state, unless
	// changed, is what the thread has whose owner this Context is.
	ac      *arch.Context64
	changed bool
	lazy    lazyState

	// thread is the one that the last Switch ran on.
	thread *thread
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
	if err := as.Enter(); err != nil {
		return nil, hostarch.NoAccess, contextError(err)
	}
	defer as.Leave()
	self := c.osThread
	if self == 0 {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		self = unix.Gettid()
	}
	t, err := as.thread(self)
	if err != nil {
		return nil, hostarch.NoAccess, contextError(err)
	}
	c.pid, c.tid = as.PID, t.tid
	if !c.forwarder.Enable(c) {
		return nil, hostarch.NoAccess, platform.ErrContextInterrupt
	}
	c.thread = t
	t.pair.Pin()
	info, at, err := t.run(c, ac)
	t.pair.Turn()
	if c.osThread == 0 {
		// Whoever runs on the OS thread next must be free.
		t.pair.ReleaseCaller()
	}
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
	if err := t.load(c, ac); err != nil {
		if errors.As(err, new(refusedError)) {
			// As rt_sigreturn(2) does.
			return protectionFault(ac), hostarch.NoAccess, platform.ErrContextSignal
		}
		return nil, hostarch.NoAccess, contextError(err)
	}
	for {
		t.inSyscall = false
		if err := ptraceCall(runRequest(ac), t.tid, 0, 0); err != nil {
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
		native, err := t.syscallStopped(c, ac)
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
		if err := t.getState(c, ac); err != nil {
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
	if err := t.getState(c, ac); err != nil {
		return nil, at, true, err
	}
	if sig == unix.SIGSYS {
		if isFakeSyscall(info, ac) {
			return nil, at, true, nil
		}
		return info, at, true, platform.ErrContextSignal
	}
	ac.Fault, at, err = t.fault(c, ac, sig, info)
	if err != nil {
		return nil, at, true, err
	}
	return info, at, true, platform.ErrContextSignal
}

// getState reads the registers, but for the floating point state of a Context
// that is bound to this OS thread: that can be had later.
func (t *thread) getState(c *threadContext, ac *arch.Context64) error {
	if err := getRegs(t.tid, &ac.Regs); err != nil {
		return t.fail("reading the general registers", err)
	}
	c.lazy.regs, c.lazy.fp, t.lazy = nil, t, c
	if c.osThread != 0 {
		return nil
	}
	t.lazy = nil
	return c.pullFP()
}

// syscallStopped reads the state of a thread that stopped for a system call. native
// is false if it is no 64-bit one.
func (t *thread) syscallStopped(c *threadContext, ac *arch.Context64) (native bool, err error) {
	t.inSyscall = true
	if c.osThread == 0 && !entryHidesState {
		// The caller may come back on another OS thread, which cannot read it.
		if err := t.getState(c, ac); err != nil {
			return false, err
		}
		if hasSyscallMark(&ac.Regs) {
			return true, nil
		}
	}
	native, known, err := getSyscall(t.tid, &ac.Regs)
	if err != nil {
		return false, t.fail("ptrace(PTRACE_GET_SYSCALL_INFO)", err)
	}
	if native && known && (c.osThread != 0 || entryHidesState) {
		c.lazy = lazyState{regs: t, fp: t, known: ac.Regs}
		t.lazy = c
		if c.osThread == 0 {
			return true, c.pull()
		}
		return true, nil
	}
	if c.osThread != 0 {
		if err := t.getState(c, ac); err != nil {
			return false, err
		}
	}
	return native || !known && hasSyscallMark(&ac.Regs), nil
}

// PullFullState implements platform.Context.PullFullState.
func (c *threadContext) PullFullState(_ platform.AddressSpace, ac *arch.Context64) error {
	if c.changed || c.ac != ac {
		return nil
	}
	return c.pull()
}

// FullStateChanged implements platform.Context.FullStateChanged.
func (c *threadContext) FullStateChanged() {
	c.changed = true
	c.lazy = lazyState{}
}

// BindThread implements platform.ThreadBinder.BindThread.
func (c *threadContext) BindThread() { c.osThread = unix.Gettid() }

// Release implements platform.Context.Release. The thread that ran the Context is
// for others that come on the same OS thread.
func (c *threadContext) Release() {
	c.PrepareSleep()
	c.lazy = lazyState{}
	c.thread = nil
}

// PrepareSleep implements platform.Context.PrepareSleep.
func (c *threadContext) PrepareSleep() {
	if c.thread != nil && c.osThread != 0 {
		c.thread.pair.Sleep()
	}
}
