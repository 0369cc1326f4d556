package vfs

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// SocketBufferSize is how many bytes a Unix socket's receive queue holds:
// Linux's default (net.core.rmem_default).
const SocketBufferSize = 212992

const (
	socketMessages  = 1024
	maxRightsPerMsg = 253 // SCM_MAX_FD
)

// UnixSocket is a socket of AF_UNIX that socketpair(2) made, or one that is not
// connected. There is no other address family, and no name to bind to.
type UnixSocket struct {
	anonFile
	waiter.Queue
	typ int // unix.SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET

	in   *socketQueue // what the peer sends
	out  *socketQueue // the peer's in; nil when not connected
	cred unix.Ucred   // of the peer's creator
}

// socketQueue is one direction of a connection.
type socketQueue struct {
	// reader and writer are the queues of the sockets at the two ends; writer is
	// nil without a peer.
	reader, writer *waiter.Queue

	mu       sync.Mutex
	msgs     []socketMessage
	bytes    int
	noWrites bool // writer shut down or closed
	noReads  bool // reader shut down
	closed   bool // reader closed
}

type socketMessage struct {
	data   []byte
	rights []*FileDescription
}

// NewUnixSocket returns a socket that is not connected.
func NewUnixSocket(typ int, flags uint32) *FileDescription {
	s := newUnixSocket(typ)
	s.in.noWrites = true
	return s.describe(flags)
}

// NewUnixSocketPair returns two connected sockets (socketpair(2)). cred is what
// SO_PEERCRED gives.
func NewUnixSocketPair(typ int, flags uint32, cred unix.Ucred) (a, b *FileDescription) {
	sa, sb := newUnixSocket(typ), newUnixSocket(typ)
	sa.out, sa.in.writer, sa.cred = sb.in, &sb.Queue, cred
	sb.out, sb.in.writer, sb.cred = sa.in, &sa.Queue, cred
	return sa.describe(flags), sb.describe(flags)
}

func newUnixSocket(typ int) *UnixSocket {
	s := &UnixSocket{anonFile: newAnonFile(unix.S_IFSOCK | 0o777), typ: typ}
	s.in = &socketQueue{reader: &s.Queue}
	return s
}

func (s *UnixSocket) describe(flags uint32) *FileDescription {
	return NewFileDescription(s, unix.O_RDWR|flags, func() string { return fmt.Sprintf("socket:[%d]", s.ino) })
}

// Type returns the socket's type, as SO_TYPE gives it.
func (s *UnixSocket) Type() int { return s.typ }

// Connected reports whether the socket has, or had, a peer.
func (s *UnixSocket) Connected() bool { return s.out != nil }

// PeerCred returns what SO_PEERCRED gives.
func (s *UnixSocket) PeerCred() unix.Ucred { return s.cred }

// Send queues p, and rights with it, for the peer. It takes over the references
// on rights if it returns no error. A stream may take a part of p.
func (s *UnixSocket) Send(p []byte, rights []*FileDescription) (int, error) {
	if s.out == nil {
		return 0, unix.ENOTCONN
	}
	if len(rights) > maxRightsPerMsg {
		return 0, unix.EINVAL
	}
	q := s.out
	q.mu.Lock()
	defer func() {
		q.mu.Unlock()
		q.reader.Notify(waiter.ReadableEvents)
	}()
	if q.noWrites || q.noReads {
		return 0, unix.EPIPE
	}
	if q.closed {
		if s.typ == unix.SOCK_DGRAM {
			return 0, unix.ECONNREFUSED
		}
		return 0, unix.EPIPE
	}
	room := SocketBufferSize - q.bytes
	if s.typ != unix.SOCK_STREAM {
		if len(p) > SocketBufferSize {
			return 0, unix.EMSGSIZE
		}
		if len(p) > room || len(q.msgs) >= socketMessages {
			return 0, unix.EAGAIN
		}
	} else {
		if len(p) == 0 {
			return 0, nil
		}
		if room <= 0 || len(q.msgs) >= socketMessages {
			return 0, unix.EAGAIN
		}
		p = p[:min(len(p), room)]
	}
	q.msgs = append(q.msgs, socketMessage{data: append([]byte(nil), p...), rights: rights})
	q.bytes += len(p)
	return len(p), nil
}

