package sysmsg

import (
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Operations of futex(2) (linux/futex.h), on memory that processes share.
const (
	futexWait = 0
	futexWake = 1
)

// FutexWait sleeps while the word at p is v, for timeout at most. It may return
// early; it returns false only when the time is over.
func FutexWait(p *atomic.Uint32, v uint32, timeout time.Duration) bool {
	ts := unix.NsecToTimespec(int64(timeout))
	_, _, errno := unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(p)), futexWait, uintptr(v), uintptr(unsafe.Pointer(&ts)), 0, 0)
	return errno != unix.ETIMEDOUT
}

// FutexWake wakes all that sleep on the word at p. Waking one would not do: the
// application may have threads that sleep on it, too.
func FutexWake(p *atomic.Uint32) {
	const all = 1<<31 - 1
	unix.RawSyscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(p)), futexWake, all, 0, 0, 0)
}
