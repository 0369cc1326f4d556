package syscalls

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// socketSyscalls are the calls on sockets. There is no network: socket pairs of
// AF_UNIX work, everything else is refused as by a host without that family.
var socketSyscalls = []kernel.Syscall{
	unix.SYS_SOCKET:      {Name: "socket", Fn: sysSocket},
	unix.SYS_SOCKETPAIR:  {Name: "socketpair", Fn: sysSocketpair},
	unix.SYS_CONNECT:     {Name: "connect", Fn: sysConnect},
	unix.SYS_BIND:        {Name: "bind", Fn: sysBind},
	unix.SYS_LISTEN:      {Name: "listen", Fn: sysListen},
	unix.SYS_ACCEPT:      {Name: "accept", Fn: sysListen},
	unix.SYS_ACCEPT4:     {Name: "accept4", Fn: sysListen},
	unix.SYS_SHUTDOWN:    {Name: "shutdown", Fn: sysShutdown},
	unix.SYS_SENDTO:      {Name: "sendto", Fn: sysSendto},
	unix.SYS_RECVFROM:    {Name: "recvfrom", Fn: sysRecvfrom},
	unix.SYS_SENDMSG:     {Name: "sendmsg", Fn: sysSendmsg},
	unix.SYS_RECVMSG:     {Name: "recvmsg", Fn: sysRecvmsg},
	unix.SYS_GETSOCKOPT:  {Name: "getsockopt", Fn: sysGetsockopt},
	unix.SYS_SETSOCKOPT:  {Name: "setsockopt", Fn: sysSetsockopt},
	unix.SYS_GETSOCKNAME: {Name: "getsockname", Fn: sysGetsockname},
	unix.SYS_GETPEERNAME: {Name: "getpeername", Fn: sysGetsockname},
}

// socketType splits the type argument of socket(2), and checks the protocol.
func socketType(domain int32, arg uint32, protocol int32) (typ int, flags uint32, err error) {
	if domain != unix.AF_UNIX {
		return 0, 0, unix.EAFNOSUPPORT
	}
	flags = arg & (unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK)
	switch typ = int(arg &^ flags); typ {
	case unix.SOCK_STREAM, unix.SOCK_DGRAM, unix.SOCK_SEQPACKET:
	default:
		return 0, 0, unix.ESOCKTNOSUPPORT
	}
	if protocol != 0 && protocol != unix.AF_UNIX {
		return 0, 0, unix.EPROTONOSUPPORT
	}
	return typ, flags, nil
}

func sysSocket(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	typ, flags, err := socketType(args[0].Int(), args[1].Uint(), args[2].Int())
	if err != nil {
		return 0, nil, err
	}
	fd, err := addFD(t, vfs.NewUnixSocket(typ, flags&unix.SOCK_NONBLOCK), flags&unix.SOCK_CLOEXEC != 0)
	return uintptr(fd), nil, err
}

func sysSocketpair(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	typ, flags, err := socketType(args[0].Int(), args[1].Uint(), args[2].Int())
	if err != nil {
		return 0, nil, err
	}
	creds := t.Creds()
	a, b := vfs.NewUnixSocketPair(typ, flags&unix.SOCK_NONBLOCK, unix.Ucred{Pid: t.TGID(), Uid: creds.EUID, Gid: creds.EGID})
	return 0, nil, addFDPair(t, a, b, flags&unix.SOCK_CLOEXEC != 0, args[3].Pointer())
}

// getSocket returns the socket at fd, and its file with a reference.
func getSocket(t *kernel.Task, fd int32) (*vfs.FileDescription, *vfs.UnixSocket, error) {
	file, err := t.GetFile(fd)
	if err != nil {
		return nil, nil, err
	}
	s, ok := file.Impl().(*vfs.UnixSocket)
	if !ok {
		file.DecRef()
		return nil, nil, unix.ENOTSOCK
	}
	return file, s, nil
}

// withSocket runs f on the socket at fd.
func withSocket(t *kernel.Task, fd int32, f func(*vfs.FileDescription, *vfs.UnixSocket) (uintptr, error)) (uintptr, *kernel.SyscallControl, error) {
	file, s, err := getSocket(t, fd)
	if err != nil {
		return 0, nil, err
	}
	defer file.DecRef()
	n, err := f(file, s)
	return n, nil, err
}

// sysConnect finds no one: nothing in the sandbox can listen.
func sysConnect(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return withSocket(t, args[0].Int(), func(_ *vfs.FileDescription, s *vfs.UnixSocket) (uintptr, error) {
		var name [3]byte // family and the first byte of the path
		if args[2].Uint() < uint32(len(name)) {
			return 0, unix.EINVAL
		}
		if err := t.CopyIn(args[1].Pointer(), name[:]); err != nil {
			return 0, err
		}
		switch {
		case usermem.ByteOrder.Uint16(name[:]) != unix.AF_UNIX:
			return 0, unix.EAFNOSUPPORT
		case s.Connected():
			return 0, unix.EISCONN
		case name[2] == 0:
			return 0, unix.ECONNREFUSED // an abstract name
		}
		return 0, unix.ENOENT
	})
}

func sysBind(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return withSocket(t, args[0].Int(), func(*vfs.FileDescription, *vfs.UnixSocket) (uintptr, error) {
		return 0, unix.EACCES
	})
}

// sysListen answers listen(2) and accept(2) on a socket that has no name.
func sysListen(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return withSocket(t, args[0].Int(), func(_ *vfs.FileDescription, s *vfs.UnixSocket) (uintptr, error) {
		if s.Type() == unix.SOCK_DGRAM {
			return 0, unix.EOPNOTSUPP
		}
		return 0, unix.EINVAL
	})
}

func sysShutdown(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return withSocket(t, args[0].Int(), func(_ *vfs.FileDescription, s *vfs.UnixSocket) (uintptr, error) {
		return 0, s.Shutdown(int(args[1].Int()))
	})
}

// send sends p and rights, whose references it takes over. All of a stream is
// sent unless a signal comes.
func send(t *kernel.Task, file *vfs.FileDescription, s *vfs.UnixSocket, p []byte, rights []*vfs.FileDescription, flags uint32) (uintptr, error) {
	done := 0
	nonblock := file.Nonblocking() || flags&unix.MSG_DONTWAIT != 0
	err := untilReady(t, file, waiter.WritableEvents, nonblock, func() error {
		for {
			n, err := s.Send(p[done:], rights)
			if err != nil {
				return err
			}
			rights = nil
			if done += n; done >= len(p) {
				return nil
			}
		}
	})
	for _, f := range rights { // not sent
		f.DecRef()
	}
	if done > 0 {
		return uintptr(done), nil
	}
	if err == unix.EPIPE && flags&unix.MSG_NOSIGNAL == 0 && s.Type() != unix.SOCK_DGRAM {
		t.SendSignal(&linux.SignalInfo{Signo: int32(linux.SIGPIPE), Code: linux.SI_KERNEL})
	}
	return 0, err
}

// maxSocketIO bounds the memory that one call takes.
const maxSocketIO = 1 << 20

func sysSendto(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return withSocket(t, args[0].Int(), func(file *vfs.FileDescription, s *vfs.UnixSocket) (uintptr, error) {
		if args[4].Value != 0 && s.Connected() && s.Type() != unix.SOCK_DGRAM {
			return 0, unix.EISCONN
		}
		p := make([]byte, min(args[2].SizeT(), maxSocketIO))
		if err := t.CopyIn(args[1].Pointer(), p); err != nil {
			return 0, err
		}
		return send(t, file, s, p, nil, args[3].Uint())
	})
}

func sysRecvfrom(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return withSocket(t, args[0].Int(), func(file *vfs.FileDescription, s *vfs.UnixSocket) (uintptr, error) {
		p := make([]byte, min(args[2].SizeT(), maxSocketIO))
		n, full, rights, err := receive(t, file, s, p, args[3].Uint())
		dropRights(rights)
		if err != nil {
			return 0, err
		}
		if err := t.CopyOut(args[1].Pointer(), p[:n]); err != nil {
			return 0, err
		}
		if args[4].Value != 0 && args[5].Value != 0 { // the peer has no name
			if err := usermem.CopyUint32Out(t, t.MM(), args[5].Pointer(), 0, usermem.IOOpts{}); err != nil {
				return 0, err
			}
		}
		if args[3].Uint()&unix.MSG_TRUNC != 0 {
			n = full
		}
		return uintptr(n), nil
	})
}

func dropRights(rights []*vfs.FileDescription) {
	for _, f := range rights {
		f.DecRef()
	}
}

// receive waits for data as flags (MSG_PEEK, MSG_DONTWAIT, MSG_WAITALL) say.
func receive(t *kernel.Task, file *vfs.FileDescription, s *vfs.UnixSocket, p []byte, flags uint32) (n, full int, rights []*vfs.FileDescription, err error) {
	nonblock := file.Nonblocking() || flags&unix.MSG_DONTWAIT != 0
	peek := flags&unix.MSG_PEEK != 0
	all := flags&unix.MSG_WAITALL != 0 && !peek && s.Type() == unix.SOCK_STREAM
	err = untilReady(t, file, waiter.ReadableEvents, nonblock, func() error {
		for {
			m, f, r, err := s.Receive(p[n:], peek)
			n, full, rights = n+m, full+f, append(rights, r...)
			if err != nil {
				return err
			}
			if !all || n == len(p) || m == 0 || len(r) > 0 {
				return nil
			}
		}
	})
	if n > 0 {
		err = nil
	}
	return n, full, rights, err
}

