package systrap

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/affinity"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/interrupt"
	"github.com/ringfence/ringfence/pkg/sysmsg"
	"github.com/ringfence/ringfence/pkg/usertrap"
)

// threadContext implements platform.Context.
type threadContext struct {
	forwarder interrupt.Forwarder

	// thread is the one that the Context has, or nil. It is set while forwarder is
	// disabled.
	thread *thread
	// lost says why a part of the state that was in a thread is not to be had.
	lost error

	spinner sysmsg.Spinner
	// holder is of the thread that calls Switch. Whoever calls PrepareSleep or Release
	// does so on the same goroutine, or it stays locked to its thread until it ends.
	holder affinity.Holder

	// sent says that an interrupt was sent to the thread.
	sent atomic.Bool

	// late says that Switch returned something else although an interrupt was
	// sent: the next Switch returns it.
	late bool

	// ac is the state that the last Switch had. known are the general registers as
	// the thread has them: in its frame, or in a call. partial says that the floating
	// point state is only in the thread, and, in a call, some of the general registers.
	// changed says that nothing in the thread counts.
	ac      *arch.Context64
	known   arch.Registers
	partial bool
	changed bool
	// changes is Table.Changes when the thread made its call.
	changes uint32
	// saves is how many more calls are to come with all of the thread's state.
	saves int

	// sites counts the system calls that could be patched; stopPatches says that
	// nothing is to be patched in the thread's AddressSpace.
	sites       usertrap.Counts
	stopPatches atomic.Bool
	// inCall says of the last signal that it came in ·call.
	inCall bool
}

// NotifyInterrupt implements interrupt.Receiver.
func (c *threadContext) NotifyInterrupt() {
	c.sent.Store(true)
	// If it fails the stub is dead, and Switch finds out.
	unix.Tgkill(c.thread.as.pid, c.thread.tid, unix.Signal(platform.SignalInterrupt))
}

// Interrupt implements platform.Context.Interrupt.
func (c *threadContext) Interrupt() { c.forwarder.NotifyInterrupt() }

// Switch implements platform.Context.Switch.
func (c *threadContext) Switch(ctx context.Context, mm platform.MemoryManager, ac *arch.Context64, _ int32) (*linux.SignalInfo, hostarch.AccessType, error) {
	if c.late {
		c.late = false
		return nil, hostarch.NoAccess, platform.ErrContextInterrupt
	}
	as, ok := mm.AddressSpace().(*addressSpace)
	if !ok {
		return nil, hostarch.NoAccess, contextError(fmt.Errorf("Switch in an AddressSpace of another platform, or none: %w", unix.EINVAL))
	}
	for {
		if err := as.preparePatches(ctx, mm, c, ac); err != nil {
			return nil, hostarch.NoAccess, contextError(err)
		}
		info, at, err := c.switchIn(as, ac)
		// What calls mm is done here: whoever releases as may hold its locks, and waits
		// until switchIn is over.
		switch {
		case err == errEarly || err == errIllegal:
			if c.settle(ctx, mm, as, ac, err, info) {
				if c.late {
					c.late = false
					return nil, hostarch.NoAccess, platform.ErrContextInterrupt
				}
				continue
			}
			err = platform.ErrContextSignal
		case err == nil && !c.thread.called:
			c.patch(ctx, mm, as, ac)
		}
		return info, at, err
	}
}

var (
	// errEarly says that the thread got a signal in patched code, before the call was
	// made; errIllegal that it got SIGILL.
	errEarly   = errors.New("signal in patched code")
	errIllegal = errors.New("SIGILL")
)

// settle sees to a signal that may come from patched code. It returns true if the
// thread is to go on.
func (c *threadContext) settle(ctx context.Context, mm platform.MemoryManager, as *addressSpace, ac *arch.Context64, why error, info *linux.SignalInfo) bool {
	if why == errIllegal {
		ip, ok := as.table.Load().Continue(ctx, mm, uint64(ac.IP()))
		if ok {
			ac.SetIP(uintptr(ip))
		}
		return ok
	}
	// A trampoline may have to be mapped first. But without patches it does not
	// happen, or somewhere else.
	if unix.Signal(info.Signo) != unix.SIGSEGV || c.inCall {
		as.stopPatches(ctx, mm, usertrap.Trapped)
	}
	return !as.patches()
}

