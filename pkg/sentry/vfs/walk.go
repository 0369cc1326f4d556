package vfs

import (
	"context"
	"strings"

	"golang.org/x/sys/unix"
)

// Limits of path resolution (path_resolution(7)).
const (
	maxSymlinks = 40
	maxName     = 255
	maxPath     = 4096 // with the NUL
)

// lookup says how far to resolve a path.
type lookup struct {
	// follow makes a symbolic link at the end be followed. One with a slash
	// behind it always is.
	follow bool
	// parent stops at the directory of the last name, without looking that up.
	parent bool
	// create is parent, but looks up the last name as well, which may be missing.
	create bool
	// statOnly allows Nodes that are good for Stat alone.
	statOnly bool
	// empty allows an empty path: the starting point itself (AT_EMPTY_PATH).
	empty bool
	// resolve are the RESOLVE_* flags of openat2(2).
	resolve uint64
}

// place is the result of a lookup.
type place struct {
	// dir and name are set for parent and create. name may be "." or "..", or ""
	// for the root itself.
	dir  *Dentry
	name string
	// slash says that slashes follow the last name.
	slash bool
	// d is what the path names; nil for parent, or if it is missing for create.
	d *Dentry
	// fresh says that d's Node was looked up just now.
	fresh bool
}

func (p *place) drop() {
	if p.dir != nil {
		p.dir.Drop()
	}
	if p.d != nil {
		p.d.Drop()
	}
}

// walker is a resolution under way.
type walker struct {
	ctx   context.Context
	creds *Creds
	ns    *Namespace

	// mnt, node and path are where it is; it owns the reference on node.
	mnt  *Mount
	node Node
	path string
	// fresh says that node comes from the last lookup of a name.
	fresh bool

	root  string // where absolute paths start, and ".." ends
	base  string // where RESOLVE_BENEATH starts
	links int
	l     lookup
}

func (w *walker) set(mnt *Mount, node Node, path string) {
	if w.node != nil {
		w.node.DecRef()
	}
	w.mnt, w.node, w.path, w.fresh = mnt, node, path, false
}

// dentry returns where the walker is; the reference goes with it.
func (w *walker) dentry() *Dentry {
	d := &Dentry{ns: w.ns, mnt: w.mnt, node: w.node, path: w.path}
	w.node = nil
	return d
}

// resolveTwo is resolve of the old and the new name of a file.
func (fs *FSContext) resolveTwo(ctx context.Context, oldAt *FileDescription, oldPath string, oldL lookup, newAt *FileDescription, newPath string, newL lookup) (from, to place, err error) {
	if from, err = fs.resolve(ctx, oldAt, oldPath, oldL); err != nil {
		return from, to, err
	}
	if to, err = fs.resolve(ctx, newAt, newPath, newL); err != nil {
		from.drop()
	}
	return from, to, err
}

// resolve resolves path, starting at the directory at (nil: the working
// directory) if it is relative.
func (fs *FSContext) resolve(ctx context.Context, at *FileDescription, path string, l lookup) (place, error) {
	if path == "" && !l.empty {
		return place{}, unix.ENOENT
	}
	if len(path) >= maxPath {
		return place{}, unix.ENAMETOOLONG
	}
	w := &walker{ctx: ctx, creds: CredsFromContext(ctx), ns: fs.ns, l: l}
	var start *Dentry
	fs.mu.Lock()
	w.root, _ = fs.root.Path()
	switch {
	case path != "" && path[0] == '/' && l.resolve&unix.RESOLVE_IN_ROOT == 0:
		start = fs.root
	case at == nil:
		start = fs.cwd
	default:
		start = at.dentry
	}
	if start == nil { // a file without a place, such as a pipe
		fs.mu.Unlock()
		if path != "" {
			return place{}, unix.ENOTDIR
		}
		return place{}, unix.EBADF
	}
	deleted := false
	w.mnt, w.node = start.mnt, start.node
	w.path, deleted = start.Path()
	w.node.IncRef()
	fs.mu.Unlock()
	defer func() {
		if w.node != nil {
			w.node.DecRef()
		}
	}()

	w.base = w.path
	if l.resolve&unix.RESOLVE_IN_ROOT != 0 {
		w.root = w.path
	}
	if path == "" {
		d := w.dentry()
		d.deleted = deleted
		return place{d: d}, nil
	}
	if path[0] == '/' && l.resolve&unix.RESOLVE_BENEATH != 0 {
		return place{}, unix.EXDEV
	}
	return w.walk(path)
}

