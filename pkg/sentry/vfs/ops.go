package vfs

import (
	"context"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/memmap"
)

// The operations below take a path and the directory at which it starts if it
// is relative: nil means the working directory. Errors are those of the system
// call that each is named after; in the order of Linux's checks.

// checkAccess returns EACCES unless creds may access node in all ways of mask.
func checkAccess(ctx context.Context, creds *Creds, node Node, mask uint32) error {
	st, err := node.Stat(ctx)
	if err != nil {
		return err
	}
	if !creds.Allowed(&st, mask) {
		return unix.EACCES
	}
	return nil
}

// access checks permissions unless the host does so on its own.
func (d *Dentry) access(ctx context.Context, mask uint32) error {
	creds := CredsFromContext(ctx)
	if d.mnt.hostChecks(creds) || (creds.Override && mask&MayExec == 0) {
		return nil
	}
	return checkAccess(ctx, creds, d.node, mask)
}

// hostChecks reports whether the host checks access to files of m on behalf of
// creds.
func (m *Mount) hostChecks(creds *Creds) bool { return m != nil && m.Host && creds.IsHost() }

func (d *Dentry) readOnly() bool { return d.mnt != nil && d.mnt.ReadOnly }

// mutable returns the directory d if entries can be made in it or removed.
func (d *Dentry) mutable(ctx context.Context) (MutableDirectory, error) {
	if d.readOnly() {
		return nil, unix.EROFS
	}
	if err := d.access(ctx, MayWrite|MayExec); err != nil {
		return nil, err
	}
	dir, ok := d.node.(MutableDirectory)
	if !ok { // such as /proc
		return nil, unix.EPERM
	}
	if _, deleted := d.Path(); deleted {
		return nil, unix.ENOENT
	}
	return dir, nil
}

// maySticky checks the sticky bit of dir before st, in it, is removed.
func maySticky(ctx context.Context, dir Node, st *unix.Stat_t) error {
	creds := CredsFromContext(ctx)
	if dir.Mode()&unix.S_ISVTX == 0 || creds.Owns(st) {
		return nil
	}
	dst, err := dir.Stat(ctx)
	if err != nil {
		return err
	}
	if !creds.Owns(&dst) {
		return unix.EPERM
	}
	return nil
}

// child returns the Dentry of a file that is about to be made.
func (d *Dentry) child(name string) *Dentry {
	path, _ := d.Path()
	return &Dentry{ns: d.ns, mnt: d.mnt, path: joinPath(path, name)}
}

func atFollow(flags int) bool { return flags&unix.AT_SYMLINK_NOFOLLOW == 0 }
func atEmpty(flags int) bool  { return flags&unix.AT_EMPTY_PATH != 0 }

// OpenAt opens a file (openat(2), openat2(2)). flags are O_*, mode the
// permissions of a new file before the umask, resolve RESOLVE_*. Opening a FIFO
// does not wait for its other end: see FileDescription.FIFOWait.
func (fs *FSContext) OpenAt(ctx context.Context, at *FileDescription, path string, flags, mode uint32, resolve uint64) (*FileDescription, error) {
	if flags&unix.O_PATH != 0 {
		flags &= unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	}
	tmpfile := flags&unix.O_TMPFILE == unix.O_TMPFILE
	create := flags&unix.O_CREAT != 0 && !tmpfile
	if tmpfile && flags&unix.O_ACCMODE == unix.O_RDONLY {
		return nil, unix.EINVAL
	}
	if flags&(unix.O_CREAT|unix.O_DIRECTORY) == unix.O_CREAT|unix.O_DIRECTORY {
		return nil, unix.EINVAL
	}
	nofollow := flags&unix.O_NOFOLLOW != 0 || (create && flags&unix.O_EXCL != 0)
	for attempt := 0; ; attempt++ {
		p, err := fs.resolve(ctx, at, path, lookup{follow: !nofollow, create: create, resolve: resolve})
		if err != nil {
			return nil, err
		}
		file, err := fs.openPlace(ctx, &p, flags, mode, create, tmpfile)
		p.drop()
		if err == errAgain && attempt < 10 { // the name came or went meanwhile
			continue
		}
		if err == errAgain {
			err = unix.EEXIST
		}
		return file, err
	}
}

