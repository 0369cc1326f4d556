package linux

import "encoding/binary"

// Parts of a file mode (inode(7)).
const (
	S_IFMT   = 0170000
	S_IFSOCK = 0140000
	S_IFLNK  = 0120000
	S_IFREG  = 0100000
	S_IFBLK  = 060000
	S_IFDIR  = 040000
	S_IFCHR  = 020000
	S_IFIFO  = 010000

	S_ISUID = 04000
	S_ISGID = 02000
	S_ISVTX = 01000

	S_IRWXU = 0700
	S_IRUSR = 0400
	S_IWUSR = 0200
	S_IXUSR = 0100
	S_IRWXG = 070
	S_IRGRP = 040
	S_IWGRP = 020
	S_IXGRP = 010
	S_IRWXO = 07
	S_IROTH = 04
	S_IWOTH = 02
	S_IXOTH = 01
)

// Types of directory entries (getdents64(2)).
const (
	DT_UNKNOWN = 0
	DT_FIFO    = 1
	DT_CHR     = 2
	DT_DIR     = 4
	DT_BLK     = 6
	DT_REG     = 8
	DT_LNK     = 10
	DT_SOCK    = 12
	DT_WHT     = 14
)

// Masks and attributes of statx(2).
const (
	STATX_TYPE          = 1
	STATX_MODE          = 2
	STATX_NLINK         = 4
	STATX_UID           = 8
	STATX_GID           = 0x10
	STATX_ATIME         = 0x20
	STATX_MTIME         = 0x40
	STATX_CTIME         = 0x80
	STATX_INO           = 0x100
	STATX_SIZE          = 0x200
	STATX_BLOCKS        = 0x400
	STATX_BASIC_STATS   = 0x7ff
	STATX_BTIME         = 0x800
	STATX_MNT_ID        = 0x1000
	STATX_DIOALIGN      = 0x2000
	STATX_MNT_ID_UNIQUE = 0x4000
	STATX__RESERVED     = 0x80000000

	STATX_ATTR_COMPRESSED = 4
	STATX_ATTR_IMMUTABLE  = 0x10
	STATX_ATTR_APPEND     = 0x20
	STATX_ATTR_NODUMP     = 0x40
	STATX_ATTR_ENCRYPTED  = 0x800
	STATX_ATTR_AUTOMOUNT  = 0x1000
	STATX_ATTR_MOUNT_ROOT = 0x2000
	STATX_ATTR_VERITY     = 0x100000
	STATX_ATTR_DAX        = 0x200000
)

// Flags of statfs(2). ST_VALID says that the others were filled in.
const (
	ST_RDONLY      = 1
	ST_NOSUID      = 2
	ST_NODEV       = 4
	ST_NOEXEC      = 8
	ST_SYNCHRONOUS = 0x10
	ST_VALID       = 0x20
	ST_MANDLOCK    = 0x40
	ST_NOATIME     = 0x400
	ST_NODIRATIME  = 0x800
	ST_RELATIME    = 0x1000
)

// File system types of statfs(2) (linux/magic.h).
const (
	ANON_INODE_FS_MAGIC   = 0x9041934
	DEVPTS_SUPER_MAGIC    = 0x1cd1
	EXT4_SUPER_MAGIC      = 0xef53
	OVERLAYFS_SUPER_MAGIC = 0x794c7630
	PIPEFS_MAGIC          = 0x50495045
	PROC_SUPER_MAGIC      = 0x9fa0
	RAMFS_MAGIC           = 0x858458f6
	SOCKFS_MAGIC          = 0x534f434b
	SYSFS_MAGIC           = 0x62656572
	TMPFS_MAGIC           = 0x1021994
)

// Flags of utimensat(2)'s nanoseconds.
const (
	UTIME_NOW  = 0x3fffffff
	UTIME_OMIT = 0x3ffffffe
)

// StatxTimestamp is struct statx_timestamp.
type StatxTimestamp struct {
	Sec  int64
	Nsec uint32
	_    [4]byte
}

func (s *StatxTimestamp) fields(c *codec) {
	c.i64(&s.Sec)
	c.u32(&s.Nsec)
	c.pad(4)
}

// SizeBytes implements Struct.
func (s *StatxTimestamp) SizeBytes() int { return 16 }