// Receive reads from the queue. full is the length of the whole message, which
// is more than n if that was cut. The caller owns the references on rights.
// With peek the data stays in the queue and rights are not returned.
func (s *UnixSocket) Receive(p []byte, peek bool) (n, full int, rights []*FileDescription, err error) {
	q := s.in
	q.mu.Lock()
	defer func() {
		q.mu.Unlock()
		if full > 0 && q.writer != nil {
			q.writer.Notify(waiter.WritableEvents)
		}
	}()
	if len(q.msgs) == 0 {
		if s.out == nil && s.typ != unix.SOCK_DGRAM {
			return 0, 0, nil, unix.EINVAL
		}
		if (q.noWrites && s.typ != unix.SOCK_DGRAM) || q.noReads {
			return 0, 0, nil, nil
		}
		return 0, 0, nil, unix.EAGAIN
	}
	if s.typ != unix.SOCK_STREAM {
		m := q.msgs[0]
		n, full = copy(p, m.data), len(m.data)
		if !peek {
			q.msgs = q.msgs[1:]
			q.bytes -= full
			rights = m.rights
		}
		return n, full, rights, nil
	}
	// A stream joins messages, but rights end a read: those of two sends must
	// not arrive as one.
	for i := 0; i < len(q.msgs) && n < len(p); i++ {
		m := &q.msgs[i]
		if len(m.rights) > 0 && n > 0 {
			break
		}
		k := copy(p[n:], m.data)
		n += k
		hadRights := len(m.rights) > 0
		if !peek {
			rights = append(rights, m.rights...)
			m.rights = nil
			m.data = m.data[k:]
			q.bytes -= k
			if len(m.data) == 0 {
				q.msgs = q.msgs[1:]
				i--
			}
		}
		if hadRights {
			break
		}
	}
	return n, n, rights, nil
}

// Shutdown ends one or both directions (shutdown(2)).
func (s *UnixSocket) Shutdown(how int) error {
	if s.out == nil {
		return unix.ENOTCONN
	}
	switch how {
	case unix.SHUT_RD, unix.SHUT_WR, unix.SHUT_RDWR:
	default:
		return unix.EINVAL
	}
	if how != unix.SHUT_WR {
		s.in.update(func(q *socketQueue) { q.noReads = true })
	}
	if how != unix.SHUT_RD {
		s.out.update(func(q *socketQueue) { q.noWrites = true })
	}
	return nil
}

// update changes q and wakes both sides.
func (q *socketQueue) update(f func(*socketQueue)) {
	q.mu.Lock()
	f(q)
	q.mu.Unlock()
	q.reader.Notify(waiter.ReadableEvents | waiter.EventHUp | waiter.EventRdHUp)
	if q.writer != nil {
		q.writer.Notify(waiter.WritableEvents | waiter.EventHUp)
	}
}

// Stat implements Impl.
func (s *UnixSocket) Stat(context.Context) (unix.Stat_t, error) { return s.stat(), nil }

// Release implements Impl.
func (s *UnixSocket) Release() {
	var dropped []socketMessage
	s.in.update(func(q *socketQueue) {
		q.closed = true
		dropped, q.msgs, q.bytes = q.msgs, nil, 0
	})
	if s.out != nil {
		s.out.update(func(q *socketQueue) { q.noWrites = true })
	}
	for _, m := range dropped {
		for _, f := range m.rights {
			f.DecRef()
		}
	}
}

// Read implements StreamReader.
func (s *UnixSocket) Read(_ context.Context, p []byte) (int, error) {
	n, _, rights, err := s.Receive(p, false)
	for _, f := range rights { // nobody asked for them
		f.DecRef()
	}
	return n, err
}

// Write implements StreamWriter.
func (s *UnixSocket) Write(_ context.Context, p []byte) (int, error) { return s.Send(p, nil) }

// Readiness implements waiter.Waitable.
func (s *UnixSocket) Readiness(mask waiter.EventMask) waiter.EventMask {
	if s.out == nil {
		return (waiter.EventHUp | waiter.WritableEvents) & (mask | waiter.EventHUp)
	}
	var ready waiter.EventMask
	s.in.mu.Lock()
	if len(s.in.msgs) > 0 || s.in.noWrites || s.in.noReads {
		ready |= waiter.ReadableEvents
	}
	if s.in.noWrites || s.in.noReads {
		ready |= waiter.EventRdHUp
	}
	inDone := s.in.noWrites || s.in.noReads
	s.in.mu.Unlock()
	s.out.mu.Lock()
	outDone := s.out.noWrites || s.out.noReads || s.out.closed
	if outDone || (s.out.bytes < SocketBufferSize && len(s.out.msgs) < socketMessages) {
		ready |= waiter.WritableEvents
	}
	s.out.mu.Unlock()
	if inDone && outDone {
		ready |= waiter.EventHUp
	}
	return ready & (mask | waiter.EventErr | waiter.EventHUp)
}

// Ioctl implements Ioctler.
func (s *UnixSocket) Ioctl(ctx context.Context, uio usermem.IO, request uint32, arg uintptr) (uintptr, error) {
	if request != unix.TIOCINQ {
		return 0, unix.ENOTTY
	}
	s.in.mu.Lock()
	n := s.in.bytes
	if s.typ != unix.SOCK_STREAM && len(s.in.msgs) > 0 {
		n = len(s.in.msgs[0].data)
	}
	s.in.mu.Unlock()
	return 0, usermem.CopyUint32Out(ctx, uio, hostarch.Addr(arg), uint32(n), usermem.IOOpts{})
}
