package tmpfs

import (
	"context"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
)

// Walk implements vfs.Directory.
func (n *inode) Walk(_ context.Context, rel string, _ bool) (vfs.Node, int, error) {
	n.fs.mu.RLock()
	defer n.fs.mu.RUnlock()
	cur, start := n, 0
	for {
		if !cur.isDir() {
			return nil, 0, unix.ENOTDIR
		}
		name, _, more := strings.Cut(rel[start:], "/")
		e := cur.entries[name]
		if e == nil {
			return nil, 0, unix.ENOENT
		}
		cur, start = e.node, start+len(name)
		if !more || cur.target != "" {
			cur.IncRef()
			return cur, start, nil
		}
		start++
	}
}

// mayAddLocked says why nothing can be entered as name, if so.
func (n *inode) mayAddLocked(name string) error {
	switch {
	case n.removed:
		return unix.ENOENT
	case n.entries[name] != nil:
		return unix.EEXIST
	}
	return nil
}

// addLocked enters node, whose reference it takes over, in the directory n.
func (n *inode) addLocked(name string, node *inode) {
	n.lastOff++
	e := &entry{name: name, off: n.lastOff + 1, node: node} // offsets 0 and 1 are "." and ".."
	n.entries[name] = e
	n.order = append(n.order, e)
	node.nlink++
	if node.isDir() {
		node.nlink++
		n.nlink++
		node.parent = n
	}
	n.touch()
}

// dropLocked takes e out of the directory n without touching link counts.
func (n *inode) dropLocked(e *entry) {
	delete(n.entries, e.name)
	i := sort.Search(len(n.order), func(i int) bool { return n.order[i].off >= e.off })
	n.order = append(n.order[:i:i], n.order[i+1:]...)
	n.touch()
}

// removeLocked takes e out of the directory n for good. The caller drops the
// reference of the name when fs.mu is free.
func (n *inode) removeLocked(e *entry) {
	n.dropLocked(e)
	e.node.nlink--
	if e.node.isDir() {
		e.node.nlink--
		n.nlink--
		e.node.removed = true
	}
	e.node.touchCtime()
}

// newChild makes a file of the given mode in n; f may complete it first.
func (n *inode) newChild(ctx context.Context, name string, mode uint32, f func(*inode)) error {
	if n.fs.inodes.Load() >= maxInodes {
		return unix.ENOSPC
	}
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	if err := n.mayAddLocked(name); err != nil {
		return err
	}
	c := n.fs.newInode(ctx, mode)
	n.mu.Lock()
	if n.mode&unix.S_ISGID != 0 {
		c.gid = n.gid
		if c.isDir() {
			c.mode |= unix.S_ISGID
		}
	}
	n.mu.Unlock()
	if f != nil {
		f(c)
	}
	n.addLocked(name, c)
	return nil
}

// Create implements vfs.MutableDirectory.
func (n *inode) Create(ctx context.Context, name string, d *vfs.Dentry, flags, mode uint32) (*vfs.FileDescription, error) {
	var c *inode
	err := n.newChild(ctx, name, unix.S_IFREG|mode, func(i *inode) {
		c = i
		c.IncRef()
	})
	if err != nil {
		return nil, err
	}
	d.SetNode(c)
	return c.open(d, flags), nil
}

// Tmpfile implements vfs.MutableDirectory.
func (n *inode) Tmpfile(ctx context.Context, d *vfs.Dentry, flags, mode uint32) (*vfs.FileDescription, error) {
	if n.fs.inodes.Load() >= maxInodes {
		return nil, unix.ENOSPC
	}
	c := n.fs.newInode(ctx, unix.S_IFREG|mode)
	c.linkable = flags&unix.O_EXCL == 0
	d.SetNode(c)
	return c.open(d, flags), nil
}

// Mkdir implements vfs.MutableDirectory.
func (n *inode) Mkdir(ctx context.Context, name string, mode uint32) error {
	return n.newChild(ctx, name, unix.S_IFDIR|mode, nil)
}

// Mknod implements vfs.MutableDirectory.
func (n *inode) Mknod(ctx context.Context, name string, mode uint32) error {
	return n.newChild(ctx, name, mode, nil)
}

// Symlink implements vfs.MutableDirectory.
func (n *inode) Symlink(ctx context.Context, name, target string) error {
	return n.newChild(ctx, name, unix.S_IFLNK|0o777, func(c *inode) { c.target = target })
}

// Link implements vfs.MutableDirectory.
func (n *inode) Link(_ context.Context, name string, old vfs.Node) error {
	o, ok := old.(*inode)
	if !ok || o.fs != n.fs {
		return unix.EXDEV
	}
	n.fs.mu.Lock()
	defer n.fs.mu.Unlock()
	if o.nlink == 0 && !o.linkable {
		return unix.ENOENT
	}
	if err := n.mayAddLocked(name); err != nil {
		return err
	}
	o.IncRef()
	n.addLocked(name, o)
	o.touchCtime()
	return nil
}

// Unlink implements vfs.MutableDirectory.
func (n *inode) Unlink(_ context.Context, name string) error {
	return n.remove(name, func(o *inode) error {
		if o.isDir() {
			return unix.EISDIR
		}
		return nil
	})
}

