package linux

// Flags of open(2). O_LARGEFILE is the kernel's value: F_GETFL returns it.
const (
	O_ACCMODE  = 3
	O_RDONLY   = 0
	O_WRONLY   = 1
	O_RDWR     = 2
	O_CREAT    = 0x40
	O_EXCL     = 0x80
	O_NOCTTY   = 0x100
	O_TRUNC    = 0x200
	O_APPEND   = 0x400
	O_NONBLOCK = 0x800
	O_DSYNC    = 0x1000
	O_ASYNC    = 0x2000
	O_NOATIME  = 0x40000
	O_CLOEXEC  = 0x80000
	O_SYNC     = 0x101000
	O_PATH     = 0x200000
)

// Special descriptors and flags of the *at calls.
const (
	AT_FDCWD              = -100
	AT_SYMLINK_NOFOLLOW   = 0x100
	AT_REMOVEDIR          = 0x200
	AT_EACCESS            = 0x200
	AT_SYMLINK_FOLLOW     = 0x400
	AT_NO_AUTOMOUNT       = 0x800
	AT_EMPTY_PATH         = 0x1000
	AT_STATX_SYNC_AS_STAT = 0
	AT_STATX_FORCE_SYNC   = 0x2000
	AT_STATX_DONT_SYNC    = 0x4000
	AT_STATX_SYNC_TYPE    = 0x6000
	AT_RECURSIVE          = 0x8000
)

// Resolve flags of openat2(2).
const (
	RESOLVE_NO_XDEV       = 1
	RESOLVE_NO_MAGICLINKS = 2
	RESOLVE_NO_SYMLINKS   = 4
	RESOLVE_BENEATH       = 8
	RESOLVE_IN_ROOT       = 0x10
	RESOLVE_CACHED        = 0x20
)

// Commands of fcntl(2).
const (
	F_DUPFD         = 0
	F_GETFD         = 1
	F_SETFD         = 2
	F_GETFL         = 3
	F_SETFL         = 4
	F_GETLK         = 5
	F_SETLK         = 6
	F_SETLKW        = 7
	F_SETOWN        = 8
	F_GETOWN        = 9
	F_SETSIG        = 10
	F_GETSIG        = 11
	F_SETOWN_EX     = 15
	F_GETOWN_EX     = 16
	F_OFD_GETLK     = 36
	F_OFD_SETLK     = 37
	F_OFD_SETLKW    = 38
	F_SETLEASE      = 1024
	F_GETLEASE      = 1025
	F_NOTIFY        = 1026
	F_DUPFD_QUERY   = 1027
	F_DUPFD_CLOEXEC = 1030
	F_SETPIPE_SZ    = 1031
	F_GETPIPE_SZ    = 1032
	F_ADD_SEALS     = 1033
	F_GET_SEALS     = 1034
	F_GET_RW_HINT   = 1035
	F_SET_RW_HINT   = 1036
)

// Arguments of fcntl(2).
const (
	FD_CLOEXEC = 1

	F_RDLCK = 0
	F_WRLCK = 1
	F_UNLCK = 2

	F_OWNER_TID  = 0
	F_OWNER_PID  = 1
	F_OWNER_PGRP = 2

	F_SEAL_SEAL         = 1
	F_SEAL_SHRINK       = 2
	F_SEAL_GROW         = 4
	F_SEAL_WRITE        = 8
	F_SEAL_FUTURE_WRITE = 0x10
	F_SEAL_EXEC         = 0x20
)

// Modes of access(2).
const (
	F_OK = 0
	X_OK = 1
	W_OK = 2
	R_OK = 4
)

// Operations of flock(2).
const (
	LOCK_SH = 1
	LOCK_EX = 2
	LOCK_NB = 4
	LOCK_UN = 8
)

// Values of lseek(2)'s whence.
const (
	SEEK_SET  = 0
	SEEK_CUR  = 1
	SEEK_END  = 2
	SEEK_DATA = 3
	SEEK_HOLE = 4
)