// switchIn is Switch in as.
func (c *threadContext) switchIn(as *addressSpace, ac *arch.Context64) (*linux.SignalInfo, hostarch.AccessType, error) {
	if err := as.enter(); err != nil {
		return nil, hostarch.NoAccess, contextError(err)
	}
	defer as.leave()
	if err := c.bind(as); err != nil {
		return nil, hostarch.NoAccess, contextError(err)
	}
	if !c.forwarder.Enable(c) {
		return nil, hostarch.NoAccess, platform.ErrContextInterrupt
	}
	info, at, err := c.run(ac)
	c.forwarder.Disable()
	// Nobody sends one now.
	if c.sent.Load() {
		c.sent.Store(false)
		c.late = err != platform.ErrContextInterrupt
	}
	return info, at, err
}

// bind gives the Context a thread of as.
func (c *threadContext) bind(as *addressSpace) error {
	if c.thread != nil && c.thread.as == as {
		return nil
	}
	c.unbind()
	if c.lost != nil {
		return c.lost
	}
	t, err := as.thread()
	if err != nil {
		return err
	}
	c.thread, c.changed = t, true
	return nil
}

// unbind takes the thread from the Context. The state is all in ac afterwards,
// unless it is lost.
func (c *threadContext) unbind() {
	if c.thread == nil {
		return
	}
	c.lost = c.pull()
	c.thread.as.putIdle(c.thread)
	c.thread, c.partial = nil, false
}

// PrepareSleep implements platform.Context.PrepareSleep: the thread is for other
// Contexts of the AddressSpace. One of them may run next, and the thread, which still
// looks at its slot, is faster than one that must be woken.
func (c *threadContext) PrepareSleep() {
	c.holder.Free()
	c.unbind()
}

// contextError returns err as a platform.ContextError.
func contextError(err error) error {
	errno := unix.EIO
	errors.As(err, &errno)
	return &platform.ContextError{Err: err, Errno: errno}
}

// run runs the thread with the state ac until the Sentry must see it.
func (c *threadContext) run(ac *arch.Context64) (*linux.SignalInfo, hostarch.AccessType, error) {
	t := c.thread
	if !t.called || !c.answer(ac) {
		if t.called && !c.changed && c.ac == ac {
			if err := c.save(); err != nil {
				c.partial = false
				return nil, hostarch.NoAccess, contextError(err)
			}
			if c.late {
				c.late = false
				return nil, hostarch.NoAccess, platform.ErrContextInterrupt
			}
		}
		if !c.load(ac) {
			// As rt_sigreturn(2) does with a state that no thread can have.
			return protectionFault(ac), hostarch.NoAccess, platform.ErrContextSignal
		}
	}
	for {
		if err := t.resume(c); err != nil {
			c.partial = false
			return nil, hostarch.NoAccess, contextError(err)
		}
		if t.takeCall(&ac.Regs, &c.known) {
			c.partial = true
			c.changes = t.as.table.Load().Changes()
			ac.Fault = arch.FaultInfo{}
			return nil, hostarch.NoAccess, nil
		}
		if t.nested() {
			if c.sent.Swap(false) {
				return nil, hostarch.NoAccess, platform.ErrContextInterrupt
			}
			continue
		}
		e, err := t.event(c, &ac.Regs)
		if err != nil {
			c.partial = false
			return nil, hostarch.NoAccess, contextError(t.as.fail(err))
		}
		// A thread that was going on with another state may not have it yet.
		c.partial, c.changed = !e.loading, e.loading
		if e.code <= 0 {
			if unix.Signal(e.signo) == unix.SIGSYS {
				// A system call, of which nothing is known but that it was not made.
				return nil, hostarch.NoAccess, contextError(fmt.Errorf("stub process %d: SIGSYS without its cause, or sent by somebody: give the host more memory: %w", t.as.pid, unix.ENOMEM))
			}
			// Somebody sent it, if only to interrupt; SIGSYS and the others come from
			// the kernel.
			if c.sent.Swap(false) {
				return nil, hostarch.NoAccess, platform.ErrContextInterrupt
			}
			switch {
			case e.called: // and is about to return
				c.known, t.called, c.changed = ac.Regs, true, false
			case e.inCall && !c.load(ac): // it makes the call again, with the slot as it was
				return protectionFault(ac), hostarch.NoAccess, platform.ErrContextSignal
			}
			continue
		}
		switch sig := unix.Signal(e.signo); sig {
		case unix.SIGSYS:
			return t.syscall(ac, &e)
		case unix.SIGSEGV, unix.SIGBUS, unix.SIGFPE, unix.SIGILL, unix.SIGTRAP:
			at := t.fault(ac, &e)
			c.inCall = e.inCall
			switch {
			case e.early:
				return e.signalInfo(), at, errEarly
			case sig == unix.SIGILL:
				return e.signalInfo(), at, errIllegal
			}
			return e.signalInfo(), at, platform.ErrContextSignal
		}
		err = fmt.Errorf("stub process %d says it got signal %d with code %d: %w", t.as.pid, e.signo, e.code, unix.EPROTO)
		return nil, hostarch.NoAccess, contextError(t.as.fail(err))
	}
}