type retryError struct{}

func (retryError) Error() string { return "name changed during the operation" }

// errAgain makes OpenAt resolve the path again.
var errAgain = retryError{}

// statusFlags are the flags that stay with an open file (fcntl(F_GETFL)).
func statusFlags(flags uint32) uint32 {
	return flags &^ (unix.O_CREAT | unix.O_EXCL | unix.O_NOCTTY | unix.O_TRUNC | unix.O_CLOEXEC)
}

func (fs *FSContext) openPlace(ctx context.Context, p *place, flags, mode uint32, create, tmpfile bool) (*FileDescription, error) {
	if create && p.d == nil {
		switch {
		case p.name == "" || p.name == "." || p.name == ".." || p.slash:
			return nil, unix.EISDIR
		}
		dir, err := p.dir.mutable(ctx)
		if err != nil {
			return nil, err
		}
		d := p.dir.child(p.name)
		file, err := dir.Create(ctx, p.name, d, flags, mode&0o7777&^fs.Umask())
		if err == unix.EEXIST && flags&unix.O_EXCL == 0 {
			return nil, errAgain
		}
		return file, err
	}
	d := p.d
	if create && flags&unix.O_EXCL != 0 {
		return nil, unix.EEXIST
	}
	isdir := isDir(d.node)
	if flags&unix.O_DIRECTORY != 0 && !isdir {
		return nil, unix.ENOTDIR
	}
	if create && (isdir || p.slash) {
		return nil, unix.EISDIR
	}
	if tmpfile {
		dir, err := d.mutable(ctx)
		if err != nil {
			return nil, err
		}
		t := d.child("#tmp")
		t.deleted = true
		return dir.Tmpfile(ctx, t, flags, mode&0o7777&^fs.Umask())
	}
	if flags&unix.O_PATH != 0 {
		p.d = nil
		return NewFileAt(pathOnly{d: d}, flags, d), nil
	}
	writes := flags&unix.O_ACCMODE != unix.O_RDONLY || flags&unix.O_TRUNC != 0
	switch d.node.Mode() & unix.S_IFMT {
	case unix.S_IFLNK:
		return nil, unix.ELOOP
	case unix.S_IFDIR:
		if writes {
			return nil, unix.EISDIR
		}
	case unix.S_IFREG:
		if writes && d.readOnly() {
			return nil, unix.EROFS
		}
	default:
		flags &^= unix.O_TRUNC
	}
	var mask uint32
	switch flags & unix.O_ACCMODE {
	case unix.O_RDONLY:
		mask = MayRead
	case unix.O_WRONLY:
		mask = MayWrite
	default:
		mask = MayRead | MayWrite
	}
	if flags&unix.O_TRUNC != 0 {
		mask |= MayWrite
	}
	if err := d.access(ctx, mask); err != nil {
		return nil, err
	}
	file, err := d.node.Open(ctx, d, flags&^(unix.O_CREAT|unix.O_EXCL|unix.O_NOCTTY))
	if err == nil {
		p.d = nil
	}
	return file, err
}

// StatAt returns a file's attributes (newfstatat(2)). flags are AT_*.
func (fs *FSContext) StatAt(ctx context.Context, at *FileDescription, path string, flags int) (unix.Stat_t, error) {
	if path == "" && atEmpty(flags) && at != nil {
		return at.Stat(ctx)
	}
	p, err := fs.resolve(ctx, at, path, lookup{follow: atFollow(flags), empty: atEmpty(flags), statOnly: true})
	if err != nil {
		return unix.Stat_t{}, err
	}
	defer p.drop()
	if s, ok := p.d.node.(lookupStater); ok && p.fresh {
		return s.LookupStat(), nil
	}
	return p.d.node.Stat(ctx)
}

