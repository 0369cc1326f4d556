package kernel

import (
	"context"
	"slices"
	"time"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/mm"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// Kernel is what /proc shows.
var _ vfs.ProcProvider = (*Kernel)(nil)

// Self implements vfs.ProcProvider.Self.
func (k *Kernel) Self(ctx context.Context) (tgid, tid int32) {
	if t := TaskFromContext(ctx); t != nil {
		return t.TGID(), t.TID()
	}
	return 0, 0
}

// Processes implements vfs.ProcProvider.Processes.
func (k *Kernel) Processes() []int32 {
	k.mu.Lock()
	defer k.mu.Unlock()
	var ids []int32
	k.eachProcessLocked(func(tg *ThreadGroup) { ids = append(ids, tg.id) })
	return ids
}

// Task implements vfs.ProcProvider.Task.
func (k *Kernel) Task(tid int32) vfs.ProcTask {
	if t := k.TaskByTID(tid); t != nil {
		return procTask{t}
	}
	return nil
}

// MemoryUsage implements vfs.ProcProvider.MemoryUsage.
func (k *Kernel) MemoryUsage() (used, total uint64) {
	return k.cfg.MemoryFile.UsedBytes(), hostMemory()
}

// TaskCount returns the number of threads.
func (k *Kernel) TaskCount() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.tasks)
}

// procTask is a Task as /proc shows it. Its methods are for any goroutine.
type procTask struct{ t *Task }

// memory returns the task's memory with a user, or nil.
func (p procTask) memory() *mm.MemoryManager {
	p.t.resMu.Lock()
	defer p.t.resMu.Unlock()
	if p.t.mm != nil {
		p.t.mm.IncUsers()
	}
	return p.t.mm
}

// Status implements vfs.ProcTask.
func (p procTask) Status() vfs.ProcStatus {
	t := p.t
	c := t.Creds()
	s := vfs.ProcStatus{
		PID: t.TID(), TGID: t.TGID(), Comm: t.Name(), State: byte(t.state.Load()), Start: t.startTime,
		UID: [4]uint32{c.RUID, c.EUID, c.SUID, c.FSUID}, GID: [4]uint32{c.RGID, c.EGID, c.SGID, c.FSGID},
		Groups: slices.Clone(c.Groups),
	}
	if m := p.memory(); m != nil {
		s.VMSize, s.RSS, s.PeakRSS = memoryOf(m)
		m.DecUsers(t)
	}
	if fs := p.FSContext(); fs != nil {
		s.Umask = fs.Umask()
		fs.DecRef()
	}
	k, tg := t.k, t.tg
	k.mu.Lock()
	defer k.mu.Unlock()
	s.PPID = tg.ppidLocked()
	if tg.pgrp != nil {
		s.PGID, s.SID = tg.pgrp.id, tg.pgrp.session.id
	}
	s.Threads = len(tg.tasks)
	s.ExitSignal = int32(tg.exitSignal)
	s.Pending, s.SharedPending, s.Blocked = uint64(t.pending.set), uint64(tg.pending.set), uint64(t.mask)
	for sig := linux.Signal(1); sig <= linux.NSig; sig++ {
		switch h := tg.handlers.actions[sig].Handler; {
		case h == linux.SIG_IGN:
			s.Ignored |= uint64(linux.SignalSetOf(sig))
		case h > linux.SIG_IGN:
			s.Caught |= uint64(linux.SignalSetOf(sig))
		}
	}
	u, sys := tg.ticksLocked()
	s.UserTime, s.SystemTime = time.Duration(u)*tick, time.Duration(sys)*tick
	s.ChildUser, s.ChildSystem = time.Duration(tg.childUserTicks)*tick, time.Duration(tg.childSysTicks)*tick
	return s
}

// Threads implements vfs.ProcTask.
func (p procTask) Threads() []int32 {
	k := p.t.k
	k.mu.Lock()
	defer k.mu.Unlock()
	var ids []int32
	for _, t := range p.t.tg.tasks {
		ids = append(ids, t.TID())
	}
	if len(ids) == 0 {
		ids = []int32{p.t.tg.id}
	}
	slices.Sort(ids)
	return ids
}

// Maps implements vfs.ProcTask.
func (p procTask) Maps() string {
	m := p.memory()
	if m == nil {
		return ""
	}
	defer m.DecUsers(p.t)
	return m.ReadMaps()
}

// maxArgs bounds what /proc shows of arguments and environment, in bytes.
const maxArgs = 1 << 20

// read returns the bytes in a range of the task's memory.
func (p procTask) read(which func(mm.Metadata) hostarch.AddrRange) []byte {
	m := p.memory()
	if m == nil {
		return nil
	}
	defer m.DecUsers(p.t)
	ar := which(m.Metadata())
	buf := make([]byte, min(uint64(ar.Length()), maxArgs))
	n, _ := m.CopyIn(p.t, ar.Start, buf, usermem.IOOpts{}) // what can be read
	return buf[:n]
}

// Cmdline implements vfs.ProcTask.
func (p procTask) Cmdline() []byte {
	return p.read(func(m mm.Metadata) hostarch.AddrRange { return m.Args })
}

// Environ implements vfs.ProcTask.
func (p procTask) Environ() []byte {
	return p.read(func(m mm.Metadata) hostarch.AddrRange { return m.Env })
}

// Auxv implements vfs.ProcTask.
func (p procTask) Auxv() []byte {
	m := p.memory()
	if m == nil {
		return nil
	}
	defer m.DecUsers(p.t)
	return slices.Clone(m.Metadata().Auxv)
}

// Executable implements vfs.ProcTask.
func (p procTask) Executable() string {
	m := p.memory()
	if m == nil {
		return ""
	}
	defer m.DecUsers(p.t)
	return m.Metadata().Executable
}

// FDTable implements vfs.ProcTask.
func (p procTask) FDTable() *vfs.FDTable {
	p.t.resMu.Lock()
	defer p.t.resMu.Unlock()
	if p.t.fdt != nil {
		p.t.fdt.IncRef()
	}
	return p.t.fdt
}

// FSContext implements vfs.ProcTask.
func (p procTask) FSContext() *vfs.FSContext {
	p.t.resMu.Lock()
	defer p.t.resMu.Unlock()
	if p.t.fs != nil {
		p.t.fs.IncRef()
	}
	return p.t.fs
}

// SetComm implements vfs.ProcTask.
func (p procTask) SetComm(name string) { p.t.SetName(name) }

// Limits implements vfs.ProcTask.
func (p procTask) Limits() (l [16][2]uint64) {
	k := p.t.k
	k.mu.Lock()
	defer k.mu.Unlock()
	for i, v := range p.t.tg.limits {
		l[i] = [2]uint64{v.Cur, v.Max}
	}
	return l
}
