package syscalls

import "github.com/ringfence/ringfence/pkg/sentry/kernel"

// struct epoll_event has natural alignment on arm64.
const (
	epollEventSize  = 16
	epollDataOffset = 8
)

// pollSyscallsArch is empty: arm64 has the current calls only.
var pollSyscallsArch = []kernel.Syscall{}
