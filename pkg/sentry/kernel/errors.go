package kernel

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
)

// restartError is an error that makes a system call be made again, or fail with
// EINTR, depending on the signal that interrupted it. The application never
// sees it. The values are those of include/linux/errno.h.
type restartError int

// Error implements error.
func (restartError) Error() string { return "interrupted by a signal" }

// The restart errors (signal(7), "Interruption of system calls").
const (
	// ERESTARTSYS restarts unless a handler without SA_RESTART runs.
	ERESTARTSYS restartError = 512
	// ERESTARTNOINTR always restarts.
	ERESTARTNOINTR restartError = 513
	// ERESTARTNOHAND restarts unless a handler runs.
	ERESTARTNOHAND restartError = 514
	// ERESTART_RESTARTBLOCK is ERESTARTNOHAND, but restarts with
	// restart_syscall(2), which calls what SetRestartBlock was given.
	ERESTART_RESTARTBLOCK restartError = 516
)

// errnoOf returns the errno that the application sees for err.
func errnoOf(err error) unix.Errno {
	switch e := err.(type) {
	case unix.Errno:
		return e
	case restartError:
		return unix.EINTR
	}
	var errno unix.Errno
	var bus *memmap.BusError
	var segv platform.SegmentationFault
	switch {
	case errors.As(err, &bus), errors.As(err, &segv):
		return unix.EFAULT
	case errors.As(err, &errno):
		return errno
	}
	return unix.EIO
}
