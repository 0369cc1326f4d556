package kernel

import (
	"errors"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/sentry/mm"
)

// run is the life of a task. If the platform wants it, it keeps its OS thread, as a
// tracer must; the thread goes back to the runtime in the end, since tracees die with
// it.
func (t *Task) run() {
	if b, ok := t.pc.(platform.ThreadBinder); ok {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		b.BindThread()
	}
	defer t.k.live.Done()
	growStack()
	t.running()
	if t.forked {
		// What it is going to touch first.
		t.mm.Prefault(t, hostarch.Addr(t.ac.IP()), hostarch.Execute)
		t.mm.Prefault(t, hostarch.Addr(t.ac.Stack())-8, hostarch.Write)
	}
	for {
		if t.work.Load() && !t.doWork() {
			break
		}
		t.inApp.Store(true)
		if t.work.Load() {
			t.inApp.Store(false)
			continue
		}
		var info *linux.SignalInfo
		var at hostarch.AccessType
		err := t.mm.Activate()
		if err == nil {
			info, at, err = t.pc.Switch(t, t.mm, t.ac, -1)
			t.mm.Deactivate()
		}
		t.inApp.Store(false)
		switch err {
		case nil:
			t.syscall()
		case platform.ErrContextSignal:
			t.fault(info, at)
		case platform.ErrContextInterrupt, platform.ErrContextCPUPreempted:
			// What it was for is in t.work.
		default:
			t.hostFailed(err)
		}
	}
	t.end()
}

// hostFailed ends the process because the host cannot run it.
func (t *Task) hostFailed(err error) {
	k := t.k
	k.mu.Lock()
	first := !t.tg.exiting // the other threads fail for the same reason, or none
	k.exitGroupLocked(t.tg, t, linux.WaitStatusKilled(linux.SIGKILL, false))
	k.mu.Unlock()
	if first {
		k.cfg.Log.Printf("process %d (%s) ended: %v", t.TGID(), t.Name(), err)
	}
}

// syscall answers the system call that the task has made.
func (t *Task) syscall() {
	k := t.k
	nr, args := t.ac.SyscallNo(), t.ac.SyscallArgs()
	var s Syscall
	if table := k.cfg.Syscalls; nr < uintptr(len(table)) {
		s = table[nr]
	}
	var (
		ret uintptr
		ctl *SyscallControl
		err error
	)
	trace := k.cfg.Trace != nil
	var entry string
	if trace {
		entry = t.traceEntry(s.Name, nr, args)
	}
	if s.Fn != nil {
		ret, ctl, err = s.Fn(t, args)
	} else {
		err = k.unknownSyscall(t, nr)
	}
	if trace {
		t.traceExit(entry, ret, ctl, err)
	}
	t.finishSyscall(ret, ctl, err)
}

func (t *Task) finishSyscall(ret uintptr, ctl *SyscallControl, err error) {
	if ctl != nil && ctl.keepRegisters {
		return
	}
	if r, ok := err.(restartError); ok {
		t.restart = r
		t.work.Store(true)
		return
	}
	var errno unix.Errno
	if err != nil {
		errno = errnoOf(err)
		ret = uintptr(-int(errno))
	}
	if t.haveSaved && errno != unix.EINTR {
		t.restoreMask()
	}
	t.ac.SetReturn(ret)
}

// restoreMask ends what SetTemporarySignalMask began.
func (t *Task) restoreMask() {
	t.k.mu.Lock()
	t.restoreMaskLocked()
	t.k.mu.Unlock()
}

func (t *Task) restoreMaskLocked() {
	if t.haveSaved {
		t.haveSaved = false
		t.setMaskLocked(t.savedMask)
	}
}

// SetRestartBlock makes fn be called when the system call that returns
// ERESTART_RESTARTBLOCK is restarted.
func (t *Task) SetRestartBlock(fn func(*Task) (uintptr, error)) { t.restartBlock = fn }

// RestartSyscall is restart_syscall(2).
func (t *Task) RestartSyscall() (uintptr, error) {
	if fn := t.restartBlock; fn != nil {
		return fn(t)
	}
	return 0, unix.EINTR
}

// settleRestart decides on a system call that was interrupted. handled says
// that a handler with flags runs now.
func (t *Task) settleRestart(handled bool, flags uint64) {
	r := t.restart
	if r == 0 {
		return
	}
	t.restart = 0
	again := true
	if handled {
		again = r == ERESTARTNOINTR || (r == ERESTARTSYS && flags&linux.SA_RESTART != 0)
	}
	if !again {
		eintr := unix.EINTR
		t.ac.SetReturn(uintptr(-int(eintr)))
		return
	}
	if !t.pull() {
		return
	}
	if r == ERESTART_RESTARTBLOCK {
		t.ac.RestartSyscallWithRestartBlock()
	} else {
		t.ac.RestartSyscall()
	}
	t.FullStateChanged()
}

// pull completes the registers, or ends the process if the host cannot.
func (t *Task) pull() bool {
	if err := t.PullFullState(); err != nil {
		t.hostFailed(err)
		return false
	}
	return true
}

// interrupted reports whether a task that blocks must see to something first.
func (t *Task) interrupted() bool {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	return t.deliverableLocked() != 0 || t.tg.stopSignal != 0 || t.dyingLocked()
}

// Interrupted reports whether a signal waits to be delivered, so that a long
// system call should end early.
func (t *Task) Interrupted() bool { return t.work.Load() && t.interrupted() }

func (t *Task) dying() bool {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	return t.dyingLocked()
}

