package filter

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/seccomp"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// Variables of the Sentry's rules.
const (
	// varPID is the Sentry's process ID.
	varPID = "sentry_pid"
	// varMonitorPID is the process ID of its Monitor. Without one it is the
	// Sentry's own, for which wait4(2) finds no child.
	varMonitorPID = "monitor_pid"
)

// ruleMaker adds up rules for one architecture.
type ruleMaker struct {
	arch  sysno.Arch
	rules seccomp.SyscallRules
}

func (m *ruleMaker) add(c sysno.Call, rule seccomp.SyscallRule) { m.rules.Add(c.On(m.arch), rule) }

// any adds calls that need no rule about arguments: those that do nothing to
// the world, and those whose arguments are descriptors and addresses only.
func (m *ruleMaker) any(calls ...sysno.Call) {
	for _, c := range calls {
		m.add(c, seccomp.MatchAll{})
	}
}

// Shorthands for arguments.
var (
	anything = seccomp.AnyValue{}
	zero     = seccomp.EqualTo(0)
	fd       = seccomp.NonNegativeFD
	atCWD    = seccomp.Int32(unix.AT_FDCWD)
)

// oneOf matches any of values.
func oneOf(values ...uint64) seccomp.AnyOf {
	var m seccomp.AnyOf
	for _, v := range values {
		m = append(m, seccomp.EqualTo(v))
	}
	return m
}

// args is a rule for the arguments in order.
func args(ms ...seccomp.ValueMatcher) seccomp.PerArg {
	var r seccomp.PerArg
	copy(r[:], ms)
	return r
}

// sentryRules returns the system calls that the Sentry makes after its start,
// whatever the platform.
func sentryRules(a sysno.Arch, access Access, v precompiled.Values) seccomp.SyscallRules {
	m := &ruleMaker{arch: a, rules: seccomp.NewSyscallRules()}
	m.goRuntime(v)
	m.memory()
	m.files()
	m.identity()
	m.standardFiles()
	m.any(sysno.Close)
	// The end of the Monitor, which is waited for.
	m.add(sysno.Wait4, args(seccomp.EqualTo(v[varMonitorPID]), anything, zero, zero))
	if access >= Redirected {
		m.redirected()
	}
	if access >= Write {
		m.write()
	}
	return m.rules
}

// goRuntime adds what the Go runtime needs: sources are runtime/os_linux.go,
// runtime/sys_linux_*.s, runtime/netpoll_epoll.go, runtime/mem_linux.go and
// runtime/cgroup_linux.go.
func (m *ruleMaker) goRuntime(v precompiled.Values) {
	// Time, for where the vDSO does not have it, and the clocks that applications
	// ask for.
	m.any(sysno.ClockGettime, sysno.ClockGetres, sysno.Nanosleep, sysno.SchedYield)
	m.any(sysno.Exit, sysno.ExitGroup, sysno.Getpid, sysno.Gettid, sysno.RestartSyscall)
	m.any(sysno.RtSigaction, sysno.RtSigprocmask, sysno.RtSigreturn, sysno.Sigaltstack)
	m.add(sysno.Futex, args(anything, oneOf(linux.FUTEX_WAIT|linux.FUTEX_PRIVATE_FLAG, linux.FUTEX_WAKE|linux.FUTEX_PRIVATE_FLAG)))

	// New threads, with these flags exactly: a new process would need others.
	thread := uint64(unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_SYSVSEM | unix.CLONE_THREAD)
	if m.arch == sysno.AMD64 {
		thread |= unix.CLONE_SETTLS
	}
	m.add(sysno.Clone, args(seccomp.EqualTo(thread)))

	// Signals to its own threads: preemption, what stops it for the shell outside,
	// and what ends it after a crash.
	m.add(sysno.Tgkill, args(seccomp.EqualTo(v[varPID]), anything, seccomp.LessThanOrEqual(64)))

	// GOMAXPROCS follows the CPUs and the control group that the process is in;
	// the latter is read with pread64(2).
	m.add(sysno.SchedGetaffinity, args(zero))

	m.add(sysno.Getrandom, args(anything, anything, seccomp.BitsAllowlist(unix.GRND_NONBLOCK)))

	// The heap. Nothing is ever executable, and never was: there is no mprotect.
	readWrite := uint64(unix.PROT_READ | unix.PROT_WRITE)
	const anonymous = unix.MAP_ANONYMOUS | unix.MAP_PRIVATE
	const mapDroppable = 0x8 // MAP_DROPPABLE: state of getrandom(2) in the vDSO
	m.add(sysno.Mmap, args(anything, anything, oneOf(unix.PROT_NONE, readWrite), oneOf(anonymous, anonymous|unix.MAP_FIXED)))
	m.add(sysno.Mmap, args(zero, anything, seccomp.EqualTo(readWrite), seccomp.EqualTo(unix.MAP_ANONYMOUS|mapDroppable)))
	m.any(sysno.Munmap)
	m.add(sysno.Madvise, args(anything, anything, oneOf(
		unix.MADV_DONTNEED, unix.MADV_FREE, unix.MADV_HUGEPAGE, unix.MADV_NOHUGEPAGE, unix.MADV_COLLAPSE)))
	m.add(sysno.Prctl, args(seccomp.EqualTo(unix.PR_SET_VMA), zero /* PR_SET_VMA_ANON_NAME */))

	// The network poller: of timers only, and of files that package os reads.
	m.add(sysno.EpollCreate1, args(seccomp.EqualTo(unix.EPOLL_CLOEXEC)))
	m.add(sysno.EpollCtl, args(fd, oneOf(unix.EPOLL_CTL_ADD, unix.EPOLL_CTL_DEL), fd))
	m.add(sysno.EpollPwait, args(fd, anything, anything, anything, zero))
	m.add(sysno.Eventfd2, args(zero, seccomp.EqualTo(unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)))
}

