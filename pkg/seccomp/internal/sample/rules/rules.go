// Package rules describes the programs of package sample: rules of the size and
// kind that a Sentry and its platforms have.
//
// It is for tests and benchmarks of pkg/seccomp and below, and an example of
// rules that can be made for either architecture on any host. It depends on pkg/seccomp
// and below, and must never know a platform.
package rules

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/seccomp"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// Variables of the programs.
const (
	// VMFD is the file descriptor of a virtual machine.
	VMFD = "vm_fd"
	// VCPUFDFirst and VCPUFDLast are the range of file descriptors of vCPUs.
	VCPUFDFirst = "vcpu_fd_first"
	VCPUFDLast  = "vcpu_fd_last"
	// StubPID is the process ID of the first stub.
	StubPID = "stub_pid"
	// Shared is the address, a 64-bit value, of memory shared with stubs.
	Shared = "shared"
)

// Platforms are the keys of the programs.
var Platforms = []string{"kvm", "ptrace", "systrap"}

// Values returns values for all variables.
func Values() precompiled.Values {
	v := precompiled.Values{VMFD: 7, VCPUFDFirst: 8, VCPUFDLast: 15, StubPID: 4711}
	v.Set64(Shared, 0x7f12_3456_7000)
	return v
}

// Sources returns what the programs for a are made of.
func Sources(a sysno.Arch) ([]precompiled.Source, error) {
	sharedHigh, sharedLow := precompiled.Names64(Shared)
	var sources []precompiled.Source
	for _, platform := range Platforms {
		sources = append(sources, precompiled.Source{
			Key:       platform,
			Variables: []string{VMFD, VCPUFDFirst, VCPUFDLast, StubPID, sharedHigh, sharedLow},
			Rules: func(v precompiled.Values) []seccomp.RuleSet {
				allowed := sentryRules(a)
				allowed.Merge(platformRules(a, platform, v))
				return []seccomp.RuleSet{{Rules: allowed, Action: seccomp.Allow}}
			},
			Options: seccomp.ProgramOptions{
				Arch:            a,
				DefaultAction:   seccomp.Trap(0),
				BadArchAction:   seccomp.KillProcess,
				HottestSyscalls: Hottest(a, platform),
			},
		})
	}
	return sources, nil
}

// Hottest returns the ten calls that are made most often, the most frequent
// first.
func Hottest(a sysno.Arch, platform string) []uintptr {
	first := []sysno.Call{sysno.Ptrace, sysno.Wait4}
	switch platform {
	case "kvm":
		first = []sysno.Call{sysno.Ioctl, sysno.RtSigreturn}
	case "systrap":
		first = []sysno.Call{sysno.Futex, sysno.SchedYield}
	}
	calls := append(first, sysno.Tgkill, sysno.Nanosleep, sysno.Getpid, sysno.EpollPwait, sysno.Mmap, sysno.Read, sysno.Write, sysno.ClockGettime)
	numbers := make([]uintptr, len(calls))
	for i, c := range calls {
		numbers[i] = c.On(a)
	}
	return numbers
}

