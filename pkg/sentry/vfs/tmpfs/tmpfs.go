// Package tmpfs is a file system in memory: /tmp, /dev/shm and memfds.
//
// It depends on vfs and filemap. Contents are host memory files of the Sentry's
// own; nothing is ever written to the host's disks.
package tmpfs

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/vfs"
)

// FS is one instance of the file system.
type FS struct {
	dev     uint64
	maxSize int64
	root    *inode

	lastIno atomic.Uint64
	used    atomic.Int64 // bytes of file contents, rounded up to pages
	inodes  atomic.Int64

	// mu protects the tree: entries and link counts of all directories.
	mu sync.RWMutex
}

// New returns an empty file system. dev is its st_dev, mode the permissions of
// its root, owned by the credentials of the Sentry's process; maxSize bounds the
// contents of all files together, in bytes.
func New(dev uint64, mode uint32, maxSize int64) *FS {
	fs := &FS{dev: dev, maxSize: maxSize}
	fs.root = fs.newInode(context.Background(), unix.S_IFDIR|mode)
	fs.root.parent = fs.root
	fs.root.nlink = 2
	return fs
}

// Root returns the root directory.
func (fs *FS) Root() vfs.Directory { return fs.root }

// inode is a file of any type.
type inode struct {
	fs  *FS
	ino uint64

	refs atomic.Int64 // names and users; contents are freed with the last

	// Protected by fs.mu.
	nlink    uint32
	entries  map[string]*entry // of a directory
	order    []*entry          // the same in the order of their offsets; removed ones are nil
	lastOff  int64
	parent   *inode // of a directory
	removed  bool   // a directory that was removed
	linkable bool   // made without a name, but may get one

	target string // of a symbolic link
	pipe   *vfs.Pipe
	locks  vfs.Locks
	data   *contents // of a regular file

	mu                  sync.Mutex // protects what follows
	mode                uint32
	uid, gid            uint32
	atime, mtime, ctime unix.Timespec
	xattrs              map[string][]byte
}

// entry is a name in a directory.
type entry struct {
	name string
	off  int64 // of the entry itself; never reused
	node *inode
}

func now() unix.Timespec {
	t := time.Now()
	return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

// newInode returns an inode with one reference and no name, owned by the task.
func (fs *FS) newInode(ctx context.Context, mode uint32) *inode {
	creds := vfs.CredsFromContext(ctx)
	n := &inode{
		fs: fs, ino: fs.lastIno.Add(1), mode: mode,
		uid: creds.UID, gid: creds.GID,
	}
	n.atime = now()
	n.mtime, n.ctime = n.atime, n.atime
	n.refs.Store(1)
	fs.inodes.Add(1)
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		n.entries = map[string]*entry{}
	case unix.S_IFREG:
		n.data = &contents{n: n}
	case unix.S_IFIFO:
		n.pipe = vfs.NewPipe()
	}
	return n
}

// IncRef implements vfs.Node.
func (n *inode) IncRef() { n.refs.Add(1) }

// DecRef implements vfs.Node.
func (n *inode) DecRef() {
	switch refs := n.refs.Add(-1); {
	case refs == 0:
		n.fs.inodes.Add(-1)
		if n.data != nil {
			n.data.free()
		}
	case refs < 0:
		panic("tmpfs: DecRef without a reference")
	}
}

// Mode implements vfs.Node.
func (n *inode) Mode() uint32 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.mode
}

func (n *inode) isDir() bool { return n.entries != nil }

