// Package hostfs shows host files to tasks: directories confined beneath a root,
// and descriptors that the Sentry inherited.
//
// It depends on vfs, memmap and fd. It opens nothing by a name that the host
// would resolve outside a root.
package hostfs

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/vfs"
)

// Poller waits for host descriptors in one goroutine, for a whole Sentry.
type Poller struct{}

// NewPoller returns a Poller.
func NewPoller() (*Poller, error) { return &Poller{}, nil }

// Close ends the goroutine. Files made with p are not notified any more.
func (p *Poller) Close() {}

// NewFile returns a file for the inherited descriptor fd: a terminal, pipe,
// socket, regular file or device. It works on a duplicate of fd, shares its
// offset, and never changes the flags of its open file description.
func NewFile(p *Poller, fd int) (*vfs.FileDescription, error) { return nil, unix.ENOSYS }
