package ptrace

import (
	"context"
	"errors"
	"math"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/affinity"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/fd"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
)

// within fails the test unless f returns in time.
func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatalf("%s: still not done", what)
	}
}

func newState() *arch.Context64 {
	ac := arch.New()
	ac.SetIP(codeAddr)
	return ac
}

// switchOnce runs c until something other than an interrupt comes.
func switchOnce(c *threadContext, m platform.MemoryManager, ac *arch.Context64) error {
	for {
		if _, _, err := c.Switch(context.Background(), m, ac, -1); err != platform.ErrContextInterrupt {
			return err
		}
	}
}

// When an OS thread ends that has called Switch, all Contexts of the AddressSpace
// get an error, and nothing hangs.
func TestTracerThreadEnds(t *testing.T) {
	m := newManager(t, syscallLoop)
	within(t, "a Context whose AddressSpace lost a tracer", func() {
		c, ac := &threadContext{}, newState()
		if err := switchOnce(c, m, ac); err != nil {
			t.Error(err)
		}
		ended := make(chan struct{})
		var end func()
		end = func() {
			runtime.LockOSThread() // and the thread ends with the goroutine
			if unix.Gettid() == os.Getpid() {
				// The first thread of all does not end.
				go end()
				<-ended
				runtime.UnlockOSThread()
				return
			}
			defer close(ended)
			if err := switchOnce(&threadContext{}, m, newState()); err != nil {
				t.Error(err)
			}
		}
		go end()
		<-ended
		var ce *platform.ContextError
		for start := time.Now(); ce == nil && time.Since(start) < 10*time.Second; {
			errors.As(switchOnce(c, m, ac), &ce)
		}
		if ce == nil || ce.Errno != unix.ESRCH {
			t.Errorf("the other Context gets %v", ce)
		}
		if err := m.as.MapFile(codeAddr, platformtest.NewMemFile(t, hostarch.PageSize), memmap.FileRange{End: hostarch.PageSize}, hostarch.Read, false); !errors.Is(err, unix.ESRCH) {
			t.Errorf("MapFile: %v, want ESRCH", err)
		}
		m.as.Unmap(codeAddr, hostarch.PageSize)
	})
}

func TestMapFileArguments(t *testing.T) {
	m := newManager(t, syscallLoop)
	f := platformtest.NewMemFile(t, 1<<20)
	limit := hostarch.Addr(m.as.Zygote.Layout.Start)
	const page = hostarch.PageSize
	for name, test := range map[string]struct {
		addr hostarch.Addr
		fr   memmap.FileRange
		at   hostarch.AccessType
	}{
		"address not aligned": {1<<20 + 1, memmap.FileRange{End: page}, hostarch.Read},
		"offset not aligned":  {1 << 20, memmap.FileRange{Start: 1, End: page + 1}, hostarch.Read},
		"length not aligned":  {1 << 20, memmap.FileRange{End: page - 1}, hostarch.Read},
		"empty":               {1 << 20, memmap.FileRange{Start: page, End: page}, hostarch.Read},
		"backwards":           {1 << 20, memmap.FileRange{Start: page}, hostarch.Read},
		"no access":           {1 << 20, memmap.FileRange{End: page}, hostarch.NoAccess},
		"low":                 {0, memmap.FileRange{End: page}, hostarch.Read},
		"the stub":            {limit, memmap.FileRange{End: page}, hostarch.Read},
		"into the stub":       {limit - page, memmap.FileRange{End: 2 * page}, hostarch.Read},
		"wraps":               {math.MaxUint64 - page + 1, memmap.FileRange{End: 2 * page}, hostarch.Read},
	} {
		if err := m.as.MapFile(test.addr, f, test.fr, test.at, false); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s: %v, want EINVAL", name, err)
		}
	}
	// The last page there is.
	if err := m.as.MapFile(limit-page, f, memmap.FileRange{End: page}, hostarch.Read, true); err != nil {
		t.Error(err)
	}
	// None of it has done any harm.
	if err := switchOnce(&threadContext{}, m, newState()); err != nil {
		t.Error(err)
	}
}

// Unmap that cannot be done gives the AddressSpace up.
func TestUnmapFails(t *testing.T) {
	m := newManager(t, syscallLoop)
	m.as.Unmap(codeAddr+1, hostarch.PageSize)
	var ce *platform.ContextError
	if err := switchOnce(&threadContext{}, m, newState()); !errors.As(err, &ce) || ce.Errno != unix.EINVAL {
		t.Errorf("Switch afterwards: %v, want a ContextError with EINVAL", err)
	}
}

