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
	if c.late {
		c.late = false
		return nil, hostarch.NoAccess, platform.ErrContextInterrupt
	}
	as, ok := mm.AddressSpace().(*addressSpace)
	if !ok || as.m != c.m {
		return nil, hostarch.NoAccess, contextError(fmt.Errorf("Switch in an AddressSpace of another platform, or none: %w", unix.EINVAL))
	}
	if err := as.enter(c); err != nil {
		return nil, hostarch.NoAccess, contextError(err)
	}
	defer as.leave(c)
	if c.ac != ac {
		c.ac = ac
		c.FullStateChanged()
	}
	if !c.sanitize(ac) {
		// As rt_sigreturn(2) does.
		return protectionFault(ac, 0), hostarch.NoAccess, platform.ErrContextSignal
	}
	if !c.forwarder.Enable(c) {
		return nil, hostarch.NoAccess, platform.ErrContextInterrupt
	}
	select {
	case <-c.wake: // of an earlier Switch
	default:
	}
	runtime.LockOSThread()
	info, at, err := c.run(as, ac, cpu)
	runtime.UnlockOSThread()
	c.forwarder.Disable()
	c.late = c.sent.Swap(false) && err != platform.ErrContextInterrupt
	return info, at, err
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
// OS thread.
func (c *vcpuContext) run(as *addressSpace, ac *arch.Context64, cpu int32) (info *linux.SignalInfo, at hostarch.AccessType, err error) {
	var v *vcpu
	defer func() {
		if v != nil {
			c.give(v)
		}
	}()
	loaded := false // the vCPU has what ac has
	for {
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
		v.entered.Store(true)
		c.pulled = false
		interrupted, err := v.exit(as)
		if err != nil {
			return nil, hostarch.NoAccess, contextError(err)
		}
		if interrupted {
			v.saveUser(&ac.Regs)
			loaded = true
			continue
		}
		info, at, done, err := c.stopped(as, v, ac)
		if done {
			return info, at, err
		}
		loaded = false
	}
}

// maxHostFaults is how often in a row the host may fail to find memory.
const maxHostFaults = 16

// exit runs the guest until it is in a stub, or was interrupted between two
// instructions of the application.
func (v *vcpu) exit(as *addressSpace) (interrupted bool, err error) {
	for faults := 0; ; {
		switch errno := v.enter(); errno {
		case 0:
			if v.run.exitReason != exitHLT {
				return false, v.failure()
			}
			return false, nil
		case unix.EINTR:
			if v.clean() {
				return true, nil
			}
			v.run.clearImmediateExit()
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
			v.failed = true
			return false, fmt.Errorf("ioctl(KVM_RUN) of vCPU %d: %w", v.id, errno)
		}
	}
}

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
	v.tid.Store(int32(unix.Gettid()))
	c.v.Store(v)
	same = v.owner == c
	if err := c.loadFP(v, ac); err != nil {
		c.give(v)
		return nil, false, err
	}
	return v, same, nil
}

// give gives the vCPU back. The floating point state stays in it.
func (c *vcpuContext) give(v *vcpu) {
	c.v.Store(nil)
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
	if c.ac != ac || c.pulled {
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
	c.mu.Lock()
	c.where = inContext64
	c.mu.Unlock()
	c.pulled = false
}

// Release implements platform.Context.Release.
func (c *vcpuContext) Release() { c.FullStateChanged() }

// PrepareSleep implements platform.Context.PrepareSleep.
func (c *vcpuContext) PrepareSleep() {}
