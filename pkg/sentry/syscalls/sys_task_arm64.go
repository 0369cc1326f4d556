package syscalls

import "github.com/ringfence/ringfence/pkg/sentry/kernel"

// Where clone(2) takes its last two arguments: CONFIG_CLONE_BACKWARDS.
const (
	cloneChildTID = 4
	cloneTLS      = 3
)

// taskSyscallsArch is empty: arm64 has the current calls only.
var taskSyscallsArch = []kernel.Syscall{}
