package syscalls

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/kernel"
)

// sysNewfstatat is the number of newfstatat(2).
const sysNewfstatat = unix.SYS_FSTATAT

// fileSyscallsArch is empty: arm64 has the current calls only.
var fileSyscallsArch = []kernel.Syscall{}
