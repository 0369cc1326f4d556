package vfs

import (
	"context"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Mount is a file system at a place of a Namespace.
type Mount struct {
	// Point is where it is: an absolute path without symbolic links.
	Point string
	// Root is the Node there.
	Root Directory
	// ReadOnly makes every change fail with EROFS.
	ReadOnly bool
	// Host says that the host checks permissions on access to its files, with the
	// credentials of the Sentry's process.
	Host bool
	// Source, Type and Options are what /proc/PID/mountinfo shows.
	Source, Type, Options string
	// Dev is the st_dev of the root, for mountinfo.
	Dev uint64

	id int
}

// Namespace is the tree of mounts that tasks see. Mounts are made before the
// first task runs and never change.
//
// Places in it are canonical paths: absolute, without symbolic links. The
// Namespace follows its own renames of them. A directory that somebody else
// renames on the host stays accessible, but ".." leads to where it was.
type Namespace struct {
	// Memfd makes the files of memfd_create(2). It is set before tasks run.
	Memfd func(ctx context.Context, name string, sealable bool) *FileDescription

	mounts map[string]*Mount
	order  []*Mount
	// above holds the directories that have a mount point somewhere below.
	above map[string]bool

	mu   sync.RWMutex
	live map[*Dentry]struct{} // those whose path follows renames

	renameMu sync.Mutex // one rename at a time, so that paths stay in step
}

// NewNamespace returns a Namespace with root mounted at "/".
func NewNamespace(root *Mount) *Namespace {
	ns := &Namespace{
		mounts: map[string]*Mount{},
		above:  map[string]bool{},
		live:   map[*Dentry]struct{}{},
	}
	root.Point = "/"
	ns.AddMount(root)
	return ns
}

// AddMount mounts m. Whether the mount point exists in the file system below
// does not matter; its parent directory lists it anyway. It must not be called
// once tasks run.
func (ns *Namespace) AddMount(m *Mount) {
	m.id = len(ns.order) + 1
	ns.mounts[m.Point] = m
	ns.order = append(ns.order, m)
	for dir := m.Point; dir != "/"; {
		dir = parentPath(dir)
		ns.above[dir] = true
	}
}

// Mounts returns the mounts in the order in which they were made.
func (ns *Namespace) Mounts() []*Mount { return ns.order }

// ID returns the number of the mount in mountinfo.
func (m *Mount) ID() int { return m.id }

// mountAt returns the mount that holds the canonical path, and the path's part
// below the mount point.
func (ns *Namespace) mountAt(path string) (m *Mount, rel string) {
	for point := path; ; point = parentPath(point) {
		if m := ns.mounts[point]; m != nil {
			return m, strings.TrimPrefix(path[len(point):], "/")
		}
	}
}

// mountNames returns the names of mount points in the directory path.
func (ns *Namespace) mountNames(path string) []string {
	if !ns.above[path] {
		return nil
	}
	var names []string
	for _, m := range ns.order {
		if m.Point != "/" && parentPath(m.Point) == path {
			names = append(names, m.Point[strings.LastIndexByte(m.Point, '/')+1:])
		}
	}
	return names
}

// parentPath returns the directory of a canonical path; "/" is its own.
func parentPath(path string) string {
	if i := strings.LastIndexByte(path, '/'); i > 0 {
		return path[:i]
	}
	return "/"
}

// joinPath appends names to a canonical path.
func joinPath(dir, rel string) string {
	if dir == "/" {
		return "/" + rel
	}
	return dir + "/" + rel
}

// under reports whether path is dir or lies below it, and returns the rest.
func under(path, dir string) (rest string, ok bool) {
	if dir == "/" {
		return path, true
	}
	rest, ok = strings.CutPrefix(path, dir)
	return rest, ok && (rest == "" || rest[0] == '/')
}

// Dentry is a Node together with its place in a Namespace. It holds a reference
// on the Node and has one owner, who calls Drop.
type Dentry struct {
	ns   *Namespace
	mnt  *Mount
	node Node

	// Once the Dentry is live, what follows is protected by ns.mu.
	path    string
	deleted bool
	live    bool
}

// Node returns the file.
func (d *Dentry) Node() Node { return d.node }

// SetNode makes d stand for node, whose reference it takes over, and drops that
// on the Node before. Only the owner of a Dentry not yet in use calls it.
func (d *Dentry) SetNode(node Node) {
	if d.node != nil {
		d.node.DecRef()
	}
	d.node = node
}

// NewDentry returns a Dentry for a file that no path leads to, such as a
// memfd's. It takes over the reference on node.
func NewDentry(ns *Namespace, mnt *Mount, node Node, name string) *Dentry {
	return &Dentry{ns: ns, mnt: mnt, node: node, path: name, deleted: true}
}

// Path returns where the file is; if it is not any more, where it was, and true.
func (d *Dentry) Path() (path string, deleted bool) {
	if d.ns == nil {
		return d.path, d.deleted
	}
	d.ns.mu.RLock()
	defer d.ns.mu.RUnlock()
	return d.path, d.deleted
}

// String returns the path as /proc/PID/fd shows it.
func (d *Dentry) String() string {
	path, deleted := d.Path()
	if deleted {
		path += " (deleted)"
	}
	return path
}

// MountNames returns the names of the mount points in the directory d.
func (d *Dentry) MountNames() []string {
	if d.ns == nil {
		return nil
	}
	path, _ := d.Path()
	return d.ns.mountNames(path)
}

// use makes the path of d follow renames until Drop.
func (d *Dentry) use() *Dentry {
	if d.ns == nil {
		return d
	}
	d.ns.mu.Lock()
	defer d.ns.mu.Unlock()
	d.live = true
	d.ns.live[d] = struct{}{}
	return d
}

// Clone returns another Dentry for the same place.
func (d *Dentry) Clone() *Dentry {
	path, deleted := d.Path()
	d.node.IncRef()
	return &Dentry{ns: d.ns, mnt: d.mnt, node: d.node, path: path, deleted: deleted}
}

// Drop ends the use of d.
func (d *Dentry) Drop() {
	if d.ns != nil {
		d.ns.mu.Lock()
		if d.live {
			delete(d.ns.live, d)
		}
		d.ns.mu.Unlock()
	}
	if d.node != nil {
		d.node.DecRef()
	}
}

// moved updates live paths after a rename; with exchange the other way as well.
func (ns *Namespace) moved(from, to string, exchange bool) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	for d := range ns.live {
		if rest, ok := under(d.path, from); ok {
			d.path = to + rest
		} else if rest, ok := under(d.path, to); ok {
			if exchange {
				d.path = from + rest
			} else {
				d.deleted = true
			}
		}
	}
}

