package kernel

import (
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/sentry/mm"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// ThreadGroup is a process. Fields are protected by Kernel.mu but for those
// that never change.
type ThreadGroup struct {
	k  *Kernel
	id int32

	// leader has the number of the process; it may have ended before others.
	leader *Task
	// tasks are the threads that have not ended, oldest first.
	tasks []*Task

	// parent is nil for the first process. parentTask is the thread that made
	// this process, for PR_SET_PDEATHSIG.
	parent     *ThreadGroup
	parentTask *Task
	children   []*ThreadGroup
	subreaper  bool

	pgrp     *ProcessGroup
	execed   bool
	handlers *SignalHandlers
	pending  pendingSignals

	// exitSignal is sent to the parent at the end; 0 for none.
	exitSignal linux.Signal
	// exiting says that all threads are to end, with exitStatus.
	exiting    bool
	exitStatus uint32
	// killer calls killMemory, unless all threads have ended before.
	killer *time.Timer
	// zombie says that all threads have ended.
	zombie bool
	// execing is the thread that runs execve(2), and is to be the only one;
	// alone is closed when it is.
	execing *Task
	alone   chan struct{}

	// stopSignal is not 0 while the process is to be stopped; resume is closed
	// when it goes on. reported is a change that wait(2) has not been told of.
	stopSignal linux.Signal
	resume     chan struct{}
	report     stopReport

	// childChanged is closed, and replaced, when a child changes its state.
	childChanged chan struct{}

	limits [linux.RLIM_NLIMITS]linux.Rlimit

	// Times of threads that have ended, and of children waited for, in ticks.
	userTicks, sysTicks           int64
	childUserTicks, childSysTicks int64
	maxRSS, childMaxRSS           uint64

	timers processTimers

	dumpable    atomic.Int32
	personality atomic.Uint32

	// ended is notified when the process has ended, for pidfds; signalled when a
	// signal is pending, for signalfds.
	ended, signalled waiter.Queue
}

// stopReport is a change of a process that wait(2) reports once.
type stopReport int

const (
	noReport stopReport = iota
	reportStopped
	reportContinued
)

// ProcessGroup is a set of processes that signals are sent to as one. It is
// protected by Kernel.mu.
type ProcessGroup struct {
	id      int32
	session *Session
	members []*ThreadGroup
}

// Session is a set of process groups with one terminal. It is protected by
// Kernel.mu.
type Session struct {
	id     int32
	groups int
	// foreground is the process group that the terminal's signals go to.
	foreground int32
	// terminal says that the Sentry's terminal is that of this session.
	terminal bool
}

// ID returns the number of the process.
func (tg *ThreadGroup) ID() int32 { return tg.id }

// Limit returns a resource limit. Any goroutine may call it.
func (tg *ThreadGroup) Limit(resource int) (cur, max uint64) {
	tg.k.mu.Lock()
	defer tg.k.mu.Unlock()
	return tg.limitLocked(resource)
}

func (tg *ThreadGroup) limitLocked(resource int) (cur, max uint64) {
	l := tg.limits[resource]
	return l.Cur, l.Max
}

// defaultLimits returns the host's limits. The soft limit on descriptors is
// that of a fresh Linux, since the Go runtime has raised ours.
func defaultLimits() (limits [linux.RLIM_NLIMITS]linux.Rlimit) {
	for i := range limits {
		l := &limits[i]
		l.Cur, l.Max = linux.RLIM_INFINITY, linux.RLIM_INFINITY
		var host unix.Rlimit
		if unix.Getrlimit(i, &host) == nil {
			l.Cur, l.Max = host.Cur, host.Max
		}
	}
	const defaultFiles, maxFiles = 1024, 1 << 20
	n := &limits[linux.RLIMIT_NOFILE]
	n.Max = min(n.Max, maxFiles)
	n.Cur = min(n.Max, defaultFiles)
	return limits
}

// SetLimit sets a resource limit of the process, as prlimit(2) by t does, and
// returns the one before. A nil limit only returns it.
func (t *Task) SetLimit(tg *ThreadGroup, resource int, limit *linux.Rlimit) (linux.Rlimit, error) {
	k := t.k
	k.mu.Lock()
	defer k.mu.Unlock()
	old := tg.limits[resource]
	if limit == nil {
		return old, nil
	}
	if limit.Cur > limit.Max {
		return old, unix.EINVAL
	}
	if limit.Max > old.Max && !t.Creds().Has(linux.CAP_SYS_RESOURCE) {
		return old, unix.EPERM
	}
	if resource == linux.RLIMIT_NOFILE && limit.Max > 1<<20 { // sysctl fs.nr_open
		return old, unix.EPERM
	}
	tg.limits[resource] = *limit
	for _, other := range tg.tasks {
		other.resMu.Lock()
		if other.mm != nil {
			other.mm.SetLimits(tg.memoryLimitsLocked())
		}
		other.resMu.Unlock()
	}
	return old, nil
}

// memoryLimits returns the limits that bound the process's memory.
func (tg *ThreadGroup) memoryLimits() mm.Limits {
	tg.k.mu.Lock()
	defer tg.k.mu.Unlock()
	return tg.memoryLimitsLocked()
}

func (tg *ThreadGroup) memoryLimitsLocked() mm.Limits {
	return mm.Limits{
		AS:      tg.limits[linux.RLIMIT_AS].Cur,
		Data:    tg.limits[linux.RLIMIT_DATA].Cur,
		Stack:   tg.limits[linux.RLIMIT_STACK].Cur,
		MemLock: tg.limits[linux.RLIMIT_MEMLOCK].Cur,
	}
}

// addrNoRandomize is ADDR_NO_RANDOMIZE of personality(2).
const addrNoRandomize = 0x0040000

// Personality returns what personality(2) has set.
func (tg *ThreadGroup) Personality() uint32 { return tg.personality.Load() }

// SetPersonality sets it, and returns what it was.
func (tg *ThreadGroup) SetPersonality(p uint32) uint32 { return tg.personality.Swap(p) }

// Dumpable returns prctl(PR_GET_DUMPABLE).
func (tg *ThreadGroup) Dumpable() int32 { return tg.dumpable.Load() }

// SetDumpable is prctl(PR_SET_DUMPABLE).
func (tg *ThreadGroup) SetDumpable(v int32) { tg.dumpable.Store(v) }

// Subreaper reports whether the process adopts orphans (PR_SET_CHILD_SUBREAPER).
func (tg *ThreadGroup) Subreaper() bool {
	tg.k.mu.Lock()
	defer tg.k.mu.Unlock()
	return tg.subreaper
}

// SetSubreaper is prctl(PR_SET_CHILD_SUBREAPER).
func (tg *ThreadGroup) SetSubreaper(v bool) {
	tg.k.mu.Lock()
	tg.subreaper = v
	tg.k.mu.Unlock()
}

// newPIDLocked returns a number that no task, process group or session has, or
// 0 if there is none.
func (k *Kernel) newPIDLocked() int32 {
	for range maxPID {
		k.lastPID++
		if k.lastPID >= maxPID {
			k.lastPID = firstReusedPID
		}
		id := k.lastPID
		if k.tasks[id] == nil && k.groups[id] == nil && k.sessions[id] == nil {
			return id
		}
	}
	return 0
}

const (
	maxPID         = 1 << 22 // sysctl kernel.pid_max of 64-bit Linux
	firstReusedPID = 300     // RESERVED_PIDS, kernel/pid.c
)

// TaskByTID returns the thread with the number tid, or nil. Any goroutine may call
// it.
func (k *Kernel) TaskByTID(tid int32) *Task {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.tasks[tid]
}

// ProcessByID returns the process with the number tgid, or nil. Any goroutine
// may call it.
func (k *Kernel) ProcessByID(tgid int32) *ThreadGroup {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.processLocked(tgid)
}

func (k *Kernel) processLocked(tgid int32) *ThreadGroup {
	if t := k.tasks[tgid]; t != nil && t.tg.id == tgid {
		return t.tg
	}
	return nil
}

// eachProcessLocked calls f for each process in the order of their numbers.
func (k *Kernel) eachProcessLocked(f func(*ThreadGroup)) {
	var ids []int32
	for id, t := range k.tasks {
		if t.tg.id == id {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	for _, id := range ids {
		f(k.tasks[id].tg)
	}
}

// joinLocked moves tg to the process group id, which is made if it does not
// exist yet.
func (tg *ThreadGroup) joinLocked(s *Session, id int32) {
	tg.leaveLocked()
	k := tg.k
	pg := k.groups[id]
	if pg == nil {
		pg = &ProcessGroup{id: id, session: s}
		k.groups[id] = pg
		s.groups++
	}
	pg.members = append(pg.members, tg)
	tg.pgrp = pg
}

// leaveLocked takes tg out of its process group, which goes when it is empty.
func (tg *ThreadGroup) leaveLocked() {
	pg := tg.pgrp
	if pg == nil {
		return
	}
	tg.pgrp = nil
	pg.members = slices.DeleteFunc(pg.members, func(m *ThreadGroup) bool { return m == tg })
	if len(pg.members) == 0 {
		delete(tg.k.groups, pg.id)
		if pg.session.groups--; pg.session.groups == 0 {
			delete(tg.k.sessions, pg.session.id)
		}
	}
}

// orphanedLocked reports whether no process of the group has a parent in
// another group of the session, that could let it go on when it is stopped.
func (pg *ProcessGroup) orphanedLocked() bool {
	for _, tg := range pg.members {
		if tg == tg.k.init && tg.k.cfg.Stopped != nil {
			return false
		}
		if p := tg.parent; p != nil && !tg.zombie && p.pgrp != nil && p.pgrp != pg && p.pgrp.session == pg.session {
			return false
		}
	}
	return true
}

// TasksOfGroup returns the threads of a process group, 0 for that of t.
func (k *Kernel) TasksOfGroup(t *Task, pgid int32) []*Task {
	k.mu.Lock()
	defer k.mu.Unlock()
	pg := t.tg.pgrp
	if pgid != 0 {
		pg = k.groups[pgid]
	}
	if pg == nil {
		return nil
	}
	var tasks []*Task
	for _, tg := range pg.members {
		tasks = append(tasks, tg.tasks...)
	}
	return tasks
}

// TasksOfUser returns the threads whose real user ID is uid.
func (k *Kernel) TasksOfUser(uid uint32) []*Task {
	k.mu.Lock()
	defer k.mu.Unlock()
	var tasks []*Task
	for _, t := range k.tasks {
		if t.Creds().RUID == uid {
			tasks = append(tasks, t)
		}
	}
	return tasks
}

// Threads returns the number of threads that have not ended.
func (tg *ThreadGroup) Threads() int {
	tg.k.mu.Lock()
	defer tg.k.mu.Unlock()
	return len(tg.tasks)
}

// PPID returns the number of the parent, 0 if there is none.
func (tg *ThreadGroup) PPID() int32 {
	tg.k.mu.Lock()
	defer tg.k.mu.Unlock()
	return tg.ppidLocked()
}

func (tg *ThreadGroup) ppidLocked() int32 {
	if tg.parent == nil {
		return 0
	}
	return tg.parent.id
}

// GetPGID returns the process group and session of process pid, 0 for the
// caller's own; ESRCH if there is none.
func (t *Task) GetPGID(pid int32) (pgid, sid int32, err error) {
	k := t.k
	k.mu.Lock()
	defer k.mu.Unlock()
	tg := t.tg
	if pid != 0 {
		other := k.tasks[pid]
		if other == nil || other.tg.pgrp == nil {
			return 0, 0, unix.ESRCH
		}
		tg = other.tg
	}
	return tg.pgrp.id, tg.pgrp.session.id, nil
}

// SetPGID is setpgid(2).
func (t *Task) SetPGID(pid, pgid int32) error {
	if pgid < 0 {
		return unix.EINVAL
	}
	k := t.k
	k.mu.Lock()
	defer k.mu.Unlock()
	tg := t.tg
	if pid != 0 && pid != tg.id {
		if tg = k.processLocked(pid); tg == nil || tg.parent != t.tg || tg.pgrp == nil {
			return unix.ESRCH
		}
		if tg.pgrp.session != t.tg.pgrp.session {
			return unix.EPERM
		}
		if tg.execed {
			return unix.EACCES
		}
	}
	if tg.pgrp.session.id == tg.id {
		return unix.EPERM
	}
	if pgid == 0 {
		pgid = tg.id
	}
	if pgid == tg.pgrp.id {
		return nil
	}
	if pgid != tg.id {
		if pg := k.groups[pgid]; pg == nil || pg.session != tg.pgrp.session {
			return unix.EPERM
		}
	}
	tg.joinLocked(tg.pgrp.session, pgid)
	return nil
}

// SetSID is setsid(2).
func (t *Task) SetSID() (int32, error) {
	k := t.k
	k.mu.Lock()
	defer k.mu.Unlock()
	tg := t.tg
	if k.groups[tg.id] != nil || k.sessions[tg.id] != nil {
		return 0, unix.EPERM
	}
	s := &Session{id: tg.id}
	k.sessions[tg.id] = s
	tg.joinLocked(s, tg.id)
	return s.id, nil
}

// Foreground returns the process group that the terminal's signals go to;
// ENOTTY if the Sentry's terminal is not that of t's session.
func (t *Task) Foreground() (int32, error) {
	k := t.k
	k.mu.Lock()
	defer k.mu.Unlock()
	s := t.tg.pgrp.session
	if !s.terminal {
		return 0, unix.ENOTTY
	}
	return s.foreground, nil
}

// SetForeground is tcsetpgrp(3) on the Sentry's terminal. A task in the
// background gets SIGTTOU unless it blocks or ignores that.
func (t *Task) SetForeground(pgid int32) error {
	k := t.k
	k.mu.Lock()
	defer k.mu.Unlock()
	pg := t.tg.pgrp
	if !pg.session.terminal {
		return unix.ENOTTY
	}
	if pgid < 0 {
		return unix.EINVAL
	}
	if pg.id != pg.session.foreground && !t.mask.Has(linux.SIGTTOU) &&
		t.tg.handlers.actions[linux.SIGTTOU].Handler != linux.SIG_IGN {
		if pg.orphanedLocked() {
			return unix.EIO
		}
		k.signalGroupLocked(pg, KernelSignal(linux.SIGTTOU))
		return ERESTARTSYS
	}
	other := k.groups[pgid]
	if other == nil {
		return unix.ESRCH
	}
	if other.session != pg.session {
		return unix.EPERM
	}
	pg.session.foreground = pgid
	return nil
}

// SignalForeground sends a signal to the process group that the terminal's
// signals go to: that of the first process, until a task says otherwise.
func (k *Kernel) SignalForeground(sig linux.Signal) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range k.sessions {
		if s.terminal {
			if pg := k.groups[s.foreground]; pg != nil {
				k.signalGroupLocked(pg, KernelSignal(sig))
			}
		}
	}
}

// SignalInit sends a signal to the first process.
func (k *Kernel) SignalInit(sig linux.Signal) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.init != nil {
		k.sendLocked(k.init, nil, KernelSignal(sig), nil)
	}
}

func (k *Kernel) signalGroupLocked(pg *ProcessGroup, info *linux.SignalInfo) {
	for _, tg := range slices.Clone(pg.members) {
		k.sendLocked(tg, nil, info, nil)
	}
}

// mayKillLocked reports whether t may send sig to tg (kill(2)).
func (t *Task) mayKillLocked(tg *ThreadGroup, sig linux.Signal) bool {
	if tg == t.tg {
		return true
	}
	if sig == linux.SIGCONT && tg.pgrp != nil && tg.pgrp.session == t.tg.pgrp.session {
		return true
	}
	c, o := t.Creds(), tg.leader.Creds()
	return c.EUID == o.SUID || c.EUID == o.RUID || c.RUID == o.SUID || c.RUID == o.RUID || c.Has(linux.CAP_KILL)
}

// Kill is kill(2): pid is a process, 0 the caller's process group, -1 all
// others, and a negative number a process group. Signal 0 only checks.
func (t *Task) Kill(pid int32, info *linux.SignalInfo) error {
	k := t.k
	k.mu.Lock()
	defer k.mu.Unlock()
	var targets []*ThreadGroup
	switch {
	case pid > 0:
		// A thread's number names its process too.
		if other := k.tasks[pid]; other != nil {
			targets = append(targets, other.tg)
		}
	case pid == 0:
		targets = append(targets, t.tg.pgrp.members...)
	case pid == -1:
		k.eachProcessLocked(func(tg *ThreadGroup) {
			if tg != k.init && tg != t.tg {
				targets = append(targets, tg)
			}
		})
	case pid == -1<<31:
		return unix.ESRCH
	default:
		if pg := k.groups[-pid]; pg != nil {
			targets = append(targets, pg.members...)
		}
	}
	if len(targets) == 0 {
		return unix.ESRCH
	}
	var err error = unix.EPERM
	for _, tg := range targets {
		if !t.mayKillLocked(tg, linux.Signal(info.Signo)) {
			continue
		}
		err = nil
		if info.Signo != 0 {
			if e := k.sendLocked(tg, nil, info, nil); e != nil && pid > 0 {
				err = e
			}
		}
	}
	return err
}

// KillThread is tgkill(2), or tkill(2) if tgid is negative.
func (t *Task) KillThread(tgid, tid int32, info *linux.SignalInfo) error {
	k := t.k
	k.mu.Lock()
	defer k.mu.Unlock()
	other := k.tasks[tid]
	if other == nil || (tgid >= 0 && other.tg.id != tgid) {
		return unix.ESRCH
	}
	if !t.mayKillLocked(other.tg, linux.Signal(info.Signo)) {
		return unix.EPERM
	}
	if info.Signo == 0 {
		return nil
	}
	return k.sendLocked(other.tg, other, info, nil)
}

// exitGroupLocked makes all threads of tg end, with status. by is one of them, if it is
// the caller, or nil.
func (k *Kernel) exitGroupLocked(tg *ThreadGroup, by *Task, status uint32) {
	if tg.exiting || tg.zombie {
		return
	}
	tg.exiting, tg.exitStatus = true, status
	if tg.stopSignal != 0 {
		tg.stopSignal = 0
		close(tg.resume)
	}
	others := false
	for _, t := range tg.tasks {
		t.interrupt()
		others = others || t != by
	}
	if others {
		// Those that are not in Switch may wait for the application, too: for its state.
		tg.killer = time.AfterFunc(killDelay, func() { k.killMemory(tg) })
	}
}

// killDelay is how long a process that is to end may take to react to interrupts.
var killDelay = time.Second

// killMemory ends what tg's threads run, unless somebody else needs their memory.
func (k *Kernel) killMemory(tg *ThreadGroup) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if tg.zombie {
		return // it came too late to be stopped
	}
	users := make(map[*mm.MemoryManager]int)
	for _, t := range k.tasks {
		if m := t.memory(); m != nil && t.tg.exiting {
			users[m]++
		}
	}
	for _, t := range tg.tasks {
		if m := t.memory(); m != nil {
			m.Kill(users[m])
		}
	}
	tg.killer.Reset(killDelay) // somebody may have been about to let go of it
}