// walk resolves path from where w is.
func (w *walker) walk(path string) (place, error) {
	wantDir := false // slashes follow the last name
	for {
		rest := strings.TrimLeft(path, "/")
		if rest == "" {
			if w.l.parent || w.l.create { // the root, or a link to a directory
				return place{dir: w.dentry()}, nil
			}
			if wantDir && !isDir(w.node) {
				return place{}, unix.ENOTDIR
			}
			return place{d: w.dentry(), fresh: w.fresh}, nil
		}
		dir, ok := w.node.(Directory)
		if !ok || !isDir(w.node) {
			return place{}, unix.ENOTDIR
		}
		if err := w.search(); err != nil {
			return place{}, err
		}
		name, after, _ := strings.Cut(rest, "/")
		tail := strings.TrimLeft(after, "/")
		slash := len(rest) > len(name) && tail == ""
		if len(name) > maxName {
			return place{}, unix.ENAMETOOLONG
		}
		if tail == "" && (w.l.parent || (w.l.create && (name == "." || name == ".."))) {
			return place{dir: w.dentry(), name: name, slash: slash}, nil
		}
		switch name {
		case ".":
			path = tail
			wantDir = true
			continue
		case "..":
			if err := w.up(); err != nil {
				return place{}, err
			}
			path = tail
			wantDir = true
			continue
		}

		var owner *Dentry // of the last name, for create
		rel := name
		if w.l.create && tail == "" {
			w.node.IncRef()
			owner = &Dentry{ns: w.ns, mnt: w.mnt, node: w.node, path: w.path}
		} else {
			rel = w.run(rest)
		}
		p, next, err := w.step(dir, rel, rest, owner)
		if owner != nil && (err != nil || p.dir == nil) {
			owner.Drop()
		}
		if err != nil || p.dir != nil || p.d != nil {
			return p, err
		}
		wantDir = strings.HasSuffix(path, "/") && (strings.Trim(next, "/") == "")
		path = next
	}
}

// step goes along rel, the beginning of rest. It returns a place if that is the
// end, else what is left to walk.
func (w *walker) step(dir Directory, rel, rest string, owner *Dentry) (place, string, error) {
	if w.ns.above[w.path] && !strings.Contains(rel, "/") {
		if m := w.ns.mounts[joinPath(w.path, rel)]; m != nil {
			if w.l.resolve&unix.RESOLVE_NO_XDEV != 0 {
				return place{}, "", unix.EXDEV
			}
			m.Root.IncRef()
			w.set(m, m.Root, m.Point)
			if owner != nil {
				return place{dir: owner, name: rel, d: w.dentry()}, "", nil
			}
			return place{}, rest[len(rel):], nil
		}
	}
	last := len(rel) == len(rest)
	node, n, err := dir.Walk(w.ctx, rel, w.l.statOnly && last)
	if err == unix.ENOENT && owner != nil {
		return place{dir: owner, name: rel, slash: !last}, "", nil
	}
	if err != nil {
		return place{}, "", err
	}
	tail := rest[n:]
	if node.Mode()&unix.S_IFMT != unix.S_IFLNK {
		w.set(w.mnt, node, joinPath(w.path, rel[:n]))
		w.fresh = true
		if owner != nil {
			if !last && !isDir(node) {
				return place{}, "", unix.ENOTDIR
			}
			return place{dir: owner, name: rel, slash: !last, d: w.dentry()}, "", nil
		}
		return place{}, tail, nil
	}
	if tail == "" && !w.l.follow {
		w.set(w.mnt, node, joinPath(w.path, rel[:n]))
		if owner != nil {
			return place{dir: owner, name: rel, d: w.dentry()}, "", nil
		}
		return place{d: w.dentry(), fresh: true}, "", nil
	}

	defer node.DecRef()
	if w.links++; w.links > maxSymlinks || w.l.resolve&unix.RESOLVE_NO_SYMLINKS != 0 {
		return place{}, "", unix.ELOOP
	}
	if magic, ok := node.(MagicLink); ok {
		d, err := magic.Jump(w.ctx)
		if err != nil {
			return place{}, "", err
		}
		if d != nil {
			if w.l.resolve&unix.RESOLVE_NO_MAGICLINKS != 0 {
				d.Drop()
				return place{}, "", unix.ELOOP
			}
			if w.l.resolve&(unix.RESOLVE_BENEATH|unix.RESOLVE_IN_ROOT) != 0 {
				d.Drop()
				return place{}, "", unix.EXDEV
			}
			if strings.Trim(tail, "/") == "" && !(tail != "" && !isDir(d.node)) {
				if owner != nil {
					return place{dir: owner, name: rel, d: d}, "", nil
				}
				return place{d: d}, "", nil
			}
			d.node.IncRef()
			path, _ := d.Path()
			w.set(d.mnt, d.node, path)
			d.Drop()
			return place{}, tail, nil
		}
	}
	link, ok := node.(Symlink)
	if !ok {
		return place{}, "", unix.EACCES
	}
	target, err := link.Readlink(w.ctx)
	switch {
	case err != nil:
		return place{}, "", err
	case target == "":
		return place{}, "", unix.ENOENT
	case len(target)+len(tail) >= 2*maxPath:
		return place{}, "", unix.ENAMETOOLONG
	}
	if target[0] == '/' {
		if w.l.resolve&unix.RESOLVE_BENEATH != 0 {
			return place{}, "", unix.EXDEV
		}
		if err := w.jump(w.root); err != nil {
			return place{}, "", err
		}
	} else if dirOf, _, nested := cutLast(rel[:n]); nested {
		// The link is not in the directory where the walk started.
		if err := w.jump(joinPath(w.path, dirOf)); err != nil {
			return place{}, "", err
		}
	}
	return place{}, target + tail, nil
}

