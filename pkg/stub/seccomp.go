package stub

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/seccomp"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// SyscallFilters returns the system calls of the host that this package makes,
// on architecture a, once there is a zygote: what Start does is not among them.
// A process that confines itself has its zygote before, and keeps it.
func SyscallFilters(a sysno.Arch) seccomp.SyscallRules {
	var any seccomp.AnyValue
	process := seccomp.AllOf{seccomp.GreaterThan(0), seccomp.NonNegativeFD}
	return seccomp.MakeSyscallRules(map[uintptr]seccomp.SyscallRule{
		// Requests to the zygote, with the files that stubs map, and its replies.
		sysno.Fstat.On(a):    seccomp.PerArg{seccomp.NonNegativeFD},
		sysno.Sendmsg.On(a):  seccomp.PerArg{seccomp.NonNegativeFD, any, seccomp.EqualTo(unix.MSG_NOSIGNAL)},
		sysno.Recvfrom.On(a): seccomp.PerArg{seccomp.NonNegativeFD, 3: seccomp.EqualTo(0)},
		sysno.Close.On(a):    seccomp.MatchAll{},

		// The end of stubs: one process at a time, never a group or everybody.
		sysno.Kill.On(a):  seccomp.PerArg{process, seccomp.EqualTo(unix.SIGKILL)},
		sysno.Wait4.On(a): seccomp.PerArg{process, any, seccomp.EqualTo(unix.WALL), seccomp.EqualTo(0)},

		// Threads that alternate, on one CPU, if they are there.
		sysno.Tgkill.On(a):           seccomp.PerArg{process, process, seccomp.EqualTo(0)},
		sysno.Getcpu.On(a):           seccomp.PerArg{1: seccomp.EqualTo(0), 2: seccomp.EqualTo(0)},
		sysno.SchedGetaffinity.On(a): seccomp.PerArg{seccomp.NonNegativeFD},
		sysno.SchedSetaffinity.On(a): seccomp.PerArg{seccomp.NonNegativeFD},

		// Whether the zygote is alive.
		sysno.Waitid.On(a): seccomp.PerArg{seccomp.EqualTo(unix.P_PID), process, any, seccomp.EqualTo(unix.WEXITED | unix.WNOHANG | unix.WNOWAIT), seccomp.EqualTo(0)},
	})
}