// msghdr is struct msghdr (recvmsg(2)), without the name.
type msghdr struct {
	iov        segments
	control    hostarch.Addr
	controlLen uint64
}

// Offsets in struct msghdr, and its size.
const (
	msgNameLen    = 8
	msgIov        = 16
	msgIovLen     = 24
	msgControl    = 32
	msgControlLen = 40
	msgFlags      = 48
	msghdrSize    = 56
	cmsghdrSize   = 16
	maxControl    = 20480 // net.core.optmem_max
)

func copyInMsghdr(t *kernel.Task, addr hostarch.Addr) (msghdr, error) {
	var buf [msghdrSize]byte
	if err := t.CopyIn(addr, buf[:]); err != nil {
		return msghdr{}, err
	}
	u64 := func(off int) uint64 { return usermem.ByteOrder.Uint64(buf[off:]) }
	if u64(msgIovLen) > linux.UIO_MAXIOV {
		return msghdr{}, unix.EMSGSIZE
	}
	iov, err := copyInVector(t, hostarch.Addr(u64(msgIov)), uint(u64(msgIovLen)))
	return msghdr{iov, hostarch.Addr(u64(msgControl)), u64(msgControlLen)}, err
}

func sysSendmsg(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return withSocket(t, args[0].Int(), func(file *vfs.FileDescription, s *vfs.UnixSocket) (uintptr, error) {
		m, err := copyInMsghdr(t, args[1].Pointer())
		if err != nil {
			return 0, err
		}
		p := make([]byte, min(m.iov.total(), maxSocketIO))
		if _, err := m.iov.copyIn(t, 0, p); err != nil {
			return 0, err
		}
		rights, err := copyInRights(t, m)
		if err != nil {
			return 0, err
		}
		return send(t, file, s, p, rights, args[2].Uint())
	})
}

// copyInRights returns the files that m's SCM_RIGHTS messages name, with
// references.
func copyInRights(t *kernel.Task, m msghdr) (rights []*vfs.FileDescription, err error) {
	if m.control == 0 || m.controlLen == 0 {
		return nil, nil
	}
	if m.controlLen > maxControl {
		return nil, unix.ENOBUFS
	}
	buf := make([]byte, m.controlLen)
	if err := t.CopyIn(m.control, buf); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			dropRights(rights)
			rights = nil
		}
	}()
	for len(buf) >= cmsghdrSize {
		size := usermem.ByteOrder.Uint64(buf)
		level, typ := usermem.ByteOrder.Uint32(buf[8:]), usermem.ByteOrder.Uint32(buf[12:])
		if size < cmsghdrSize || size > uint64(len(buf)) {
			return rights, unix.EINVAL
		}
		if level == unix.SOL_SOCKET && typ == unix.SCM_RIGHTS {
			for d := buf[cmsghdrSize:size]; len(d) >= 4; d = d[4:] {
				f, err := t.GetFile(int32(usermem.ByteOrder.Uint32(d)))
				if err != nil {
					return rights, err
				}
				rights = append(rights, f)
			}
		} else if level != unix.SOL_SOCKET || typ != unix.SCM_CREDENTIALS {
			return rights, unix.EINVAL
		}
		buf = buf[min((size+7)&^7, uint64(len(buf))):]
	}
	return rights, nil
}

func sysRecvmsg(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return withSocket(t, args[0].Int(), func(file *vfs.FileDescription, s *vfs.UnixSocket) (uintptr, error) {
		flags := args[2].Uint()
		m, err := copyInMsghdr(t, args[1].Pointer())
		if err != nil {
			return 0, err
		}
		p := make([]byte, min(m.iov.total(), maxSocketIO))
		n, full, rights, err := receive(t, file, s, p, flags)
		if err != nil {
			dropRights(rights)
			return 0, err
		}
		var outFlags uint32
		if full > n {
			outFlags |= unix.MSG_TRUNC
		}
		control, truncated := installRights(t, rights, m.controlLen, flags&unix.MSG_CMSG_CLOEXEC != 0)
		if truncated {
			outFlags |= unix.MSG_CTRUNC
		}
		if _, err := m.iov.copyOut(t, 0, p[:n]); err != nil {
			return 0, err
		}
		if len(control) > 0 {
			if err := t.CopyOut(m.control, control); err != nil {
				return 0, err
			}
		}
		hdr := args[1].Pointer()
		if err := usermem.CopyUint64Out(t, t.MM(), hdr+msgControlLen, uint64(len(control)), usermem.IOOpts{}); err != nil {
			return 0, err
		}
		if err := usermem.CopyUint32Out(t, t.MM(), hdr+msgFlags, outFlags, usermem.IOOpts{}); err != nil {
			return 0, err
		}
		if err := usermem.CopyUint32Out(t, t.MM(), hdr+msgNameLen, 0, usermem.IOOpts{}); err != nil {
			return 0, err
		}
		if flags&unix.MSG_TRUNC != 0 {
			n = full
		}
		return uintptr(n), nil
	})
}