// run returns the longest beginning of rest that one Walk can do: up to a mount
// point, "." or "..", or doubled slashes, and without the last name for create
// and parent.
func (w *walker) run(rest string) string {
	path, mounts := w.path, w.ns.above[w.path]
	// Whoever has to be checked at every directory goes one by one.
	single := !w.creds.Override && !w.mnt.hostChecks(w.creds)
	end := 0
	for i := 0; ; {
		j := strings.IndexByte(rest[i:], '/')
		name := rest[i:]
		if j >= 0 {
			name = rest[i : i+j]
		}
		if name == "" || name == "." || name == ".." || len(name) > maxName {
			return rest[:end]
		}
		if (w.l.parent || w.l.create) && (j < 0 || strings.Trim(rest[i+j:], "/") == "") {
			return rest[:end]
		}
		if mounts {
			path = joinPath(path, name)
			if w.ns.mounts[path] != nil {
				if i == 0 {
					return name // step crosses
				}
				return rest[:end]
			}
			mounts = w.ns.above[path]
		}
		end = i + len(name)
		if j < 0 || single {
			return rest[:end]
		}
		i = end + 1
	}
}

// up goes to the parent directory, but not above the root.
func (w *walker) up() error {
	if w.l.resolve&unix.RESOLVE_BENEATH != 0 && w.path == w.base {
		return unix.EXDEV
	}
	if w.path == w.root || w.path == "/" {
		return nil
	}
	if _, ok := w.ns.mounts[w.path]; ok && w.l.resolve&unix.RESOLVE_NO_XDEV != 0 {
		return unix.EXDEV
	}
	return w.jump(parentPath(w.path))
}

// jump goes to a canonical path, from the root of its mount.
func (w *walker) jump(path string) error {
	m, rel := w.ns.mountAt(path)
	if rel == "" {
		m.Root.IncRef()
		w.set(m, m.Root, path)
		return nil
	}
	node, n, err := m.Root.Walk(w.ctx, rel, false)
	if err != nil {
		return err
	}
	if n < len(rel) || !isDir(node) { // changed by somebody else
		node.DecRef()
		return unix.ENOENT
	}
	w.set(m, node, path)
	return nil
}

// search checks that the caller may look for names in the directory where w is.
func (w *walker) search() error {
	if w.creds.Override || w.node.Mode()&0o111 == 0o111 || w.mnt.hostChecks(w.creds) {
		return nil
	}
	return checkAccess(w.ctx, w.creds, w.node, MayExec)
}

func isDir(n Node) bool { return n.Mode()&unix.S_IFMT == unix.S_IFDIR }

// cutLast splits rel at its last slash.
func cutLast(rel string) (dir, name string, nested bool) {
	if i := strings.LastIndexByte(rel, '/'); i >= 0 {
		return rel[:i], rel[i+1:], true
	}
	return "", rel, false
}