func (t *Task) dyingLocked() bool {
	return t.tg.exiting || t.exiting || (t.tg.execing != nil && t.tg.execing != t)
}

// doWork does what must be done before application code runs on: it stops,
// takes signals, and settles interrupted system calls. It returns false when
// the task is to end.
func (t *Task) doWork() bool {
	k, tg := t.k, t.tg
	for {
		t.work.Store(false)
		k.mu.Lock()
		if t.dyingLocked() {
			k.mu.Unlock()
			return false
		}
		if tg.stopSignal != 0 {
			resume := tg.resume
			t.stopped = true
			tg.stoppedLocked()
			k.mu.Unlock()
			t.pc.PrepareSleep()
			t.state.Store('T')
			<-resume // exiting closes it as well
			t.running()
			k.mu.Lock()
			t.stopped = false
			k.mu.Unlock()
			t.work.Store(true)
			continue
		}
		info := t.takeLocked(^(t.mask &^ linux.UnblockableSignals))
		if info == nil {
			k.mu.Unlock()
			t.settleRestart(false, 0)
			if t.haveSaved {
				t.restoreMask() // may let signals in
			}
			if t.work.Load() {
				continue
			}
			return true
		}
		t.takeSignal(info)
	}
}

// takeSignal does what the action for a signal says. Kernel.mu is held at the
// start and not at the end.
func (t *Task) takeSignal(info *linux.SignalInfo) {
	k, tg := t.k, t.tg
	sig := linux.Signal(info.Signo)
	act := tg.handlers.actions[sig]
	t.traceSignal(info)
	if act.Handler > linux.SIG_IGN {
		if act.Flags&linux.SA_RESETHAND != 0 {
			tg.handlers.actions[sig].Handler = linux.SIG_DFL
		}
		k.mu.Unlock()
		t.runHandler(info, &act)
		return
	}
	defer k.mu.Unlock()
	switch {
	case tg.handlers.ignores(sig):
	case stopSignals.Has(sig):
		if sig == linux.SIGSTOP || !tg.pgrp.orphanedLocked() {
			tg.stopLocked(sig)
		}
	default:
		k.exitGroupLocked(tg, t, linux.WaitStatusKilled(sig, false)) // no core is dumped
	}
}

// runHandler makes the task run the handler for a signal next.
func (t *Task) runHandler(info *linux.SignalInfo, act *linux.SigAction) {
	t.settleRestart(true, act.Flags)
	if !t.pull() {
		return
	}
	old := t.mask
	if t.haveSaved {
		old, t.haveSaved = t.savedMask, false
	}
	sig := linux.Signal(info.Signo)
	if err := t.ac.SignalSetup(t, t.mm, act, info, &t.altStack, old, uint64(t.restorer)); err != nil {
		// The stack cannot take the frame. A handler for that may run on another.
		if sig == linux.SIGSEGV {
			t.k.mu.Lock()
			t.tg.handlers.actions[sig] = linux.SigAction{}
			t.k.mu.Unlock()
		}
		t.SetSignalMask(old)
		t.forceSignal(KernelSignal(linux.SIGSEGV))
		return
	}
	t.FullStateChanged()
	blocked := t.mask | act.Mask
	if act.Flags&linux.SA_NODEFER == 0 {
		blocked |= linux.SignalSetOf(sig)
	}
	t.SetSignalMask(blocked)
}

// SignalReturn is rt_sigreturn(2).
func (t *Task) SignalReturn() (*SyscallControl, error) {
	if err := t.PullFullState(); err != nil {
		return nil, err
	}
	mask, alt, err := t.ac.SignalRestore(t, t.mm)
	if err != nil {
		t.forceSignal(KernelSignal(linux.SIGSEGV))
		return KeepRegisters, nil
	}
	t.SetAltStack(alt) // Linux ignores its errors
	t.SetSignalMask(mask)
	t.FullStateChanged()
	return KeepRegisters, nil
}

// fault sees to a signal that the platform reports for the task.
func (t *Task) fault(info *linux.SignalInfo, at hostarch.AccessType) {
	sig := linux.Signal(info.Signo)
	switch sig {
	case linux.SIGSEGV:
		if platform.TryCPUIDEmulate(t, t.mm, t.ac) {
			return
		}
		if info.Code <= 0 || info.Code == linux.SI_KERNEL {
			break // no page fault: a general protection fault, or sent from outside
		}
		err := t.mm.HandleUserFault(t, hostarch.Addr(info.Addr()), at, hostarch.Addr(t.ac.Stack()))
		var bus *memmap.BusError
		var fault *mm.FaultError
		switch {
		case err == nil:
			return
		case errors.As(err, &bus):
			addr := info.Addr()
			info = &linux.SignalInfo{Signo: int32(linux.SIGBUS), Code: linux.BUS_ADRERR}
			info.SetAddr(addr)
		case errors.As(err, &fault):
			info.Code = linux.SEGV_MAPERR
			if fault.Mapped {
				info.Code = linux.SEGV_ACCERR
			}
		default: // the host cannot map the page
			t.hostFailed(err)
			return
		}
	case linux.SIGBUS, linux.SIGILL, linux.SIGFPE, linux.SIGTRAP, linux.SIGSYS:
	default:
		return // sent from outside, or a late interrupt: not for the application
	}
	t.forceSignal(info)
}

// growStack makes the goroutine's stack as large as most tasks come to need: it would
// be copied three times on the way there.
//
//go:noinline
func growStack() {
	var frame [9 << 10]byte
	runtime.KeepAlive(&frame)
}