// MountOf returns the number of the mount that the path is in (statx(2)).
func (fs *FSContext) MountOf(ctx context.Context, at *FileDescription, path string, flags int) (id int, root bool) {
	p, err := fs.resolve(ctx, at, path, lookup{follow: atFollow(flags), empty: atEmpty(flags), statOnly: true})
	if err != nil || p.d.mnt == nil {
		return 0, false
	}
	defer p.drop()
	return p.d.mnt.id, p.d.path == p.d.mnt.Point
}

// newName resolves the path of a file to be made and checks that it can be.
func (fs *FSContext) newName(ctx context.Context, at *FileDescription, path string, dir bool) (place, MutableDirectory, error) {
	p, err := fs.resolve(ctx, at, path, lookup{create: true})
	if err != nil {
		return p, nil, err
	}
	mut, err := func() (MutableDirectory, error) {
		switch {
		case p.d != nil || p.name == "" || p.name == "." || p.name == "..":
			return nil, unix.EEXIST
		case p.slash && !dir:
			return nil, unix.ENOENT
		}
		return p.dir.mutable(ctx)
	}()
	if err != nil {
		p.drop()
		return place{}, nil, err
	}
	return p, mut, nil
}

// MkdirAt makes a directory (mkdirat(2)).
func (fs *FSContext) MkdirAt(ctx context.Context, at *FileDescription, path string, mode uint32) error {
	p, dir, err := fs.newName(ctx, at, path, true)
	if err != nil {
		return err
	}
	defer p.drop()
	return dir.Mkdir(ctx, p.name, mode&0o1777&^fs.Umask())
}

// MknodAt makes a regular file, FIFO or socket (mknodat(2)); devices give EPERM.
func (fs *FSContext) MknodAt(ctx context.Context, at *FileDescription, path string, mode uint32) error {
	switch mode & unix.S_IFMT {
	case 0:
		mode |= unix.S_IFREG
	case unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR, unix.S_IFBLK:
	case unix.S_IFDIR:
		return unix.EPERM
	default:
		return unix.EINVAL
	}
	p, dir, err := fs.newName(ctx, at, path, false)
	if err != nil {
		return err
	}
	defer p.drop()
	switch mode & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		return unix.EPERM // whoever asks: a device would be the host's
	}
	return dir.Mknod(ctx, p.name, mode&(unix.S_IFMT|0o7777&^fs.Umask()))
}

// SymlinkAt makes a symbolic link to target (symlinkat(2)).
func (fs *FSContext) SymlinkAt(ctx context.Context, target string, at *FileDescription, path string) error {
	if target == "" {
		return unix.ENOENT
	}
	if len(target) >= maxPath {
		return unix.ENAMETOOLONG
	}
	p, dir, err := fs.newName(ctx, at, path, false)
	if err != nil {
		return err
	}
	defer p.drop()
	return dir.Symlink(ctx, p.name, target)
}

// LinkAt gives a file another name (linkat(2)). flags are AT_SYMLINK_FOLLOW and
// AT_EMPTY_PATH.
func (fs *FSContext) LinkAt(ctx context.Context, oldAt *FileDescription, oldPath string, newAt *FileDescription, newPath string, flags int) error {
	if flags&^(unix.AT_SYMLINK_FOLLOW|unix.AT_EMPTY_PATH) != 0 {
		return unix.EINVAL
	}
	l := lookup{follow: flags&unix.AT_SYMLINK_FOLLOW != 0, empty: atEmpty(flags)}
	old, p, err := fs.resolveTwo(ctx, oldAt, oldPath, l, newAt, newPath, lookup{create: true})
	if err != nil {
		return err
	}
	defer old.drop()
	defer p.drop()
	switch {
	case p.d != nil || p.name == "" || p.name == "." || p.name == "..":
		return unix.EEXIST
	case p.slash:
		return unix.ENOENT
	case p.dir.readOnly():
		return unix.EROFS
	case old.d.mnt != p.dir.mnt:
		return unix.EXDEV
	case isDir(old.d.node):
		return unix.EPERM
	}
	dir, err := p.dir.mutable(ctx)
	if err != nil {
		return err
	}
	return dir.Link(ctx, p.name, old.d.node)
}

