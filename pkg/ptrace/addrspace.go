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

	*stub.Process

	// frameMu is held while the kernel writes a signal frame onto the signal stack,
	// which all threads share.
	frameMu sync.Mutex

	// spareMu is held while spare, the id of a parked thread that nobody traces, is
	// taken and another one made. It is 0 when there is none.
	spareMu     sync.Mutex
	spare       int
	spareWanted atomic.Bool

	// threads are those that are traced, by the id of the OS thread that does it.
	threadsMu sync.Mutex
	threads   map[int]*thread
}

func newAddressSpace() (*addressSpace, error) {
	noStopSignals()
	as := &addressSpace{threads: make(map[int]*thread)}
	err := stub.WithShared(nil, func(z *stub.Zygote) error {
		pid, tid, err := z.Fork()
		as.Process, as.spare = stub.NewProcess(z, pid, nil), tid
		return err
	})
	if err != nil {
		return nil, err
	}
	return as, nil
}

// thread returns the thread that belongs to self, the calling OS thread, to which
// the goroutine must be locked. The caller is between Enter and Leave.
func (as *addressSpace) thread(self int) (*thread, error) {
	as.threadsMu.Lock()
	t := as.threads[self]
	as.threadsMu.Unlock()
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
		return nil, fmt.Errorf("clone of a thread in stub process %d: %w: raise RLIMIT_NPROC (ulimit -u) or the pids limit of the control group (pids.max)", as.PID, unix.EAGAIN)
	}
	t, err := as.attach(as.spare, func(t *thread) {
		as.spare = 0
		as.threadsMu.Lock()
		as.threads[self] = t
		as.threadsMu.Unlock()
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
	tid, err := t.call(as.Zygote.Layout.Clone, unix.SYS_CLONE, cloneThread)
	if err == nil {
		as.spare = int(tid)
	} else if !errors.As(err, new(unix.Errno)) || as.Err() != nil {
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
	_, err = t.call(as.Zygote.Layout.Call, nr, args...)
	return err
}

// checkRange returns an error unless applications may map [addr, addr+length).
func (as *addressSpace) checkRange(addr hostarch.Addr, length uint64) error {
	ar, ok := addr.ToRange(length)
	if !ok || length == 0 || !ar.IsPageAligned() || ar.Start < platform.SystemMMapMinAddr() || ar.End > hostarch.Addr(as.Zygote.Layout.Start) {
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
	if err := as.Enter(); err != nil {
		return fmt.Errorf("MapFile: %w", err)
	}
	defer as.Leave()
	flags := unix.MAP_SHARED | unix.MAP_FIXED
	if precommit {
		flags |= unix.MAP_POPULATE
	}
	err := as.Zygote.WithFile(f, func(num int) error {
		return as.call(unix.SYS_MMAP, uintptr(addr), uintptr(fr.Length()), uintptr(at.Prot()), uintptr(flags), uintptr(num), uintptr(fr.Start))
	})
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.ENOMEM) {
		err = fmt.Errorf("%w: raise sysctl vm.max_map_count or RLIMIT_AS (ulimit -v), or give the host more memory", err)
	}
	return fmt.Errorf("MapFile: mmap of %#x bytes at %v with access %v in stub process %d: %w", fr.Length(), addr, at, as.PID, err)
}

// Unmap implements platform.AddressSpace.Unmap.
func (as *addressSpace) Unmap(addr hostarch.Addr, length uint64) {
	if as.Enter() != nil {
		return // Nothing runs in it any more.
	}
	defer as.Leave()
	err := as.checkRange(addr, length)
	if err == nil {
		err = as.call(unix.SYS_MUNMAP, uintptr(addr), uintptr(length))
	}
	if err != nil {
		as.Fail(fmt.Errorf("munmap of %#x bytes at %v in stub process %d: %w", length, addr, as.PID, err))
	}
}

// Release implements platform.AddressSpace.Release.
func (as *addressSpace) Release() {
	first, _ := as.Retire()
	if !first {
		return
	}
	as.Kill()
	for _, t := range as.threads {
		t.reap()
	}
	// Only now can the process go.
	as.Reap()
}

// PreFork implements platform.AddressSpace.PreFork.
func (*addressSpace) PreFork() {}

// PostFork implements platform.AddressSpace.PostFork.
func (*addressSpace) PostFork() {}
