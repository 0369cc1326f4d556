package kernel

import (
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
)

// The signals whose default action is not to end the process (signal(7)).
var (
	ignoredByDefault = linux.MakeSignalSet(linux.SIGCHLD, linux.SIGCONT, linux.SIGURG, linux.SIGWINCH)
	stopSignals      = linux.MakeSignalSet(linux.SIGSTOP, linux.SIGTSTP, linux.SIGTTIN, linux.SIGTTOU)
	// synchronousSignals come from what the thread itself does, and are
	// delivered before all others.
	synchronousSignals = linux.MakeSignalSet(linux.SIGSEGV, linux.SIGBUS, linux.SIGILL, linux.SIGTRAP, linux.SIGFPE, linux.SIGSYS)
)

// pendingSignals are the signals that wait for delivery. Standard signals are
// held once, real-time signals in the order in which they came.
type pendingSignals struct {
	set   linux.SignalSet
	infos []*queuedSignal
}

type queuedSignal struct {
	info linux.SignalInfo
	// timer is the POSIX timer that owns the signal, or nil.
	timer *posixTimer
}

// next returns the signal to be taken first among those of accept, or 0.
func (p *pendingSignals) next(accept linux.SignalSet) linux.Signal {
	set := p.set & accept
	if s := set & synchronousSignals; s != 0 {
		set = s
	}
	return firstSignal(set)
}

// firstSignal returns the lowest signal of set, or 0.
func firstSignal(set linux.SignalSet) linux.Signal {
	for s := linux.Signal(1); s <= linux.NSig; s++ {
		if set.Has(s) {
			return s
		}
	}
	return 0
}

// take removes the first signal of the number sig, which is pending.
func (p *pendingSignals) take(sig linux.Signal) *queuedSignal {
	i := slices.IndexFunc(p.infos, func(q *queuedSignal) bool { return q.info.Signo == int32(sig) })
	q := p.infos[i]
	p.infos = slices.Delete(p.infos, i, i+1)
	if !slices.ContainsFunc(p.infos, func(q *queuedSignal) bool { return q.info.Signo == int32(sig) }) {
		p.set &^= linux.SignalSetOf(sig)
	}
	return q
}

// discard removes all signals of set, and returns how many.
func (p *pendingSignals) discard(set linux.SignalSet) int {
	n := len(p.infos)
	p.set &^= set
	p.infos = slices.DeleteFunc(p.infos, func(q *queuedSignal) bool {
		drop := set.Has(linux.Signal(q.info.Signo))
		if drop && q.timer != nil {
			q.timer.queued = false
		}
		return drop
	})
	return n - len(p.infos)
}

// SignalHandlers are the actions for each signal, shared by threads
// (CLONE_SIGHAND). They are protected by Kernel.mu.
type SignalHandlers struct {
	actions [linux.NSig + 1]linux.SigAction
}

func (h *SignalHandlers) fork() *SignalHandlers {
	n := *h
	return &n
}

// ignores reports whether sig has no effect when it is delivered.
func (h *SignalHandlers) ignores(sig linux.Signal) bool {
	switch h.actions[sig].Handler {
	case linux.SIG_IGN:
		return true
	case linux.SIG_DFL:
		return ignoredByDefault.Has(sig)
	}
	return false
}

// reset sets the actions that are functions to the default, as execve(2) does.
func (h *SignalHandlers) reset() {
	for i := range h.actions {
		if h.actions[i].Handler != linux.SIG_IGN {
			h.actions[i] = linux.SigAction{}
		} else {
			h.actions[i] = linux.SigAction{Handler: linux.SIG_IGN}
		}
	}
}

// KernelSignal returns the information of a signal that the Sentry sends.
func KernelSignal(sig linux.Signal) *linux.SignalInfo {
	return &linux.SignalInfo{Signo: int32(sig), Code: linux.SI_KERNEL}
}

// UserSignal returns the information of a signal that t sends with kill(2), or
// with tgkill(2) if code is SI_TKILL.
func (t *Task) UserSignal(sig linux.Signal, code int32) *linux.SignalInfo {
	info := &linux.SignalInfo{Signo: int32(sig), Code: code}
	info.SetPID(t.TGID())
	info.SetUID(int32(t.Creds().RUID))
	return info
}

// SendSignal sends a signal to this thread. Any goroutine may call it. It fails
// with EAGAIN when too many signals are queued.
func (t *Task) SendSignal(info *linux.SignalInfo) error {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	return t.k.sendLocked(t.tg, t, info, nil)
}