// remove takes name out of n, unless refuse says why not.
func (n *inode) remove(name string, refuse func(*inode) error) error {
	n.fs.mu.Lock()
	e := n.entries[name]
	err := error(unix.ENOENT)
	if e != nil {
		if err = refuse(e.node); err == nil {
			n.removeLocked(e)
		}
	}
	n.fs.mu.Unlock()
	if err == nil {
		e.node.DecRef()
	}
	return err
}

// Rmdir implements vfs.MutableDirectory.
func (n *inode) Rmdir(_ context.Context, name string) error {
	return n.remove(name, func(o *inode) error {
		switch {
		case !o.isDir():
			return unix.ENOTDIR
		case len(o.entries) > 0:
			return unix.ENOTEMPTY
		}
		return nil
	})
}

// Rename implements vfs.MutableDirectory.
func (n *inode) Rename(_ context.Context, name string, newDir vfs.Node, newName string, flags uint32) error {
	to, ok := newDir.(*inode)
	if !ok || to.fs != n.fs {
		return unix.EXDEV
	}
	n.fs.mu.Lock()
	gone, err := n.renameLocked(name, to, newName, flags)
	n.fs.mu.Unlock()
	if gone != nil {
		gone.DecRef()
	}
	return err
}

func (n *inode) renameLocked(name string, to *inode, newName string, flags uint32) (gone *inode, err error) {
	e, t := n.entries[name], to.entries[newName]
	exchange := flags&unix.RENAME_EXCHANGE != 0
	switch {
	case e == nil, to.removed, exchange && t == nil:
		return nil, unix.ENOENT
	case t != nil && flags&unix.RENAME_NOREPLACE != 0:
		return nil, unix.EEXIST
	case t != nil && t.node == e.node:
		return nil, nil
	case below(to, e.node), exchange && below(n, t.node):
		return nil, unix.EINVAL
	}
	if t != nil && !exchange {
		switch {
		case e.node.isDir() && !t.node.isDir():
			return nil, unix.ENOTDIR
		case !e.node.isDir() && t.node.isDir():
			return nil, unix.EISDIR
		case len(t.node.entries) > 0:
			return nil, unix.ENOTEMPTY
		}
		to.removeLocked(t)
		gone = t.node
	}
	// Moving is taking out and entering again; addLocked counts links anew.
	take := func(dir *inode, e *entry) {
		dir.dropLocked(e)
		e.node.nlink--
		if e.node.isDir() {
			e.node.nlink--
			dir.nlink--
		}
	}
	take(n, e)
	if exchange {
		take(to, t)
		n.addLocked(name, t.node)
		t.node.touchCtime()
	}
	to.addLocked(newName, e.node)
	e.node.touchCtime()
	return gone, nil
}

// below reports whether dir is top or lies below it.
func below(dir, top *inode) bool {
	for ; ; dir = dir.parent {
		if dir == top {
			return true
		}
		if dir.parent == dir {
			return false
		}
	}
}

// Open implements vfs.Node.
func (n *inode) Open(_ context.Context, d *vfs.Dentry, flags uint32) (*vfs.FileDescription, error) {
	switch n.Mode() & unix.S_IFMT {
	case unix.S_IFREG:
		if flags&unix.O_TRUNC != 0 {
			if err := n.data.truncate(0); err != nil {
				return nil, err
			}
			n.touch()
		}
		return n.open(d, flags), nil
	case unix.S_IFDIR:
		return vfs.NewFileAt(&directory{inode: n}, flags, d), nil
	case unix.S_IFIFO:
		return vfs.OpenFIFO(n.pipe, flags, d)
	case unix.S_IFLNK:
		return nil, unix.ELOOP
	}
	return nil, unix.ENXIO
}

// directory is an open directory.
type directory struct {
	waiter.AlwaysReady
	*inode
}

// Release implements vfs.Impl.
func (directory) Release() {}

// Locks implements vfs.Locker.
func (f *directory) Locks() *vfs.Locks { return &f.locks }

// Sync implements vfs.Syncer.
func (directory) Sync(context.Context) error { return nil }

// ReadDir implements vfs.DirReader. The offset of an entry stays the same while
// others come and go.
func (f *directory) ReadDir(_ context.Context, off int64, emit func(vfs.Dirent) bool) error {
	fs := f.fs
	fs.mu.RLock()
	defer fs.mu.RUnlock()
	if off == 0 {
		if !emit(vfs.Dirent{Name: ".", Ino: f.ino, Type: unix.DT_DIR, NextOff: 1}) {
			return nil
		}
		off = 1
	}
	if off == 1 {
		if !emit(vfs.Dirent{Name: "..", Ino: f.parent.ino, Type: unix.DT_DIR, NextOff: 2}) {
			return nil
		}
		off = 2
	}
	i := sort.Search(len(f.order), func(i int) bool { return f.order[i].off >= off })
	for _, e := range f.order[i:] {
		typ := uint8(e.node.Mode() >> 12) // DT_* are the type bits of the mode
		if !emit(vfs.Dirent{Name: e.name, Ino: e.node.ino, Type: typ, NextOff: e.off + 1}) {
			return nil
		}
	}
	return nil
}

// Seek implements vfs.Seeker.
func (f *directory) Seek(_ context.Context, cur, off int64, whence int) (int64, error) {
	return vfs.SeekDir(cur, off, whence)
}
