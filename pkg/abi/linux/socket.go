package linux

// Address families, socket types and flags of socket(2).
const (
	AF_UNSPEC  = 0
	AF_UNIX    = 1
	AF_INET    = 2
	AF_INET6   = 10
	AF_NETLINK = 16

	SOCK_STREAM    = 1
	SOCK_DGRAM     = 2
	SOCK_RAW       = 3
	SOCK_SEQPACKET = 5
	SOCK_TYPE_MASK = 15
	SOCK_CLOEXEC   = 0x80000
	SOCK_NONBLOCK  = 0x800
)

// Values of shutdown(2)'s how.
const (
	SHUT_RD   = 0
	SHUT_WR   = 1
	SHUT_RDWR = 2
)

// Levels and options of getsockopt(2).
const (
	SOL_SOCKET     = 1
	SO_DEBUG       = 1
	SO_REUSEADDR   = 2
	SO_TYPE        = 3
	SO_ERROR       = 4
	SO_DONTROUTE   = 5
	SO_BROADCAST   = 6
	SO_SNDBUF      = 7
	SO_RCVBUF      = 8
	SO_KEEPALIVE   = 9
	SO_OOBINLINE   = 10
	SO_LINGER      = 13
	SO_REUSEPORT   = 15
	SO_PASSCRED    = 16
	SO_PEERCRED    = 17
	SO_RCVLOWAT    = 18
	SO_SNDLOWAT    = 19
	SO_RCVTIMEO    = 20
	SO_SNDTIMEO    = 21
	SO_ACCEPTCONN  = 30
	SO_PROTOCOL    = 38
	SO_DOMAIN      = 39
	SO_SNDBUFFORCE = 32
	SO_RCVBUFFORCE = 33
)

// Flags of sendmsg(2) and recvmsg(2).
const (
	MSG_OOB          = 1
	MSG_PEEK         = 2
	MSG_DONTROUTE    = 4
	MSG_CTRUNC       = 8
	MSG_TRUNC        = 0x20
	MSG_DONTWAIT     = 0x40
	MSG_EOR          = 0x80
	MSG_WAITALL      = 0x100
	MSG_NOSIGNAL     = 0x4000
	MSG_MORE         = 0x8000
	MSG_WAITFORONE   = 0x10000
	MSG_CMSG_CLOEXEC = 0x40000000
)

// Ancillary messages of unix(7).
const (
	SCM_RIGHTS      = 1
	SCM_CREDENTIALS = 2
	SCM_MAX_FD      = 253
)

// SOMAXCONN bounds listen(2)'s backlog.
const (
	SOMAXCONN = 4096
)

// SockAddrUnix is struct sockaddr_un (unix(7)).
type SockAddrUnix struct {
	Family uint16
	Path   [108]byte
}

func (s *SockAddrUnix) fields(c *codec) {
	c.u16(&s.Family)
	c.raw(s.Path[:])
}

// SizeBytes implements Struct.
func (s *SockAddrUnix) SizeBytes() int { return 110 }

// MarshalBytes implements Struct.
func (s *SockAddrUnix) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *SockAddrUnix) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Msghdr is struct user_msghdr (sendmsg(2)).
type Msghdr struct {
	Name       uint64
	Namelen    int32
	_          [4]byte
	Iov        uint64
	Iovlen     uint64
	Control    uint64
	Controllen uint64
	Flags      uint32
	_          [4]byte
}

func (s *Msghdr) fields(c *codec) {
	c.u64(&s.Name)
	c.i32(&s.Namelen)
	c.pad(4)
	c.u64(&s.Iov)
	c.u64(&s.Iovlen)
	c.u64(&s.Control)
	c.u64(&s.Controllen)
	c.u32(&s.Flags)
	c.pad(4)
}

// SizeBytes implements Struct.
func (s *Msghdr) SizeBytes() int { return 56 }

// MarshalBytes implements Struct.
func (s *Msghdr) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Msghdr) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Mmsghdr is struct mmsghdr (sendmmsg(2)).
type Mmsghdr struct {
	Hdr Msghdr
	Len uint32
	_   [4]byte
}

func (s *Mmsghdr) fields(c *codec) {
	s.Hdr.fields(c)
	c.u32(&s.Len)
	c.pad(4)
}

// SizeBytes implements Struct.
func (s *Mmsghdr) SizeBytes() int { return 64 }

// MarshalBytes implements Struct.
func (s *Mmsghdr) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Mmsghdr) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Cmsghdr is struct cmsghdr (cmsg(3)).
type Cmsghdr struct {
	Len   uint64
	Level int32
	Type  int32
}

func (s *Cmsghdr) fields(c *codec) {
	c.u64(&s.Len)
	c.i32(&s.Level)
	c.i32(&s.Type)
}

// SizeBytes implements Struct.
func (s *Cmsghdr) SizeBytes() int { return 16 }

// MarshalBytes implements Struct.
func (s *Cmsghdr) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Cmsghdr) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Ucred is struct ucred (unix(7)).
type Ucred struct {
	PID int32
	UID uint32
	GID uint32
}

func (s *Ucred) fields(c *codec) {
	c.i32(&s.PID)
	c.u32(&s.UID)
	c.u32(&s.GID)
}

// SizeBytes implements Struct.
func (s *Ucred) SizeBytes() int { return 12 }

// MarshalBytes implements Struct.
func (s *Ucred) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Ucred) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Linger is struct linger (socket(7)).
type Linger struct {
	OnOff  int32
	Linger int32
}

func (s *Linger) fields(c *codec) {
	c.i32(&s.OnOff)
	c.i32(&s.Linger)
}

// SizeBytes implements Struct.
func (s *Linger) SizeBytes() int { return 8 }

// MarshalBytes implements Struct.
func (s *Linger) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Linger) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }
