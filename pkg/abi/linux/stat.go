package linux

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
