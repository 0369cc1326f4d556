// Package systrap is the platform that runs application code under seccomp(2),
// without ptrace(2) and without any privilege.
//
// Every AddressSpace is a stub process (package stub). A Context that runs in it has
// a thread there until it sleeps in the Sentry. Syscall User Dispatch and a filter turn
// each system call that the application makes into SIGSYS. The signal stack of a thread
// is a slot: memory that the Sentry shares, so that the frame that the kernel writes for
// SIGSYS, or for a fault, is the thread's state, and nobody has to copy it. The
// handler hands the slot to the Sentry (package sysmsg), waits until it comes back,
// and goes on in the application with what the Sentry made of the frame. Interrupts are
// signals, too.
//
// One more thread of the stub, under another filter, makes the few system calls
// that change it: mmap, mprotect, munmap, clone. Its requests are in memory that the stub
// cannot write, and it tells what came of them by the position of a file that only
// it can set, so that the application can neither make it do anything nor speak
// for it.
//
// If it is allowed (platform.TextPatching), system call instructions that are used
// often become jumps to trampolines (package usertrap), and these calls are handed
// over without a signal.
//
// Whatever the application does to its slots, or by jumping into the stub's text,
// it does to itself and to those that share its memory. Selectors of DS, ES, FS
// and GS are not part of a Context's state: they stay with the stub's thread.
//
// It depends on packages stub, freestanding, sysmsg, affinity and usertrap, and must
// never know of another backend or of the Sentry.
package systrap

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/fd"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/seccomp"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
	"github.com/ringfence/ringfence/pkg/usertrap"
)

// Name is the name under which the platform is registered.
const Name = "systrap"

func init() { platform.Register(Name, constructor{}) }

type constructor struct{}

// New implements platform.Constructor.New. It runs a thread in an AddressSpace, so
// that what the host forbids is found here.
func (constructor) New(deviceFile *fd.FD) (platform.Platform, error) {
	if deviceFile != nil {
		deviceFile.Close()
		return nil, errors.New("platform systrap: needs no device file")
	}
	p := &systrap{}
	if err := p.probe(); err != nil {
		return nil, fmt.Errorf("platform systrap: %w", err)
	}
	return p, nil
}

// OpenDevice implements platform.Constructor.OpenDevice.
func (constructor) OpenDevice(devicePath string) (*fd.FD, error) {
	if devicePath != "" {
		return nil, fmt.Errorf("open %s: platform systrap needs no device: give an empty path", devicePath)
	}
	return nil, nil
}

// Requirements implements platform.Constructor.Requirements: it needs nothing.
func (constructor) Requirements() platform.Requirements { return platform.Requirements{} }

// PrecompiledSeccompInfo implements platform.Constructor.PrecompiledSeccompInfo.
func (constructor) PrecompiledSeccompInfo() []platform.SeccompInfo {
	return []platform.SeccompInfo{seccompInfo{sysno.Native}}
}

// systrap implements platform.Platform. All instances share a zygote.
type systrap struct {
	platform.MMapMinAddr
	platform.NoCPUPreemptionDetection
	platform.DoesNotOwnPageTables
	platform.UseHostGlobalMemoryBarrier

	maxUserAddr hostarch.Addr

	// patching says that applications' code may be patched; stats counts what was.
	patching atomic.Bool
	stats    usertrap.Stats
}

// probe finds out whether the host lets us do what we need.
func (p *systrap) probe() error {
	if err := checkCPU(); err != nil {
		return err
	}
	if err := seccomp.Probe(seccomp.FeatureFilter); err != nil {
		return err
	}
	as, err := stubs.take()
	if err != nil {
		return err
	}
	p.maxUserAddr = hostarch.Addr(as.at.slots)
	if err := as.probe(); err != nil {
		as.Release()
		return err
	}
	stubs.keep(as)
	return nil
}

// SupportsAddressSpaceIO implements platform.Platform.SupportsAddressSpaceIO.
func (*systrap) SupportsAddressSpaceIO() bool { return false }

// CooperativelySchedulesAddressSpace implements
// platform.Platform.CooperativelySchedulesAddressSpace.
func (*systrap) CooperativelySchedulesAddressSpace() bool { return false }

// MapUnit implements platform.Platform.MapUnit: an mmap(2) costs the same for
// any number of pages.
func (*systrap) MapUnit() uint64 { return 0 }

// MaxUserAddress implements platform.Platform.MaxUserAddress.
func (p *systrap) MaxUserAddress() hostarch.Addr { return p.maxUserAddr }

// NewAddressSpace implements platform.Platform.NewAddressSpace.
func (p *systrap) NewAddressSpace(any) (platform.AddressSpace, <-chan struct{}, error) {
	as, err := stubs.take()
	if err != nil {
		return nil, nil, err
	}
	if end := hostarch.Addr(as.at.slots); end < p.maxUserAddr {
		// A new zygote, after the death of one, that came to lie lower.
		as.Release()
		return nil, nil, fmt.Errorf("new stub processes end at %v, and the platform promised %v: %w", end, p.maxUserAddr, unix.ENOMEM)
	}
	as.patching, as.stats = p.patching.Load(), &p.stats
	return as, nil, nil
}

// NewContext implements platform.Platform.NewContext.
func (*systrap) NewContext(context.Context) platform.Context { return &threadContext{} }

// SeccompInfo implements platform.Platform.SeccompInfo.
func (*systrap) SeccompInfo() platform.SeccompInfo { return seccompInfo{sysno.Native} }

// hint returns what to do about a limit of the host, to be added to an error.
func hint(err error) string {
	switch {
	case errors.Is(err, unix.EMFILE):
		return ": raise RLIMIT_NOFILE (ulimit -n)"
	case errors.Is(err, unix.ENFILE):
		return ": raise sysctl fs.file-max"
	case errors.Is(err, unix.EAGAIN):
		return ": raise RLIMIT_NPROC (ulimit -u) or the pids limit of the control group (pids.max)"
	case errors.Is(err, unix.ENOMEM):
		return ": raise sysctl vm.max_map_count or RLIMIT_AS (ulimit -v), or give the host more memory"
	}
	return ""
}