// Flags of rename(2), fallocate(2), setxattr(2), splice(2), preadv2(2),
// close_range(2), getrandom(2), and advice of posix_fadvise(2).
const (
	RENAME_NOREPLACE = 1
	RENAME_EXCHANGE  = 2
	RENAME_WHITEOUT  = 4

	FALLOC_FL_KEEP_SIZE      = 1
	FALLOC_FL_PUNCH_HOLE     = 2
	FALLOC_FL_COLLAPSE_RANGE = 8
	FALLOC_FL_ZERO_RANGE     = 0x10
	FALLOC_FL_INSERT_RANGE   = 0x20
	FALLOC_FL_UNSHARE_RANGE  = 0x40

	XATTR_CREATE  = 1
	XATTR_REPLACE = 2

	SPLICE_F_MOVE     = 1
	SPLICE_F_NONBLOCK = 2
	SPLICE_F_MORE     = 4
	SPLICE_F_GIFT     = 8

	RWF_HIPRI    = 1
	RWF_DSYNC    = 2
	RWF_SYNC     = 4
	RWF_NOWAIT   = 8
	RWF_APPEND   = 0x10
	RWF_NOAPPEND = 0x20

	CLOSE_RANGE_UNSHARE = 2
	CLOSE_RANGE_CLOEXEC = 4

	GRND_NONBLOCK = 1
	GRND_RANDOM   = 2
	GRND_INSECURE = 4

	POSIX_FADV_NORMAL     = 0
	POSIX_FADV_RANDOM     = 1
	POSIX_FADV_SEQUENTIAL = 2
	POSIX_FADV_WILLNEED   = 3
	POSIX_FADV_DONTNEED   = 4
	POSIX_FADV_NOREUSE    = 5
)

// Limits (linux/limits.h, linux/uio.h).
const (
	PATH_MAX       = 4096
	NAME_MAX       = 255
	UIO_MAXIOV     = 1024
	PIPE_BUF       = 4096
	XATTR_NAME_MAX = 255
	XATTR_SIZE_MAX = 0x10000
)

// Flags of pidfd_open(2), inotify_init1(2), eventfd2(2), timerfd_create(2),
// timerfd_settime(2) and signalfd4(2).
const (
	PIDFD_NONBLOCK = 2048
	PIDFD_THREAD   = 128

	IN_CLOEXEC  = 0x80000
	IN_NONBLOCK = 0x800

	EFD_SEMAPHORE = 1
	EFD_CLOEXEC   = 0x80000
	EFD_NONBLOCK  = 0x800

	TFD_CLOEXEC             = 0x80000
	TFD_NONBLOCK            = 0x800
	TFD_TIMER_ABSTIME       = 1
	TFD_TIMER_CANCEL_ON_SET = 2

	SFD_CLOEXEC  = 0x80000
	SFD_NONBLOCK = 0x800
)

// Flock is struct flock (fcntl(2)).
type Flock struct {
	Type   int16
	Whence int16
	_      [4]byte
	Start  int64
	Len    int64
	PID    int32
	_      [4]byte
}

func (s *Flock) fields(c *codec) {
	c.i16(&s.Type)
	c.i16(&s.Whence)
	c.pad(4)
	c.i64(&s.Start)
	c.i64(&s.Len)
	c.i32(&s.PID)
	c.pad(4)
}

// SizeBytes implements Struct.
func (s *Flock) SizeBytes() int { return 32 }

// MarshalBytes implements Struct.
func (s *Flock) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Flock) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// FOwnerEx is struct f_owner_ex (F_SETOWN_EX).
type FOwnerEx struct {
	Type int32
	PID  int32
}

func (s *FOwnerEx) fields(c *codec) {
	c.i32(&s.Type)
	c.i32(&s.PID)
}

// SizeBytes implements Struct.
func (s *FOwnerEx) SizeBytes() int { return 8 }

// MarshalBytes implements Struct.
func (s *FOwnerEx) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *FOwnerEx) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// OpenHow is struct open_how (openat2(2)).
type OpenHow struct {
	Flags   uint64
	Mode    uint64
	Resolve uint64
}

func (s *OpenHow) fields(c *codec) {
	c.u64(&s.Flags)
	c.u64(&s.Mode)
	c.u64(&s.Resolve)
}

// SizeBytes implements Struct.
func (s *OpenHow) SizeBytes() int { return 24 }

// MarshalBytes implements Struct.
func (s *OpenHow) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *OpenHow) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// IOVec is struct iovec (readv(2)).
type IOVec struct {
	Base uint64
	Len  uint64
}

func (s *IOVec) fields(c *codec) {
	c.u64(&s.Base)
	c.u64(&s.Len)
}

// SizeBytes implements Struct.
func (s *IOVec) SizeBytes() int { return 16 }

// MarshalBytes implements Struct.
func (s *IOVec) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *IOVec) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }
