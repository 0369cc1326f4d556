// Package kvm is the platform that runs application code in a virtual machine:
// the Sentry stays an ordinary process of the host, and the guest holds nothing
// but application code in ring 3 and a window of one-instruction stubs in ring 0.
// Every system call, exception and interrupt leaves KVM_RUN; Go reads and writes
// the registers in the page that KVM shares with us, and resumes.
//
// One VM serves all AddressSpaces. An AddressSpace is a set of page tables in
// guest memory that we own; guest-physical memory is the Sentry's files, in regions
// that are added when they are first mapped. vCPUs are a pool of fixed size: a
// Context takes one for a Switch, the one that it had before if it can, and gives
// it up when others have waited too long.
//
// It works on ordinary KVM and on kvm-pvm, where ring 0 is emulated and SYSCALL
// from ring 3 stays there. New finds out what the host is like. Where leaving the
// guest is slow system calls do not leave it: a shim in the guest posts them in
// memory and spins for the answer, while another thread runs the vCPU.
//
// The VM lives as long as the process, or until Close. It depends on packages
// pagetables, sysmsg and affinity, and must never know of another backend or of the
// Sentry.
package kvm

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/fd"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// Name is the name under which the platform is registered.
const Name = "kvm"

// defaultDevice is the device of KVM.
const defaultDevice = "/dev/kvm"

func init() { platform.Register(Name, constructor{}) }

// constructor implements platform.Constructor.
type constructor struct{ options options }

// New implements platform.Constructor.New.
func (c constructor) New(deviceFile *fd.FD) (platform.Platform, error) {
	if deviceFile == nil {
		return nil, fmt.Errorf("platform kvm: no device file: hand in what OpenDevice returns: %w", unix.EBADF)
	}
	defer deviceFile.Close()
	p, err := newPlatform(deviceFile.FD(), c.options)
	if err != nil {
		return nil, fmt.Errorf("platform kvm: %w", err)
	}
	return p, nil
}

// OpenDevice implements platform.Constructor.OpenDevice.
func (constructor) OpenDevice(devicePath string) (*fd.FD, error) {
	if devicePath == "" {
		devicePath = defaultDevice
	}
	f, err := fd.Open(devicePath, unix.O_RDWR, 0)
	if err != nil {
		return nil, deviceError(err)
	}
	return f, nil
}

// deviceError adds to an error of open(2) what would help.
func deviceError(err error) error {
	fix := ""
	switch {
	case errors.Is(err, unix.ENOENT):
		fix = ": load the module kvm_intel or kvm_amd, enable virtualisation in the firmware, or give this machine or container the device"
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		fix = ": load the module kvm_intel or kvm_amd, and enable virtualisation in the firmware"
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		fix = ": add the user to the group that owns it (kvm), or allow the device in the container (--device)"
	}
	return fmt.Errorf("platform kvm: %w%s", err, fix)
}

// Requirements implements platform.Constructor.Requirements.
func (constructor) Requirements() platform.Requirements { return platform.Requirements{} }

// PrecompiledSeccompInfo implements platform.Constructor.PrecompiledSeccompInfo.
func (constructor) PrecompiledSeccompInfo() []platform.SeccompInfo {
	return []platform.SeccompInfo{seccompInfo{arch: sysno.AMD64}}
}
