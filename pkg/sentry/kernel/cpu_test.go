package kernel_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
	"github.com/ringfence/ringfence/pkg/sentry/pgalloc"
	"github.com/ringfence/ringfence/pkg/sentry/syscalls"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/tmpfs"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// The memory of test programs.
const (
	memory       = hostarch.Addr(0x10000000)
	memorySize   = 1 << 20
	handlers     = 0x20000000 // where functions given to sigaction are
	defaultLimit = 30 * time.Second
)

// fakePlatform runs Go functions as application code: each Context is a
// goroutine that does what a CPU would to its registers.
type fakePlatform struct {
	platform.Platform

	mu       sync.Mutex
	programs []func(*app) // of the Contexts to be made next
	handlers []func(*app, int, linux.SignalInfo)
	contexts int
}

func (p *fakePlatform) SupportsAddressSpaceIO() bool             { return false }
func (p *fakePlatform) CooperativelySchedulesAddressSpace() bool { return false }
func (p *fakePlatform) HaveGlobalMemoryBarrier() bool            { return false }
func (p *fakePlatform) OwnsPageTables() bool                     { return false }
func (p *fakePlatform) MapUnit() uint64                          { return 0 }
func (p *fakePlatform) MinUserAddress() hostarch.Addr            { return 0x10000 }
func (p *fakePlatform) MaxUserAddress() hostarch.Addr            { return 1<<47 - hostarch.PageSize }
func (p *fakePlatform) NewAddressSpace(any) (platform.AddressSpace, <-chan struct{}, error) {
	return &fakeAddressSpace{killed: make(chan struct{})}, nil, nil
}

func (p *fakePlatform) NewContext(ctx context.Context) platform.Context {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := &fakeContext{
		app:  &app{p: p, task: ctx.(*kernel.Task), resume: make(chan bool), event: make(chan event)},
		intr: make(chan struct{}, 1),
	}
	if len(p.programs) > 0 { // none for a clone that fails
		c.program, p.programs = p.programs[0], p.programs[1:]
	}
	p.contexts++
	return c
}

type fakeAddressSpace struct {
	platform.NoAddressSpaceIO
	kill   sync.Once
	killed chan struct{}
}

func (as *fakeAddressSpace) Kill() { as.kill.Do(func() { close(as.killed) }) }

func (*fakeAddressSpace) MapFile(hostarch.Addr, memmap.File, memmap.FileRange, hostarch.AccessType, bool) error {
	return nil
}
func (*fakeAddressSpace) Unmap(hostarch.Addr, uint64) {}
func (*fakeAddressSpace) Release()                    {}
func (*fakeAddressSpace) PreFork()                    {}
func (*fakeAddressSpace) PostFork()                   {}

// An event ends a Switch.
type event struct {
	info *linux.SignalInfo
	at   hostarch.AccessType
	err  error
	spin bool
	// deaf is spin that no interrupt ends.
	deaf bool
}

type fakeContext struct {
	app     *app
	program func(*app)
	started bool
	intr    chan struct{}
}

func (c *fakeContext) Switch(_ context.Context, mm platform.MemoryManager, ac *arch.Context64, _ int32) (*linux.SignalInfo, hostarch.AccessType, error) {
	c.app.ac = ac
	if !c.started {
		c.started = true
		go func() {
			<-c.app.resume
			c.program(c.app)
			c.app.syscall(unix.SYS_EXIT_GROUP, 0)
		}()
	}
	c.app.resume <- true
	e := <-c.app.event
	if e.deaf {
		<-mm.AddressSpace().(*fakeAddressSpace).killed
		return nil, hostarch.NoAccess, &platform.ContextError{Err: unix.ESRCH, Errno: unix.ESRCH}
	}
	if e.spin {
		<-c.intr
		return nil, hostarch.NoAccess, platform.ErrContextInterrupt
	}
	return e.info, e.at, e.err
}

func (c *fakeContext) PullFullState(platform.AddressSpace, *arch.Context64) error { return nil }
func (c *fakeContext) FullStateChanged()                                          {}

func (c *fakeContext) PrepareSleep() {
	if c.app.deaf {
		<-c.app.task.MM().AddressSpace().(*fakeAddressSpace).killed
	}
}

func (c *fakeContext) Interrupt() {
	select {
	case c.intr <- struct{}{}:
	default:
	}
}

func (c *fakeContext) Release() {
	c.app.p.mu.Lock()
	c.app.p.contexts--
	c.app.p.mu.Unlock()
	close(c.app.resume)
}

