package vfs

import (
	"context"
	"io"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/waiter"
)

// pathOnly is a file opened with O_PATH: a place and nothing else.
type pathOnly struct {
	waiter.AlwaysReady
	d *Dentry
}

// Stat implements Impl.
func (p pathOnly) Stat(ctx context.Context) (unix.Stat_t, error) { return p.d.node.Stat(ctx) }

// Release implements Impl. The Dentry belongs to the FileDescription.
func (pathOnly) Release() {}

// readFullAt reads len(p) bytes at off, or up to the end: then io.EOF.
func readFullAt(ctx context.Context, f *FileDescription, p []byte, off int64) (int, error) {
	n := 0
	for n < len(p) {
		m, err := f.PRead(ctx, p[n:], off+int64(n))
		n += m
		if err != nil {
			return n, err
		}
		if m == 0 {
			return n, io.EOF
		}
	}
	return n, nil
}

// fileNode is an open file without a place, as /proc/PID/fd leads to it.
type fileNode struct {
	file *FileDescription
	mode uint32
}

// FileDentry returns a Dentry that leads to the open file itself: its place if
// it has one. It belongs to the caller.
func FileDentry(ctx context.Context, f *FileDescription) (*Dentry, error) {
	if f.dentry != nil {
		return f.dentry.Clone(), nil
	}
	st, err := f.Stat(ctx)
	if err != nil {
		return nil, err
	}
	f.IncRef()
	return &Dentry{node: &fileNode{f, st.Mode}, path: f.Path()}, nil
}

// IncRef implements Node.
func (n *fileNode) IncRef() { n.file.IncRef() }

// DecRef implements Node.
func (n *fileNode) DecRef() { n.file.DecRef() }

// Mode implements Node.
func (n *fileNode) Mode() uint32 { return n.mode }

// Stat implements Node.
func (n *fileNode) Stat(ctx context.Context) (unix.Stat_t, error) { return n.file.Stat(ctx) }

// Open implements Node: it opens the same pipe or terminal again.
func (n *fileNode) Open(_ context.Context, d *Dentry, flags uint32) (*FileDescription, error) {
	if r, ok := n.file.impl.(Reopener); ok {
		file, err := r.Reopen(flags, n.file.path)
		if err == nil {
			d.Drop()
		}
		return file, err
	}
	return nil, unix.ENXIO
}

// Reopener is implemented by files without a place that open(2) of
// /proc/PID/fd/N opens anew.
type Reopener interface {
	Reopen(flags uint32, path func() string) (*FileDescription, error)
}

// Reopen implements Reopener. Unlike that of a FIFO, opening a pipe never waits
// for the other end.
func (e *pipeEnd) Reopen(flags uint32, path func() string) (*FileDescription, error) {
	return e.p.Open(statusFlags(flags), path), nil
}

// fifoWait is what open(2) of a FIFO waits for.
type fifoWait struct {
	pipe   *Pipe
	before uint64 // peers opened until now
}

// OpenFIFO opens an end of the FIFO d as open(2) does: see FIFOWait. d belongs to
// the description if there is no error.
func OpenFIFO(p *Pipe, flags uint32, d *Dentry) (*FileDescription, error) {
	before, open := p.PeerCount(flags)
	if !open && flags&(unix.O_ACCMODE|unix.O_NONBLOCK) == unix.O_WRONLY|unix.O_NONBLOCK {
		return nil, unix.ENXIO
	}
	f := p.Open(statusFlags(flags), d.String)
	f.dentry = d.use()
	if !open && flags&unix.O_ACCMODE != unix.O_RDWR && flags&unix.O_NONBLOCK == 0 {
		f.fifo = &fifoWait{p, before}
	}
	return f, nil
}

// FIFOWait waits until the other end of a FIFO that was just opened is open too
// (fifo(7)). block waits for the channel and returns an error if it was
// interrupted. For other files it returns nil at once.
func (f *FileDescription) FIFOWait(block func(ready <-chan struct{}) error) error {
	w := f.fifo
	if w == nil {
		return nil
	}
	e, c := waiter.NewChannelEntry(0)
	w.pipe.RegisterOpen(e)
	defer w.pipe.UnregisterOpen(e)
	for {
		if n, open := w.pipe.PeerCount(f.StatusFlags()); open || n != w.before {
			return nil
		}
		if err := block(c); err != nil {
			return err
		}
	}
}
