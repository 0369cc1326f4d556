// Package hostfs shows host files to tasks: directories confined beneath a root,
// and descriptors that the Sentry inherited.
//
// It depends on abi/linux, vfs, filemap and memmap. It opens nothing by a name that the
// host would resolve outside a root.
package hostfs

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// NewFile returns a file for the inherited descriptor fd: a terminal, pipe,
// socket, regular file or device. It works on a duplicate of fd, shares its
// offset, and never changes the flags of its open file description.
func NewFile(p *Poller, fd int) (*vfs.FileDescription, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("duplicate descriptor %d: %w", fd, err)
	}
	f, err := newFile(p, dup)
	if err != nil {
		unix.Close(dup)
		return nil, fmt.Errorf("use descriptor %d: %w", fd, err)
	}
	return f, nil
}

func newFile(p *Poller, fd int) (*vfs.FileDescription, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return nil, err
	}
	procFD, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /proc/self/fd: %w: mount proc on /proc of the host", err)
	}
	buf := make([]byte, 4096)
	n, err := unix.Readlinkat(procFD, procName(fd), buf)
	name := string(buf[:max(n, 0)])
	if err != nil {
		name = fmt.Sprintf("host:[%d]", st.Ino)
	}
	in := &inherited{p: p, procFD: procFD, fd: fd, st: st, name: name, flags: uint32(flags), nonblock: -1}
	in.refs.inc()
	shown := uint32(flags) & (unix.O_ACCMODE | unix.O_APPEND | unix.O_NONBLOCK | unix.O_PATH)

	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFBLK:
		fs := &FS{writable: true, procFD: procFD}
		fs.inodes.m = map[inodeKey]*inode{}
		node := &node{fs: fs, fd: fd, st: st}
		node.refs.inc()
		r := &regular{node: node, inode: fs.inode(&st), flags: uint32(flags)}
		f := &inheritedFile{regular: r, in: in}
		f.append.Store(flags&unix.O_APPEND != 0)
		return vfs.NewFileDescription(f, shown, in.path), nil
	case unix.S_IFDIR:
		unix.Close(procFD)
		return nil, fmt.Errorf("%w: redirect it to a file", unix.EISDIR)
	case unix.S_IFSOCK:
		in.socket = true
	case unix.S_IFCHR:
		_, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		in.tty = err == nil
	}
	if in.tty || st.Mode&unix.S_IFMT == unix.S_IFIFO {
		// A description of our own has an O_NONBLOCK of our own. Where the host
		// does not let us have it, poll(2) before each call has to do.
		nb, err := unix.Openat(procFD, procName(fd), flags&unix.O_ACCMODE|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		if err == nil {
			in.nonblock = nb
		}
	}
	return vfs.NewFileDescription(&stream{in}, shown, in.path), nil
}

// inherited is a descriptor from outside.
type inherited struct {
	waiter.Queue
	refs

	p      *Poller
	procFD int
	fd     int
	// nonblock is another open file description of the same pipe or terminal, or -1.
	nonblock int
	st       unix.Stat_t
	name     string
	flags    uint32
	socket   bool
	tty      bool

	watchMu sync.Mutex
	watched bool
	watchID int32
}

func (in *inherited) path() string { return in.name }

// allows reports whether the descriptor allows the access mode of flags.
func (in *inherited) allows(flags uint32) bool {
	have, want := in.flags&unix.O_ACCMODE, flags&unix.O_ACCMODE
	return have == unix.O_RDWR || have == want
}

// close gives the descriptors back with the last reference.
func (in *inherited) close() {
	if !in.refs.dec() {
		return
	}
	if in.watched && in.watchID != 0 {
		in.p.unwatch(in.fd, in.watchID)
	}
	if in.nonblock >= 0 {
		unix.Close(in.nonblock)
	}
	unix.Close(in.fd)
	unix.Close(in.procFD)
}

// Stat implements vfs.Impl.
func (in *inherited) Stat(context.Context) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Fstat(in.fd, &st)
	return st, err
}

// poll returns which of the events of poll(2) hold now.
func (in *inherited) poll(events waiter.EventMask) waiter.EventMask {
	fds := []unix.PollFd{{Fd: int32(in.fd), Events: int16(events)}}
	for {
		_, err := unix.Poll(fds, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return waiter.EventErr
		}
		return fromPoll(uint32(uint16(fds[0].Revents)))
	}
}