// MarshalBytes implements Struct.
func (s *StatxTimestamp) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *StatxTimestamp) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Statx is struct statx (statx(2)).
type Statx struct {
	Mask           uint32
	Blksize        uint32
	Attributes     uint64
	Nlink          uint32
	UID            uint32
	GID            uint32
	Mode           uint16
	_              [2]byte
	Ino            uint64
	Size           uint64
	Blocks         uint64
	AttributesMask uint64
	Atime          StatxTimestamp
	Btime          StatxTimestamp
	Ctime          StatxTimestamp
	Mtime          StatxTimestamp
	RdevMajor      uint32
	RdevMinor      uint32
	DevMajor       uint32
	DevMinor       uint32
	MntID          uint64
	DioMemAlign    uint32
	DioOffsetAlign uint32
	_              [96]byte
}

func (s *Statx) fields(c *codec) {
	c.u32(&s.Mask)
	c.u32(&s.Blksize)
	c.u64(&s.Attributes)
	c.u32(&s.Nlink)
	c.u32(&s.UID)
	c.u32(&s.GID)
	c.u16(&s.Mode)
	c.pad(2)
	c.u64(&s.Ino)
	c.u64(&s.Size)
	c.u64(&s.Blocks)
	c.u64(&s.AttributesMask)
	s.Atime.fields(c)
	s.Btime.fields(c)
	s.Ctime.fields(c)
	s.Mtime.fields(c)
	c.u32(&s.RdevMajor)
	c.u32(&s.RdevMinor)
	c.u32(&s.DevMajor)
	c.u32(&s.DevMinor)
	c.u64(&s.MntID)
	c.u32(&s.DioMemAlign)
	c.u32(&s.DioOffsetAlign)
	c.pad(96)
}

// SizeBytes implements Struct.
func (s *Statx) SizeBytes() int { return 256 }

// MarshalBytes implements Struct.
func (s *Statx) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Statx) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Statfs is struct statfs (statfs(2)).
type Statfs struct {
	Type    int64
	Bsize   int64
	Blocks  uint64
	Bfree   uint64
	Bavail  uint64
	Files   uint64
	Ffree   uint64
	Fsid    [2]int32
	Namelen int64
	Frsize  int64
	Flags   int64
	_       [32]byte
}

func (s *Statfs) fields(c *codec) {
	c.i64(&s.Type)
	c.i64(&s.Bsize)
	c.u64(&s.Blocks)
	c.u64(&s.Bfree)
	c.u64(&s.Bavail)
	c.u64(&s.Files)
	c.u64(&s.Ffree)
	for i := range s.Fsid {
		c.i32(&s.Fsid[i])
	}
	c.i64(&s.Namelen)
	c.i64(&s.Frsize)
	c.i64(&s.Flags)
	c.pad(32)
}

// SizeBytes implements Struct.
func (s *Statfs) SizeBytes() int { return 120 }

// MarshalBytes implements Struct.
func (s *Statfs) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Statfs) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// MakeDev returns the device number that stat(2) uses (makedev(3)).
func MakeDev(major, minor uint32) uint64 {
	ma, mi := uint64(major), uint64(minor)
	return mi&0xff | ma&0xfff<<8 | mi&^0xff<<12 | ma&^0xfff<<32
}

// DevMajor returns the major number in dev.
func DevMajor(dev uint64) uint32 { return uint32(dev>>8&0xfff | dev>>32&^0xfff) }

// DevMinor returns the minor number in dev.
func DevMinor(dev uint64) uint32 { return uint32(dev&0xff | dev>>12&^0xff) }

// DirentType returns the DT_ value for a file of the given mode.
func DirentType(mode uint32) uint8 { return uint8(mode & S_IFMT >> 12) }

// direntHeader is the size of struct linux_dirent64 before the name.
const direntHeader = 19

// DirentSize returns the size in bytes of the directory entry for name.
func DirentSize(name string) int { return (direntHeader + len(name) + 1 + 7) &^ 7 }

// AppendDirent appends a struct linux_dirent64 (getdents64(2)) to b. off is the
// position from which reading goes on after this entry, typ a DT_ value.
func AppendDirent(b []byte, ino uint64, off int64, typ uint8, name string) []byte {
	size := DirentSize(name)
	b = binary.LittleEndian.AppendUint64(b, ino)
	b = binary.LittleEndian.AppendUint64(b, uint64(off))
	b = binary.LittleEndian.AppendUint16(b, uint16(size))
	b = append(b, typ)
	b = append(b, name...)
	return append(b, make([]byte, size-direntHeader-len(name))...)
}
