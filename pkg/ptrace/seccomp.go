package ptrace

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
	return []uintptr{sysno.Ptrace.On(s.arch), sysno.Wait4.On(s.arch), sysno.Tgkill.On(s.arch), sysno.SchedSetaffinity.On(s.arch)}
}

// SyscallFilters implements platform.SeccompInfo.SyscallFilters. Stubs come and
// go, so that no rule can name them: what keeps this process from other processes
// of its user is the host's (sysctl kernel.yama.ptrace_scope).
func (s seccompInfo) SyscallFilters(precompiled.Values) seccomp.SyscallRules {
	var any seccomp.AnyValue
	thread := seccomp.AllOf{seccomp.GreaterThan(0), seccomp.NonNegativeFD}
	// request is a rule for ptrace(2) with the thread's id.
	request := func(req uint64, addr, data seccomp.ValueMatcher) seccomp.SyscallRule {
		return seccomp.PerArg{seccomp.EqualTo(req), thread, addr, data}
	}
	zero := seccomp.EqualTo(0)

	r := stub.SyscallFilters(s.arch)
	r.Merge(seccomp.MakeSyscallRules(map[uintptr]seccomp.SyscallRule{
		sysno.Ptrace.On(s.arch): seccomp.Or{
			// A Switch.
			request(ptraceSysemu, zero, zero),
			request(unix.PTRACE_GET_SYSCALL_INFO, any, any),
			request(unix.PTRACE_GETSIGINFO, zero, any),
			// System calls in the stub.
			request(unix.PTRACE_CONT, zero, zero),
			// New threads. No option that would let a stub outlive us.
			request(unix.PTRACE_SEIZE, zero, seccomp.EqualTo(seizeOptions)),
			request(unix.PTRACE_INTERRUPT, zero, zero),
			request(ptraceSetSigMask, seccomp.EqualTo(8), any),
		},
		sysno.Wait4.On(s.arch): seccomp.PerArg{thread, any, seccomp.EqualTo(unix.WALL | unix.WNOTHREAD), zero},
		// Context.Interrupt.
		sysno.Tgkill.On(s.arch): seccomp.PerArg{thread, thread, seccomp.EqualTo(linux.Signal(platform.SignalInterrupt))},
		// GlobalMemoryBarrier.
		sysno.Membarrier.On(s.arch): seccomp.PerArg{seccomp.AnyOf{
			seccomp.EqualTo(linux.MEMBARRIER_CMD_QUERY), seccomp.EqualTo(linux.MEMBARRIER_CMD_GLOBAL),
		}, zero},
	}))
	// Registers. There is no PTRACE_POKEDATA: the Sentry reaches the memory of
	// applications through the file behind it.
	if s.arch == sysno.AMD64 {
		xstate := seccomp.EqualTo(unix.NT_X86_XSTATE)
		r.Add(sysno.Ptrace.On(s.arch), seccomp.Or{
			request(unix.PTRACE_GETREGS, zero, any),
			request(unix.PTRACE_SETREGS, zero, any),
			request(unix.PTRACE_GETREGSET, xstate, any),
			request(unix.PTRACE_SETREGSET, xstate, any),
			// The result of a system call, RAX in struct user.
			request(unix.PTRACE_POKEUSR, seccomp.EqualTo(10*8), any),
			// What a signal frame says of an exception.
			request(unix.PTRACE_SINGLESTEP, zero, seccomp.AnyOf{
				seccomp.EqualTo(unix.SIGSEGV), seccomp.EqualTo(unix.SIGBUS), seccomp.EqualTo(unix.SIGFPE),
			}),
			request(unix.PTRACE_PEEKDATA, any, any),
		})
	} else {
		sets := seccomp.AnyOf{
			seccomp.EqualTo(unix.NT_PRSTATUS), seccomp.EqualTo(unix.NT_ARM_TLS), seccomp.EqualTo(unix.NT_ARM_SYSTEM_CALL),
			seccomp.EqualTo(unix.NT_PRFPREG), seccomp.EqualTo(unix.NT_ARM_SVE),
		}
		const sysemuSingleStep = 32
		r.Add(sysno.Ptrace.On(s.arch), seccomp.Or{
			request(unix.PTRACE_GETREGSET, sets, any),
			request(unix.PTRACE_SETREGSET, sets, any),
			request(sysemuSingleStep, zero, zero),
			// What a signal frame says of an exception.
			request(unix.PTRACE_SINGLESTEP, zero, seccomp.AnyOf{
				seccomp.EqualTo(unix.SIGSEGV), seccomp.EqualTo(unix.SIGBUS),
			}),
			request(unix.PTRACE_PEEKDATA, any, any),
		})
	}
	return r
}
