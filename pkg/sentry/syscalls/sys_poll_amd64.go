package syscalls

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// struct epoll_event is packed on amd64 (linux/eventpoll.h).
const (
	epollEventSize  = 12
	epollDataOffset = 4
)

// pollSyscallsArch are the older calls that amd64 still has.
var pollSyscallsArch = []kernel.Syscall{
	unix.SYS_PIPE:         {Name: "pipe", Fn: sysPipe},
	unix.SYS_EVENTFD:      {Name: "eventfd", Fn: sysEventfd},
	unix.SYS_POLL:         {Name: "poll", Fn: sysPoll},
	unix.SYS_SELECT:       {Name: "select", Fn: sysSelect},
	unix.SYS_EPOLL_CREATE: {Name: "epoll_create", Fn: sysEpollCreate},
	unix.SYS_EPOLL_WAIT:   {Name: "epoll_wait", Fn: sysEpollWait},
}

func sysPipe(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, pipe(t, args[0].Pointer(), 0)
}

func sysEventfd(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return eventfd(t, args[0].Uint(), 0)
}

func sysPoll(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	n, err := pollAt(t, args[0].Pointer(), args[1].SizeT(), millis(args[2].Int()))
	return n, nil, noHandRestart(err)
}

func sysSelect(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	timeout, tv := forever, args[4].Pointer()
	if tv != 0 {
		var buf [16]byte // struct timeval
		if err := t.CopyIn(tv, buf[:]); err != nil {
			return 0, nil, err
		}
		sec, usec := int64(usermem.ByteOrder.Uint64(buf[0:])), int64(usermem.ByteOrder.Uint64(buf[8:]))
		if sec < 0 || usec < 0 {
			return 0, nil, unix.EINVAL
		}
		timeout = maxDuration
		if sec < 1<<32 && usec < 1<<52 {
			timeout = time.Duration(sec)*time.Second + time.Duration(usec)*time.Microsecond
		}
	}
	start := time.Now()
	addrs := [3]hostarch.Addr{args[1].Pointer(), args[2].Pointer(), args[3].Pointer()}
	n, err := selectAt(t, args[0].Int(), addrs, timeout)
	if tv != 0 && timeout > 0 {
		left := max(timeout-time.Since(start), 0)
		var buf [16]byte
		usermem.ByteOrder.PutUint64(buf[0:], uint64(left/time.Second))
		usermem.ByteOrder.PutUint64(buf[8:], uint64(left%time.Second/time.Microsecond))
		t.CopyOut(tv, buf[:])
	}
	return n, nil, noHandRestart(err)
}

func sysEpollCreate(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	if args[0].Int() <= 0 {
		return 0, nil, unix.EINVAL
	}
	return epollCreate(t, 0)
}

func sysEpollWait(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	n, err := epollWait(t, args[0].Int(), args[1].Pointer(), args[2].Int(), millis(args[3].Int()))
	return n, nil, err
}
