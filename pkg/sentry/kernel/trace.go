package kernel

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
)

// traceArgs says how the arguments of a system call are shown: d decimal, x
// hexadecimal, s a string, b bytes whose length is the next argument, v a
// vector of strings, g a signal, o octal, n nothing. Other calls show six
// numbers in hexadecimal.
var traceArgs = map[string]string{
	"access": "so", "accept4": "dxxx", "arch_prctl": "xx", "bind": "dxd", "brk": "x", "capget": "xx", "chdir": "s",
	"chmod": "so", "chown": "sdd", "clock_getres": "dx", "clock_gettime": "dx", "clock_nanosleep": "dxxx",
	"clone": "xxxxx", "clone3": "xd", "close": "d", "close_range": "ddx", "connect": "dxd", "dup": "d", "dup2": "dd",
	"dup3": "ddx", "epoll_create1": "x", "epoll_ctl": "dddx", "epoll_pwait": "dxddxd", "epoll_wait": "dxdd",
	"eventfd2": "dx", "execve": "svx", "execveat": "dsvxx", "exit": "d", "exit_group": "d", "faccessat": "dso",
	"faccessat2": "dsox", "fadvise64": "dddd", "fallocate": "dxdd", "fchdir": "d", "fchmod": "do", "fchmodat": "dso",
	"fchown": "ddd", "fchownat": "dsddx", "fcntl": "ddx", "fdatasync": "d", "flock": "dd", "fork": "", "fstat": "dx",
	"fstatfs": "dx", "fsync": "d", "ftruncate": "dd", "futex": "xxxxxx", "getcwd": "xd", "getdents64": "dxd",
	"getegid": "", "geteuid": "", "getgid": "", "getgroups": "dx", "getpgid": "d", "getpgrp": "", "getpid": "",
	"getppid": "", "getrandom": "xdx", "getresgid": "xxx", "getresuid": "xxx", "getrlimit": "dx", "getrusage": "dx",
	"getsid": "d", "getsockopt": "dddxx", "gettid": "", "gettimeofday": "xx", "getuid": "", "getxattr": "ssxd",
	"ioctl": "dxx", "kill": "dg", "lchown": "sdd", "link": "ss", "linkat": "dsdsx", "listen": "dd", "lseek": "ddd",
	"lstat": "sx", "madvise": "xxd", "mkdir": "so", "mkdirat": "dso", "mmap": "xxxxdx", "mprotect": "xxx",
	"mremap": "xxxxx", "munmap": "xx", "nanosleep": "xx", "newfstatat": "dsxx", "open": "sxo", "openat": "dsxo",
	"openat2": "dsxd", "pause": "", "personality": "x", "pidfd_open": "dx", "pipe": "x", "pipe2": "xx", "poll": "xdd",
	"ppoll": "xdxxd", "prctl": "dxxxx", "pread64": "dxdd", "prlimit64": "ddxx", "pselect6": "dxxxxx",
	"pwrite64": "dbnd", "read": "dxd", "readlink": "sxd", "readlinkat": "dsxd", "readv": "dxd", "rename": "ss",
	"renameat": "dsds", "renameat2": "dsdsx", "restart_syscall": "", "rmdir": "s", "rseq": "xxxx",
	"rt_sigaction": "gxxd", "rt_sigpending": "xd", "rt_sigprocmask": "dxxd", "rt_sigqueueinfo": "dgx",
	"rt_sigreturn": "", "rt_sigsuspend": "xd", "rt_sigtimedwait": "xxxd", "sched_getaffinity": "ddx",
	"sched_yield": "", "select": "dxxxx", "sendmsg": "dxx", "sendto": "dbnxxd", "set_robust_list": "xd",
	"set_tid_address": "x", "setitimer": "dxx", "setpgid": "dd", "setsid": "", "setsockopt": "dddxd",
	"sigaltstack": "xx", "socket": "ddd", "socketpair": "dddx", "stat": "sx", "statfs": "sx", "statx": "dsxxx",
	"symlink": "ss", "symlinkat": "sds", "sysinfo": "x", "tgkill": "ddg", "tkill": "dg", "truncate": "sd",
	"umask": "o", "uname": "x", "unlink": "s", "unlinkat": "dsx", "utimensat": "dsxx", "vfork": "", "wait4": "dxxx",
	"waitid": "ddxxx", "write": "dbn", "writev": "dxd",
}