// memory adds what package pgalloc, tmpfs and files that applications map need:
// memory files, which grow, shrink and are mapped here with a look at them, but
// never to be executed.
func (m *ruleMaker) memory() {
	m.add(sysno.MemfdCreate, args(anything, seccomp.EqualTo(unix.MFD_CLOEXEC)))
	m.any(sysno.Ftruncate)
	m.add(sysno.Fallocate, args(fd, seccomp.BitsAllowlist(0x7f)))
	m.add(sysno.Mmap, args(anything, anything, oneOf(unix.PROT_READ, unix.PROT_READ|unix.PROT_WRITE),
		oneOf(unix.MAP_SHARED, unix.MAP_SHARED|unix.MAP_NORESERVE), fd))
}

// identity adds what the Sentry asks about itself and the host to tell
// applications.
func (m *ruleMaker) identity() {
	m.any(sysno.Getuid, sysno.Geteuid, sysno.Getgid, sysno.Getegid, sysno.Getgroups, sysno.Sysinfo)
	// Limits are read, never set.
	if m.arch == sysno.AMD64 { // as package unix does there
		m.any(sysno.Getrlimit)
	} else {
		m.add(sysno.Prlimit64, args(zero, anything, zero))
	}
}

// files adds what package hostfs needs to show files beneath the root, and
// open ones.
//
// A filter sees no names, and not the flags of openat2(2), which are in memory:
// it cannot keep a Sentry that is in the hands of an attacker from any file that
// the user may open. Only the number of ways is small: no directory but through
// a descriptor.
func (m *ruleMaker) files() {
	m.add(sysno.Openat2, args(fd, anything, anything, seccomp.EqualTo(unix.SizeofOpenHow)))
	m.add(sysno.Newfstatat, args(fd, anything, anything, oneOf(0, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT)))
	m.add(sysno.Readlinkat, args(fd))
	m.any(sysno.Fstat, sysno.Fstatfs, sysno.Getdents64, sysno.Lseek)
	m.any(sysno.Read, sysno.Write, sysno.Pread64, sysno.Pwrite64, sysno.Fsync, sysno.Fdatasync)
	m.add(sysno.Fadvise64, args(fd, anything, anything, seccomp.LessThanOrEqual(unix.FADV_NOREUSE)))
	m.any(sysno.Getxattr, sysno.Listxattr)

	// Opening, through /proc/self/fd, an inode that was found before; for reading
	// (see redirected for the rest).
	m.add(sysno.Openat, args(fd, anything, seccomp.BitsAllowlist(m.reopenFlags())))

	// Access, with the effective IDs. Before Linux 5.8 package unix makes it up
	// from others, here the rest of them.
	m.add(sysno.Faccessat2, args(fd, anything, seccomp.LessThanOrEqual(7), seccomp.EqualTo(unix.AT_EACCESS)))
	m.any(sysno.Capget)

	// /proc/cpuinfo.
	m.add(sysno.Openat, args(atCWD, anything, seccomp.EqualTo(unix.O_RDONLY|unix.O_CLOEXEC)))

	m.add(sysno.Fcntl, seccomp.Or{
		args(fd, seccomp.EqualTo(unix.F_DUPFD_CLOEXEC)),
		args(fd, seccomp.EqualTo(unix.F_GETFL)),
		args(fd, seccomp.EqualTo(unix.F_SETFL), seccomp.BitsAllowlist(unix.O_APPEND|unix.O_NOATIME|unix.O_NONBLOCK|m.largeFileFlag())),
	})
}