// sendLocked sends a signal to the thread to, or to any of tg if that is nil.
func (k *Kernel) sendLocked(tg *ThreadGroup, to *Task, info *linux.SignalInfo, timer *posixTimer) error {
	sig := linux.Signal(info.Signo)
	if tg.zombie || tg.exiting || (to != nil && to.ended) {
		return nil // it exists, but nothing can reach it any more
	}

	if sig == linux.SIGKILL { // nothing stands in its way, not even a stop
		k.exitGroupLocked(tg, nil, linux.WaitStatusKilled(sig, false))
		return nil
	}

	// Stop signals and SIGCONT cancel each other, and SIGCONT acts at once,
	// blocked, ignored or not.
	switch {
	case stopSignals.Has(sig):
		tg.discardLocked(linux.SignalSetOf(linux.SIGCONT))
	case sig == linux.SIGCONT:
		tg.discardLocked(stopSignals)
		tg.continueLocked()
	}

	target := to
	if target == nil {
		target = tg.tasks[0]
	}
	sent := linux.SignalSetOf(sig)
	if tg.handlers.ignores(sig) && (target.mask|target.realMask)&sent == 0 {
		return nil
	}
	p := &tg.pending
	if to != nil {
		p = &to.pending
	}
	if sig.IsStandard() && p.set.Has(sig) {
		return nil
	}
	if max, _ := tg.limitLocked(unix.RLIMIT_SIGPENDING); uint64(k.queued) >= max {
		// One that is not queued yet is sent all the same: there are 64 at most.
		switch {
		case sig.IsRealtime() && info.Code != linux.SI_USER:
			return unix.EAGAIN
		case p.set.Has(sig):
			return nil
		}
	}
	p.set |= sent
	p.infos = append(p.infos, &queuedSignal{info: *info, timer: timer})
	if timer != nil {
		timer.queued = true
	}
	k.queued++
	tg.signalled.Notify(waiter.ReadableEvents)

	if to != nil {
		if to.wantsLocked(sig) {
			to.interrupt()
		}
		return nil
	}
	// The first thread if it will have it, else any other.
	for _, t := range tg.tasks {
		if t.wantsLocked(sig) {
			t.interrupt()
			break
		}
	}
	return nil
}

// wantsLocked reports whether t would take sig now.
func (t *Task) wantsLocked(sig linux.Signal) bool {
	return !t.ended && (!t.mask.Has(sig) || linux.UnblockableSignals.Has(sig))
}

// discardLocked drops pending signals of the whole process.
func (tg *ThreadGroup) discardLocked(set linux.SignalSet) {
	tg.k.queued -= tg.pending.discard(set)
	for _, t := range tg.tasks {
		tg.k.queued -= t.pending.discard(set)
	}
}

// deliverableLocked returns the pending signals that are not blocked.
func (t *Task) deliverableLocked() linux.SignalSet {
	return (t.pending.set | t.tg.pending.set) & ^(t.mask &^ linux.UnblockableSignals)
}

// takeLocked removes a pending signal of accept, or returns nil.
func (t *Task) takeLocked(accept linux.SignalSet) *linux.SignalInfo {
	p := &t.pending
	sig := p.next(accept)
	if sig == 0 {
		p = &t.tg.pending
		if sig = p.next(accept); sig == 0 {
			return nil
		}
	}
	q := p.take(sig)
	t.k.queued--
	if q.timer != nil {
		q.timer.deliveredLocked(&q.info)
	}
	return &q.info
}

// SignalMask returns the signals that t blocks.
func (t *Task) SignalMask() linux.SignalSet { return t.mask }

// SetSignalMask makes mask the signals that t blocks.
func (t *Task) SetSignalMask(mask linux.SignalSet) {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	t.setMaskLocked(mask)
}

func (t *Task) setMaskLocked(mask linux.SignalSet) {
	mask &^= linux.UnblockableSignals
	added := mask &^ t.mask
	t.mask = mask
	// What was meant for t and is blocked now goes to another thread.
	if set := t.tg.pending.set & added; set != 0 {
		for _, other := range t.tg.tasks {
			if other != t && set&^other.mask != 0 {
				other.interrupt()
			}
		}
	}
	if t.deliverableLocked() != 0 {
		t.work.Store(true)
	}
}

