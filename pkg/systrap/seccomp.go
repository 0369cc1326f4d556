package systrap

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/seccomp"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
	"github.com/ringfence/ringfence/pkg/stub"
)

// seccompInfo implements platform.ArchSeccompInfo. There is one configuration,
// without variables.
type seccompInfo struct{ arch sysno.Arch }

// Variables implements platform.SeccompInfo.Variables.
func (seccompInfo) Variables() precompiled.Values { return nil }

// ConfigKey implements platform.SeccompInfo.ConfigKey.
func (seccompInfo) ConfigKey() string { return Name }

// ForArch implements platform.ArchSeccompInfo.ForArch.
func (seccompInfo) ForArch(a sysno.Arch) (platform.SeccompInfo, bool) { return seccompInfo{a}, true }

// HottestSyscalls implements platform.SeccompInfo.HottestSyscalls.
func (s seccompInfo) HottestSyscalls() []uintptr {
	return []uintptr{sysno.Futex.On(s.arch), sysno.Lseek.On(s.arch), sysno.Tgkill.On(s.arch), sysno.Fstat.On(s.arch)}
}

// SyscallFilters implements platform.SeccompInfo.SyscallFilters.
func (s seccompInfo) SyscallFilters(precompiled.Values) seccomp.SyscallRules {
	var any seccomp.AnyValue
	id := seccomp.AllOf{seccomp.GreaterThan(0), seccomp.NonNegativeFD}
	zero := seccomp.EqualTo(0)
	wait := func(what uint64) seccomp.SyscallRule {
		return seccomp.PerArg{seccomp.EqualTo(unix.P_PID), id, any, seccomp.EqualTo(what | unix.WNOHANG | unix.WNOWAIT | unix.WALL), zero}
	}
	r := stub.SyscallFilters(s.arch)
	r.Merge(seccomp.MakeSyscallRules(map[uintptr]seccomp.SyscallRule{
		// Slots and requests.
		sysno.Futex.On(s.arch): seccomp.PerArg{any, seccomp.AnyOf{seccomp.EqualTo(futexWait), seccomp.EqualTo(futexWake)}},
		sysno.Lseek.On(s.arch): seccomp.PerArg{seccomp.NonNegativeFD, zero, seccomp.EqualTo(unix.SEEK_CUR)},
		// Context.Interrupt.
		sysno.Tgkill.On(s.arch): seccomp.PerArg{id, id, seccomp.EqualTo(linux.Signal(platform.SignalInterrupt))},
		// Whether a stub has ended, or was stopped.
		sysno.Waitid.On(s.arch): seccomp.Or{wait(unix.WEXITED), wait(unix.WSTOPPED)},
		// The memory of new stubs.
		sysno.MemfdCreate.On(s.arch): seccomp.PerArg{any, seccomp.AnyOf{
			seccomp.EqualTo(unix.MFD_CLOEXEC), seccomp.EqualTo(unix.MFD_CLOEXEC | unix.MFD_NOEXEC_SEAL),
		}},
		sysno.Ftruncate.On(s.arch): seccomp.PerArg{seccomp.NonNegativeFD, seccomp.EqualTo(fileSize)},
		sysno.Mmap.On(s.arch): seccomp.PerArg{
			zero, any, seccomp.EqualTo(unix.PROT_READ | unix.PROT_WRITE), seccomp.EqualTo(unix.MAP_SHARED), seccomp.NonNegativeFD,
		},
		sysno.Munmap.On(s.arch): seccomp.MatchAll{},
		// GlobalMemoryBarrier.
		sysno.Membarrier.On(s.arch): seccomp.PerArg{seccomp.AnyOf{
			seccomp.EqualTo(linux.MEMBARRIER_CMD_QUERY), seccomp.EqualTo(linux.MEMBARRIER_CMD_GLOBAL),
		}, zero},
	}))
	return r
}