// installRights gives the task descriptors for rights, whose references it
// takes over, as many as room bytes of control data and the table allow. It
// returns the control message.
func installRights(t *kernel.Task, rights []*vfs.FileDescription, room uint64, cloexec bool) (control []byte, truncated bool) {
	var fds []byte
	for i, f := range rights {
		if cmsghdrSize+uint64(len(fds))+4 > room {
			dropRights(rights[i:])
			truncated = true
			break
		}
		fd, err := addFD(t, f, cloexec)
		if err != nil {
			dropRights(rights[i+1:])
			truncated = true
			break
		}
		fds = usermem.ByteOrder.AppendUint32(fds, uint32(fd))
	}
	if len(fds) == 0 {
		return nil, truncated
	}
	control = usermem.ByteOrder.AppendUint64(control, uint64(cmsghdrSize+len(fds)))
	control = usermem.ByteOrder.AppendUint32(control, unix.SOL_SOCKET)
	control = usermem.ByteOrder.AppendUint32(control, unix.SCM_RIGHTS)
	control = append(control, fds...)
	for len(control)%8 != 0 && uint64(len(control)) < room {
		control = append(control, 0)
	}
	return control, truncated
}

func sysGetsockopt(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return withSocket(t, args[0].Int(), func(_ *vfs.FileDescription, s *vfs.UnixSocket) (uintptr, error) {
		if args[1].Int() != unix.SOL_SOCKET {
			return 0, unix.EOPNOTSUPP
		}
		var val []byte
		add := func(v uint32) { val = usermem.ByteOrder.AppendUint32(val, v) }
		switch args[2].Int() {
		case unix.SO_TYPE:
			add(uint32(s.Type()))
		case unix.SO_DOMAIN:
			add(unix.AF_UNIX)
		case unix.SO_SNDBUF, unix.SO_RCVBUF:
			add(vfs.SocketBufferSize)
		case unix.SO_PEERCRED:
			c := s.PeerCred()
			add(uint32(c.Pid))
			add(c.Uid)
			add(c.Gid)
		case unix.SO_ERROR, unix.SO_PROTOCOL, unix.SO_ACCEPTCONN, unix.SO_PASSCRED, unix.SO_REUSEADDR, unix.SO_KEEPALIVE:
			add(0)
		case unix.SO_LINGER, unix.SO_RCVTIMEO, unix.SO_SNDTIMEO:
			val = make([]byte, 16)
			if args[2].Int() == unix.SO_LINGER {
				val = val[:8]
			}
		default:
			return 0, unix.ENOPROTOOPT
		}
		size, err := usermem.CopyUint32In(t, t.MM(), args[4].Pointer(), usermem.IOOpts{})
		if err != nil {
			return 0, err
		}
		if int32(size) < 0 {
			return 0, unix.EINVAL
		}
		val = val[:min(len(val), int(size))]
		if err := t.CopyOut(args[3].Pointer(), val); err != nil {
			return 0, err
		}
		return 0, usermem.CopyUint32Out(t, t.MM(), args[4].Pointer(), uint32(len(val)), usermem.IOOpts{})
	})
}

// sysSetsockopt takes the options that change nothing here.
func sysSetsockopt(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return withSocket(t, args[0].Int(), func(*vfs.FileDescription, *vfs.UnixSocket) (uintptr, error) {
		if args[1].Int() != unix.SOL_SOCKET {
			return 0, unix.EOPNOTSUPP
		}
		switch args[2].Int() {
		case unix.SO_SNDBUF, unix.SO_RCVBUF, unix.SO_REUSEADDR, unix.SO_KEEPALIVE, unix.SO_LINGER:
			return 0, nil
		}
		return 0, unix.ENOPROTOOPT
	})
}

// sysGetsockname answers getsockname(2) and getpeername(2): the family alone,
// as of a socket without a name.
func sysGetsockname(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return withSocket(t, args[0].Int(), func(*vfs.FileDescription, *vfs.UnixSocket) (uintptr, error) {
		size, err := usermem.CopyUint32In(t, t.MM(), args[2].Pointer(), usermem.IOOpts{})
		if err != nil {
			return 0, err
		}
		if int32(size) < 0 {
			return 0, unix.EINVAL
		}
		name := usermem.ByteOrder.AppendUint16(nil, unix.AF_UNIX)
		if err := t.CopyOut(args[1].Pointer(), name[:min(len(name), int(size))]); err != nil {
			return 0, err
		}
		return 0, usermem.CopyUint32Out(t, t.MM(), args[2].Pointer(), uint32(len(name)), usermem.IOOpts{})
	})
}
