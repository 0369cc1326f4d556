// Package pseudofs has the parts of file systems whose files are made up by the
// Sentry: /dev and /proc are built of them.
//
// It depends on vfs. What the files say is not its business.
package pseudofs

import (
	"context"
	"hash/fnv"
	"io"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
)

// FS is what the files of one file system share.
type FS struct {
	Dev   uint64    // st_dev
	Magic int64     // f_type of statfs(2)
	Start time.Time // the time that every file shows
}

// Attr are the attributes of a file. It is embedded by every kind, and
// implements most of vfs.Node.
type Attr struct {
	FS       *FS
	Ino      uint64
	FileMode uint32 // type and permission bits
	UID, GID uint32
	Rdev     uint64
}

// Ino returns an inode number for a path in a file system of this package.
func Ino(path string) uint64 {
	h := fnv.New64a()
	io.WriteString(h, path)
	return h.Sum64()>>16 | 1 // some programs keep inode numbers in few bits
}

// IncRef implements vfs.Node.
func (*Attr) IncRef() {}

// DecRef implements vfs.Node.
func (*Attr) DecRef() {}

// Mode implements vfs.Node.
func (a *Attr) Mode() uint32 { return a.FileMode }

// Stat implements vfs.Node.
func (a *Attr) Stat(context.Context) (unix.Stat_t, error) {
	st := unix.Stat_t{
		Dev: a.FS.Dev, Ino: a.Ino, Mode: a.FileMode, Uid: a.UID, Gid: a.GID,
		Rdev: a.Rdev, Blksize: 4096, Nlink: 1,
	}
	if a.FileMode&unix.S_IFMT == unix.S_IFDIR {
		st.Nlink = 2
	}
	st.Mtim = unix.NsecToTimespec(a.FS.Start.UnixNano())
	st.Atim, st.Ctim = st.Mtim, st.Mtim
	return st, nil
}

// Statfs implements vfs.Statfser.
func (a *Attr) Statfs(context.Context) (unix.Statfs_t, error) {
	st := unix.Statfs_t{Type: a.FS.Magic, Bsize: 4096, Frsize: 4096, Namelen: 255}
	return st, nil
}

// Dir is a directory.
type Dir struct {
	Attr
	// Lookup returns the file of a name, or an error.
	Lookup func(ctx context.Context, name string) (vfs.Node, error)
	// List returns the names, in an order that stays the same.
	List func(ctx context.Context) []string
}

// Static returns the functions of a Dir with fixed entries.
func Static(names []string, nodes map[string]vfs.Node) (
	lookup func(context.Context, string) (vfs.Node, error), list func(context.Context) []string) {
	lookup = func(_ context.Context, name string) (vfs.Node, error) {
		if n := nodes[name]; n != nil {
			return n, nil
		}
		return nil, unix.ENOENT
	}
	return lookup, func(context.Context) []string { return names }
}

// Walk implements vfs.Directory.
func (d *Dir) Walk(ctx context.Context, rel string, _ bool) (vfs.Node, int, error) {
	name, rest, more := strings.Cut(rel, "/")
	node, err := d.Lookup(ctx, name)
	if err != nil || !more || node.Mode()&unix.S_IFMT == unix.S_IFLNK {
		return node, len(name), err
	}
	dir, ok := node.(vfs.Directory)
	if !ok {
		return nil, 0, unix.ENOTDIR
	}
	node, n, err := dir.Walk(ctx, rest, false)
	return node, len(name) + 1 + n, err
}

// Open implements vfs.Node.
func (d *Dir) Open(_ context.Context, at *vfs.Dentry, flags uint32) (*vfs.FileDescription, error) {
	return vfs.NewFileAt(&openDir{Dir: d, at: at}, flags, at), nil
}

type openDir struct {
	waiter.AlwaysReady
	*Dir
	at *vfs.Dentry

	mu    sync.Mutex
	names []string // as of the last time that it was read from the start
}

// Release implements vfs.Impl.
func (*openDir) Release() {}

