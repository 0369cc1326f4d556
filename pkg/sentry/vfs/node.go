package vfs

import (
	"context"

	"golang.org/x/sys/unix"
)

// Node is a file as its file system knows it, whatever its name. What a Node
// can do beyond this it says by implementing the interfaces below.
type Node interface {
	// IncRef and DecRef count the users of the Node. A lookup returns it with
	// one reference.
	IncRef()
	DecRef()

	// Mode returns the file's type, and its permission bits when it was looked up.
	Mode() uint32

	// Stat returns the file's attributes.
	Stat(ctx context.Context) (unix.Stat_t, error)

	// Open opens the file. flags are those of open(2), with permissions already
	// checked; creation flags but for O_TRUNC are not set. If it succeeds, d
	// belongs to the description; the Node may have replaced itself in it.
	Open(ctx context.Context, d *Dentry, flags uint32) (*FileDescription, error)
}

// Directory is implemented by Nodes that are directories.
type Directory interface {
	Node

	// Walk looks up rel: names separated by single slashes, none of them empty,
	// "." or "..". It returns the Node it got to, and the number of bytes of rel
	// that led there: less than len(rel) only if that Node is a symbolic link,
	// which Walk never follows. With statOnly the Node is only good for Mode,
	// Stat and DecRef, unless it is a symbolic link.
	Walk(ctx context.Context, rel string, statOnly bool) (node Node, n int, err error)
}

// MutableDirectory is implemented by directories whose entries can change.
// Names are single components. The caller has checked that the mount can be
// written, and the permissions of the directory.
type MutableDirectory interface {
	Directory

	// Create makes a regular file and opens it; EEXIST if there is anything of
	// that name. d stands for the new file and has no Node yet.
	Create(ctx context.Context, name string, d *Dentry, flags, mode uint32) (*FileDescription, error)

	// Tmpfile makes a regular file without a name and opens it (O_TMPFILE).
	Tmpfile(ctx context.Context, d *Dentry, flags, mode uint32) (*FileDescription, error)

	Mkdir(ctx context.Context, name string, mode uint32) error
	Mknod(ctx context.Context, name string, mode uint32) error
	Symlink(ctx context.Context, name, target string) error
	// Link gives the Node old, of the same file system, another name.
	Link(ctx context.Context, name string, old Node) error
	Unlink(ctx context.Context, name string) error
	Rmdir(ctx context.Context, name string) error
	// Rename moves name to newName in newDir, of the same file system; flags are
	// those of renameat2(2).
	Rename(ctx context.Context, name string, newDir Node, newName string, flags uint32) error
}

// Symlink is implemented by Nodes that are symbolic links.
type Symlink interface {
	Readlink(ctx context.Context) (string, error)
}

// MagicLink is implemented by symbolic links of /proc that lead to a file
// itself, not to a name.
type MagicLink interface {
	Symlink
	// Jump returns what the link leads to, owned by the caller. A nil Dentry
	// means that the text of the link is to be followed instead.
	Jump(ctx context.Context) (*Dentry, error)
}

// SetAttr says which attributes of a file to change.
type SetAttr struct {
	SetMode, SetUID, SetGID, SetSize, SetAtime, SetMtime bool

	Mode         uint32 // permission bits
	UID, GID     uint32
	Size         int64
	Atime, Mtime unix.Timespec // Nsec may be UTIME_NOW
}

// AttrSetter is implemented by Nodes whose attributes can be changed.
type AttrSetter interface {
	SetAttr(ctx context.Context, a SetAttr) error
}

// Statfser is implemented by Nodes that know about their file system.
type Statfser interface {
	Statfs(ctx context.Context) (unix.Statfs_t, error)
}

// Xattrer is implemented by Nodes with extended attributes (xattr(7)). A buffer
// of length 0 asks for the size alone.
type Xattrer interface {
	GetXattr(ctx context.Context, name string, buf []byte) (int, error)
	ListXattr(ctx context.Context, buf []byte) (int, error)
	SetXattr(ctx context.Context, name string, value []byte, flags uint32) error
	RemoveXattr(ctx context.Context, name string) error
}

// lookupStater is implemented by Nodes that still hold the attributes which
// their lookup read.
type lookupStater interface {
	LookupStat() unix.Stat_t
}
