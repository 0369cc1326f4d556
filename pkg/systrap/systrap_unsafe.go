package systrap

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// word32 returns the word at off of shared memory. off is a multiple of 4.
func word32(b []byte, off int) *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&b[off : off+4][0]))
}

// waitInfo is as much of siginfo_t as waitid(2) fills in.
type waitInfo struct {
	signo, errno, code int32
	_                  int32
	pid, uid, status   int32
	_                  [100]byte
}

// waitFor is waitid(2) for the child pid, which does not wait, and leaves it to be reaped.
// what is WEXITED or WSTOPPED; a pid of 0 in the result says that it has not.
func waitFor(pid int, what uintptr) (info waitInfo, errno unix.Errno) {
	_, _, errno = unix.RawSyscall6(unix.SYS_WAITID, unix.P_PID, uintptr(pid), uintptr(unsafe.Pointer(&info)),
		what|unix.WNOHANG|unix.WNOWAIT|unix.WALL, 0, 0)
	return info, errno
}

// hasEnded reports whether the child pid, which was not reaped, has ended, with a
// status as wait4(2) has it.
func hasEnded(pid int) (ended bool, status unix.WaitStatus) {
	info, errno := waitFor(pid, unix.WEXITED)
	if errno != 0 {
		return true, 0 // There is no such child.
	}
	const cldExited = 1 // CLD_EXITED (asm-generic/siginfo.h)
	if info.code == cldExited {
		return info.pid != 0, unix.WaitStatus(info.status << 8)
	}
	return info.pid != 0, unix.WaitStatus(info.status)
}

// isStopped reports whether the child pid was stopped by a signal.
func isStopped(pid int) bool {
	info, errno := waitFor(pid, unix.WSTOPPED)
	return errno == 0 && info.pid != 0
}
