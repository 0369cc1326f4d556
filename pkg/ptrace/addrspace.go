package ptrace

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/stub"
)

// addressSpace is a stub process. It implements platform.AddressSpace.
type addressSpace struct {
	platform.NoAddressSpaceIO

	zygote *stub.Zygote
	pid    int

	// frameMu is held while the kernel writes a signal frame onto the signal stack,
	// which all threads share.
	frameMu sync.Mutex

	// spareMu is held while spare, the id of a parked thread that nobody traces, is
	// taken and another one made. It is 0 when there is none.
	spareMu     sync.Mutex
	spare       int
	spareWanted atomic.Bool

	mu sync.Mutex

	// threads are those that are traced, by the id of the OS thread that does it.
	threads map[int]*thread

	// users is the number of goroutines between enter and leave, idle is signalled
	// when there are none.
	users int
	idle  sync.Cond

	// dead is why the AddressSpace was given up, if it was.
	dead     error
	released bool
}

func newAddressSpace() (*addressSpace, error) {
	noStopSignals()
	zygote, err := stub.Shared()
	if err != nil {
		return nil, err
	}
	pid, tid, err := zygote.Fork()
	if err != nil {
		return nil, err
	}
	as := &addressSpace{zygote: zygote, pid: pid, spare: tid, threads: make(map[int]*thread)}
	as.idle.L = &as.mu
	return as, nil
}

// enter keeps the AddressSpace from being reaped until leave. It returns an error
// if it was released or given up.
func (as *addressSpace) enter() error {
	as.mu.Lock()
	defer as.mu.Unlock()
	if as.dead != nil {
		return as.dead
	}
	as.users++
	return nil
}

func (as *addressSpace) leave() {
	as.mu.Lock()
	defer as.mu.Unlock()
	as.users--
	if as.users == 0 {
		as.idle.Broadcast()
	}
}

// fail gives the AddressSpace up because of err, unless it was before, and
// returns the reason.
func (as *addressSpace) fail(err error) error {
	as.mu.Lock()
	defer as.mu.Unlock()
	if as.dead == nil {
		as.dead = err
	}
	as.kill()
	return as.dead
}

func (as *addressSpace) isDead() bool {
	as.mu.Lock()
	defer as.mu.Unlock()
	return as.dead != nil
}

// kill kills the stub process: nothing that we wait for in it goes on for long.
func (as *addressSpace) kill() { stub.Kill(as.pid) }

// thread returns the thread that belongs to self, the calling OS thread, to which
// the goroutine must be locked. The caller is between enter and leave.
func (as *addressSpace) thread(self int) (*thread, error) {
	as.mu.Lock()
	t := as.threads[self]
	as.mu.Unlock()
	if t != nil {
		if as.spareWanted.CompareAndSwap(true, false) {
			as.spareMu.Lock()
			defer as.spareMu.Unlock()
			return t, as.newSpare(t)
		}
		return t, nil
	}
	as.spareMu.Lock()
	defer as.spareMu.Unlock()
	if as.spare == 0 {
		// Somebody who has a thread will try again.
		as.spareWanted.Store(true)
		return nil, fmt.Errorf("clone of a thread in stub process %d: %w: raise RLIMIT_NPROC (ulimit -u) or the pids limit of the control group (pids.max)", as.pid, unix.EAGAIN)
	}
	t, err := as.attach(as.spare, func(t *thread) {
		as.spare = 0
		as.mu.Lock()
		as.threads[self] = t
		as.mu.Unlock()
	})
	if err != nil {
		return nil, err
	}
	return t, as.newSpare(t)
}

// newSpare lets t make a spare thread. That the host refuses one is no error here:
// the next OS thread that needs it gets that.
func (as *addressSpace) newSpare(t *thread) error {
	// It inherits the mask: nobody but its tracer is to reach it.
	if err := t.setSignalMask(^uint64(0)); err != nil {
		return err
	}
	tid, err := t.call(as.zygote.Layout.Clone, unix.SYS_CLONE, cloneThread)
	if err == nil {
		as.spare = int(tid)
	} else if !errors.As(err, new(unix.Errno)) || as.isDead() {
		return err
	}
	return t.setSignalMask(0)
}

