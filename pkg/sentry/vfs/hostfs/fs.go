package hostfs

import (
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/filemap"
)

// FS is a host directory, or one file, with all that lies beneath it.
//
// Every name goes to the host through openat2(2) with RESOLVE_BENEATH,
// RESOLVE_NO_SYMLINKS and RESOLVE_NO_MAGICLINKS, or is a single component that
// is not followed, relative to a descriptor of a directory that was found the
// same way. What is opened for reading or writing is the very inode that was
// checked before, through the Sentry's own /proc/self/fd.
type FS struct {
	writable bool
	root     *node

	// procFD is the directory /proc/self/fd of the host.
	procFD int

	devices sync.Map // st_dev -> *device
	inodes  inodeTable

	// links are paths from the root that were symbolic links when last seen, so
	// that the next walk stops there at once. Only a hint.
	linksMu sync.RWMutex
	links   map[string]struct{}
}

// maxLinks bounds the hints of an FS.
const maxLinks = 4096

// device is what matters of a host file system.
type device struct {
	denied bool
	noexec bool
}

// New opens the host directory or file path as a file system. With writable
// false nothing in it is ever changed; with true the process's umask is set to
// 0, since files are made with the modes that tasks ask for. Errors say what to
// do about them.
func New(path string, writable bool) (*FS, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w: name a directory that exists and that you may enter", path, err)
	}
	fs := &FS{writable: writable, links: map[string]struct{}{}}
	fs.inodes.m = map[inodeKey]*inode{}
	fs.procFD, err = unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open /proc/self/fd: %w: mount proc on /proc of the host", err)
	}
	n, err := fs.newNode(fd)
	if err != nil {
		unix.Close(fs.procFD)
		return nil, fmt.Errorf("use %s: %w", path, err)
	}
	fs.root = n
	if n.isDir() {
		probe, err := n.openat2(".", unix.O_PATH, 0)
		if err != nil {
			fs.Close()
			if errors.Is(err, unix.ENOSYS) {
				return nil, fmt.Errorf("openat2: %w: files are confined with it: use Linux 5.6 or later, and allow the call if a seccomp filter is in force", err)
			}
			return nil, fmt.Errorf("open %s: %w", path, err)
		}
		unix.Close(probe)
	}
	if writable {
		unix.Umask(0)
	}
	return fs, nil
}

// Root returns the Node of the directory or file itself; it belongs to the FS.
func (fs *FS) Root() vfs.Directory { return fs.root }

// Accessible returns an error unless the process may read the root, and search
// it if it is a directory.
func (fs *FS) Accessible() error {
	mode := uint32(vfs.MayRead)
	if fs.root.isDir() {
		mode |= vfs.MayExec
	}
	return fs.root.HostAccess(mode)
}

// Close closes what the FS holds. Files that are still open stay so.
func (fs *FS) Close() {
	fs.root.DecRef()
	unix.Close(fs.procFD)
}

// procName is the name of fd in /proc/self/fd.
func procName(fd int) string { return strconv.Itoa(fd) }

// reopen opens the inode behind fd with flags.
func (fs *FS) reopen(fd, flags int) (int, error) {
	for {
		n, err := unix.Openat(fs.procFD, procName(fd), flags|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// device returns what is known of the file system that st is in. fd leads there,
// or dir and name do.
func (fs *FS) device(st *unix.Stat_t, open func() (int, func(), error)) (*device, error) {
	if d, ok := fs.devices.Load(st.Dev); ok {
		return d.(*device), nil
	}
	fd, done, err := open()
	if err != nil {
		return nil, err
	}
	defer done()
	var sfs unix.Statfs_t
	if err := unix.Fstatfs(fd, &sfs); err != nil {
		return nil, err
	}
	d := &device{
		// A proc file system shows the Sentry itself: its memory, its descriptors.
		denied: sfs.Type == unix.PROC_SUPER_MAGIC,
		noexec: sfs.Flags&unix.ST_NOEXEC != 0,
	}
	fs.devices.Store(st.Dev, d)
	return d, nil
}

type inodeKey struct{ dev, ino uint64 }

// inodeTable holds the inodes that are open.
type inodeTable struct {
	mu sync.Mutex
	m  map[inodeKey]*inode
}

// inode is what the open files of one host inode share.
type inode struct {
	*filemap.Object
	locks vfs.Locks
}

// inode returns the shared part of the file st, with a reference.
func (fs *FS) inode(st *unix.Stat_t) *inode {
	t := &fs.inodes
	key := inodeKey{st.Dev, st.Ino}
	t.mu.Lock()
	defer t.mu.Unlock()
	if i := t.m[key]; i != nil && i.TryIncRef() {
		return i
	}
	i := &inode{}
	i.Object = filemap.New(st.Dev, st.Ino, func() {
		t.mu.Lock()
		if t.m[key] == i {
			delete(t.m, key)
		}
		t.mu.Unlock()
	})
	t.m[key] = i
	return i
}

// linkIn returns the shortest beginning of rel, from the root, that is known as
// a symbolic link.
func (fs *FS) linkIn(rel string) (string, bool) {
	fs.linksMu.RLock()
	defer fs.linksMu.RUnlock()
	if len(fs.links) == 0 {
		return "", false
	}
	for i := 0; i <= len(rel); i++ {
		if i == len(rel) || rel[i] == '/' {
			if _, ok := fs.links[rel[:i]]; ok {
				return rel[:i], true
			}
		}
	}
	return "", false
}

// noteLink remembers that rel is a symbolic link, or forgets it.
func (fs *FS) noteLink(rel string, is bool) {
	fs.linksMu.Lock()
	defer fs.linksMu.Unlock()
	if !is {
		delete(fs.links, rel)
		return
	}
	if len(fs.links) >= maxLinks {
		clear(fs.links)
	}
	fs.links[rel] = struct{}{}
}

// refs counts references and says when the last is gone.
type refs struct{ n atomic.Int64 }

func (r *refs) inc() { r.n.Add(1) }

func (r *refs) dec() (last bool) {
	switch n := r.n.Add(-1); {
	case n == 0:
		return true
	case n < 0:
		panic("hostfs: DecRef without a reference")
	}
	return false
}