// stopLocked begins to stop tg because of sig.
func (tg *ThreadGroup) stopLocked(sig linux.Signal) {
	if tg.stopSignal != 0 || tg.exiting {
		return
	}
	tg.stopSignal = sig
	tg.resume = make(chan struct{})
	for _, t := range tg.tasks {
		t.interrupt()
	}
}

// continueLocked lets tg go on if it is stopped, or about to.
func (tg *ThreadGroup) continueLocked() {
	if tg.stopSignal == 0 {
		return
	}
	full := !slices.ContainsFunc(tg.tasks, func(t *Task) bool { return !t.stopped })
	tg.stopSignal = 0
	close(tg.resume)
	if full {
		tg.report = reportContinued
		tg.notifyParentLocked(linux.CLD_CONTINUED, int32(linux.SIGCONT))
	}
}

// stoppedLocked tells the parent when the last thread of tg has stopped.
func (tg *ThreadGroup) stoppedLocked() {
	if tg.stopSignal == 0 || slices.ContainsFunc(tg.tasks, func(t *Task) bool { return !t.stopped }) {
		return
	}
	tg.report = reportStopped
	if tg == tg.k.init && tg.k.cfg.Stopped != nil {
		go tg.k.cfg.Stopped()
	}
	tg.notifyParentLocked(linux.CLD_STOPPED, int32(tg.stopSignal))
}