// ReadlinkAt returns the text of a symbolic link (readlinkat(2)).
func (fs *FSContext) ReadlinkAt(ctx context.Context, at *FileDescription, path string) (string, error) {
	p, err := fs.resolve(ctx, at, path, lookup{empty: at != nil})
	if err != nil {
		return "", err
	}
	defer p.drop()
	link, ok := p.d.node.(Symlink)
	if !ok || p.d.node.Mode()&unix.S_IFMT != unix.S_IFLNK {
		if path == "" {
			return "", unix.ENOENT
		}
		return "", unix.EINVAL
	}
	return link.Readlink(ctx)
}

// UnlinkAt removes a file (unlinkat(2)), with AT_REMOVEDIR an empty directory.
func (fs *FSContext) UnlinkAt(ctx context.Context, at *FileDescription, path string, flags int) error {
	if flags&^unix.AT_REMOVEDIR != 0 {
		return unix.EINVAL
	}
	rmdir := flags&unix.AT_REMOVEDIR != 0
	p, err := fs.resolve(ctx, at, path, lookup{parent: true})
	if err != nil {
		return err
	}
	defer p.drop()
	switch {
	case !rmdir && (p.name == "" || p.name == "." || p.name == ".."):
		return unix.EISDIR
	case p.name == "..":
		return unix.ENOTEMPTY
	case p.name == ".":
		return unix.EINVAL
	case p.name == "":
		return unix.EBUSY
	case p.dir.readOnly():
		return unix.EROFS
	}
	if len(p.name) > maxName {
		return unix.ENAMETOOLONG
	}
	fs.ns.renameMu.Lock()
	defer fs.ns.renameMu.Unlock()
	target := p.dir.child(p.name).path
	node, err := p.dir.lookupChild(ctx, p.name)
	if err != nil {
		return err
	}
	st, err := node.Stat(ctx)
	node.DecRef()
	if err != nil {
		return err
	}
	dir, err := p.dir.mutable(ctx)
	if err != nil {
		return err
	}
	if err := maySticky(ctx, p.dir.node, &st); err != nil {
		return err
	}
	isdir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	switch {
	case rmdir && !isdir, !rmdir && !isdir && p.slash:
		return unix.ENOTDIR
	case !rmdir && isdir:
		return unix.EISDIR
	case fs.ns.mounts[target] != nil || fs.ns.above[target]:
		return unix.EBUSY
	case rmdir:
		err = dir.Rmdir(ctx, p.name)
	default:
		err = dir.Unlink(ctx, p.name)
	}
	if err == nil {
		fs.ns.removed(target)
	}
	return err
}

// lookupChild looks up a name in the directory d without following it.
func (d *Dentry) lookupChild(ctx context.Context, name string) (Node, error) {
	dir, ok := d.node.(Directory)
	if !ok {
		return nil, unix.ENOTDIR
	}
	if m := d.ns.mounts[joinPath(d.path, name)]; m != nil {
		m.Root.IncRef()
		return m.Root, nil
	}
	node, _, err := dir.Walk(ctx, name, true)
	return node, err
}

