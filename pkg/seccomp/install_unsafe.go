package seccomp

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/bpf"
)

// bpf.Instruction is laid out like struct sock_filter.
var (
	_ [unsafe.Sizeof(unix.SockFilter{})]byte     = [unsafe.Sizeof(bpf.Instruction{})]byte{}
	_ [unsafe.Offsetof(unix.SockFilter{}.K)]byte = [unsafe.Offsetof(bpf.Instruction{}.K)]byte{}
)

// setFilter is seccomp(SECCOMP_SET_MODE_FILTER, flags, p), with a null pointer
// if p is nil. p has no more than bpf.MaxInstructions instructions.
func setFilter(p bpf.Program, flags uintptr) (int, unix.Errno) {
	var arg unsafe.Pointer
	if p != nil {
		arg = unsafe.Pointer(&unix.SockFprog{
			Len:    uint16(len(p)),
			Filter: (*unix.SockFilter)(unsafe.Pointer(&p[0])),
		})
	}
	// Syscall and not RawSyscall: with TSYNC the kernel waits for no one, but
	// copying and translating a long filter takes a while.
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(arg))
	runtime.KeepAlive(p)
	return int(r), errno
}

// actionAvailable is seccomp(SECCOMP_GET_ACTION_AVAIL, 0, &a).
func actionAvailable(a Action) unix.Errno {
	value := uint32(a)
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&value)))
	return errno
}