// reopenFlags are the flags of openat(2) to read a file.
func (m *ruleMaker) reopenFlags() uint64 {
	return unix.O_CLOEXEC | unix.O_NOCTTY | unix.O_NONBLOCK | unix.O_APPEND | unix.O_NOATIME | unix.O_DSYNC | unix.O_SYNC | m.directoryFlag()
}

// directoryFlag is O_DIRECTORY, which is not the same everywhere
// (arch/arm64/include/uapi/asm/fcntl.h).
func (m *ruleMaker) directoryFlag() uint64 {
	if m.arch == sysno.ARM64 {
		return 0x4000
	}
	return 0x10000
}

// largeFileFlag is O_LARGEFILE as the kernel has it, which sets it for all files
// of 64-bit processes.
func (m *ruleMaker) largeFileFlag() uint64 {
	if m.arch == sysno.ARM64 {
		return 0x20000
	}
	return 0x8000
}

// standardFiles adds what inherited terminals, pipes and sockets need, with the
// poller that waits for them.
func (m *ruleMaker) standardFiles() {
	m.add(sysno.Ppoll, args(anything, seccomp.EqualTo(1), anything, zero))
	m.add(sysno.Recvfrom, args(fd, anything, anything, seccomp.EqualTo(unix.MSG_DONTWAIT)))
	// Without MSG_DONTWAIT: the listener, to the Monitor.
	m.add(sysno.Sendmsg, args(fd, anything, oneOf(unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, unix.MSG_NOSIGNAL)))
	// Not TIOCSTI and the like: they type at the shell outside.
	m.add(sysno.Ioctl, args(fd, oneOf(
		linux.TCGETS, linux.TCSETS, linux.TCSETSW, linux.TCSETSF, linux.TIOCGWINSZ, linux.TIOCSWINSZ,
		linux.TCSBRK, linux.TCSBRKP, linux.TCXONC, linux.TCFLSH, linux.TIOCINQ, linux.TIOCOUTQ)))
}

// redirected adds what is done to a regular file that was inherited: it is opened
// again, with an offset of its own (see hostfs.NewFile).
func (m *ruleMaker) redirected() {
	m.add(sysno.Openat, args(fd, anything, seccomp.BitsAllowlist(m.reopenFlags()|unix.O_ACCMODE|unix.O_TRUNC)))
	m.add(sysno.Openat, args(atCWD, anything, seccomp.EqualTo(unix.O_PATH|unix.O_CLOEXEC|m.directoryFlag()))) // /proc/self/fd
}

// write adds what changes directories and attributes. Of special files none is
// ever made.
func (m *ruleMaker) write() {
	m.add(sysno.Fchmodat, args(fd))
	m.any(sysno.Fchown)
	m.add(sysno.Fchownat, args(fd, anything, anything, anything, oneOf(0, unix.AT_SYMLINK_NOFOLLOW)))
	m.add(sysno.Utimensat, args(fd, anything, anything, zero))
	m.any(sysno.Setxattr, sysno.Removexattr)
	m.add(sysno.Mkdirat, args(fd))
	m.add(sysno.Mknodat, args(fd, anything, seccomp.MaskedEqual{Mask: unix.S_IFMT, Value: unix.S_IFREG}, zero))
	m.add(sysno.Symlinkat, args(anything, fd))
	m.add(sysno.Linkat, args(fd, anything, fd, anything, seccomp.EqualTo(unix.AT_SYMLINK_FOLLOW)))
	m.add(sysno.Unlinkat, args(fd, anything, oneOf(0, unix.AT_REMOVEDIR)))
	m.add(sysno.Renameat2, args(fd, anything, fd, anything,
		seccomp.BitsAllowlist(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE|unix.RENAME_WHITEOUT)))
}

// refusedRules returns calls that fail with EPERM although they are forbidden,
// because somebody may well try and has an error to give.
//
// A zygote that was killed is to be replaced (package stub), which begins with a
// memory file to be sealed and executed. A confined Sentry cannot start a
// process: what runs goes on, and new address spaces get the error.
func refusedRules(a sysno.Arch) seccomp.SyscallRules {
	m := &ruleMaker{arch: a, rules: seccomp.NewSyscallRules()}
	m.add(sysno.MemfdCreate, args(anything, seccomp.MaskedEqual{Mask: unix.MFD_ALLOW_SEALING, Value: unix.MFD_ALLOW_SEALING}))
	return m.rules
}
