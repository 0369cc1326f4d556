package hostfs

import (
	"context"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/vfs"
)

// resolveFlags confine every lookup by name.
const resolveFlags = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS

// maxTries bounds how often a call is repeated that the host wants repeated.
const maxTries = 64

// node is a host file. It implements vfs.Node and, depending on its type, can do
// what the other interfaces say.
type node struct {
	fs *FS
	refs
	fd int // O_PATH, or open for more; -1 if the node is only good for Stat
	st unix.Stat_t
}

// newNode returns the node of fd, which it takes over.
func (fs *FS) newNode(fd int) (*node, error) {
	n := &node{fs: fs, fd: fd}
	n.refs.inc()
	err := unix.Fstat(fd, &n.st)
	if err == nil {
		err = n.allowed(func() (int, func(), error) { return fd, func() {}, nil })
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return n, nil
}

// allowed returns EACCES if the file system of n must not be shown.
func (n *node) allowed(open func() (int, func(), error)) error {
	d, err := n.fs.device(&n.st, open)
	if err == nil && d.denied {
		err = unix.EACCES
	}
	return err
}

// openat2 opens rel beneath n.
func (n *node) openat2(rel string, flags uint64, mode uint32) (int, error) {
	how := unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Mode:    uint64(mode),
		Resolve: resolveFlags,
	}
	for try := 0; ; try++ {
		fd, err := unix.Openat2(n.fd, rel, &how)
		if (err == unix.EAGAIN || err == unix.EINTR) && try < maxTries {
			continue
		}
		return fd, err
	}
}

func (n *node) isDir() bool { return n.st.Mode&unix.S_IFMT == unix.S_IFDIR }

// IncRef implements vfs.Node.
func (n *node) IncRef() { n.refs.inc() }

// DecRef implements vfs.Node.
func (n *node) DecRef() {
	if n.refs.dec() && n.fd >= 0 {
		unix.Close(n.fd)
	}
}

// Mode implements vfs.Node.
func (n *node) Mode() uint32 { return n.st.Mode }

// LookupStat returns the attributes that the lookup read.
func (n *node) LookupStat() unix.Stat_t { return n.st }

// Stat implements vfs.Node.
func (n *node) Stat(context.Context) (unix.Stat_t, error) {
	if n.fd < 0 {
		return n.st, nil
	}
	var st unix.Stat_t
	err := unix.Fstat(n.fd, &st)
	return st, err
}

// Walk implements vfs.Directory.
func (n *node) Walk(_ context.Context, rel string, statOnly bool) (vfs.Node, int, error) {
	if !n.isDir() {
		return nil, 0, unix.ENOTDIR
	}
	if statOnly && strings.IndexByte(rel, '/') < 0 {
		s, err := n.statChild(rel)
		if err != nil {
			return nil, 0, err
		}
		if s != nil {
			return s, len(rel), nil
		}
	}
	if n == n.fs.root {
		if link, ok := n.fs.linkIn(rel); ok {
			c, err := n.open(link)
			if err == nil {
				if c.st.Mode&unix.S_IFMT == unix.S_IFLNK {
					return c, len(link), nil
				}
				c.DecRef()
			}
			n.fs.noteLink(link, false)
		}
	}
	c, err := n.open(rel)
	switch {
	case err == nil:
		return c, len(rel), nil
	case err != unix.ELOOP || strings.IndexByte(rel, '/') < 0:
		return nil, 0, err
	}
	return n.walkToLink(rel)
}

// open looks up rel, which is not followed if it is a symbolic link.
func (n *node) open(rel string) (*node, error) {
	fd, err := n.openat2(rel, unix.O_PATH, 0)
	if err != nil {
		return nil, err
	}
	return n.fs.newNode(fd)
}

// statChild returns a node for name that is good for Stat alone, or nil if it is
// a symbolic link.
func (n *node) statChild(name string) (*node, error) {
	c := &node{fs: n.fs, fd: -1}
	c.refs.inc()
	err := unix.Fstatat(n.fd, name, &c.st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT)
	if err != nil {
		return nil, err
	}
	if c.st.Mode&unix.S_IFMT == unix.S_IFLNK {
		return nil, nil
	}
	err = c.allowed(func() (int, func(), error) {
		fd, err := n.openat2(name, unix.O_PATH, 0)
		return fd, func() { unix.Close(fd) }, err
	})
	return c, err
}