// SetTemporarySignalMask makes mask the blocked signals until the system call
// is over, or if a handler runs until that returns (sigsuspend(2), ppoll(2)).
func (t *Task) SetTemporarySignalMask(mask linux.SignalSet) {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	if !t.haveSaved {
		t.savedMask, t.haveSaved = t.mask, true
	}
	t.setMaskLocked(mask)
	t.work.Store(true) // so that the mask is put back
}

// PendingSignals returns the signals that are pending for t and its process.
func (t *Task) PendingSignals() linux.SignalSet {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	return t.pending.set | t.tg.pending.set
}

// SignalAction returns the action for sig, and installs act unless it is nil.
// EINVAL if sig does not exist or cannot have another action.
func (t *Task) SignalAction(sig linux.Signal, act *linux.SigAction) (old linux.SigAction, err error) {
	if !sig.IsValid() || (act != nil && linux.UnblockableSignals.Has(sig)) {
		return old, unix.EINVAL
	}
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	old = t.tg.handlers.actions[sig]
	if act != nil {
		n := *act
		n.Mask &^= linux.UnblockableSignals
		t.tg.handlers.actions[sig] = n
		if t.tg.handlers.ignores(sig) {
			t.tg.discardLocked(linux.SignalSetOf(sig))
		}
	}
	return old, nil
}

// AltStack returns the alternate signal stack (sigaltstack(2)).
func (t *Task) AltStack() linux.SignalStack {
	s := t.altStack
	if s.Size == 0 {
		return linux.SignalStack{Flags: linux.SS_DISABLE}
	}
	if t.onAltStack() {
		s.Flags |= linux.SS_ONSTACK
	}
	return s
}

// onAltStack reports whether the task runs on its alternate stack. One that is
// disarmed while a handler runs is free to be used again.
func (t *Task) onAltStack() bool {
	return t.altStack.Size != 0 && t.altStack.Flags&linux.SS_AUTODISARM == 0 && t.altStack.Contains(uint64(t.ac.Stack()))
}

// SetAltStack sets the alternate signal stack. It gives the errors of
// sigaltstack(2).
func (t *Task) SetAltStack(s linux.SignalStack) error {
	if t.onAltStack() {
		return unix.EPERM
	}
	switch s.Flags &^ linux.SS_AUTODISARM {
	case linux.SS_DISABLE:
		t.altStack = linux.SignalStack{}
	case 0, linux.SS_ONSTACK:
		if s.Size < minSigStackSize {
			return unix.ENOMEM
		}
		s.Flags &= linux.SS_AUTODISARM
		t.altStack = s
	default:
		return unix.EINVAL
	}
	return nil
}

// forceSignal sends a signal that the thread caused itself and cannot do
// without: if it is blocked or ignored, it ends the process.
func (t *Task) forceSignal(info *linux.SignalInfo) {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	sig := linux.Signal(info.Signo)
	act := &t.tg.handlers.actions[sig]
	if t.mask.Has(sig) || act.Handler == linux.SIG_IGN {
		*act = linux.SigAction{}
		t.mask &^= linux.SignalSetOf(sig)
	}
	t.k.sendLocked(t.tg, t, info, nil)
	t.work.Store(true)
}

// WaitSignal takes a pending signal of set, waiting for one for at most timeout,
// or for ever if that is negative (sigtimedwait(2)). It returns EAGAIN if none
// came, EINTR if another did.
func (t *Task) WaitSignal(set linux.SignalSet, timeout time.Duration) (*linux.SignalInfo, error) {
	k := t.k
	set &^= linux.UnblockableSignals
	k.mu.Lock()
	if info := t.takeLocked(set); info != nil || timeout == 0 {
		k.mu.Unlock()
		if info == nil {
			return nil, unix.EAGAIN
		}
		return info, nil
	}
	t.realMask = t.mask
	t.mask &^= set
	k.mu.Unlock()

	var deadline time.Time
	if timeout > 0 {
		deadline = time.Now().Add(timeout)
	}
	err := t.BlockUntil(nil, deadline)

	k.mu.Lock()
	defer k.mu.Unlock()
	info := t.takeLocked(set)
	t.setMaskLocked(t.realMask)
	t.realMask = 0
	switch {
	case info != nil:
		return info, nil
	case err == unix.ETIMEDOUT:
		return nil, unix.EAGAIN
	}
	return nil, unix.EINTR
}
