package filter

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/bpf"
)

// notification is struct seccomp_notif (linux/seccomp.h).
type notification struct {
	id    uint64
	tid   uint32
	flags uint32
	data  bpf.Data
}

// The number of the request has the size of the struct.
var _ [80]byte = [unsafe.Sizeof(notification{})]byte{}

// receive returns the call that waits on listener. It is ENOENT if that is no
// longer the case.
func receive(listener int) (*violation, error) {
	var n notification // must be zero
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(listener), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n)))
	if errno != 0 {
		return nil, errno
	}
	return &violation{tid: n.tid, data: n.data}, nil
}