// notifyParentLocked tells the parent that tg has stopped or goes on.
func (tg *ThreadGroup) notifyParentLocked(code, status int32) {
	p := tg.parent
	if p == nil {
		return
	}
	act := &p.handlers.actions[linux.SIGCHLD]
	if act.Flags&linux.SA_NOCLDSTOP == 0 && act.Handler != linux.SIG_IGN {
		tg.k.sendLocked(p, nil, tg.childInfoLocked(linux.SIGCHLD, code, status), nil)
	}
	p.wakeWaitersLocked()
}

// childInfoLocked returns the siginfo_t that a parent gets of tg.
func (tg *ThreadGroup) childInfoLocked(sig linux.Signal, code, status int32) *linux.SignalInfo {
	info := &linux.SignalInfo{Signo: int32(sig), Code: code}
	info.SetPID(tg.id)
	info.SetUID(int32(tg.leader.Creds().RUID))
	info.SetStatus(status)
	u, s := tg.ticksLocked()
	usermem.ByteOrder.PutUint64(info.Fields[16:], uint64(u)) // si_utime, si_stime
	usermem.ByteOrder.PutUint64(info.Fields[24:], uint64(s))
	return info
}

func (tg *ThreadGroup) wakeWaitersLocked() {
	close(tg.childChanged)
	tg.childChanged = make(chan struct{})
}

// ticksLocked returns the time that tg's threads have spent.
func (tg *ThreadGroup) ticksLocked() (user, sys int64) {
	user, sys = tg.userTicks, tg.sysTicks
	for _, t := range tg.tasks {
		user += t.userTicks.Load()
		sys += t.sysTicks.Load()
	}
	return user, sys
}
