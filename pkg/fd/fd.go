// Package fd owns host file descriptors: it closes them once, on time, and
// never a number that somebody else has got since.
//
// It depends on golang.org/x/sys alone.
package fd

import (
	"fmt"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// FD is an owned host file descriptor. It is closed by Close, or when the FD is
// no longer reachable. Methods are safe for concurrent use, but the number that
// FD returns is only good while nobody calls Close or Release.
type FD struct {
	fd      atomic.Int64
	cleanup runtime.Cleanup
}

// New takes ownership of the open file descriptor fd. A negative fd gives an FD
// that is already closed.
func New(fd int) *FD {
	f := &FD{}
	if fd < 0 {
		f.fd.Store(-1)
		return f
	}
	f.fd.Store(int64(fd))
	f.cleanup = runtime.AddCleanup(f, func(fd int) { unix.Close(fd) }, fd)
	return f
}

// Open opens path with the flags and permission bits of open(2); O_CLOEXEC is
// always added.
func Open(path string, flags int, perm uint32) (*FD, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, perm)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", path, err)
		}
		return New(fd), nil
	}
}

// FD returns the descriptor's number, or -1 when it is closed or released.
func (f *FD) FD() int { return int(f.fd.Load()) }

// Release gives up ownership and returns the number, or -1 when there is none.
// The caller closes it.
func (f *FD) Release() int {
	fd := int(f.fd.Swap(-1))
	if fd >= 0 {
		f.cleanup.Stop()
	}
	return fd
}

// Close closes the descriptor. Closing it again is an error, EBADF.
func (f *FD) Close() error {
	fd := f.Release()
	if fd < 0 {
		return fmt.Errorf("close: file descriptor already closed: %w", unix.EBADF)
	}
	if err := unix.Close(fd); err != nil {
		return fmt.Errorf("close descriptor %d: %w", fd, err)
	}
	return nil
}