// RenameAt moves a file (renameat2(2)).
func (fs *FSContext) RenameAt(ctx context.Context, oldAt *FileDescription, oldPath string, newAt *FileDescription, newPath string, flags uint32) error {
	if flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) != 0 ||
		flags == unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE {
		return unix.EINVAL
	}
	from, to, err := fs.resolveTwo(ctx, oldAt, oldPath, lookup{parent: true}, newAt, newPath, lookup{parent: true})
	if err != nil {
		return err
	}
	defer from.drop()
	defer to.drop()
	special := func(name string) bool { return name == "" || name == "." || name == ".." }
	switch {
	case from.dir.mnt != to.dir.mnt:
		return unix.EXDEV
	case special(from.name):
		return unix.EBUSY
	case special(to.name):
		if flags&unix.RENAME_NOREPLACE != 0 {
			return unix.EEXIST
		}
		return unix.EBUSY
	case from.dir.readOnly():
		return unix.EROFS
	}
	fs.ns.renameMu.Lock()
	defer fs.ns.renameMu.Unlock()
	src, dst := from.dir.child(from.name).path, to.dir.child(to.name).path
	node, err := from.dir.lookupChild(ctx, from.name)
	if err != nil {
		return err
	}
	st, err := node.Stat(ctx)
	node.DecRef()
	if err != nil {
		return err
	}
	isdir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	target, err := to.dir.lookupChild(ctx, to.name)
	var tst unix.Stat_t
	exists := err == nil
	if exists {
		tst, err = target.Stat(ctx)
		target.DecRef()
	}
	if err != nil && err != unix.ENOENT {
		return err
	}
	rest, inside := under(dst, src)
	switch {
	case exists && flags&unix.RENAME_NOREPLACE != 0:
		return unix.EEXIST
	case !exists && flags&unix.RENAME_EXCHANGE != 0:
		return unix.ENOENT
	case !isdir && (from.slash || (!exists && to.slash)):
		return unix.ENOTDIR
	case inside && rest != "":
		return unix.EINVAL
	}
	if rest, ok := under(src, dst); ok && rest != "" {
		if flags&unix.RENAME_EXCHANGE != 0 {
			return unix.EINVAL
		}
		return unix.ENOTEMPTY
	}
	fromDir, err := from.dir.mutable(ctx)
	if err != nil {
		return err
	}
	toDir, err := to.dir.mutable(ctx)
	if err != nil {
		return err
	}
	if err := maySticky(ctx, from.dir.node, &st); err != nil {
		return err
	}
	if exists {
		if err := maySticky(ctx, to.dir.node, &tst); err != nil {
			return err
		}
		switch tdir := tst.Mode&unix.S_IFMT == unix.S_IFDIR; {
		case flags&unix.RENAME_EXCHANGE != 0:
		case isdir && !tdir:
			return unix.ENOTDIR
		case !isdir && tdir:
			return unix.EISDIR
		}
	}
	for _, path := range []string{src, dst} {
		if fs.ns.mounts[path] != nil || fs.ns.above[path] {
			return unix.EBUSY
		}
	}
	if exists && st.Dev == tst.Dev && st.Ino == tst.Ino { // two names of one file
		return nil
	}
	if err := fromDir.Rename(ctx, from.name, toDir, to.name, flags); err != nil {
		return err
	}
	fs.ns.moved(src, dst, flags&unix.RENAME_EXCHANGE != 0)
	return nil
}

// setAttr changes attributes of the file d after check has agreed.
func setAttr(ctx context.Context, d *Dentry, a SetAttr, check func(creds *Creds, st *unix.Stat_t) error) error {
	if d.readOnly() {
		return unix.EROFS
	}
	st, err := d.node.Stat(ctx)
	if err != nil {
		return err
	}
	if !d.mnt.hostChecks(CredsFromContext(ctx)) {
		if err := check(CredsFromContext(ctx), &st); err != nil {
			return err
		}
	}
	s, ok := d.node.(AttrSetter)
	if !ok {
		return unix.EPERM
	}
	return s.SetAttr(ctx, a)
}

// onFile calls f with the file that at and path name; flags are AT_*.
func (fs *FSContext) onFile(ctx context.Context, at *FileDescription, path string, flags int, f func(d *Dentry) error) error {
	p, err := fs.resolve(ctx, at, path, lookup{follow: atFollow(flags), empty: atEmpty(flags)})
	if err != nil {
		return err
	}
	defer p.drop()
	return f(p.d)
}

// Dentry returns where the open file is, or nil if it has no place. It belongs
// to f.
func (f *FileDescription) Dentry() *Dentry { return f.dentry }

// placeOf returns the Dentry of f for an operation on the open file itself.
func (f *FileDescription) placeOf() (*Dentry, error) {
	if f.StatusFlags()&unix.O_PATH != 0 {
		return nil, unix.EBADF
	}
	if f.dentry == nil {
		return nil, unix.EPERM
	}
	return f.dentry, nil
}

