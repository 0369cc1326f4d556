package kvm

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/interrupt"
	"github.com/ringfence/ringfence/pkg/sysmsg"
)

// vcpuContext implements platform.Context.
type vcpuContext struct {
	m         *machine
	forwarder interrupt.Forwarder

	// sent says that Interrupt was called. wake gets the Context out of the queue for a
	// vCPU, v is the one that it has.
	sent atomic.Bool
	wake chan struct{}
	v    atomic.Pointer[vcpu]

	// preempts is what the machine's was when the Context last looked.
	preempts uint64

	// late says that Switch returned something else although it was interrupted: the
	// next Switch returns that.
	late bool

	// ac is the state of the last Switch. pulled says that its floating point state is
	// the thread's.
	ac     *arch.Context64
	pulled bool

	// mu protects where the floating point state is: in ac, in the vCPU home or in
	// saved, into which the next user of the vCPU puts it.
	mu      sync.Mutex
	where   place
	home    *vcpu
	saved   []byte
	saveErr error

	// bound says that BindThread was called.
	bound bool

	// busy protects what follows, and is held by Switch.
	busy sync.Mutex

	// runner runs the vCPU, or nil when Switch does so itself.
	runner *runner

	// parked is the AddressSpace in whose shim the thread waits for the result of the
	// system call posted, or nil.
	parked *addressSpace
	posted arch.Registers
	// answered says that it got the result answer, and made no system call since.
	answered bool
	answer   uint64

	// partial says that ac lacks the registers that are not posted. rest has them once
	// the thread is not parked any more, unless stopErr says why not.
	partial bool
	rest    arch.Registers
	stopErr error

	// spins and looks are how often this Switch looks at the slot, and how often the
	// shim does; spinner and answers adapt them.
	spins, looks     uint32
	spinner, answers sysmsg.Spinner

	// lull is how long, in looks, pause does not look.
	lull uint32

	// yields is how often the thread had to give up its vCPU, one time after the other,
	// before the Sentry had to see it.
	yields int

	// spurious is the page fault that was last retried since the access was possible.
	spurious struct {
		ip   uint64
		addr hostarch.Addr
	}
}

type place int

const (
	inContext64 place = iota
	inVCPU
	inSaved
)

func newContext(m *machine) *vcpuContext {
	return &vcpuContext{m: m, wake: make(chan struct{}, 1), preempts: m.preempts.Load()}
}

// poke makes the Context look at what it should stop for.
func (c *vcpuContext) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
	if v := c.v.Load(); v != nil {
		v.kick()
	}
}

// NotifyInterrupt implements interrupt.Receiver.
func (c *vcpuContext) NotifyInterrupt() {
	c.sent.Store(true)
	c.poke()
}

// Interrupt implements platform.Context.Interrupt.
func (c *vcpuContext) Interrupt() { c.forwarder.NotifyInterrupt() }

// contextError returns err as a platform.ContextError.
func contextError(err error) error {
	errno := unix.EIO
	errors.As(err, &errno)
	return &platform.ContextError{Err: err, Errno: errno}
}

// Switch implements platform.Context.Switch. A CPU is a vCPU.
func (c *vcpuContext) Switch(_ context.Context, mm platform.MemoryManager, ac *arch.Context64, cpu int32) (*linux.SignalInfo, hostarch.AccessType, error) {
	c.busy.Lock()
	defer c.busy.Unlock()
	if c.late {
		c.late = false
		return nil, hostarch.NoAccess, platform.ErrContextInterrupt
	}
	as, ok := mm.AddressSpace().(*addressSpace)
	if !ok || as.m != c.m {
		return nil, hostarch.NoAccess, contextError(fmt.Errorf("Switch in an AddressSpace of another platform, or none: %w", unix.EINVAL))
	}
	answered := c.canAnswer(as, ac, cpu)
	if answered {
		// What follows is done while the thread gets to its next system call.
		c.giveAnswer(as.slots[c.v.Load().id], ac.Regs.Rax)
	}
	c.planSpins()
	if !answered {
		c.stop()
		if err := as.enter(c); err != nil {
			return nil, hostarch.NoAccess, contextError(err)
		}
	}
	defer func() {
		if c.parked == nil {
			as.leave(c)
		}
	}()
	if !answered {
		if c.ac != ac {
			c.ac = ac
			c.changeFullState()
		}
		if err := c.complete(ac); err != nil {
			return nil, hostarch.NoAccess, contextError(err)
		}
		if !c.sanitize(ac) {
			// As rt_sigreturn(2) does.
			return protectionFault(ac, 0), hostarch.NoAccess, platform.ErrContextSignal
		}
		select {
		case <-c.wake: // of an earlier Switch
		default:
		}
	}
	if !c.forwarder.Enable(c) {
		if !answered {
			return nil, hostarch.NoAccess, platform.ErrContextInterrupt
		}
		// It came since canAnswer.
		c.NotifyInterrupt()
		for !c.forwarder.Enable(c) {
		}
	}
	runtime.LockOSThread()
	info, at, err := c.run(as, ac, cpu, answered)
	runtime.UnlockOSThread()
	c.forwarder.Disable()
	if err == nil || err == platform.ErrContextSignal {
		c.yields = 0
	}
	c.late = c.sent.Load() && c.sent.Swap(false) && err != platform.ErrContextInterrupt
	return info, at, err
}