// answer answers a call, if that is all that there is to do.
func (c *threadContext) answer(ac *arch.Context64) bool {
	if c.changed || c.ac != ac || c.changes != c.thread.as.table.Load().Changes() || !c.thread.answer(&c.known, &ac.Regs) {
		return false
	}
	c.saves = max(c.saves-1, 0)
	return true
}

// savesAhead is after how many calls that need no state the thread does not write it any
// more.
const savesAhead = 4

// event is a signal as a thread has got it. The application may have forged all
// of it.
type event struct {
	// called says that the thread was in a call, loading that it was going on from there
	// with a state that was given to it; early that it was on its way there, from patched
	// code, and inCall that it had left that.
	called, loading, early, inCall bool

	signo, code int32
	fault       arch.FaultInfo
	info        [linux.SignalInfoSize]byte
}

// signalInfo returns e's siginfo.
func (e *event) signalInfo() *linux.SignalInfo {
	info := new(linux.SignalInfo)
	info.UnmarshalBytes(e.info[:])
	return info
}

// load gives the thread the state ac. It returns false if no thread can have it.
//
// Precondition: ac is complete, or the thread has a frame with the rest.
func (c *threadContext) load(ac *arch.Context64) bool {
	t := c.thread
	all := t.called || c.changed || c.ac != ac
	if (all || ac.Regs != c.known) && !ac.SanitizeRegs() {
		return false
	}
	if !all {
		t.putChangedRegs(&c.known, &ac.Regs)
		if !c.partial {
			return t.putFP(ac.FloatingPointData())
		}
		return true
	}
	if !t.putFP(ac.FloatingPointData()) {
		return false
	}
	if t.called {
		t.putState(&ac.Regs)
	} else {
		t.putFrame(&ac.Regs)
	}
	c.ac, c.known, c.changed, c.partial = ac, ac.Regs, false, true
	return true
}

// pull completes ac, unless it is complete.
func (c *threadContext) pull() error {
	t := c.thread
	if t == nil || !c.partial || c.changed {
		return nil
	}
	if err := t.as.enter(); err != nil {
		return err
	}
	defer t.as.leave()
	return c.save()
}

// save completes ac.
//
// Precondition: the AddressSpace was entered.
func (c *threadContext) save() error {
	t := c.thread
	if t.called && c.partial {
		c.saves = savesAhead
	}
	if t.called && c.partial && !t.saved {
		interrupted, err := t.saveCall(c, &c.ac.Regs)
		if err != nil {
			return err
		}
		c.late = c.late || interrupted
	}
	if c.partial {
		t.getFP(c.ac.FloatingPointData())
	}
	// A frame still has the same.
	c.partial = !t.called
	return nil
}

// PullFullState implements platform.Context.PullFullState.
func (c *threadContext) PullFullState(_ platform.AddressSpace, ac *arch.Context64) error {
	if c.ac != ac {
		return nil
	}
	err := c.lost
	if err == nil {
		err = c.pull()
	}
	if err != nil {
		c.partial = false
		return contextError(err)
	}
	return nil
}

// FullStateChanged implements platform.Context.FullStateChanged.
func (c *threadContext) FullStateChanged() { c.changed, c.lost = true, nil }

// Release implements platform.Context.Release. The thread is for other Contexts
// of the AddressSpace.
func (c *threadContext) Release() {
	c.partial = false
	c.holder.Free()
	c.unbind()
}
