package kvm

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/seccomp"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// Variables of the rules: the file descriptor of the VM, and the lowest and highest of
// its vCPUs.
const (
	vmVariable        = "kvm_vm_fd"
	firstVCPUVariable = "kvm_vcpu_fd_first"
	lastVCPUVariable  = "kvm_vcpu_fd_last"
)

// Requests of ioctl(2) that are made once the platform is ready
// (include/uapi/linux/kvm.h).
const (
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmRun                 = 0xae80
	kvmGetXSave            = 0x9000aea4
	kvmSetXSave            = 0x5000aea5
	kvmSetMSRs             = 0x4008ae89
	kvmGetXSave2           = 0x9000aecf
)

// Operations of futex(2) that package sysmsg uses (linux/futex.h).
const (
	futexWait = 0
	futexWake = 1
)

// seccompInfo implements platform.ArchSeccompInfo.
type seccompInfo struct {
	arch                sysno.Arch
	vm                  uint32
	firstVCPU, lastVCPU uint32
}

// Variables implements platform.SeccompInfo.Variables.
func (s seccompInfo) Variables() precompiled.Values {
	return precompiled.Values{vmVariable: s.vm, firstVCPUVariable: s.firstVCPU, lastVCPUVariable: s.lastVCPU}
}

// ConfigKey implements platform.SeccompInfo.ConfigKey.
func (seccompInfo) ConfigKey() string { return Name }

// ForArch implements platform.ArchSeccompInfo.ForArch.
func (s seccompInfo) ForArch(a sysno.Arch) (platform.SeccompInfo, bool) {
	return seccompInfo{arch: a}, a == sysno.AMD64
}

// HottestSyscalls implements platform.SeccompInfo.HottestSyscalls.
func (s seccompInfo) HottestSyscalls() []uintptr {
	return []uintptr{sysno.Ioctl.On(s.arch), sysno.Futex.On(s.arch), sysno.Tgkill.On(s.arch)}
}

// SyscallFilters implements platform.SeccompInfo.SyscallFilters. vCPUs are a range of
// descriptors; to other files that may be in it their requests mean nothing.
func (s seccompInfo) SyscallFilters(vars precompiled.Values) seccomp.SyscallRules {
	var any seccomp.AnyValue
	thread := seccomp.AllOf{seccomp.GreaterThan(0), seccomp.NonNegativeFD}
	zero := seccomp.EqualTo(0)
	vcpu := seccomp.AllOf{seccomp.GreaterThanOrEqual(vars[firstVCPUVariable]), seccomp.LessThanOrEqual(vars[lastVCPUVariable])}
	const mapFlags = unix.MAP_SHARED | unix.MAP_NORESERVE | unix.MAP_FIXED
	return seccomp.MakeSyscallRules(map[uintptr]seccomp.SyscallRule{
		sysno.Ioctl.On(s.arch): seccomp.Or{
			seccomp.PerArg{vcpu, seccomp.EqualTo(kvmRun), zero},
			seccomp.PerArg{vcpu, seccomp.EqualTo(kvmGetXSave)},
			seccomp.PerArg{vcpu, seccomp.EqualTo(kvmGetXSave2)},
			seccomp.PerArg{vcpu, seccomp.EqualTo(kvmSetXSave)},
			seccomp.PerArg{vcpu, seccomp.EqualTo(kvmSetMSRs)}, // after a triple fault
			seccomp.PerArg{seccomp.EqualTo(vars[vmVariable]), seccomp.EqualTo(kvmSetUserMemoryRegion)},
		},
		// Files that applications map, over room for them; and page tables.
		sysno.Mmap.On(s.arch): seccomp.Or{
			seccomp.PerArg{any, any, seccomp.EqualTo(unix.PROT_READ | unix.PROT_WRITE), seccomp.EqualTo(mapFlags), seccomp.NonNegativeFD},
			seccomp.PerArg{any, any, seccomp.EqualTo(unix.PROT_READ), seccomp.EqualTo(mapFlags), seccomp.NonNegativeFD},
			seccomp.PerArg{any, any, seccomp.EqualTo(unix.PROT_NONE), seccomp.EqualTo(unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE | unix.MAP_FIXED)},
			seccomp.PerArg{zero, any, seccomp.EqualTo(unix.PROT_NONE), seccomp.EqualTo(unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE)},
			seccomp.PerArg{zero, any, seccomp.EqualTo(unix.PROT_READ | unix.PROT_WRITE), seccomp.EqualTo(unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE)},
		},
		sysno.Munmap.On(s.arch): seccomp.MatchAll{},
		sysno.Madvise.On(s.arch): seccomp.PerArg{any, any, seccomp.AnyOf{
			seccomp.EqualTo(unix.MADV_POPULATE_READ), seccomp.EqualTo(unix.MADV_POPULATE_WRITE),
			seccomp.EqualTo(unix.MADV_DONTNEED), // a flush of pages
		}},
		// Runners, which are kept off the CPU of those who wait for them.
		sysno.Futex.On(s.arch):            seccomp.PerArg{any, seccomp.AnyOf{seccomp.EqualTo(futexWait), seccomp.EqualTo(futexWake)}},
		sysno.Getcpu.On(s.arch):           seccomp.PerArg{1: zero, 2: zero},
		sysno.SchedGetaffinity.On(s.arch): seccomp.PerArg{zero},
		sysno.SchedSetaffinity.On(s.arch): seccomp.PerArg{thread},
		// What kind of file it is.
		sysno.Fcntl.On(s.arch): seccomp.PerArg{seccomp.NonNegativeFD, seccomp.EqualTo(unix.F_GET_SEALS), zero},
		// The size of a file, when a page of it is missing.
		sysno.Fstat.On(s.arch): seccomp.PerArg{seccomp.NonNegativeFD},
		// Context.Interrupt, and what else gets a vCPU out.
		sysno.Tgkill.On(s.arch): seccomp.PerArg{thread, thread, seccomp.EqualTo(linux.Signal(platform.SignalInterrupt))},
		// GlobalMemoryBarrier.
		sysno.Membarrier.On(s.arch): seccomp.PerArg{seccomp.AnyOf{
			seccomp.EqualTo(linux.MEMBARRIER_CMD_QUERY),
			seccomp.EqualTo(linux.MEMBARRIER_CMD_PRIVATE_EXPEDITED),
			seccomp.EqualTo(linux.MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED),
		}, zero},
	})
}