// walkToLink goes along rel name by name, up to a symbolic link.
func (n *node) walkToLink(rel string) (vfs.Node, int, error) {
	cur := n
	cur.IncRef()
	for start := 0; ; {
		end := len(rel)
		if i := strings.IndexByte(rel[start:], '/'); i >= 0 {
			end = start + i
		}
		next, err := cur.open(rel[start:end])
		cur.DecRef()
		if err != nil {
			return nil, 0, err
		}
		switch {
		case next.st.Mode&unix.S_IFMT == unix.S_IFLNK:
			if n == n.fs.root {
				n.fs.noteLink(rel[:end], true)
			}
			return next, end, nil
		case end == len(rel): // the link is gone meanwhile
			return next, end, nil
		case !next.isDir():
			next.DecRef()
			return nil, 0, unix.ENOTDIR
		}
		cur, start = next, end+1
	}
}

// Readlink implements vfs.Symlink.
func (n *node) Readlink(context.Context) (string, error) {
	buf := make([]byte, 4096)
	l, err := unix.Readlinkat(n.fd, "", buf)
	if err != nil {
		return "", err
	}
	return string(buf[:l]), nil
}

// HostAccess asks the host whether the Sentry's process may access the file.
func (n *node) HostAccess(mode uint32) error {
	return unix.Faccessat(n.fs.procFD, procName(n.fd), mode, unix.AT_EACCESS)
}

// openFlags are the flags of open(2) that reach the host. O_DIRECT does not: it
// asks for an alignment of buffers, and ours are not the application's.
const openFlags = unix.O_ACCMODE | unix.O_APPEND | unix.O_TRUNC | unix.O_NOATIME | unix.O_DSYNC | unix.O_SYNC

// Open implements vfs.Node.
func (n *node) Open(_ context.Context, d *vfs.Dentry, flags uint32) (*vfs.FileDescription, error) {
	hostFlags := int(flags & openFlags)
	if !n.fs.writable {
		hostFlags &^= unix.O_TRUNC | unix.O_ACCMODE // never, whoever forgot to check
		if flags&unix.O_ACCMODE != unix.O_RDONLY || flags&unix.O_TRUNC != 0 {
			return nil, unix.EROFS
		}
	}
	switch n.st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		hostFlags |= unix.O_NONBLOCK // for what waits although it is a regular file, as in tracefs
	case unix.S_IFDIR:
		hostFlags = unix.O_RDONLY | unix.O_DIRECTORY
	case unix.S_IFLNK:
		return nil, unix.ELOOP
	case unix.S_IFIFO, unix.S_IFSOCK:
		return nil, unix.ENXIO // its other end is not in the sandbox
	default:
		return nil, unix.EACCES // as on a mount with nodev
	}
	fd, err := n.fs.reopen(n.fd, hostFlags)
	if err != nil {
		return nil, err
	}
	file := &node{fs: n.fs, fd: fd, st: n.st} // the same inode, so nothing is to be checked again
	file.refs.inc()
	return file.newFile(d, flags), nil
}

// newFile returns n, which is open for more than O_PATH, as a file that was
// opened at d. Both belong to it.
func (n *node) newFile(d *vfs.Dentry, flags uint32) *vfs.FileDescription {
	d.SetNode(n)
	if n.isDir() {
		return vfs.NewFileAt(&directory{node: n, d: d}, flags, d)
	}
	return vfs.NewFileAt(&regular{node: n, d: d, inode: n.fs.inode(&n.st), flags: flags}, flags, d)
}

// SetAttr implements vfs.AttrSetter.
func (n *node) SetAttr(_ context.Context, a vfs.SetAttr) error {
	if !n.fs.writable {
		return unix.EROFS
	}
	name := procName(n.fd)
	if a.SetSize {
		fd, err := n.fs.reopen(n.fd, unix.O_WRONLY|unix.O_NONBLOCK)
		if err != nil {
			return err
		}
		err = unix.Ftruncate(fd, a.Size)
		unix.Close(fd)
		if err != nil {
			return err
		}
	}
	if a.SetUID || a.SetGID {
		uid, gid := -1, -1
		if a.SetUID {
			uid = int(a.UID)
		}
		if a.SetGID {
			gid = int(a.GID)
		}
		if err := unix.Fchownat(n.fs.procFD, name, uid, gid, 0); err != nil {
			return err
		}
	}
	if a.SetMode {
		if err := unix.Fchmodat(n.fs.procFD, name, a.Mode, 0); err != nil {
			return err
		}
	}
	if a.SetAtime || a.SetMtime {
		times := []unix.Timespec{a.Atime, a.Mtime}
		if !a.SetAtime {
			times[0].Nsec = unix.UTIME_OMIT
		}
		if !a.SetMtime {
			times[1].Nsec = unix.UTIME_OMIT
		}
		return unix.UtimesNanoAt(n.fs.procFD, name, times, 0)
	}
	return nil
}