// planSpins decides how long to spin, if at all. One side that spins alone gains
// nothing: a try of one is a try of both, and lasts while the thread waits in the shim,
// since whether that is worth it shows when there is an answer.
func (c *vcpuContext) planSpins() {
	c.spins, c.looks = 0, 0
	if !c.bound || c.m.runners.max == 0 {
		return
	}
	try := c.parked != nil || c.answers.GaveUp()
	spins, looks := uint32(0), c.answers.Next(c.m.spins)
	if looks == 0 && c.parked != nil {
		looks = c.m.spins
	}
	if looks > 0 {
		spins = c.spinner.Next(c.m.spins)
		if spins == 0 && try {
			spins = c.m.spins
		}
	}
	if spins > 0 {
		c.spins, c.looks = spins, looks
	}
}

// canAnswer reports whether the thread waits in the shim, and needs no more than the
// result of its system call to go on.
func (c *vcpuContext) canAnswer(as *addressSpace, ac *arch.Context64, cpu int32) bool {
	if c.parked == nil || c.parked != as || c.ac != ac {
		return false
	}
	v := c.v.Load()
	if as.gone.Load() || v.yield.Load() || c.preempts != c.m.preempts.Load() || cpu >= 0 && v.id != int(cpu) {
		return false
	}
	return equalButRAX(&c.posted, &ac.Regs) && c.posted.Eflags&flagTF == 0 && !c.forwarder.Pending()
}

// giveAnswer gives a thread that waits in the shim the result of its system call.
func (c *vcpuContext) giveAnswer(s *slot, result uint64) {
	c.answered, c.answer = true, result
	s.ret.Store(result)
	outcome := sysmsg.Spun
	if s.word.Swap(sysmsg.Stub) != sysmsg.Sentry {
		outcome = sysmsg.Slept // it leaves, or has left
	}
	c.answers.Report(outcome)
}

// stop makes the thread leave the shim if it waits there, and gives up what it holds.
func (c *vcpuContext) stop() {
	as := c.parked
	if as == nil {
		return
	}
	v, r := c.v.Load(), c.runner
	as.slots[v.id].word.Store(leaveNow)
	for r.word.Wait(sysmsg.Spins(2 * shimSpin)); !r.exited(); r.word.Wait(0) {
		v.kick() // the application has changed the slot
	}
	switch {
	case r.errno != 0 && r.errno != unix.EINTR:
		c.stopErr = v.runError(r.errno)
	case v.leftShim(&c.rest):
	case v.interrupted || v.run.exitReason == exitHLT:
		v.failed = true
		c.stopErr = fmt.Errorf("vCPU %d: %w: %w", v.id, errForged, unix.EPROTO)
	default:
		c.stopErr = v.failure()
	}
	c.parked = nil
	c.give(v)
	as.leave(c)
}

// leaveFor makes the thread leave as, in which no Switch can begin any more, if it
// waits in the shim there. It waits for a Switch that is under way.
func (c *vcpuContext) leaveFor(as *addressSpace) {
	c.busy.Lock()
	defer c.busy.Unlock()
	if c.parked == as {
		c.stop()
	}
}

// tryLeave does that too, for any AddressSpace if as is nil, but returns false if a
// Switch is under way.
func (c *vcpuContext) tryLeave(as *addressSpace) bool {
	if !c.busy.TryLock() {
		return false
	}
	defer c.busy.Unlock()
	if as == nil || c.parked == as {
		c.stop()
	}
	return true
}