// cloneThread are the flags of a new thread of a stub.
const cloneThread = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD | unix.CLONE_SYSVSEM

// call makes a system call of the host in the stub.
func (as *addressSpace) call(nr uintptr, args ...uintptr) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	t, err := as.thread(unix.Gettid())
	if err != nil {
		return err
	}
	_, err = t.call(as.zygote.Layout.Call, nr, args...)
	return err
}

// checkRange returns an error unless applications may map [addr, addr+length).
func (as *addressSpace) checkRange(addr hostarch.Addr, length uint64) error {
	ar, ok := addr.ToRange(length)
	if !ok || length == 0 || !ar.IsPageAligned() || ar.Start < platform.SystemMMapMinAddr() || ar.End > hostarch.Addr(as.zygote.Layout.Start) {
		return fmt.Errorf("%#x bytes at %v: not whole pages that an application can have: %w", length, addr, unix.EINVAL)
	}
	return nil
}

// MapFile implements platform.AddressSpace.MapFile.
func (as *addressSpace) MapFile(addr hostarch.Addr, f memmap.File, fr memmap.FileRange, at hostarch.AccessType, precommit bool) error {
	if !fr.WellFormed() || fr.Start&hostarch.PageMask != 0 || !at.Any() {
		return fmt.Errorf("MapFile of the bytes %v with access %v: %w", fr, at, unix.EINVAL)
	}
	if err := as.checkRange(addr, fr.Length()); err != nil {
		return fmt.Errorf("MapFile: %w", err)
	}
	if err := as.enter(); err != nil {
		return fmt.Errorf("MapFile: %w", err)
	}
	defer as.leave()
	flags := unix.MAP_SHARED | unix.MAP_FIXED
	if precommit {
		flags |= unix.MAP_POPULATE
	}
	err := as.zygote.WithFile(f, func(num int) error {
		return as.call(unix.SYS_MMAP, uintptr(addr), uintptr(fr.Length()), uintptr(at.Prot()), uintptr(flags), uintptr(num), uintptr(fr.Start))
	})
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.ENOMEM) {
		err = fmt.Errorf("%w: raise sysctl vm.max_map_count or RLIMIT_AS (ulimit -v), or give the host more memory", err)
	}
	return fmt.Errorf("MapFile: mmap of %#x bytes at %v with access %v in stub process %d: %w", fr.Length(), addr, at, as.pid, err)
}

// Unmap implements platform.AddressSpace.Unmap.
func (as *addressSpace) Unmap(addr hostarch.Addr, length uint64) {
	if as.enter() != nil {
		return // Nothing runs in it any more.
	}
	defer as.leave()
	err := as.checkRange(addr, length)
	if err == nil {
		err = as.call(unix.SYS_MUNMAP, uintptr(addr), uintptr(length))
	}
	if err != nil {
		as.fail(fmt.Errorf("munmap of %#x bytes at %v in stub process %d: %w", length, addr, as.pid, err))
	}
}

// Release implements platform.AddressSpace.Release.
func (as *addressSpace) Release() {
	as.mu.Lock()
	defer as.mu.Unlock()
	if as.released {
		return
	}
	as.released = true
	if as.dead == nil {
		as.dead = fmt.Errorf("the AddressSpace was released: %w", unix.ESRCH)
	}
	as.kill()
	for as.users > 0 {
		as.idle.Wait()
	}
	for _, t := range as.threads {
		t.reap()
	}
	// Only now can the process go.
	as.zygote.Release(as.pid)
}

// PreFork implements platform.AddressSpace.PreFork.
func (*addressSpace) PreFork() {}

// PostFork implements platform.AddressSpace.PostFork.
func (*addressSpace) PostFork() {}