// sentryRules are the calls that the Go runtime and file operations need.
func sentryRules(a sysno.Arch) seccomp.SyscallRules {
	r := seccomp.NewSyscallRules()
	add := func(c sysno.Call, rule seccomp.SyscallRule) { r.Add(c.On(a), rule) }
	for _, c := range []sysno.Call{
		sysno.ClockGettime, sysno.Close, sysno.Dup, sysno.Exit, sysno.ExitGroup, sysno.Fstat, sysno.Fsync,
		sysno.Ftruncate, sysno.Getcpu, sysno.Getpid, sysno.Gettid, sysno.Getrandom, sysno.Lseek, sysno.Membarrier,
		sysno.Nanosleep, sysno.ClockNanosleep, sysno.Pread64, sysno.Preadv, sysno.Pwrite64, sysno.Pwritev, sysno.Read, sysno.Readv,
		sysno.RestartSyscall, sysno.RtSigaction, sysno.RtSigprocmask, sysno.RtSigreturn, sysno.SchedGetaffinity, sysno.SchedYield,
		sysno.Sigaltstack, sysno.Write, sysno.Writev, sysno.Newfstatat, sysno.Readlinkat, sysno.Getdents64,
	} {
		add(c, seccomp.MatchAll{})
	}
	var any seccomp.AnyValue
	add(sysno.Futex, seccomp.PerArg{any, seccomp.AnyOf{
		seccomp.EqualTo(linux.FUTEX_WAIT | linux.FUTEX_PRIVATE_FLAG), seccomp.EqualTo(linux.FUTEX_WAKE | linux.FUTEX_PRIVATE_FLAG),
		seccomp.EqualTo(linux.FUTEX_WAIT), seccomp.EqualTo(linux.FUTEX_WAKE),
	}})
	add(sysno.Mmap, seccomp.Or{
		seccomp.PerArg{any, any, seccomp.BitsAllowlist(unix.PROT_READ | unix.PROT_WRITE), seccomp.EqualTo(unix.MAP_SHARED), seccomp.NonNegativeFD},
		seccomp.PerArg{any, any, seccomp.BitsAllowlist(unix.PROT_READ | unix.PROT_WRITE), seccomp.AnyOf{
			seccomp.EqualTo(unix.MAP_PRIVATE | unix.MAP_ANONYMOUS), seccomp.EqualTo(unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_FIXED),
			seccomp.EqualTo(unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_NORESERVE),
		}},
	})
	add(sysno.Mprotect, seccomp.PerArg{any, any, seccomp.BitsAllowlist(unix.PROT_READ | unix.PROT_WRITE)})
	add(sysno.Munmap, seccomp.PerArg{seccomp.GreaterThan(0xffff)})
	add(sysno.Madvise, seccomp.PerArg{any, any, seccomp.AnyOf{
		seccomp.EqualTo(unix.MADV_DONTNEED), seccomp.EqualTo(unix.MADV_FREE), seccomp.EqualTo(unix.MADV_HUGEPAGE),
		seccomp.EqualTo(unix.MADV_NOHUGEPAGE), seccomp.EqualTo(unix.MADV_COLLAPSE),
	}})
	add(sysno.Clone, seccomp.PerArg{seccomp.EqualTo(unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD | unix.CLONE_SYSVSEM)})
	add(sysno.EpollCreate1, seccomp.PerArg{seccomp.EqualTo(unix.EPOLL_CLOEXEC)})
	add(sysno.EpollCtl, seccomp.PerArg{seccomp.NonNegativeFD, seccomp.AnyOf{
		seccomp.EqualTo(unix.EPOLL_CTL_ADD), seccomp.EqualTo(unix.EPOLL_CTL_DEL), seccomp.EqualTo(unix.EPOLL_CTL_MOD)}})
	add(sysno.EpollPwait, seccomp.PerArg{seccomp.NonNegativeFD, any, any, any, seccomp.EqualTo(0)})
	add(sysno.Eventfd2, seccomp.PerArg{seccomp.EqualTo(0), seccomp.BitsAllowlist(unix.EFD_CLOEXEC | unix.EFD_NONBLOCK)})
	add(sysno.Fallocate, seccomp.PerArg{seccomp.NonNegativeFD, seccomp.AnyOf{seccomp.EqualTo(0), seccomp.EqualTo(unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE)}})
	add(sysno.Fcntl, seccomp.PerArg{seccomp.NonNegativeFD, seccomp.AnyOf{
		seccomp.EqualTo(unix.F_GETFL), seccomp.EqualTo(unix.F_SETFL), seccomp.EqualTo(unix.F_GETFD), seccomp.EqualTo(unix.F_DUPFD_CLOEXEC)}})
	add(sysno.MemfdCreate, seccomp.PerArg{any, seccomp.EqualTo(unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING)})
	add(sysno.Mincore, seccomp.PerArg{any, seccomp.LessThanOrEqual(1 << 30)})
	add(sysno.Openat2, seccomp.PerArg{seccomp.NonNegativeFD, any, any, seccomp.EqualTo(unix.SizeofOpenHow)})
	add(sysno.Ppoll, seccomp.PerArg{3: seccomp.EqualTo(0)})
	add(sysno.Recvmsg, seccomp.PerArg{seccomp.NonNegativeFD, any, seccomp.MaskedEqual{Mask: ^uint64(unix.MSG_DONTWAIT | unix.MSG_PEEK | unix.MSG_TRUNC)}})
	add(sysno.Sendmsg, seccomp.PerArg{seccomp.NonNegativeFD, any, seccomp.EqualTo(unix.MSG_DONTWAIT | unix.MSG_NOSIGNAL)})
	add(sysno.Shutdown, seccomp.PerArg{seccomp.NonNegativeFD, seccomp.LessThanOrEqual(unix.SHUT_RDWR)})
	add(sysno.TimerCreate, seccomp.PerArg{seccomp.EqualTo(unix.CLOCK_THREAD_CPUTIME_ID)})
	add(sysno.TimerSettime, seccomp.PerArg{1: seccomp.EqualTo(0)})
	add(sysno.TimerDelete, seccomp.MatchAll{})
	add(sysno.Utimensat, seccomp.PerArg{seccomp.NonNegativeFD, seccomp.EqualTo(0)})
	if a == sysno.AMD64 {
		add(sysno.ArchPrctl, seccomp.PerArg{seccomp.EqualTo(0x1002 /* ARCH_SET_FS */)})
		add(sysno.EpollWait, seccomp.PerArg{seccomp.NonNegativeFD})
		add(sysno.Poll, seccomp.MatchAll{})
	}
	return r
}