// Stat implements vfs.Node.
func (n *inode) Stat(context.Context) (unix.Stat_t, error) {
	st := unix.Stat_t{Dev: n.fs.dev, Ino: n.ino, Blksize: 4096}
	n.fs.mu.RLock()
	setNlink(&st, n.nlink)
	entries := len(n.entries)
	n.fs.mu.RUnlock()
	switch {
	case n.isDir():
		st.Size = int64(40 + 20*entries)
	case n.data != nil:
		st.Size, st.Blocks = n.data.size()
	default:
		st.Size = int64(len(n.target))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	st.Mode, st.Uid, st.Gid = n.mode, n.uid, n.gid
	st.Atim, st.Mtim, st.Ctim = n.atime, n.mtime, n.ctime
	return st, nil
}

// touch sets modification and change time.
func (n *inode) touch() {
	n.mu.Lock()
	n.mtime = now()
	n.ctime = n.mtime
	n.mu.Unlock()
}

func (n *inode) touchCtime() {
	n.mu.Lock()
	n.ctime = now()
	n.mu.Unlock()
}

// Readlink implements vfs.Symlink.
func (n *inode) Readlink(context.Context) (string, error) { return n.target, nil }

// SetAttr implements vfs.AttrSetter.
func (n *inode) SetAttr(ctx context.Context, a vfs.SetAttr) error {
	if a.SetSize {
		if n.data == nil {
			return unix.EINVAL
		}
		if err := n.data.truncate(a.Size); err != nil {
			return err
		}
		n.touch()
	}
	creds := vfs.CredsFromContext(ctx)
	n.mu.Lock()
	defer n.mu.Unlock()
	if a.SetUID {
		n.uid = a.UID
	}
	if a.SetGID {
		n.gid = a.GID
	}
	if (a.SetUID || a.SetGID) && n.mode&unix.S_IFMT == unix.S_IFREG {
		n.mode &^= unix.S_ISUID
		if n.mode&0o010 != 0 {
			n.mode &^= unix.S_ISGID
		}
	}
	if a.SetMode {
		n.mode = n.mode&unix.S_IFMT | a.Mode
		if !creds.Override && !creds.InGroup(n.gid) {
			n.mode &^= unix.S_ISGID
		}
	}
	t := now()
	set := func(dst *unix.Timespec, src unix.Timespec) {
		if *dst = src; src.Nsec == unix.UTIME_NOW {
			*dst = t
		}
	}
	if a.SetAtime {
		set(&n.atime, a.Atime)
	}
	if a.SetMtime {
		set(&n.mtime, a.Mtime)
	}
	n.ctime = t
	return nil
}

// Statfs implements vfs.Statfser.
func (n *inode) Statfs(context.Context) (unix.Statfs_t, error) {
	const block = 4096
	free := uint64(max(n.fs.maxSize-n.fs.used.Load(), 0)) / block
	return unix.Statfs_t{
		Type: unix.TMPFS_MAGIC, Bsize: block, Frsize: block, Namelen: 255,
		Blocks: uint64(n.fs.maxSize) / block, Bfree: free, Bavail: free,
		Files: maxInodes, Ffree: uint64(max(maxInodes-n.fs.inodes.Load(), 0)),
	}, nil
}

// maxInodes bounds the files of an FS.
const maxInodes = 1 << 20

// xattr limits (xattr(7)).
const (
	maxXattrName  = 255
	maxXattrTotal = 64 << 10
)

// GetXattr implements vfs.Xattrer.
func (n *inode) GetXattr(_ context.Context, name string, buf []byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	v, ok := n.xattrs[name]
	switch {
	case !ok:
		return 0, unix.ENODATA
	case len(buf) == 0:
		return len(v), nil
	case len(buf) < len(v):
		return 0, unix.ERANGE
	}
	return copy(buf, v), nil
}

// ListXattr implements vfs.Xattrer.
func (n *inode) ListXattr(_ context.Context, buf []byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var list []byte
	for name := range n.xattrs {
		list = append(append(list, name...), 0)
	}
	if len(buf) == 0 {
		return len(list), nil
	}
	if len(buf) < len(list) {
		return 0, unix.ERANGE
	}
	return copy(buf, list), nil
}

func userXattr(name string, n *inode) error {
	if len(name) < len("user.")+1 || name[:5] != "user." {
		return unix.EOPNOTSUPP
	}
	if len(name) > maxXattrName {
		return unix.ERANGE
	}
	if n.data == nil && !n.isDir() {
		return unix.EPERM
	}
	return nil
}

// SetXattr implements vfs.Xattrer.
func (n *inode) SetXattr(_ context.Context, name string, value []byte, flags uint32) error {
	if err := userXattr(name, n); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	_, have := n.xattrs[name]
	switch {
	case have && flags&unix.XATTR_CREATE != 0:
		return unix.EEXIST
	case !have && flags&unix.XATTR_REPLACE != 0:
		return unix.ENODATA
	}
	total := len(value) + len(name)
	for k, v := range n.xattrs {
		if k != name {
			total += len(k) + len(v)
		}
	}
	if total > maxXattrTotal {
		return unix.ENOSPC
	}
	if n.xattrs == nil {
		n.xattrs = map[string][]byte{}
	}
	n.xattrs[name] = append([]byte{}, value...)
	n.ctime = now()
	return nil
}

// RemoveXattr implements vfs.Xattrer.
func (n *inode) RemoveXattr(_ context.Context, name string) error {
	if err := userXattr(name, n); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.xattrs[name]; !ok {
		return unix.ENODATA
	}
	delete(n.xattrs, name)
	n.ctime = now()
	return nil
}