func chmodDentry(ctx context.Context, d *Dentry, mode uint32) error {
	if d.node.Mode()&unix.S_IFMT == unix.S_IFLNK {
		return unix.EOPNOTSUPP
	}
	return setAttr(ctx, d, SetAttr{SetMode: true, Mode: mode & 0o7777}, func(creds *Creds, st *unix.Stat_t) error {
		if !creds.Owns(st) {
			return unix.EPERM
		}
		return nil
	})
}

// ChmodAt changes permission bits (fchmodat2(2)).
func (fs *FSContext) ChmodAt(ctx context.Context, at *FileDescription, path string, mode uint32, flags int) error {
	return fs.onFile(ctx, at, path, flags, func(d *Dentry) error { return chmodDentry(ctx, d, mode) })
}

// Chmod changes the permission bits of an open file (fchmod(2)).
func (f *FileDescription) Chmod(ctx context.Context, mode uint32) error {
	d, err := f.placeOf()
	if err != nil {
		return err
	}
	return chmodDentry(ctx, d, mode)
}

func chownDentry(ctx context.Context, d *Dentry, uid, gid uint32) error {
	const keep = ^uint32(0)
	a := SetAttr{SetUID: uid != keep, UID: uid, SetGID: gid != keep, GID: gid}
	return setAttr(ctx, d, a, func(creds *Creds, st *unix.Stat_t) error {
		switch {
		case creds.Override:
		case a.SetUID && (uid != st.Uid || creds.UID != st.Uid),
			a.SetGID && (creds.UID != st.Uid || (gid != st.Gid && !creds.InGroup(gid))):
			return unix.EPERM
		}
		return nil
	})
}

// ChownAt changes owner and group (fchownat(2)); ^0 leaves one as it is.
func (fs *FSContext) ChownAt(ctx context.Context, at *FileDescription, path string, uid, gid uint32, flags int) error {
	return fs.onFile(ctx, at, path, flags, func(d *Dentry) error { return chownDentry(ctx, d, uid, gid) })
}

// Chown changes owner and group of an open file (fchown(2)).
func (f *FileDescription) Chown(ctx context.Context, uid, gid uint32) error {
	d, err := f.placeOf()
	if err != nil {
		return err
	}
	return chownDentry(ctx, d, uid, gid)
}

func utimensDentry(ctx context.Context, d *Dentry, times [2]unix.Timespec) error {
	a := SetAttr{Atime: times[0], Mtime: times[1]}
	a.SetAtime = times[0].Nsec != unix.UTIME_OMIT
	a.SetMtime = times[1].Nsec != unix.UTIME_OMIT
	if !a.SetAtime && !a.SetMtime {
		return nil
	}
	now := times[0].Nsec == unix.UTIME_NOW && times[1].Nsec == unix.UTIME_NOW
	return setAttr(ctx, d, a, func(creds *Creds, st *unix.Stat_t) error {
		switch {
		case creds.Owns(st), now && creds.Allowed(st, MayWrite):
			return nil
		case now:
			return unix.EACCES
		}
		return unix.EPERM
	})
}

// UtimensAt changes access and modification time (utimensat(2)). Nsec may be
// UTIME_NOW or UTIME_OMIT, and is valid otherwise.
func (fs *FSContext) UtimensAt(ctx context.Context, at *FileDescription, path string, times [2]unix.Timespec, flags int) error {
	return fs.onFile(ctx, at, path, flags, func(d *Dentry) error { return utimensDentry(ctx, d, times) })
}

// Utimens changes the times of an open file (futimens(3)).
func (f *FileDescription) Utimens(ctx context.Context, times [2]unix.Timespec) error {
	d, err := f.placeOf()
	if err != nil {
		return err
	}
	return utimensDentry(ctx, d, times)
}