// complete reads into ac the registers that were not posted with the last system
// call.
//
// Preconditions: the thread does not wait in the shim.
func (c *vcpuContext) complete(ac *arch.Context64) error {
	if c.stopErr != nil {
		return c.stopErr
	}
	if c.partial {
		c.partial = false
		copyRest(&ac.Regs, &c.rest)
	}
	return nil
}

// sanitize makes ac safe to run. It returns false if that cannot be.
func (c *vcpuContext) sanitize(ac *arch.Context64) bool {
	r := &ac.Regs
	compat := r.Cs == userCS32
	if compat {
		if r.Rip>>32 != 0 {
			return false
		}
		r.Cs = userCS
	}
	ok := ac.SanitizeRegs()
	if compat {
		r.Cs = userCS32
	}
	if !ok {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.where != inContext64 || ac.FloatingPointData().Validate() == nil
}

// run runs the thread until the Sentry must see it. The goroutine is locked to its
// OS thread. answered says that the thread was given the result of a system call in the
// shim, and goes on there.
func (c *vcpuContext) run(as *addressSpace, ac *arch.Context64, cpu int32, answered bool) (info *linux.SignalInfo, at hostarch.AccessType, err error) {
	var v *vcpu
	if answered {
		v, c.parked = c.v.Load(), nil
	}
	defer func() {
		if v != nil && c.parked == nil {
			c.give(v)
		}
	}()
	loaded := false // the vCPU has what ac has
	for {
		if !answered {
			if v != nil {
				v.run.clearImmediateExit()
			}
			if err := as.isDead(); err != nil {
				return nil, hostarch.NoAccess, contextError(err)
			}
			if c.sent.Swap(false) {
				return nil, hostarch.NoAccess, platform.ErrContextInterrupt
			}
			if n := c.m.preempts.Load(); n != c.preempts {
				c.preempts = n
				return nil, hostarch.NoAccess, platform.ErrContextCPUPreempted
			}
			if v == nil || v.yield.Load() {
				if v != nil {
					c.give(v)
					c.yields = min(c.yields+1, maxYields)
				}
				var same bool
				if v, same, err = c.take(ac); err != nil {
					return nil, hostarch.NoAccess, contextError(err)
				}
				if v != nil && cpu >= 0 && (!same || v.id != int(cpu)) {
					return nil, hostarch.NoAccess, platform.ErrContextCPUPreempted
				}
				loaded = false
				continue
			}
			if !loaded {
				v.load(&ac.Regs, as.root)
			}
			v.slices.Store(1 << c.yields)
			v.entered.Store(true)
			if c.looks > 0 && v.shim != 0 && c.runner == nil {
				c.runner = c.m.runners.take()
			}
		}
		c.pulled = false
		posted, err := c.exit(as, v, answered)
		if err != nil {
			return nil, hostarch.NoAccess, contextError(err)
		}
		if posted {
			as.slots[v.id].copyPosted(&ac.Regs)
			if answered {
				copyCall(&c.posted, &ac.Regs) // the rest is the same
			} else {
				c.posted = ac.Regs
			}
			c.answered, c.partial, c.parked = false, true, as
			if c.m.pool.wanted.Load() > 0 {
				c.stop() // others need the vCPU
				v = nil
			}
			return nil, hostarch.NoAccess, nil
		}
		answered, c.partial = false, false
		var rest arch.Registers
		switch {
		case v.leftShim(&rest):
			syscall, err := c.leftShim(as.slots[v.id], v, &ac.Regs, &rest)
			if syscall || err != nil {
				return nil, hostarch.NoAccess, err
			}
			loaded = false
		case v.interrupted:
			v.saveUser(&ac.Regs)
			loaded = true
		default:
			info, at, done, err := c.stopped(as, v, ac)
			if done {
				return info, at, err
			}
			loaded = false
		}
		c.answered = false
	}
}

// leftShim finds out whether a thread that left the shim makes a system call, and
// makes r its registers; rest are those that the shim leaves alone.
func (c *vcpuContext) leftShim(s *slot, v *vcpu, r, rest *arch.Registers) (syscall bool, err error) {
	switch w := s.word.Load(); {
	case w == sysmsg.Sentry || w == sysmsg.SentryStubWaits:
		copyRest(r, rest)
		s.copyPosted(r)
		return true, nil
	case (w == sysmsg.Stub || w == sysmsg.StubSentryWaits) && c.answered:
		// It has left before it saw the answer, or did not get far with it.
		*r = c.posted
		copyRest(r, rest)
		r.Rax, r.Orig_rax = c.answer, noSyscall
		return false, nil
	}
	v.failed = true
	return false, contextError(fmt.Errorf("vCPU %d: %w: %w", v.id, errForged, unix.EPROTO))
}

// maxHostFaults is how often in a row the host may fail to find memory.
const maxHostFaults = 16

// exit runs the guest until it is in a stub, was interrupted between two instructions
// of the application, left the shim, or (posted) waits there. answered says that it
// runs already.
func (c *vcpuContext) exit(as *addressSpace, v *vcpu, answered bool) (posted bool, err error) {
	var s *slot
	if v.shim != 0 {
		s = as.slots[v.id]
	}
	for faults := 0; ; {
		posted, errno := c.enter(s, v, answered)
		if posted {
			return true, nil
		}
		answered = false
		switch errno {
		case 0:
			if v.run.exitReason != exitHLT {
				return false, v.failure()
			}
			return false, nil
		case unix.EINTR:
			return false, nil
		case unix.EFAULT:
			// A file was truncated, most likely; it may have grown again by now.
			if faults++; faults > maxHostFaults {
				v.failed = true
				return false, fmt.Errorf("ioctl(KVM_RUN) of vCPU %d: the host does not give the memory that the application uses: %w", v.id, errno)
			}
			if err := as.hideTruncated(); err != nil {
				return false, err
			}
		default:
			return false, v.runError(errno)
		}
	}
}

// lookAtOnce is how many looks at a slot come between two looks at the runner.
const lookAtOnce = 16

// enter runs the guest until it leaves or (posted) waits in the shim. Without a runner
// it does so on this thread, and the guest must leave.
func (c *vcpuContext) enter(s *slot, v *vcpu, answered bool) (posted bool, errno unix.Errno) {
	r := c.runner
	if r == nil {
		if s != nil {
			s.word.Store(sysmsg.StubSentryWaits)
		}
		v.tid.Store(int32(unix.Gettid()))
		return false, v.enter()
	}
	spins := c.spins
	if s.spins.Load() != c.looks {
		s.spins.Store(c.looks)
	}
	if !answered {
		s.word.Store(sysmsg.Stub)
		r.start(v)
		// It may have to wake up first, and to enter the guest takes time.
		sysmsg.SpinWhile(&r.entering, 0, 4*spins)
		spins += c.m.entrySpins
	}
	outcome := sysmsg.Slept
	if answered && spins > 0 && c.pause(s) {
		outcome = sysmsg.Spun
	}
	for n := spins; n > 0 && outcome == sysmsg.Slept; n -= min(n, lookAtOnce) {
		if sysmsg.SpinWhile(&s.word, sysmsg.Stub, lookAtOnce) != sysmsg.Stub || r.exited() {
			outcome = sysmsg.Spun
		}
	}
	c.spinner.Report(outcome)
	for !r.exited() {
		switch s.word.Load() {
		case sysmsg.Sentry, sysmsg.SentryStubWaits:
			return true, 0
		case sysmsg.Stub:
			s.word.CompareAndSwap(sysmsg.Stub, sysmsg.StubSentryWaits)
		case sysmsg.StubSentryWaits:
			r.word.Wait(0) // now the shim leaves if it is to post
		default:
			v.kick() // the application has changed it
			r.word.Wait(0)
		}
	}
	return false, r.errno
}

// pause lets the time pass, without a look at the slot, that the thread needs for its
// next system call at least, and reports whether it made one. A look takes the cache
// line from the thread, which then waits for it when it wants to post: the best one is
// the first after that. So the pause becomes shorter when it was too long, and longer
// when it was not.
func (c *vcpuContext) pause(s *slot) bool {
	if c.lull > 0 {
		sysmsg.SpinWhile(&never, 0, c.lull)
	}
	if s.word.Load() != sysmsg.Stub {
		c.lull = max(c.lull, 1) - 1
		return true
	}
	c.lull = min(c.lull+2, c.m.maxLull)
	return false
}

// never is what pause looks at meanwhile.
var never atomic.Uint32

// failure returns what is wrong with a vCPU that left the guest in a way that it
// should not.
func (v *vcpu) failure() error {
	v.failed = true
	r := v.run
	what := ""
	switch r.exitReason {
	case exitShutdown:
		what = " (a triple fault)"
		// On SVM the CPU is reset with that.
		if err := v.setMSRs(); err != nil {
			return err
		}
	case exitFailEntry:
		what = fmt.Sprintf(" (the CPU refuses the state: %#x)", r.exit[0])
	case exitInternalError:
		what = fmt.Sprintf(" (KVM's emulator: %d)", uint32(r.exit[0]))
	}
	return fmt.Errorf("vCPU %d left the guest for reason %d%s at %#x, CS %#x: %w", v.id, r.exitReason, what, r.regs.rip, r.sregs.cs.selector, unix.EIO)
}

// take gives the Context a vCPU with its floating point state, or nil if it was
// poked before it got one. same says that the vCPU ran no other Context since it ran
// this one.
func (c *vcpuContext) take(ac *arch.Context64) (v *vcpu, same bool, err error) {
	c.mu.Lock()
	home := c.home
	c.mu.Unlock()
	if v = c.m.pool.take(home, c.wake); v == nil {
		return nil, false, nil
	}
	c.v.Store(v)
	v.holder.Store(c)
	same = v.owner == c
	if err := c.loadFP(v, ac); err != nil {
		c.give(v)
		return nil, false, err
	}
	return v, same, nil
}

// give gives the vCPU back, and the runner. The floating point state stays in it.
func (c *vcpuContext) give(v *vcpu) {
	c.v.Store(nil)
	v.holder.Store(nil)
	if c.runner != nil {
		c.m.runners.put(c.runner)
		c.runner = nil
	}
	c.m.pool.put(v)
}

// loadFP makes v, which the Context has taken, hold its floating point state.
func (c *vcpuContext) loadFP(v *vcpu, ac *arch.Context64) error {
	if o := v.owner; o != c {
		if o != nil {
			o.evict(v)
		}
		v.owner = c
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.where == inVCPU && c.home == v {
		return nil
	}
	b := v.xsave
	switch {
	case c.where == inContext64:
		clear(b)
		copy(b, ac.FloatingPointData())
		maskXState(b, c.m.xcr0)
	case c.where == inVCPU:
		if err := c.home.readXSave(b); err != nil {
			return err
		}
	case c.saveErr != nil:
		return c.saveErr
	default:
		b = c.saved
	}
	// Until it is done it is nowhere else.
	if err := v.writeXSave(b); err != nil {
		return err
	}
	c.where, c.home = inVCPU, v
	return nil
}

// evict saves the floating point state that v may hold of the Context.
func (c *vcpuContext) evict(v *vcpu) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.where != inVCPU || c.home != v {
		return
	}
	if c.saved == nil {
		c.saved = make([]byte, len(v.xsave))
	}
	c.saveErr = v.readXSave(c.saved)
	c.where = inSaved
}

// PullFullState implements platform.Context.PullFullState.
func (c *vcpuContext) PullFullState(_ platform.AddressSpace, ac *arch.Context64) error {
	c.busy.Lock()
	defer c.busy.Unlock()
	c.stop()
	if c.ac != ac {
		return nil
	}
	if err := c.complete(ac); err != nil {
		return err
	}
	return c.pullFP(ac)
}

// pullFP reads the floating point state into ac.
func (c *vcpuContext) pullFP(ac *arch.Context64) error {
	if c.pulled {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	fp := ac.FloatingPointData()
	switch {
	case c.where == inContext64:
		return nil
	case c.where == inVCPU:
		if c.saved == nil {
			c.saved = make([]byte, len(c.home.xsave))
		}
		if err := c.home.readXSave(c.saved); err != nil {
			return err
		}
	case c.saveErr != nil:
		return c.saveErr
	}
	clear(fp[copy(fp, c.saved):])
	c.pulled = true
	return nil
}

// FullStateChanged implements platform.Context.FullStateChanged.
func (c *vcpuContext) FullStateChanged() {
	c.busy.Lock()
	defer c.busy.Unlock()
	c.stop()
	c.changeFullState()
}

// changeFullState makes ac what counts.
func (c *vcpuContext) changeFullState() {
	c.mu.Lock()
	c.where = inContext64
	c.mu.Unlock()
	c.pulled, c.partial, c.stopErr = false, false, nil
}

// Release implements platform.Context.Release.
func (c *vcpuContext) Release() { c.FullStateChanged() }

// PrepareSleep implements platform.Context.PrepareSleep.
func (c *vcpuContext) PrepareSleep() {
	c.busy.Lock()
	defer c.busy.Unlock()
	c.stop()
}

// BindThread implements platform.ThreadBinder.BindThread: a thread that waits in the
// shim keeps its vCPU and a CPU until PrepareSleep.
func (c *vcpuContext) BindThread() { c.bound = true }
