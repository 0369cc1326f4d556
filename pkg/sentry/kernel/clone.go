package kernel

import (
	"encoding/binary"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/mm"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
)

// maxTasks bounds the threads of a sandbox. Each has an OS thread, of which the
// Go runtime allows 10,000.
const maxTasks = 8000

// namespaceFlags are the flags of clone(2) that need a namespace of their own,
// which a sandbox does not give.
const namespaceFlags = linux.CLONE_NEWTIME | linux.CLONE_NEWNS | linux.CLONE_NEWCGROUP | linux.CLONE_NEWUTS |
	linux.CLONE_NEWIPC | linux.CLONE_NEWUSER | linux.CLONE_NEWPID | linux.CLONE_NEWNET

// Clone makes a thread or process (clone(2), clone3(2)) and returns its number.
// For CLONE_VFORK it returns when the child has ended or runs another program.
func (t *Task) Clone(args *linux.CloneArgs) (int32, error) {
	k, flags := t.k, args.Flags
	switch {
	case flags&namespaceFlags != 0, flags&linux.CLONE_INTO_CGROUP != 0, args.SetTidSize != 0:
		return 0, unix.EPERM
	case flags&linux.CLONE_SIGHAND != 0 && flags&linux.CLONE_VM == 0,
		flags&linux.CLONE_THREAD != 0 && flags&linux.CLONE_SIGHAND == 0,
		flags&linux.CLONE_SIGHAND != 0 && flags&linux.CLONE_CLEAR_SIGHAND != 0,
		flags&linux.CLONE_PIDFD != 0 && flags&(linux.CLONE_DETACHED|linux.CLONE_THREAD) != 0,
		args.ExitSignal > linux.NSig:
		return 0, unix.EINVAL
	}
	if err := t.PullFullState(); err != nil {
		return 0, err
	}
	ac := t.ac.Fork()
	ac.SetReturn(0)
	if args.Stack != 0 {
		ac.SetStack(uintptr(args.Stack + args.StackSize))
	}
	if flags&linux.CLONE_SETTLS != 0 && !ac.SetTLS(uintptr(args.TLS)) {
		return 0, unix.EPERM
	}

	child := newTask(k, ac, t.Name())
	child.creds.Store(t.Creds())
	child.Prctl = t.Prctl
	child.nice.Store(t.Nice())
	child.policy.Store(t.Scheduler())
	child.affinity.Store(t.affinity.Load())
	child.mask = t.mask
	child.restorer = t.restorer
	if t.haveSaved {
		child.mask = t.savedMask
	}
	var err error
	if flags&linux.CLONE_VM != 0 {
		t.mm.IncUsers()
		child.mm = t.mm
		if flags&linux.CLONE_VFORK != 0 {
			child.altStack = t.altStack
		}
	} else {
		t.mm.Expect(hostarch.Addr(ac.IP()), hostarch.Execute)
		t.mm.Expect(hostarch.Addr(ac.Stack())-8, hostarch.Write)
		if child.mm, err = t.mm.Fork(t); err != nil {
			k.noProcesses.Do(func() { k.cfg.Log.Printf("the host has no more processes for the application: %v", err) })
			if errnoOf(err) != unix.ENOMEM {
				err = unix.EAGAIN // fork(2) knows no other reason
			}
			return 0, err
		}
		child.altStack = t.altStack
		child.forked = true
	}
	child.fdt, child.fs = t.fdt, t.fs
	if flags&linux.CLONE_FILES != 0 {
		child.fdt.IncRef()
	} else {
		child.fdt = t.fdt.Fork()
	}
	if flags&linux.CLONE_FS != 0 {
		child.fs.IncRef()
	} else {
		child.fs = t.fs.Fork()
	}
	child.pc = k.cfg.Platform.NewContext(child)
	if flags&linux.CLONE_CHILD_CLEARTID != 0 {
		child.clearTID = hostarch.Addr(args.ChildTID)
	}
	var vfork chan struct{}
	if flags&linux.CLONE_VFORK != 0 {
		vfork = make(chan struct{})
		child.vfork = vfork
	}

	k.mu.Lock()
	err = k.addTaskLocked(t, child, flags, linux.Signal(args.ExitSignal))
	k.mu.Unlock()
	if err == nil && flags&linux.CLONE_PIDFD != 0 {
		if err = t.addPidFD(child.tg, hostarch.Addr(args.PidFD)); err != nil {
			k.mu.Lock()
			k.removeTaskLocked(child)
			k.mu.Unlock()
		}
	}
	if err != nil {
		child.mm.DecUsers(t)
		child.fdt.DecRef()
		child.fs.DecRef()
		child.pc.Release()
		return 0, err
	}
	tid := child.TID()

	// Failure to write the numbers is not an error.
	var buf [4]byte
	binary.LittleEndian.PutUint32(buf[:], uint32(tid))
	if flags&linux.CLONE_PARENT_SETTID != 0 {
		t.CopyOut(hostarch.Addr(args.ParentTID), buf[:])
	}
	if flags&linux.CLONE_CHILD_SETTID != 0 {
		child.CopyOut(hostarch.Addr(args.ChildTID), buf[:])
	}
	go child.run()
	if vfork != nil {
		// The child may go on alone if t is killed.
		t.blockKillable(vfork)
	}
	return tid, nil
}

