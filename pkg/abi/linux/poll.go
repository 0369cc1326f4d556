package linux

// Events of poll(2) (asm-generic/poll.h).
const (
	POLLIN     = 1
	POLLPRI    = 2
	POLLOUT    = 4
	POLLERR    = 8
	POLLHUP    = 0x10
	POLLNVAL   = 0x20
	POLLRDNORM = 0x40
	POLLRDBAND = 0x80
	POLLWRNORM = 0x100
	POLLWRBAND = 0x200
	POLLMSG    = 0x400
	POLLREMOVE = 0x1000
	POLLRDHUP  = 0x2000
)

// Events of epoll_ctl(2).
const (
	EPOLLIN        = 1
	EPOLLPRI       = 2
	EPOLLOUT       = 4
	EPOLLERR       = 8
	EPOLLHUP       = 0x10
	EPOLLRDNORM    = 0x40
	EPOLLRDBAND    = 0x80
	EPOLLWRNORM    = 0x100
	EPOLLWRBAND    = 0x200
	EPOLLMSG       = 0x400
	EPOLLRDHUP     = 0x2000
	EPOLLEXCLUSIVE = 0x10000000
	EPOLLWAKEUP    = 0x20000000
	EPOLLONESHOT   = 0x40000000
	EPOLLET        = 0x80000000
)

// Operations of epoll_ctl(2), and the flag of epoll_create1(2).
const (
	EPOLL_CTL_ADD = 1
	EPOLL_CTL_DEL = 2
	EPOLL_CTL_MOD = 3
	EPOLL_CLOEXEC = 0x80000
)

// Events and flags of inotify_add_watch(2).
const (
	IN_ACCESS        = 1
	IN_MODIFY        = 2
	IN_ATTRIB        = 4
	IN_CLOSE_WRITE   = 8
	IN_CLOSE_NOWRITE = 0x10
	IN_OPEN          = 0x20
	IN_MOVED_FROM    = 0x40
	IN_MOVED_TO      = 0x80
	IN_CREATE        = 0x100
	IN_DELETE        = 0x200
	IN_DELETE_SELF   = 0x400
	IN_MOVE_SELF     = 0x800
	IN_UNMOUNT       = 0x2000
	IN_Q_OVERFLOW    = 0x4000
	IN_IGNORED       = 0x8000
	IN_ONLYDIR       = 0x1000000
	IN_DONT_FOLLOW   = 0x2000000
	IN_EXCL_UNLINK   = 0x4000000
	IN_MASK_CREATE   = 0x10000000
	IN_MASK_ADD      = 0x20000000
	IN_ISDIR         = 0x40000000
	IN_ONESHOT       = 0x80000000
)

// FD_SETSIZE is the most descriptors that libc's fd_set holds (select(2)).
const (
	FD_SETSIZE = 1024
)

// PollFD is struct pollfd (poll(2)).
type PollFD struct {
	FD      int32
	Events  int16
	REvents int16
}

func (s *PollFD) fields(c *codec) {
	c.i32(&s.FD)
	c.i16(&s.Events)
	c.i16(&s.REvents)
}

// SizeBytes implements Struct.
func (s *PollFD) SizeBytes() int { return 8 }

// MarshalBytes implements Struct.
func (s *PollFD) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *PollFD) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// InotifyEvent is struct inotify_event (inotify(7)) without the name of Len bytes
// that follows.
type InotifyEvent struct {
	WD     int32
	Mask   uint32
	Cookie uint32
	Len    uint32
}

func (s *InotifyEvent) fields(c *codec) {
	c.i32(&s.WD)
	c.u32(&s.Mask)
	c.u32(&s.Cookie)
	c.u32(&s.Len)
}

// SizeBytes implements Struct.
func (s *InotifyEvent) SizeBytes() int { return 16 }

// MarshalBytes implements Struct.
func (s *InotifyEvent) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *InotifyEvent) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// SignalfdSiginfo is struct signalfd_siginfo (signalfd(2)).
type SignalfdSiginfo struct {
	Signo    uint32
	Errno    int32
	Code     int32
	PID      uint32
	UID      uint32
	FD       int32
	TID      uint32
	Band     uint32
	Overrun  uint32
	TrapNo   uint32
	Status   int32
	Int      int32
	Ptr      uint64
	Utime    uint64
	Stime    uint64
	Addr     uint64
	AddrLSB  uint16
	_        [2]byte
	Syscall  int32
	CallAddr uint64
	Arch     uint32
	_        [28]byte
}

func (s *SignalfdSiginfo) fields(c *codec) {
	c.u32(&s.Signo)
	c.i32(&s.Errno)
	c.i32(&s.Code)
	c.u32(&s.PID)
	c.u32(&s.UID)
	c.i32(&s.FD)
	c.u32(&s.TID)
	c.u32(&s.Band)
	c.u32(&s.Overrun)
	c.u32(&s.TrapNo)
	c.i32(&s.Status)
	c.i32(&s.Int)
	c.u64(&s.Ptr)
	c.u64(&s.Utime)
	c.u64(&s.Stime)
	c.u64(&s.Addr)
	c.u16(&s.AddrLSB)
	c.pad(2)
	c.i32(&s.Syscall)
	c.u64(&s.CallAddr)
	c.u32(&s.Arch)
	c.pad(28)
}

// SizeBytes implements Struct.
func (s *SignalfdSiginfo) SizeBytes() int { return 128 }

// MarshalBytes implements Struct.
func (s *SignalfdSiginfo) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *SignalfdSiginfo) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// SigsetArg is the last argument of pselect6(2): a signal set's address and size.
type SigsetArg struct {
	Addr uint64
	Size uint64
}

func (s *SigsetArg) fields(c *codec) {
	c.u64(&s.Addr)
	c.u64(&s.Size)
}

// SizeBytes implements Struct.
func (s *SigsetArg) SizeBytes() int { return 16 }

// MarshalBytes implements Struct.
func (s *SigsetArg) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *SigsetArg) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }
