// Package ptrace is the platform that runs application code under ptrace(2). It
// works wherever a process may trace its own children; other platforms are
// faster.
//
// Every AddressSpace is a stub process (package stub). Linux ties a traced thread
// to the OS thread that attached to it, so a stub has one thread for every OS
// thread that has called Switch with it, made on first use and kept until the
// AddressSpace is released. Application code runs under PTRACE_SYSEMU: it never
// makes a system call of the host. The few that must be made in a stub, as
// mmap(2), are injected: the tracer sets all registers so that the thread makes
// just that call, from text that the application cannot change.
//
// Contexts whose caller promises to stay on one OS thread (platform.ThreadBinder)
// leave their registers in the stub's thread after a system call, and are twice as
// fast. While tracer and thread alternate quickly they are pinned to one CPU.
//
// When an OS thread ends, the kernel kills what it traced: the Go runtime ends
// the thread of a goroutine that returns without UnlockOSThread. If such a
// goroutine has called Switch, or changed a mapping, all Contexts of the
// AddressSpace get a ContextError.
//
// What is particular on amd64: system calls by int $0x80, sysenter and in 32-bit
// code give a SIGSEGV, as on a kernel without CONFIG_IA32_EMULATION. A call of the
// vsyscall page is the system call that it stands for, with IP at its caller; such
// a call cannot be restarted.
//
// New changes the process's disposition of SIGCHLD: children that stop no longer
// send it (SA_NOCLDSTOP, sigaction(2)), those that end still do.
//
// It depends on package stub, and must never know of another backend or of the
// Sentry.
package ptrace

import (
	"context"
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/fd"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// Name is the name under which the platform is registered.
const Name = "ptrace"

func init() { platform.Register(Name, constructor{}) }

type constructor struct{}

// New implements platform.Constructor.New. It makes an AddressSpace and a traced
// thread, so that what the host forbids is found here.
func (constructor) New(deviceFile *fd.FD) (platform.Platform, error) {
	if deviceFile != nil {
		deviceFile.Close()
		return nil, errors.New("platform ptrace: needs no device file")
	}
	p := &ptrace{}
	if err := p.probe(); err != nil {
		return nil, fmt.Errorf("platform ptrace: %w", err)
	}
	return p, nil
}

// OpenDevice implements platform.Constructor.OpenDevice.
func (constructor) OpenDevice(devicePath string) (*fd.FD, error) {
	if devicePath != "" {
		return nil, fmt.Errorf("open %s: platform ptrace needs no device: give an empty path", devicePath)
	}
	return nil, nil
}

// Requirements implements platform.Constructor.Requirements: tracing one's own
// children takes no privilege.
func (constructor) Requirements() platform.Requirements { return platform.Requirements{} }

// PrecompiledSeccompInfo implements platform.Constructor.PrecompiledSeccompInfo.
func (constructor) PrecompiledSeccompInfo() []platform.SeccompInfo {
	return []platform.SeccompInfo{seccompInfo{sysno.Native}}
}

// ptrace implements platform.Platform. It has no state: all instances share the
// zygote of package stub.
type ptrace struct {
	platform.MMapMinAddr
	platform.NoCPUPreemptionDetection
	platform.DoesNotOwnPageTables
	platform.UseHostGlobalMemoryBarrier

	maxUserAddr hostarch.Addr
}

// probe finds out whether the host lets us do what we need.
func (p *ptrace) probe() error {
	as, err := newAddressSpace()
	if err != nil {
		return err
	}
	defer as.Release()
	p.maxUserAddr = hostarch.Addr(as.Zygote.Layout.Start)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := as.Enter(); err != nil {
		return err
	}
	defer as.Leave()
	t, err := as.thread(unix.Gettid())
	if err != nil {
		return err
	}
	return t.probe()
}

// SupportsAddressSpaceIO implements platform.Platform.SupportsAddressSpaceIO.
func (*ptrace) SupportsAddressSpaceIO() bool { return false }

// CooperativelySchedulesAddressSpace implements
// platform.Platform.CooperativelySchedulesAddressSpace.
func (*ptrace) CooperativelySchedulesAddressSpace() bool { return false }

// MapUnit implements platform.Platform.MapUnit: an mmap(2) costs the same for
// any number of pages.
func (*ptrace) MapUnit() uint64 { return 0 }

// MaxUserAddress implements platform.Platform.MaxUserAddress.
func (p *ptrace) MaxUserAddress() hostarch.Addr { return p.maxUserAddr }

// NewAddressSpace implements platform.Platform.NewAddressSpace.
func (p *ptrace) NewAddressSpace(any) (platform.AddressSpace, <-chan struct{}, error) {
	as, err := newAddressSpace()
	if err != nil {
		return nil, nil, err
	}
	if end := hostarch.Addr(as.Zygote.Layout.Start); end < p.maxUserAddr {
		// A new zygote, after the death of one, that came to lie lower.
		as.Release()
		return nil, nil, fmt.Errorf("new stub processes end at %v, and the platform promised %v: %w", end, p.maxUserAddr, unix.ENOMEM)
	}
	return as, nil, nil
}

// NewContext implements platform.Platform.NewContext.
func (*ptrace) NewContext(context.Context) platform.Context { return &threadContext{} }

// SeccompInfo implements platform.Platform.SeccompInfo.
func (*ptrace) SeccompInfo() platform.SeccompInfo { return seccompInfo{sysno.Native} }