// Readiness implements waiter.Waitable.
func (in *inherited) Readiness(mask waiter.EventMask) waiter.EventMask {
	return in.poll(mask&waiter.AllEvents) & (mask | waiter.EventErr | waiter.EventHUp)
}

// EventRegister implements waiter.Waitable.
func (in *inherited) EventRegister(e *waiter.Entry) error {
	in.watchMu.Lock()
	defer in.watchMu.Unlock()
	if !in.watched {
		id, err := in.p.watch(in.fd, &in.Queue)
		if err != nil {
			return err
		}
		in.watched, in.watchID = true, id
	}
	return in.Queue.EventRegister(e)
}

// stream is an open terminal, pipe, socket or device from outside.
type stream struct{ *inherited }

// Release implements vfs.Impl.
func (s *stream) Release() { s.close() }

// blocks reports whether a call that needs the event might have to wait.
func (s *stream) blocks(event waiter.EventMask) bool {
	return s.poll(event)&(event|waiter.EventErr|waiter.EventHUp) == 0
}

// Read implements vfs.StreamReader.
func (s *stream) Read(_ context.Context, p []byte) (int, error) {
	switch {
	case s.socket:
		return retry(func() (int, error) {
			n, _, err := unix.Recvfrom(s.fd, p, unix.MSG_DONTWAIT)
			return n, err
		})
	case s.nonblock >= 0:
		return retry(func() (int, error) { return unix.Read(s.nonblock, p) })
	case s.blocks(waiter.EventIn):
		return 0, unix.EAGAIN
	}
	return retry(func() (int, error) { return unix.Read(s.fd, p) })
}