// Truncate sets the length of a file (truncate(2)).
func (fs *FSContext) Truncate(ctx context.Context, path string, size int64) error {
	if size < 0 {
		return unix.EINVAL
	}
	return fs.onFile(ctx, nil, path, 0, func(d *Dentry) error {
		switch d.node.Mode() & unix.S_IFMT {
		case unix.S_IFREG:
		case unix.S_IFDIR:
			return unix.EISDIR
		default:
			return unix.EINVAL
		}
		return setAttr(ctx, d, SetAttr{SetSize: true, Size: size}, func(creds *Creds, st *unix.Stat_t) error {
			if !creds.Allowed(st, MayWrite) {
				return unix.EACCES
			}
			return nil
		})
	})
}

// AccessAt checks whether creds may access a file (faccessat2(2)). mode is made
// of MayRead, MayWrite and MayExec, or 0.
func (fs *FSContext) AccessAt(ctx context.Context, creds *Creds, at *FileDescription, path string, mode uint32, flags int) error {
	if mode&^7 != 0 || flags&^(unix.AT_EACCESS|unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH) != 0 {
		return unix.EINVAL
	}
	p, err := fs.resolve(ctx, at, path, lookup{follow: atFollow(flags), empty: atEmpty(flags)})
	if err != nil {
		return err
	}
	defer p.drop()
	if mode == 0 {
		return nil
	}
	if a, ok := p.d.node.(interface {
		HostAccess(mode uint32) error
	}); ok && p.d.mnt.hostChecks(creds) {
		err = a.HostAccess(mode)
	} else {
		err = checkAccess(ctx, creds, p.d.node, mode)
	}
	if err != nil {
		return err
	}
	switch p.d.node.Mode() & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK:
		if mode&MayWrite != 0 && p.d.readOnly() {
			return unix.EROFS
		}
	}
	return nil
}

func statfsDentry(ctx context.Context, d *Dentry) (unix.Statfs_t, error) {
	s, ok := d.node.(Statfser)
	if !ok {
		return unix.Statfs_t{}, unix.ENOSYS
	}
	st, err := s.Statfs(ctx)
	st.Flags &^= unix.ST_RDONLY
	if d.readOnly() {
		st.Flags |= unix.ST_RDONLY
	}
	return st, err
}

// Statfs describes the file system of a path (statfs(2)).
func (fs *FSContext) Statfs(ctx context.Context, path string) (st unix.Statfs_t, err error) {
	err = fs.onFile(ctx, nil, path, 0, func(d *Dentry) error {
		st, err = statfsDentry(ctx, d)
		return err
	})
	return st, err
}

// Statfs describes the file system of an open file (fstatfs(2)).
func (f *FileDescription) Statfs(ctx context.Context) (unix.Statfs_t, error) {
	if f.dentry != nil {
		return statfsDentry(ctx, f.dentry)
	}
	return unix.Statfs_t{Type: unix.PIPEFS_MAGIC, Bsize: 4096, Namelen: maxName, Frsize: 4096}, nil
}

// enter returns the directory that at and path name, if it may be entered.
func (fs *FSContext) enter(ctx context.Context, at *FileDescription, path string, flags int) (*Dentry, error) {
	p, err := fs.resolve(ctx, at, path, lookup{follow: true, empty: atEmpty(flags)})
	if err != nil {
		return nil, err
	}
	if !isDir(p.d.node) {
		err = unix.ENOTDIR
	} else if a, ok := p.d.node.(interface {
		HostAccess(mode uint32) error
	}); ok && p.d.mnt.hostChecks(CredsFromContext(ctx)) {
		err = a.HostAccess(MayExec)
	} else {
		err = checkAccess(ctx, CredsFromContext(ctx), p.d.node, MayExec)
	}
	if err != nil {
		p.drop()
		return nil, err
	}
	return p.d, nil
}

// Chdir changes the working directory (chdir(2)).
func (fs *FSContext) Chdir(ctx context.Context, path string) error {
	d, err := fs.enter(ctx, nil, path, 0)
	if err != nil {
		return err
	}
	fs.set(&fs.cwd, d)
	return nil
}