// maxTraceString bounds the strings shown, in bytes.
const maxTraceString = 48

// traceEntry returns what the trace shows of a call before it is made: execve
// leaves no arguments behind.
func (t *Task) traceEntry(name string, nr uintptr, args arch.SyscallArguments) string {
	if name == "" {
		name = fmt.Sprintf("syscall_%d", nr)
	}
	kinds, ok := traceArgs[name]
	if !ok {
		kinds = "xxxxxx"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "[%5d] %s(", t.TID(), name)
	for i, kind := range kinds {
		if kind == 'n' {
			continue
		}
		if i > 0 {
			b.WriteString(", ")
		}
		a := args[i]
		switch kind {
		case 'd':
			b.WriteString(strconv.Itoa(int(a.Int())))
		case 'o':
			fmt.Fprintf(&b, "%#o", a.Value)
		case 'g':
			b.WriteString(linux.Signal(a.Int()).String())
		case 's':
			s, err := t.CopyInString(a.Pointer(), 4096)
			if err != nil {
				fmt.Fprintf(&b, "%#x", a.Value)
				break
			}
			b.WriteString(quote(s))
		case 'b':
			buf := make([]byte, min(args[i+1].Value, maxTraceString+1))
			if t.CopyIn(a.Pointer(), buf) != nil {
				fmt.Fprintf(&b, "%#x", a.Value)
			} else {
				b.WriteString(quote(string(buf)))
			}
			fmt.Fprintf(&b, ", %d", args[i+1].Value)
		case 'v':
			b.WriteString(t.traceVector(a))
		default:
			fmt.Fprintf(&b, "%#x", a.Value)
		}
	}
	b.WriteByte(')')
	return b.String()
}

func quote(s string) string {
	if len(s) > maxTraceString {
		return strconv.Quote(s[:maxTraceString]) + "..."
	}
	return strconv.Quote(s)
}

func (t *Task) traceVector(a arch.SyscallArgument) string {
	v, err := t.CopyInVector(a.Pointer())
	if err != nil {
		return fmt.Sprintf("%#x", a.Value)
	}
	more := ""
	if len(v) > 8 {
		v, more = v[:8], ", ..."
	}
	for i := range v {
		v[i] = quote(v[i])
	}
	return "[" + strings.Join(v, ", ") + more + "]"
}

// traceExit writes the line of a call.
func (t *Task) traceExit(entry string, ret uintptr, ctl *SyscallControl, err error) {
	var result string
	r, restart := err.(restartError)
	switch {
	case ctl != nil && ctl.keepRegisters:
		result = "?"
	case restart:
		result = fmt.Sprintf("? (%v, %d)", r, int(r))
	case err != nil:
		errno := errnoOf(err)
		result = fmt.Sprintf("-1 %s (%v)", unix.ErrnoName(errno), errno)
	case ret > 1<<16:
		result = fmt.Sprintf("%#x", ret)
	default:
		result = strconv.Itoa(int(ret))
	}
	k := t.k
	k.traceMu.Lock()
	defer k.traceMu.Unlock()
	fmt.Fprintf(k.cfg.Trace, "%s = %s\n", entry, result)
}

// traceSignal writes a line for a signal that is taken.
func (t *Task) traceSignal(info *linux.SignalInfo) {
	if t.k.cfg.Trace == nil {
		return
	}
	t.k.traceMu.Lock()
	defer t.k.traceMu.Unlock()
	fmt.Fprintf(t.k.cfg.Trace, "[%5d] --- %v ---\n", t.TID(), info)
}