// app is the view that a test program has of its thread.
type app struct {
	p      *fakePlatform
	task   *kernel.Task
	ac     *arch.Context64
	resume chan bool
	event  chan event
	// deaf says that the thread does not give its state away.
	deaf bool
}

// yield hands an event to the Sentry, and runs on when the Sentry says so: not
// before handlers that it sets up have run.
func (a *app) yield(e event) {
	a.event <- e
	a.wait()
	a.runHandlers()
}

func (a *app) wait() {
	if !<-a.resume {
		runtime.Goexit() // the thread has ended
	}
}

// runHandlers runs the handlers that the thread was made to enter.
func (a *app) runHandlers() {
	for {
		i := int(a.ac.IP()) - handlers
		if i < 0 || i >= len(a.p.handlers) {
			return
		}
		a.p.mu.Lock()
		handler := a.p.handlers[i]
		a.p.mu.Unlock()
		var info linux.SignalInfo
		info.UnmarshalBytes(a.read(hostarch.Addr(handlerInfo(a.ac)), linux.SignalInfoSize))
		sp := a.ac.Stack()
		handler(a, handlerSignal(a.ac), info)
		a.ac.SetStack(sp)
		handlerReturn(a.ac)
		enterSyscall(a.ac, unix.SYS_RT_SIGRETURN, nil)
		a.event <- event{}
		a.wait()
	}
}

// syscall makes a system call, as often as the Sentry restarts it.
func (a *app) syscall(nr uintptr, args ...uintptr) (uintptr, unix.Errno) {
	ip := a.ac.IP()
	enterSyscall(a.ac, nr, args)
	a.yield(event{})
	for a.ac.IP() == ip {
		again(a.ac)
		a.yield(event{})
	}
	if ret := a.ac.Return(); ret > ^uintptr(4095) {
		return ^uintptr(0), unix.Errno(-ret)
	}
	return a.ac.Return(), 0
}

// must is syscall that may not fail.
func (a *app) must(nr uintptr, args ...uintptr) uintptr {
	ret, errno := a.syscall(nr, args...)
	if errno != 0 {
		panic(fmt.Sprintf("system call %d %#x: %v", nr, args, errno))
	}
	return ret
}

// spin runs code without system calls until done.
func (a *app) spin(done func() bool) {
	for !done() {
		a.yield(event{spin: true})
	}
}

// block runs code for ever that does not let itself be interrupted.
func (a *app) block() { a.yield(event{deaf: true}) }

// fault is an instruction that raises a signal.
func (a *app) fault(info *linux.SignalInfo) {
	a.yield(event{info: info, err: platform.ErrContextSignal})
}

// clone makes a thread or process that runs f.
func (a *app) clone(flags uintptr, f func(*app)) int {
	a.p.mu.Lock()
	a.p.programs = append(a.p.programs, f)
	a.p.mu.Unlock()
	stack := uintptr(0)
	if flags&linux.CLONE_VM != 0 && flags&linux.CLONE_VFORK == 0 {
		stack = a.ac.Stack() - 65536
	}
	return int(a.must(unix.SYS_CLONE, flags, stack, 0, 0, 0))
}

// fork makes a child that runs f.
func (a *app) fork(f func(*app)) int { return a.clone(uintptr(linux.SIGCHLD), f) }

const threadFlags = linux.CLONE_VM | linux.CLONE_FS | linux.CLONE_FILES | linux.CLONE_SIGHAND | linux.CLONE_THREAD

func (a *app) thread(f func(*app)) int {
	return a.clone(threadFlags, func(a *app) {
		f(a)
		a.syscall(unix.SYS_EXIT, 0)
	})
}

// read and write access the program's memory.
func (a *app) read(addr hostarch.Addr, n int) []byte {
	b := make([]byte, n)
	if _, err := a.task.MM().CopyIn(context.Background(), addr, b, usermem.IOOpts{}); err != nil {
		panic(err)
	}
	return b
}

func (a *app) write(addr hostarch.Addr, b []byte) {
	if _, err := a.task.MM().CopyOut(context.Background(), addr, b, usermem.IOOpts{}); err != nil {
		panic(err)
	}
}

func (a *app) load32(addr hostarch.Addr) uint32 { return binary.LittleEndian.Uint32(a.read(addr, 4)) }
func (a *app) load64(addr hostarch.Addr) uint64 { return binary.LittleEndian.Uint64(a.read(addr, 8)) }
func (a *app) store32(addr hostarch.Addr, v uint32) {
	a.write(addr, binary.LittleEndian.AppendUint32(nil, v))
}
func (a *app) store64(addr hostarch.Addr, v ...uint64) {
	for i, v := range v {
		a.write(addr+hostarch.Addr(i*8), binary.LittleEndian.AppendUint64(nil, v))
	}
}