// Fchdir changes the working directory to an open one (fchdir(2)).
func (fs *FSContext) Fchdir(ctx context.Context, f *FileDescription) error {
	if f.dentry == nil || !isDir(f.dentry.node) {
		return unix.ENOTDIR
	}
	d, err := fs.enter(ctx, f, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return err
	}
	fs.set(&fs.cwd, d)
	return nil
}

// Chroot changes the root directory (chroot(2)); EPERM without privilege.
func (fs *FSContext) Chroot(ctx context.Context, path string) error {
	d, err := fs.enter(ctx, nil, path, 0)
	if err != nil {
		return err
	}
	if !CredsFromContext(ctx).Override {
		d.Drop()
		return unix.EPERM
	}
	fs.set(&fs.root, d)
	return nil
}

func xattrer(d *Dentry, write bool) (Xattrer, error) {
	if write && d.readOnly() {
		return nil, unix.EROFS
	}
	x, ok := d.node.(Xattrer)
	if !ok {
		return nil, unix.EOPNOTSUPP
	}
	return x, nil
}

// WithXattrs calls f with the extended attributes of the file that path names,
// for writing or not.
func (fs *FSContext) WithXattrs(ctx context.Context, path string, follow, write bool, f func(Xattrer) error) error {
	flags := 0
	if !follow {
		flags = unix.AT_SYMLINK_NOFOLLOW
	}
	return fs.onFile(ctx, nil, path, flags, func(d *Dentry) error {
		x, err := xattrer(d, write)
		if err != nil {
			return err
		}
		return f(x)
	})
}

// Xattrs returns the extended attributes of an open file, for writing or not.
func (f *FileDescription) Xattrs(write bool) (Xattrer, error) {
	if f.StatusFlags()&unix.O_PATH != 0 {
		return nil, unix.EBADF
	}
	if f.dentry == nil {
		return nil, unix.EOPNOTSUPP
	}
	return xattrer(f.dentry, write)
}

// Executable is a program that OpenExecutable found.
type Executable struct {
	ctx  context.Context
	file *FileDescription
	path string
}

// OpenExecutable opens a program (execveat(2)): a regular file that the caller
// may execute, else EACCES. flags are AT_EMPTY_PATH and AT_SYMLINK_NOFOLLOW.
func (fs *FSContext) OpenExecutable(ctx context.Context, at *FileDescription, path string, flags int) (*Executable, error) {
	p, err := fs.resolve(ctx, at, path, lookup{follow: atFollow(flags), empty: atEmpty(flags)})
	if err != nil {
		return nil, err
	}
	defer p.drop()
	switch p.d.node.Mode() & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFLNK:
		return nil, unix.ELOOP
	default:
		return nil, unix.EACCES
	}
	st, err := p.d.node.Stat(ctx)
	if err != nil {
		return nil, err
	}
	creds := CredsFromContext(ctx)
	if a, ok := p.d.node.(interface {
		HostAccess(mode uint32) error
	}); ok && p.d.mnt.hostChecks(creds) {
		err = a.HostAccess(MayExec)
	} else if !creds.Allowed(&st, MayExec) {
		err = unix.EACCES
	}
	if err != nil {
		return nil, err
	}
	name := fs.PathOf(p.d)
	file, err := p.d.node.Open(ctx, p.d, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	p.d = nil
	return &Executable{ctx: ctx, file: file, path: name}, nil
}

// ReadAt implements io.ReaderAt.
func (e *Executable) ReadAt(p []byte, off int64) (int, error) {
	return readFullAt(e.ctx, e.file, p, off)
}

// ConfigureMMap prepares opts for a mapping of the program.
func (e *Executable) ConfigureMMap(ctx context.Context, opts *memmap.MMapOpts) error {
	return e.file.ConfigureMMap(ctx, opts)
}

// Path returns the canonical path.
func (e *Executable) Path() string { return e.path }

// Close ends the use of the program; mappings stay.
func (e *Executable) Close() { e.file.DecRef() }
