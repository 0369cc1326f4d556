package seccomp

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Action is what happens to a system call: a SECCOMP_RET_* value with its
// data, see seccomp(2). The zero Action kills the thread.
type Action uint32

// Actions without data.
const (
	// KillProcess ends the process as if by SIGSYS.
	KillProcess Action = unix.SECCOMP_RET_KILL_PROCESS
	// KillThread ends the calling thread as if by SIGSYS.
	KillThread Action = unix.SECCOMP_RET_KILL_THREAD
	// UserNotif asks the process that holds the listener (InstallListener);
	// ENOSYS if there is none.
	UserNotif Action = unix.SECCOMP_RET_USER_NOTIF
	// Log lets the call through and writes it to the audit log.
	Log Action = unix.SECCOMP_RET_LOG
	// Allow lets the call through.
	Allow Action = unix.SECCOMP_RET_ALLOW
)

// Errno returns the action that fails the call with errno, at most 4095 (the
// kernel takes what is above for that).
func Errno(errno unix.Errno) Action {
	return unix.SECCOMP_RET_ERRNO | Action(errno)&unix.SECCOMP_RET_DATA
}

// Trap returns the action that sends the thread SIGSYS, with data in si_errno.
func Trap(data uint16) Action { return unix.SECCOMP_RET_TRAP | Action(data) }

// Trace returns the action that tells the ptrace tracer, which gets data from
// PTRACE_GETEVENTMSG. The call fails with ENOSYS if there is no tracer.
func Trace(data uint16) Action { return unix.SECCOMP_RET_TRACE | Action(data) }

// kind returns a without its data.
func (a Action) kind() Action { return a & unix.SECCOMP_RET_ACTION_FULL }

// Data returns the data of a: the errno of Errno, the argument of Trap and
// Trace.
func (a Action) Data() uint16 { return uint16(a & unix.SECCOMP_RET_DATA) }

// String implements fmt.Stringer.
func (a Action) String() string {
	name := ""
	switch a.kind() {
	case KillProcess:
		name = "kill process"
	case KillThread:
		name = "kill thread"
	case UserNotif:
		name = "user notification"
	case Log:
		name = "log"
	case Allow:
		name = "allow"
	case unix.SECCOMP_RET_TRAP:
		name = "trap"
	case unix.SECCOMP_RET_TRACE:
		name = "trace"
	case unix.SECCOMP_RET_ERRNO:
		if e := unix.ErrnoName(unix.Errno(a.Data())); e != "" {
			return "errno " + e
		}
		return fmt.Sprintf("errno %d", a.Data())
	default:
		return fmt.Sprintf("action %#x", uint32(a))
	}
	if a.Data() != 0 {
		return fmt.Sprintf("%s %d", name, a.Data())
	}
	return name
}
