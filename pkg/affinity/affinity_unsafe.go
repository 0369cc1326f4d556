package affinity

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// CurrentCPU returns the number of the CPU that the caller runs on.
func CurrentCPU() (int, error) {
	var cpu uint32
	_, _, errno := unix.RawSyscall(unix.SYS_GETCPU, uintptr(unsafe.Pointer(&cpu)), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(cpu), nil
}
