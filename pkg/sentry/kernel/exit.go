package kernel

import (
	"slices"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/mm"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// ExitGroup makes all threads of t's process end, with a status as wait4(2)
// gives it.
func (t *Task) ExitGroup(status uint32) {
	t.k.mu.Lock()
	t.k.exitGroupLocked(t.tg, t, status)
	t.k.mu.Unlock()
}

// Exit makes t end (exit(2)). The leader's code is that of the process, whoever
// ends last.
func (t *Task) Exit(code int32) {
	k := t.k
	k.mu.Lock()
	defer k.mu.Unlock()
	t.exiting = true
	if !t.tg.exiting && t == t.tg.leader {
		t.tg.exitStatus = linux.WaitStatusExited(code)
	}
	t.work.Store(true)
}

// maxLateReleases bounds the processes that have ended but whose memory is still
// being released: a program that forks without end must not be ahead of that.
const maxLateReleases = 8

// end releases what the task holds, and tells those who wait for it.
func (t *Task) end() {
	k, tg := t.k, t.tg
	mm := t.leaveMemory()
	// Nobody sees how long the host takes to end a process: those who wait for it
	// are told before.
	release := func() {
		if mm != nil {
			mm.DecUsers(t)
		}
		t.pc.Release()
	}
	if late := k.lateReleases.Add(1); late <= maxLateReleases && tg.lastTask() {
		defer k.lateReleases.Add(-1)
		defer release()
	} else {
		k.lateReleases.Add(-1)
		release()
	}

	t.resMu.Lock()
	fdt, fs := t.fdt, t.fs
	t.fdt, t.fs = nil, nil
	t.resMu.Unlock()
	if fdt != nil {
		fdt.DecRef()
	}
	if fs != nil {
		fs.DecRef()
	}

	k.mu.Lock()
	defer k.mu.Unlock()
	t.ended = true
	t.state.Store('Z')
	tg.userTicks += t.userTicks.Load()
	tg.sysTicks += t.sysTicks.Load()
	tg.tasks = slices.DeleteFunc(tg.tasks, func(o *Task) bool { return o == t })
	k.queued -= t.pending.discard(^linux.SignalSet(0))
	if t != tg.leader {
		delete(k.tasks, t.TID())
	}
	k.parentDiedLocked(t)

	switch {
	case len(tg.tasks) == 0:
		k.endGroupLocked(tg)
		return
	case tg.execing != nil && len(tg.tasks) == 1:
		close(tg.alone)
	}
	// What waits for the process may have been meant for t.
	for _, other := range tg.tasks {
		if other.deliverableLocked() != 0 {
			other.interrupt()
		}
	}
	tg.stoppedLocked() // t may have been the last that had not stopped
}

// lastTask reports whether tg has only one thread.
func (tg *ThreadGroup) lastTask() bool {
	tg.k.mu.Lock()
	defer tg.k.mu.Unlock()
	return len(tg.tasks) == 1
}

// leaveMemory lets go of the task's memory, and tells the threads that share it:
// futexes that t holds, the thread that waits for it, the parent of vfork. It
// returns the memory, if there is any, of which t is still a user.
func (t *Task) leaveMemory() *mm.MemoryManager {
	if t.mm == nil {
		return nil
	}
	t.endRobustList()
	if addr := t.clearTID; addr != 0 {
		t.clearTID = 0
		// Like Linux: nobody looks at memory that is about to go.
		if t.mm.Shared() && t.CopyOut(addr, make([]byte, 4)) == nil {
			t.FutexWake(addr, false, 1, linux.FUTEX_BITSET_MATCH_ANY)
		}
	}
	if t.vfork != nil {
		close(t.vfork)
		t.vfork = nil
	}
	t.resMu.Lock()
	mm := t.mm
	t.mm = nil
	t.resMu.Unlock()
	_, _, rss := memoryOf(mm)
	t.k.mu.Lock()
	t.tg.maxRSS = max(t.tg.maxRSS, rss)
	t.k.mu.Unlock()
	return mm
}

// maxRobustList bounds the list, which may be a ring (ROBUST_LIST_LIMIT).
const maxRobustList = 2048

// endRobustList marks the futexes that t holds as left by a thread that died
// (get_robust_list(2)). What it reads is the application's.
func (t *Task) endRobustList() {
	head := t.robustList
	t.robustList = 0
	if head == 0 {
		return
	}
	var h linux.RobustListHead
	if t.CopyInStruct(head, &h) != nil {
		return
	}
	const piBit = 1
	handle := func(entry uint64, pending bool) {
		t.robustDeath(hostarch.Addr(entry&^piBit+uint64(h.FutexOffset)), pending)
	}
	entry := h.List
	for range maxRobustList {
		if hostarch.Addr(entry&^piBit) == head {
			break
		}
		next, err := usermem.CopyUint64In(t, t.mm, hostarch.Addr(entry&^piBit), usermem.IOOpts{})
		if entry != h.ListOpPending {
			handle(entry, false)
		}
		if err != nil {
			break
		}
		entry = next
	}
	if h.ListOpPending&^piBit != 0 {
		handle(h.ListOpPending, true)
	}
}

// robustDeath marks one futex word, if t holds it.
func (t *Task) robustDeath(addr hostarch.Addr, pending bool) {
	if addr%4 != 0 {
		return
	}
	v, err := t.mm.LoadUint32(t, addr, usermem.IOOpts{})
	for err == nil {
		if pending && v&linux.FUTEX_TID_MASK == 0 {
			t.FutexWake(addr, false, 1, linux.FUTEX_BITSET_MATCH_ANY)
			return
		}
		if v&linux.FUTEX_TID_MASK != uint32(t.TID()) {
			return
		}
		var was uint32
		was, err = t.mm.CompareAndSwapUint32(t, addr, v, v&linux.FUTEX_WAITERS|linux.FUTEX_OWNER_DIED, usermem.IOOpts{})
		if err == nil && was == v {
			if v&linux.FUTEX_WAITERS != 0 {
				t.FutexWake(addr, false, 1, linux.FUTEX_BITSET_MATCH_ANY)
			}
			return
		}
		v = was
	}
}

// parentDiedLocked sends the signals of prctl(PR_SET_PDEATHSIG) for t's end. Another
// thread of the process is the children's parent then, as long as there is one: its
// end counts as well.
func (k *Kernel) parentDiedLocked(t *Task) {
	var heir *Task
	if len(t.tg.tasks) > 0 {
		heir = t.tg.tasks[0]
	}
	for _, child := range t.tg.children {
		if child.parentTask != t {
			continue
		}
		child.parentTask = heir
		for _, c := range child.tasks {
			if sig := c.parentDeath; sig != 0 {
				k.sendLocked(child, c, KernelSignal(sig), nil)
			}
		}
	}
}

// endGroupLocked makes a process without threads a zombie, or forgets it if
// nobody will wait.
func (k *Kernel) endGroupLocked(tg *ThreadGroup) {
	tg.zombie = true
	tg.timers.stopLocked()
	if tg.killer != nil {
		tg.killer.Stop()
	}
	k.queued -= tg.pending.discard(^linux.SignalSet(0))
	tg.ended.Notify(waiter.ReadableEvents)

	if tg == k.init {
		k.eachProcessLocked(func(other *ThreadGroup) {
			k.exitGroupLocked(other, nil, linux.WaitStatusKilled(linux.SIGKILL, false))
		})
	}
	k.reparentLocked(tg)

	p := tg.parent
	if p == nil {
		return // the first process: Wait takes its status
	}
	reap := false
	if tg.exitSignal == linux.SIGCHLD {
		act := &p.handlers.actions[linux.SIGCHLD]
		reap = act.Handler == linux.SIG_IGN || act.Flags&linux.SA_NOCLDWAIT != 0
	}
	if sig := tg.exitSignal; sig != 0 && !p.zombie {
		code, status := exitCode(tg.exitStatus)
		k.sendLocked(p, nil, tg.childInfoLocked(sig, code, status), nil)
	}
	if reap || p.zombie {
		k.reapLocked(tg)
	}
	p.wakeWaitersLocked()
}

// exitCode returns si_code and si_status for a status of wait4(2).
func exitCode(status uint32) (code, value int32) {
	if sig := status & 0x7f; sig != 0 {
		if status&0x80 != 0 {
			return linux.CLD_DUMPED, int32(sig)
		}
		return linux.CLD_KILLED, int32(sig)
	}
	return linux.CLD_EXITED, int32(status >> 8 & 0xff)
}

// reparentLocked gives the children of tg to the nearest ancestor that takes
// orphans, and lets process groups go on that nobody else could.
func (k *Kernel) reparentLocked(tg *ThreadGroup) {
	heir := k.init
	for p := tg.parent; p != nil; p = p.parent {
		if p.subreaper && !p.zombie {
			heir = p
			break
		}
	}
	children := tg.children
	tg.children = nil
	orphaned := func(pg *ProcessGroup) {
		if pg == nil || !pg.orphanedLocked() ||
			!slices.ContainsFunc(pg.members, func(m *ThreadGroup) bool { return m.stopSignal != 0 }) {
			return
		}
		k.signalGroupLocked(pg, KernelSignal(linux.SIGHUP))
		k.signalGroupLocked(pg, KernelSignal(linux.SIGCONT))
	}
	for _, child := range children {
		if heir == tg || heir == nil || heir.zombie {
			child.parent, child.parentTask = nil, nil
			if child.zombie {
				k.reapLocked(child)
			}
			continue
		}
		child.parent, child.parentTask = heir, heir.leader
		heir.children = append(heir.children, child)
		child.exitSignal = linux.SIGCHLD
		if child.zombie {
			k.endOrphanLocked(child)
		}
		orphaned(child.pgrp)
	}
	orphaned(tg.pgrp)
}

// endOrphanLocked tells the new parent of a zombie.
func (k *Kernel) endOrphanLocked(tg *ThreadGroup) {
	p := tg.parent
	act := &p.handlers.actions[linux.SIGCHLD]
	code, status := exitCode(tg.exitStatus)
	k.sendLocked(p, nil, tg.childInfoLocked(linux.SIGCHLD, code, status), nil)
	if act.Handler == linux.SIG_IGN || act.Flags&linux.SA_NOCLDWAIT != 0 {
		k.reapLocked(tg)
	}
	p.wakeWaitersLocked()
}

// reapLocked forgets a zombie.
func (k *Kernel) reapLocked(tg *ThreadGroup) {
	delete(k.tasks, tg.id)
	tg.leader.state.Store('X')
	tg.leaveLocked()
	p := tg.parent
	if p == nil {
		return
	}
	p.children = slices.DeleteFunc(p.children, func(c *ThreadGroup) bool { return c == tg })
	tg.parent, tg.parentTask = nil, nil
	p.childUserTicks += tg.userTicks + tg.childUserTicks
	p.childSysTicks += tg.sysTicks + tg.childSysTicks
	p.childMaxRSS = max(p.childMaxRSS, tg.maxRSS, tg.childMaxRSS)
}