// Write implements vfs.StreamWriter.
func (s *stream) Write(_ context.Context, p []byte) (int, error) {
	switch {
	case s.socket:
		return retry(func() (int, error) {
			return unix.SendmsgN(s.fd, p, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		})
	case s.nonblock >= 0:
		return retry(func() (int, error) { return unix.Write(s.nonblock, p) })
	case s.blocks(waiter.EventOut):
		return 0, unix.EAGAIN
	}
	// A pipe that poll(2) calls writable takes this much (pipe(7)).
	p = p[:min(len(p), 4096)]
	return retry(func() (int, error) { return unix.Write(s.fd, p) })
}

// Reopen implements vfs.Reopener.
func (s *stream) Reopen(flags uint32, path func() string) (*vfs.FileDescription, error) {
	if s.socket {
		return nil, unix.ENXIO
	}
	if !s.allows(flags) {
		return nil, unix.EACCES
	}
	s.refs.inc()
	return vfs.NewFileDescription(&stream{s.inherited}, flags&^(unix.O_TRUNC|unix.O_CREAT|unix.O_EXCL|unix.O_NOCTTY|unix.O_CLOEXEC), path), nil
}

// Ioctl implements vfs.Ioctler. Only the requests here reach the host.
func (s *stream) Ioctl(ctx context.Context, uio usermem.IO, request uint32, arg uintptr) (uintptr, error) {
	addr, opts := hostarch.Addr(arg), usermem.IOOpts{}
	if request == linux.FIONREAD {
		n, err := unix.IoctlGetInt(s.fd, unix.TIOCINQ)
		if err != nil {
			return 0, err
		}
		return 0, usermem.CopyUint32Out(ctx, uio, addr, uint32(n), opts)
	}
	if !s.tty {
		return 0, unix.ENOTTY
	}
	switch request {
	case linux.TCGETS:
		h, err := unix.IoctlGetTermios(s.fd, unix.TCGETS)
		if err != nil {
			return 0, err
		}
		t := linux.Termios{
			InputFlags: h.Iflag, OutputFlags: h.Oflag, ControlFlags: h.Cflag, LocalFlags: h.Lflag, LineDiscipline: h.Line,
			ControlChars: h.Cc,
		}
		return 0, copyOut(ctx, uio, addr, &t)
	case linux.TCSETS, linux.TCSETSW, linux.TCSETSF:
		var t linux.Termios
		if err := copyIn(ctx, uio, addr, &t); err != nil {
			return 0, err
		}
		h, err := unix.IoctlGetTermios(s.fd, unix.TCGETS)
		if err != nil {
			return 0, err
		}
		h.Iflag, h.Oflag, h.Cflag, h.Lflag, h.Line = t.InputFlags, t.OutputFlags, t.ControlFlags, t.LocalFlags, t.LineDiscipline
		h.Cc = t.ControlChars
		return 0, unix.IoctlSetTermios(s.fd, uint(request), h)
	case linux.TIOCGWINSZ:
		h, err := unix.IoctlGetWinsize(s.fd, unix.TIOCGWINSZ)
		if err != nil {
			return 0, err
		}
		return 0, copyOut(ctx, uio, addr, &linux.Winsize{Row: h.Row, Col: h.Col, Xpixel: h.Xpixel, Ypixel: h.Ypixel})
	case linux.TIOCSWINSZ:
		var w linux.Winsize
		if err := copyIn(ctx, uio, addr, &w); err != nil {
			return 0, err
		}
		return 0, unix.IoctlSetWinsize(s.fd, unix.TIOCSWINSZ, &unix.Winsize{Row: w.Row, Col: w.Col, Xpixel: w.Xpixel, Ypixel: w.Ypixel})
	case linux.TCSBRK, linux.TCSBRKP, linux.TCXONC, linux.TCFLSH:
		return 0, unix.IoctlSetInt(s.fd, uint(request), int(int32(arg)))
	case linux.TIOCOUTQ:
		n, err := unix.IoctlGetInt(s.fd, unix.TIOCOUTQ)
		if err != nil {
			return 0, err
		}
		return 0, usermem.CopyUint32Out(ctx, uio, addr, uint32(n), opts)
	case linux.TIOCSTI: // types at the shell outside
		return 0, unix.EPERM
	}
	return 0, unix.ENOTTY
}

// IsTerminal implements vfs.Terminal.
func (s *stream) IsTerminal() bool { return s.tty }

func copyOut(ctx context.Context, uio usermem.IO, addr hostarch.Addr, s linux.Struct) error {
	buf := make([]byte, s.SizeBytes())
	s.MarshalBytes(buf)
	_, err := uio.CopyOut(ctx, addr, buf, usermem.IOOpts{})
	return err
}

func copyIn(ctx context.Context, uio usermem.IO, addr hostarch.Addr, s linux.Struct) error {
	buf := make([]byte, s.SizeBytes())
	if _, err := uio.CopyIn(ctx, addr, buf, usermem.IOOpts{}); err != nil {
		return err
	}
	s.UnmarshalBytes(buf)
	return nil
}

// inheritedFile is a regular file from outside. The offset is that of the open
// file description, which others go on using.
type inheritedFile struct {
	*regular
	in     *inherited
	append atomic.Bool
}

// Release implements vfs.Impl.
func (f *inheritedFile) Release() {
	f.regular.Release()
	f.in.close()
}

// Read implements vfs.StreamReader.
func (f *inheritedFile) Read(_ context.Context, p []byte) (int, error) {
	return retry(func() (int, error) { return unix.Read(f.fd, p) })
}

// Write implements vfs.StreamWriter.
func (f *inheritedFile) Write(_ context.Context, p []byte) (int, error) {
	if f.append.Load() && f.in.flags&unix.O_APPEND == 0 {
		if _, err := unix.Seek(f.fd, 0, io.SeekEnd); err != nil {
			return 0, err
		}
	}
	return retry(func() (int, error) { return unix.Write(f.fd, p) })
}

// Seek implements vfs.Seeker.
func (f *inheritedFile) Seek(_ context.Context, _, off int64, whence int) (int64, error) {
	return unix.Seek(f.fd, off, whence)
}

// SetStatusFlags implements vfs.FlagSetter. Those of the host stay as they are.
func (f *inheritedFile) SetStatusFlags(flags uint32) error {
	f.append.Store(flags&unix.O_APPEND != 0)
	return nil
}

// ConfigureMMap implements vfs.MMapper.
func (f *inheritedFile) ConfigureMMap(_ context.Context, opts *memmap.MMapOpts) error {
	if err := f.inode.AddFD(f.fd, f.flags&unix.O_ACCMODE == unix.O_RDWR, f.in.name); err != nil {
		return err
	}
	opts.Mappable, opts.MappingIdentity = f.inode.Object, f.inode.Object
	return nil
}

// Reopen implements vfs.Reopener: a description with an offset of its own, and
// no more access than the one that was inherited.
func (f *inheritedFile) Reopen(flags uint32, path func() string) (*vfs.FileDescription, error) {
	if !f.in.allows(flags) || (flags&unix.O_TRUNC != 0 && f.in.flags&unix.O_ACCMODE == unix.O_RDONLY) {
		return nil, unix.EACCES
	}
	fd, err := unix.Openat(f.in.procFD, procName(f.fd), int(flags&openFlags)|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	file, err := newFile(f.in.p, fd)
	if err != nil {
		unix.Close(fd)
	}
	return file, err
}