// Places in the memory of a program for arguments and results. Processes have
// copies, threads must not use them at the same time.
const (
	scratch  = memory
	scratch2 = memory + 256
	scratch3 = memory + 512
	shared   = memory + 4096
)

// sigaction installs a handler.
func (a *app) sigaction(sig linux.Signal, flags uint64, mask linux.SignalSet, f func(*app, int, linux.SignalInfo)) {
	a.p.mu.Lock()
	a.p.handlers = append(a.p.handlers, f)
	addr := uint64(handlers + len(a.p.handlers) - 1)
	a.p.mu.Unlock()
	a.setAction(sig, linux.SigAction{Handler: addr, Flags: flags | linux.SA_SIGINFO | linux.SA_RESTORER, Restorer: 0x30000000, Mask: mask})
}

func (a *app) setAction(sig linux.Signal, act linux.SigAction) {
	b := make([]byte, act.SizeBytes())
	act.MarshalBytes(b)
	a.write(scratch, b)
	a.must(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(scratch), 0, 8)
}

// sigmask is sigprocmask(2), and returns the old mask.
func (a *app) sigmask(how int, set linux.SignalSet) linux.SignalSet {
	a.store64(scratch, uint64(set))
	a.must(unix.SYS_RT_SIGPROCMASK, uintptr(how), uintptr(scratch), uintptr(scratch2), 8)
	return linux.SignalSet(a.load64(scratch2))
}

func (a *app) kill(pid int, sig linux.Signal) unix.Errno {
	_, errno := a.syscall(unix.SYS_KILL, uintptr(pid), uintptr(sig))
	return errno
}

// wait4 returns the child and its status.
func (a *app) wait4(pid, options int) (int, uint32, unix.Errno) {
	ret, errno := a.syscall(unix.SYS_WAIT4, uintptr(pid), uintptr(scratch), uintptr(options), 0)
	return int(int32(ret)), a.load32(scratch), errno
}

func (a *app) sleep(d time.Duration) unix.Errno {
	a.store64(scratch3, uint64(d/time.Second), uint64(d%time.Second))
	_, errno := a.syscall(unix.SYS_NANOSLEEP, uintptr(scratch3), 0)
	return errno
}

// asleep waits until a thread is blocked in a system call.
func (a *app) asleep(tid int) {
	for a.task.Kernel().Task(int32(tid)).Status().State != 'S' {
		a.sleep(time.Millisecond)
	}
}

func (a *app) exit(code int) { a.syscall(unix.SYS_EXIT_GROUP, uintptr(code)) }

// run runs a program as the first process, and returns its status.
func run(t *testing.T, program func(*app)) uint32 {
	t.Helper()
	mf, err := pgalloc.New("test")
	if err != nil {
		t.Fatal(err)
	}
	defer mf.Destroy()
	p := &fakePlatform{programs: []func(*app){program}}
	var logged bytes.Buffer
	k := kernel.New(kernel.Config{
		Platform: p, MemoryFile: mf, Syscalls: syscalls.Table(), Hostname: "test", Log: log.New(&logged, "", 0),
	})
	ns := vfs.NewNamespace(&vfs.Mount{Root: tmpfs.New(1, 0o755, 1<<20).Root()})
	if err := k.StartBare(vfs.NewFDTable(), vfs.NewFSContext(ns), memory, memorySize); err != nil {
		t.Fatal(err)
	}
	watchdog := time.AfterFunc(defaultLimit, func() {
		buf := make([]byte, 1<<20)
		panic(fmt.Sprintf("%s did not end in %v\n%s", t.Name(), defaultLimit, buf[:runtime.Stack(buf, true)]))
	})
	defer watchdog.Stop()
	status, err := k.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if logged.Len() > 0 {
		t.Errorf("logged: %s", logged.String())
	}
	if p.contexts != 0 {
		t.Errorf("%d Contexts are left", p.contexts)
	}
	if used := mf.UsedBytes(); used != 0 {
		t.Errorf("%d bytes of memory are left", used)
	}
	return status
}

// check runs a program that must end with status 0.
func check(t *testing.T, program func(*app)) {
	t.Helper()
	if status := run(t, program); status != 0 {
		t.Errorf("status %#x, want 0", status)
	}
}