// removed marks the live Dentries of a path that is gone.
func (ns *Namespace) removed(path string) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	for d := range ns.live {
		if d.path == path {
			d.deleted = true
		}
	}
}

// FSContext is what a task's paths start from: root and working directory, and
// the umask. Tasks share it with CLONE_FS. It starts with one reference.
type FSContext struct {
	ns *Namespace

	mu    sync.Mutex
	refs  int
	root  *Dentry
	cwd   *Dentry
	umask uint32
}

// NewFSContext returns a context with root and working directory at "/", and
// the umask 022.
func NewFSContext(ns *Namespace) *FSContext {
	return &FSContext{ns: ns, refs: 1, root: ns.rootDentry().use(), cwd: ns.rootDentry().use(), umask: 0o022}
}

func (ns *Namespace) rootDentry() *Dentry {
	m := ns.mounts["/"]
	m.Root.IncRef()
	return &Dentry{ns: ns, mnt: m, node: m.Root, path: "/"}
}

// Namespace returns the tree of mounts.
func (fs *FSContext) Namespace() *Namespace { return fs.ns }

// IncRef adds a reference.
func (fs *FSContext) IncRef() {
	fs.mu.Lock()
	fs.refs++
	fs.mu.Unlock()
}

// DecRef drops a reference.
func (fs *FSContext) DecRef() {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.refs--; fs.refs == 0 {
		fs.root.Drop()
		fs.cwd.Drop()
	}
}

// Fork returns a copy.
func (fs *FSContext) Fork() *FSContext {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return &FSContext{ns: fs.ns, refs: 1, root: fs.root.Clone().use(), cwd: fs.cwd.Clone().use(), umask: fs.umask}
}

// Umask returns the file mode creation mask.
func (fs *FSContext) Umask() uint32 {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.umask
}

// SetUmask changes the file mode creation mask and returns the one before.
func (fs *FSContext) SetUmask(mask uint32) uint32 {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	old := fs.umask
	fs.umask = mask & 0o777
	return old
}

// Root returns the root directory, owned by the caller.
func (fs *FSContext) Root() *Dentry {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.root.Clone()
}

// Cwd returns the working directory, owned by the caller.
func (fs *FSContext) Cwd() *Dentry {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.cwd.Clone()
}

// set replaces root or working directory.
func (fs *FSContext) set(which **Dentry, d *Dentry) {
	d.use()
	fs.mu.Lock()
	old := *which
	*which = d
	fs.mu.Unlock()
	old.Drop()
}

// PathOf returns the path of d as it is seen from the root of fs.
func (fs *FSContext) PathOf(d *Dentry) string {
	fs.mu.Lock()
	root, _ := fs.root.Path()
	fs.mu.Unlock()
	path, deleted := d.Path()
	if d.ns == nil {
		return d.String()
	}
	rest, ok := under(path, root)
	if !ok {
		rest = "(unreachable)" + path
	}
	if rest == "" {
		rest = "/"
	}
	if deleted {
		rest += " (deleted)"
	}
	return rest
}

// Getcwd returns the path of the working directory (getcwd(2)); ENOENT if it
// has been removed.
func (fs *FSContext) Getcwd(ctx context.Context) (string, error) {
	d := fs.Cwd()
	defer d.Drop()
	if _, deleted := d.Path(); deleted {
		return "", unix.ENOENT
	}
	st, err := d.node.Stat(ctx)
	if err != nil {
		return "", err
	}
	if st.Nlink == 0 { // removed by others
		return "", unix.ENOENT
	}
	return fs.PathOf(d), nil
}