func newTask(k *Kernel, ac *arch.Context64, name string) *Task {
	t := &Task{k: k, ac: ac, name: name, wake: make(chan struct{}, 1), startTime: time.Now()}
	t.Prctl.TimerSlack = 50000 // Linux's default
	t.affinity.Store(&k.cpus)
	t.state.Store('R')
	t.work.Store(true)
	return t
}

// addTaskLocked gives child a number and its place among the others: a thread
// of t's process, or a process of its own. The child's goroutine is accounted
// for: run must follow.
func (k *Kernel) addTaskLocked(t, child *Task, flags uint64, exitSignal linux.Signal) error {
	tg := t.tg
	if t.dyingLocked() {
		return ERESTARTNOINTR
	}
	if max, _ := tg.limitLocked(linux.RLIMIT_NPROC); len(k.tasks) >= maxTasks ||
		(uint64(len(k.tasks)) >= max && !t.Creds().Has(linux.CAP_SYS_RESOURCE) && !t.Creds().Has(linux.CAP_SYS_ADMIN)) {
		return unix.EAGAIN
	}
	id := k.newPIDLocked()
	if id == 0 {
		return unix.EAGAIN
	}
	child.tid.Store(id)
	if flags&linux.CLONE_THREAD != 0 {
		child.tg = tg
	} else {
		n := newThreadGroup(k, id, child)
		n.limits = tg.limits
		n.dumpable.Store(tg.dumpable.Load())
		n.personality.Store(tg.personality.Load())
		n.parent, n.parentTask, n.exitSignal = tg, t, exitSignal
		if flags&linux.CLONE_PARENT != 0 {
			n.parent, n.parentTask, n.exitSignal = tg.parent, tg.parentTask, tg.exitSignal
		}
		if n.parent != nil {
			n.parent.children = append(n.parent.children, n)
		}
		switch {
		case flags&linux.CLONE_SIGHAND != 0:
			n.handlers = tg.handlers
		case flags&linux.CLONE_CLEAR_SIGHAND != 0:
			n.handlers = tg.handlers.fork()
			n.handlers.reset()
		default:
			n.handlers = tg.handlers.fork()
		}
		n.joinLocked(tg.pgrp.session, tg.pgrp.id)
		child.tg = n
	}
	child.tg.tasks = append(child.tg.tasks, child)
	k.tasks[id] = child
	k.live.Add(1)
	return nil
}

// removeTaskLocked undoes addTaskLocked for a child that never ran.
func (k *Kernel) removeTaskLocked(child *Task) {
	tg := child.tg
	delete(k.tasks, child.TID())
	tg.tasks = slices.DeleteFunc(tg.tasks, func(o *Task) bool { return o == child })
	if len(tg.tasks) == 0 {
		tg.zombie = true
		k.reapLocked(tg)
	}
	k.live.Done()
}

func newThreadGroup(k *Kernel, id int32, leader *Task) *ThreadGroup {
	tg := &ThreadGroup{k: k, id: id, leader: leader, childChanged: make(chan struct{})}
	tg.timers.tg = tg
	tg.dumpable.Store(1)
	return tg
}

// UnshareFiles gives t a descriptor table of its own (unshare(2)).
func (t *Task) UnshareFiles() { t.replace(t.fdt.Fork(), nil) }

// UnshareFS gives t a working directory, root and umask of its own.
func (t *Task) UnshareFS() { t.replace(nil, t.fs.Fork()) }

func (t *Task) replace(fdt *vfs.FDTable, fs *vfs.FSContext) {
	t.resMu.Lock()
	oldFDT, oldFS := t.fdt, t.fs
	if fdt != nil {
		t.fdt = fdt
	}
	if fs != nil {
		t.fs = fs
	}
	t.resMu.Unlock()
	if fdt != nil {
		oldFDT.DecRef()
	}
	if fs != nil {
		oldFS.DecRef()
	}
}

// memoryOf returns the sizes of an address space in bytes.
func memoryOf(m *mm.MemoryManager) (size, rss, peak uint64) {
	if m == nil {
		return 0, 0, 0
	}
	return m.VirtualMemorySize(), m.ResidentSize(), m.PeakResidentSize()
}