// ReadDir implements vfs.DirReader. An entry's offset is its place in the list
// as it was when the directory was read from its start.
func (d *openDir) ReadDir(ctx context.Context, off int64, emit func(vfs.Dirent) bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off == 0 || d.names == nil {
		d.names = append([]string{".", ".."}, d.List(ctx)...)
		have := map[string]bool{}
		for _, name := range d.names {
			have[name] = true
		}
		for _, name := range d.at.MountNames() {
			if !have[name] {
				d.names = append(d.names, name)
			}
		}
	}
	for ; off >= 0 && off < int64(len(d.names)); off++ {
		name := d.names[off]
		e := vfs.Dirent{Name: name, NextOff: off + 1, Ino: d.Ino, Type: unix.DT_DIR}
		if name != "." && name != ".." {
			if node, err := d.Lookup(ctx, name); err == nil {
				st, err := node.Stat(ctx)
				node.DecRef()
				if err != nil {
					continue
				}
				e.Ino, e.Type = st.Ino, uint8(st.Mode&unix.S_IFMT>>12)
			} else if !isMount(d.at, name) {
				continue // gone meanwhile
			}
		}
		if !emit(e) {
			return nil
		}
	}
	return nil
}

func isMount(at *vfs.Dentry, name string) bool {
	for _, m := range at.MountNames() {
		if m == name {
			return true
		}
	}
	return false
}

// Seek implements vfs.Seeker.
func (d *openDir) Seek(_ context.Context, cur, off int64, whence int) (int64, error) {
	return vfs.SeekDir(cur, off, whence)
}

// Link is a symbolic link.
type Link struct {
	Attr
	Target func(ctx context.Context) (string, error)
	// Follow returns what the link leads to if that is not its text; may be nil.
	Follow func(ctx context.Context) (*vfs.Dentry, error)
}

// Readlink implements vfs.Symlink.
func (l *Link) Readlink(ctx context.Context) (string, error) { return l.Target(ctx) }

// Jump implements vfs.MagicLink.
func (l *Link) Jump(ctx context.Context) (*vfs.Dentry, error) {
	if l.Follow == nil {
		return nil, nil
	}
	return l.Follow(ctx)
}

// Open implements vfs.Node.
func (*Link) Open(context.Context, *vfs.Dentry, uint32) (*vfs.FileDescription, error) {
	return nil, unix.ELOOP
}

// File is a regular file whose contents are made when it is read from its start.
type File struct {
	Attr
	Content func(ctx context.Context) ([]byte, error)
	// Write takes what is written at once; nil means EACCES or, for the
	// privileged, EIO.
	Write func(ctx context.Context, p []byte) error
}

// Open implements vfs.Node.
func (f *File) Open(_ context.Context, d *vfs.Dentry, flags uint32) (*vfs.FileDescription, error) {
	return vfs.NewFileAt(&openFile{File: f}, flags, d), nil
}

// SetAttr implements vfs.AttrSetter: these files have no length to set.
func (f *File) SetAttr(_ context.Context, a vfs.SetAttr) error {
	if a.SetSize && !a.SetMode && !a.SetUID && !a.SetGID {
		return nil
	}
	return unix.EPERM
}

type openFile struct {
	waiter.AlwaysReady
	*File

	mu   sync.Mutex
	data []byte
	read bool
}

// Release implements vfs.Impl.
func (*openFile) Release() {}

// ReadAt implements vfs.ReaderAt.
func (f *openFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if off == 0 || !f.read {
		data, err := f.Content(ctx)
		if err != nil {
			return 0, err
		}
		f.data, f.read = data, true
	}
	if off >= int64(len(f.data)) {
		return 0, nil
	}
	return copy(p, f.data[off:]), nil
}

// WriteAt implements vfs.WriterAt.
func (f *openFile) WriteAt(ctx context.Context, p []byte, _ int64) (int, error) {
	if f.File.Write == nil {
		return 0, unix.EIO
	}
	if err := f.File.Write(ctx, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Append implements vfs.WriterAt.
func (f *openFile) Append(ctx context.Context, p []byte) (int, int64, error) {
	n, err := f.WriteAt(ctx, p, 0)
	return n, int64(n), err
}

// Size implements vfs.Sizer.
func (*openFile) Size(context.Context) (int64, error) { return 0, nil }

// Truncate implements vfs.Truncater.
func (*openFile) Truncate(context.Context, int64) error { return nil }