// A full address space is an error that names the fix.
func TestMapFileNoMemory(t *testing.T) {
	m := newManager(t, syscallLoop)
	as := m.as
	if err := unix.Prlimit(as.PID, unix.RLIMIT_AS, &unix.Rlimit{Cur: 1 << 20, Max: 1 << 20}, nil); err != nil {
		t.Fatal(err)
	}
	err := as.MapFile(1<<30, platformtest.NewMemFile(t, 1<<30), memmap.FileRange{End: 1 << 30}, hostarch.Read, false)
	if !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), "vm.max_map_count") {
		t.Errorf("MapFile: %v, want ENOMEM and vm.max_map_count", err)
	}
}

func TestConstructor(t *testing.T) {
	if _, err := (constructor{}).OpenDevice("/dev/null"); err == nil || !strings.Contains(err.Error(), "/dev/null") {
		t.Errorf("OpenDevice: %v", err)
	}
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	device, err := unix.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := (constructor{}).New(fd.New(device)); err == nil {
		t.Error("New with a device succeeds")
	}
	if _, err := unix.FcntlInt(uintptr(device), unix.F_GETFD, 0); err != unix.EBADF {
		t.Errorf("New does not close the device: %v", err)
	}
}

// A Context in an AddressSpace of another platform, or none, gets an error.
func TestForeignAddressSpace(t *testing.T) {
	var ce *platform.ContextError
	if err := switchOnce(&threadContext{}, &platformtest.Manager{}, newState()); !errors.As(err, &ce) || ce.Errno != unix.EINVAL {
		t.Errorf("Switch: %v, want a ContextError with EINVAL", err)
	}
}

// When no thread can be made the Context gets an error that names the limit, and
// all is well once there is room again.
func TestNoThreadLeft(t *testing.T) {
	m := newManager(t, syscallLoop)
	as := m.as
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := switchOnce(&threadContext{}, m, newState()); err != nil {
		t.Fatal(err)
	}
	as.spareMu.Lock()
	spare := as.spare
	as.spare = 0
	as.spareMu.Unlock()
	if spare == 0 {
		t.Fatal("no spare thread")
	}
	onOther := func() (err error) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			err = switchOnce(&threadContext{}, m, newState())
		}()
		<-done
		return err
	}
	var ce *platform.ContextError
	if err := onOther(); !errors.As(err, &ce) || ce.Errno != unix.EAGAIN || !strings.Contains(err.Error(), "RLIMIT_NPROC") {
		t.Errorf("without a spare thread: %v, want EAGAIN and RLIMIT_NPROC", err)
	}
	if err := switchOnce(&threadContext{}, m, newState()); err != nil {
		t.Fatal(err)
	}
	if err := onOther(); err != nil {
		t.Errorf("with a spare thread again: %v", err)
	}
}

// The affinity of OS threads is restored before others use them.
func TestAffinityRestored(t *testing.T) {
	var before unix.CPUSet
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		t.Fatal(err)
	}
	m := newManager(t, syscallLoop)
	check := func(when string) {
		t.Helper()
		var now unix.CPUSet
		if err := unix.SchedGetaffinity(0, &now); err != nil {
			t.Fatal(err)
		}
		if now != before {
			t.Errorf("%s: %d CPUs are allowed, %d before", when, now.Count(), before.Count())
		}
	}
	c, ac := &threadContext{}, newState()
	for range 3 * affinity.HotTurns {
		if err := switchOnce(c, m, ac); err != nil {
			t.Fatal(err)
		}
		check("after a Switch")
	}
	b := &threadContext{}
	b.BindThread()
	for _, end := range []func(){b.PrepareSleep, b.Release} {
		for range 3 * affinity.HotTurns {
			if err := switchOnce(b, m, ac); err != nil {
				t.Fatal(err)
			}
		}
		end()
		check("after PrepareSleep or Release")
	}
	// One that stops calling us.
	b = &threadContext{}
	b.BindThread()
	for range 3 * affinity.HotTurns {
		if err := switchOnce(b, m, ac); err != nil {
			t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		n := affinity.Pinned()
		if n == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the sweeper leaves a pair pinned")
		}
	}
	check("after a while")
	b.Release()
}