// ioctls of <linux/kvm.h> whose numbers are the same on both architectures.
const (
	kvmRun                 = 0xae80
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmSetSignalMask       = 0x4004ae8b
	kvmCheckExtension      = 0xae03
)

func platformRules(a sysno.Arch, platform string, v precompiled.Values) seccomp.SyscallRules {
	r := seccomp.NewSyscallRules()
	add := func(c sysno.Call, rule seccomp.SyscallRule) { r.Add(c.On(a), rule) }
	value := func(name string) seccomp.EqualTo { return seccomp.EqualTo(v[name]) }
	var any seccomp.AnyValue
	switch platform {
	case "kvm":
		vcpu := seccomp.AllOf{seccomp.GreaterThanOrEqual(v[VCPUFDFirst]), seccomp.LessThanOrEqual(v[VCPUFDLast])}
		add(sysno.Ioctl, seccomp.Or{
			seccomp.PerArg{vcpu, seccomp.EqualTo(kvmRun), seccomp.EqualTo(0)},
			seccomp.PerArg{vcpu, seccomp.EqualTo(kvmSetSignalMask)},
			seccomp.PerArg{value(VMFD), seccomp.EqualTo(kvmCreateVCPU), seccomp.LessThan(1024)},
			seccomp.PerArg{value(VMFD), seccomp.EqualTo(kvmSetUserMemoryRegion)},
			seccomp.PerArg{value(VMFD), seccomp.EqualTo(kvmCheckExtension)},
		})
		if a == sysno.AMD64 {
			for _, request := range []uint64{0x8090ae81, 0x4090ae82, 0x8138ae83, 0x4138ae84, 0x4008ae90, 0x5000aea5} {
				add(sysno.Ioctl, seccomp.PerArg{vcpu, seccomp.EqualTo(request)})
			}
		} else {
			for _, request := range []uint64{0x4020aeae, 0x4010aeab, 0x4010aeac} {
				add(sysno.Ioctl, seccomp.PerArg{vcpu, seccomp.EqualTo(request)})
			}
		}
		add(sysno.Tgkill, seccomp.MatchAll{})
	case "ptrace":
		add(sysno.Ptrace, seccomp.PerArg{seccomp.AnyOf{
			seccomp.EqualTo(unix.PTRACE_GETREGSET), seccomp.EqualTo(unix.PTRACE_SETREGSET), seccomp.EqualTo(0x4202 /* PTRACE_GETSIGINFO */),
			seccomp.EqualTo(31 /* PTRACE_SYSEMU */), seccomp.EqualTo(32 /* PTRACE_SYSEMU_SINGLESTEP */), seccomp.EqualTo(unix.PTRACE_GETEVENTMSG),
			seccomp.EqualTo(unix.PTRACE_CONT), seccomp.EqualTo(unix.PTRACE_SEIZE), seccomp.EqualTo(unix.PTRACE_LISTEN),
		}})
		add(sysno.Wait4, seccomp.PerArg{any, any, seccomp.EqualTo(unix.WALL), seccomp.EqualTo(0)})
		add(sysno.Tgkill, seccomp.PerArg{2: seccomp.AnyOf{seccomp.EqualTo(unix.SIGSTOP), seccomp.EqualTo(unix.SIGCHLD), seccomp.EqualTo(unix.SIGURG)}})
	case "systrap":
		shared := v.Get64(Shared)
		add(sysno.Futex, seccomp.PerArg{seccomp.EqualTo(shared), seccomp.EqualTo(linux.FUTEX_REQUEUE)})
		add(sysno.Tgkill, seccomp.PerArg{value(StubPID), any, seccomp.AnyOf{seccomp.EqualTo(unix.SIGCHLD), seccomp.EqualTo(unix.SIGKILL)}})
		add(sysno.Tgkill, seccomp.PerArg{2: seccomp.EqualTo(unix.SIGURG)})
		add(sysno.Wait4, seccomp.PerArg{value(StubPID), any, seccomp.EqualTo(unix.WNOHANG), seccomp.EqualTo(0)})
	}
	return r
}