// Statfs implements vfs.Statfser.
func (n *node) Statfs(context.Context) (unix.Statfs_t, error) {
	var st unix.Statfs_t
	err := unix.Fstatfs(n.fd, &st)
	return st, err
}

// check returns EROFS unless n may be changed.
func (n *node) check() error {
	if !n.fs.writable {
		return unix.EROFS
	}
	return nil
}

// own gives a new file to the task that made it, where the host has not.
func (n *node) own(ctx context.Context, fd int, name string) error {
	creds := vfs.CredsFromContext(ctx)
	if creds.IsHost() {
		return nil
	}
	if name == "" {
		return unix.Fchown(fd, int(creds.UID), int(creds.GID))
	}
	return unix.Fchownat(fd, name, int(creds.UID), int(creds.GID), unix.AT_SYMLINK_NOFOLLOW)
}

// Create implements vfs.MutableDirectory.
func (n *node) Create(ctx context.Context, name string, d *vfs.Dentry, flags, mode uint32) (*vfs.FileDescription, error) {
	return n.create(ctx, name, d, uint64(flags&openFlags|unix.O_CREAT|unix.O_EXCL), flags, mode)
}

// Tmpfile implements vfs.MutableDirectory.
func (n *node) Tmpfile(ctx context.Context, d *vfs.Dentry, flags, mode uint32) (*vfs.FileDescription, error) {
	return n.create(ctx, ".", d, uint64(flags&(openFlags|unix.O_EXCL)|unix.O_TMPFILE), flags, mode)
}

func (n *node) create(ctx context.Context, name string, d *vfs.Dentry, hostFlags uint64, flags, mode uint32) (*vfs.FileDescription, error) {
	if err := n.check(); err != nil {
		return nil, err
	}
	fd, err := n.openat2(name, hostFlags&^unix.O_TRUNC, mode&0o7777)
	if err != nil {
		return nil, err
	}
	if err := n.own(ctx, fd, ""); err != nil {
		unix.Close(fd)
		return nil, err
	}
	file, err := n.fs.newNode(fd)
	if err != nil {
		return nil, err
	}
	return file.newFile(d, flags), nil
}

// Mkdir implements vfs.MutableDirectory.
func (n *node) Mkdir(ctx context.Context, name string, mode uint32) error {
	if err := n.check(); err != nil {
		return err
	}
	if err := unix.Mkdirat(n.fd, name, mode); err != nil {
		return err
	}
	return n.own(ctx, n.fd, name)
}

// Mknod implements vfs.MutableDirectory. FIFOs and sockets would lead out of the
// sandbox: EPERM.
func (n *node) Mknod(ctx context.Context, name string, mode uint32) error {
	if err := n.check(); err != nil {
		return err
	}
	if mode&unix.S_IFMT != unix.S_IFREG {
		return unix.EPERM
	}
	if err := unix.Mknodat(n.fd, name, mode, 0); err != nil {
		return err
	}
	return n.own(ctx, n.fd, name)
}

// Symlink implements vfs.MutableDirectory.
func (n *node) Symlink(ctx context.Context, name, target string) error {
	if err := n.check(); err != nil {
		return err
	}
	if err := unix.Symlinkat(target, n.fd, name); err != nil {
		return err
	}
	return n.own(ctx, n.fd, name)
}

// Link implements vfs.MutableDirectory.
func (n *node) Link(_ context.Context, name string, old vfs.Node) error {
	o, ok := old.(*node)
	if !ok || o.fs != n.fs {
		return unix.EXDEV
	}
	if err := n.check(); err != nil {
		return err
	}
	return unix.Linkat(n.fs.procFD, procName(o.fd), n.fd, name, unix.AT_SYMLINK_FOLLOW)
}

// Unlink implements vfs.MutableDirectory.
func (n *node) Unlink(_ context.Context, name string) error {
	if err := n.check(); err != nil {
		return err
	}
	return unix.Unlinkat(n.fd, name, 0)
}

// Rmdir implements vfs.MutableDirectory.
func (n *node) Rmdir(_ context.Context, name string) error {
	if err := n.check(); err != nil {
		return err
	}
	return unix.Unlinkat(n.fd, name, unix.AT_REMOVEDIR)
}

// Rename implements vfs.MutableDirectory.
func (n *node) Rename(_ context.Context, name string, newDir vfs.Node, newName string, flags uint32) error {
	to, ok := newDir.(*node)
	if !ok || to.fs != n.fs {
		return unix.EXDEV
	}
	if err := n.check(); err != nil {
		return err
	}
	return unix.Renameat2(n.fd, name, to.fd, newName, uint(flags))
}
