package kernel

import (
	"context"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/loader"
	"github.com/ringfence/ringfence/pkg/sentry/mm"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// ExecArgs say which program to run, and how.
type ExecArgs struct {
	// Dir, Path and Flags are those of execveat(2); Dir may be nil.
	Dir   *vfs.FileDescription
	Path  string
	Flags int
	// Filename is the name that the program is told (AT_EXECFN), and that an
	// interpreter opens.
	Filename   string
	Argv, Envv []string
}

// loaded is a program in memory of its own, ready to run.
type loaded struct {
	mm       *mm.MemoryManager
	image    loader.Image
	restorer hostarch.Addr
}

// load loads a program for t into new memory.
func (t *Task) load(args *ExecArgs) (*loaded, error) {
	file, err := t.fs.OpenExecutable(t, args.Dir, args.Path, args.Flags)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	limits := t.tg.memoryLimits()
	m, err := mm.New(t.k.cfg.Platform, t.k.cfg.MemoryFile, mm.Options{
		NoRandomize: t.tg.Personality()&addrNoRandomize != 0,
		Limits:      limits,
	})
	if err != nil {
		return nil, err
	}
	c := t.Creds()
	image, err := loader.Load(t, loader.Args{
		MM: m,
		Open: func(ctx context.Context, path string) (loader.File, error) {
			f, err := t.fs.OpenExecutable(ctx, nil, path, 0)
			if err != nil {
				return nil, err
			}
			return f, nil
		},
		File:       file,
		Filename:   args.Filename,
		Argv:       args.Argv,
		Envv:       args.Envv,
		UID:        c.RUID,
		EUID:       c.EUID,
		GID:        c.RGID,
		EGID:       c.EGID,
		StackLimit: limits.Stack,
	})
	var restorer hostarch.Addr
	if err == nil {
		restorer, err = t.mapRestorer(m)
	}
	if err != nil {
		m.DecUsers(t)
		return nil, err
	}
	// What it is going to touch first, and what the loader has mapped.
	m.Expect(image.StackPointer, hostarch.Write)
	m.Prefault(t, image.Entry, hostarch.Execute)
	return &loaded{m, image, restorer}, nil
}

// mapRestorer puts restorerCode into m.
func (t *Task) mapRestorer(m *mm.MemoryManager) (hostarch.Addr, error) {
	if len(restorerCode) == 0 {
		return 0, nil
	}
	addr, err := m.MMap(t, memmap.MMapOpts{
		Length: hostarch.PageSize, Private: true, Perms: hostarch.ReadExec, MaxPerms: hostarch.AnyAccess, Hint: "[vdso]",
	})
	if err != nil {
		return 0, err
	}
	_, err = m.CopyOut(t, addr, restorerCode, usermem.IOOpts{IgnorePermissions: true})
	return addr, err
}

// enter makes t run the program from its start.
func (t *Task) enter(p *loaded) {
	t.resMu.Lock()
	t.mm = p.mm
	t.resMu.Unlock()
	t.restorer = p.restorer
	t.SetName(p.image.Name)
	t.ac = arch.New()
	t.ac.SetIP(uintptr(p.image.Entry))
	t.ac.SetStack(uintptr(p.image.StackPointer))
}

// Execve replaces the program of t's process (execve(2), execveat(2)).
func (t *Task) Execve(args *ExecArgs) (*SyscallControl, error) {
	p, err := t.load(args)
	if err != nil {
		return nil, err
	}
	if err := t.becomeAlone(); err != nil {
		p.mm.DecUsers(t)
		return nil, err
	}
	k, tg := t.k, t.tg

	// From here on there is no way back.
	if old := t.leaveMemory(); old != nil {
		old.DecUsers(t)
	}
	t.enter(p)
	fdt := t.fdt.Fork() // Linux unshares the table as well
	t.replace(fdt, nil)
	fdt.CloseOnExec()
	t.SetCreds(t.Creds().exec())

	k.mu.Lock()
	tg.handlers = tg.handlers.fork()
	tg.handlers.reset()
	tg.timers.stopPOSIXLocked()
	tg.execed = true
	tg.exitSignal = linux.SIGCHLD
	tg.execing = nil
	tg.dumpable.Store(1)
	t.parentDeath = 0
	t.haveSaved = false
	k.mu.Unlock()
	t.altStack = linux.SignalStack{}
	t.restartBlock = nil
	t.FullStateChanged()
	return KeepRegisters, nil
}

// becomeAlone ends the other threads of the process, and makes t its leader.
func (t *Task) becomeAlone() error {
	k, tg := t.k, t.tg
	k.mu.Lock()
	if t.dyingLocked() {
		k.mu.Unlock()
		return ERESTARTNOINTR
	}
	tg.execing = t
	tg.alone = make(chan struct{})
	alone := tg.alone
	if len(tg.tasks) == 1 {
		close(alone)
	}
	for _, other := range tg.tasks {
		if other != t {
			other.interrupt()
		}
	}
	k.mu.Unlock()
	if err := t.blockKillable(alone); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if old := tg.leader; old != t {
		delete(k.tasks, t.TID())
		t.tid.Store(tg.id)
		k.tasks[tg.id] = t
		tg.leader = t
		t.startTime = old.startTime
		tg.exitStatus = 0
	}
	return nil
}

// Start makes the first process run a program. It must be called once.
func (k *Kernel) Start(args *ExecArgs, fdt *vfs.FDTable, fs *vfs.FSContext) error {
	t := k.newInit(fdt, fs)
	p, err := t.load(args)
	if err != nil {
		return err
	}
	t.enter(p)
	t.start()
	return nil
}

// newInit makes the task of the first process.
func (k *Kernel) newInit(fdt *vfs.FDTable, fs *vfs.FSContext) *Task {
	t := newTask(k, arch.New(), "ringfence")
	t.fdt, t.fs = fdt, fs
	t.creds.Store(HostCreds())

	k.mu.Lock()
	defer k.mu.Unlock()
	id := k.newPIDLocked()
	t.tid.Store(id)
	tg := newThreadGroup(k, id, t)
	tg.handlers = &SignalHandlers{}
	for _, sig := range k.cfg.Ignored {
		tg.handlers.actions[sig].Handler = linux.SIG_IGN
	}
	tg.limits = defaultLimits()
	tg.execed = true
	t.tg = tg
	tg.tasks = []*Task{t}
	s := &Session{id: id, foreground: id, terminal: true}
	k.sessions[id] = s
	tg.joinLocked(s, id)
	k.tasks[id] = t
	k.init = tg
	return t
}

// start runs the first task.
func (t *Task) start() {
	t.pc = t.k.cfg.Platform.NewContext(t)
	t.k.live.Add(1)
	go t.run()
}
