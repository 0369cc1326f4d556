// Package devfs is the /dev of a sandbox: the few devices that programs count
// on, none of them the host's.
//
// It depends on vfs and pseudofs.
package devfs

import (
	"context"
	"crypto/rand"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/pseudofs"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// New returns the root of a file system with the number dev. terminals are those
// that the sandbox was started on: the first is /dev/tty, and all are in /dev/pts
// under their own names. They must stay open.
func New(dev uint64, terminals []*vfs.FileDescription) vfs.Directory {
	fs := &pseudofs.FS{Dev: dev, Magic: unix.TMPFS_MAGIC, Start: time.Now()}
	attr := func(name string, mode uint32) pseudofs.Attr {
		return pseudofs.Attr{FS: fs, Ino: pseudofs.Ino("/dev/" + name), FileMode: mode}
	}
	var names []string
	nodes := map[string]vfs.Node{}
	add := func(name string, n vfs.Node) {
		names = append(names, name)
		nodes[name] = n
	}
	memory := func(name string, minor uint32, d vfs.Impl) {
		a := attr(name, unix.S_IFCHR|0o666)
		a.Rdev = unix.Mkdev(1, minor)
		add(name, &device{Attr: a, open: func(_ context.Context, at *vfs.Dentry, flags uint32) (*vfs.FileDescription, error) {
			return vfs.NewFileAt(d, flags, at), nil
		}})
	}
	link := func(name, target string) {
		add(name, &pseudofs.Link{
			Attr:   attr(name, unix.S_IFLNK|0o777),
			Target: func(context.Context) (string, error) { return target, nil },
		})
	}
	link("core", "/proc/kcore")
	link("fd", "/proc/self/fd")
	memory("full", 7, &full{special{node: func() vfs.Node { return nodes["full"] }}})
	memory("null", 3, &null{special{node: func() vfs.Node { return nodes["null"] }}})
	memory("random", 8, &random{special{node: func() vfs.Node { return nodes["random"] }}})
	pts := &pseudofs.Dir{Attr: attr("pts", unix.S_IFDIR|0o755)}
	pts.Lookup, pts.List = pseudofs.Static(terminalNodes(terminals))
	add("pts", pts)
	link("stderr", "/proc/self/fd/2")
	link("stdin", "/proc/self/fd/0")
	link("stdout", "/proc/self/fd/1")
	a := attr("tty", unix.S_IFCHR|0o666)
	a.Rdev = unix.Mkdev(5, 0)
	add("tty", &device{Attr: a, open: func(_ context.Context, at *vfs.Dentry, flags uint32) (*vfs.FileDescription, error) {
		if len(terminals) == 0 {
			return nil, unix.ENXIO
		}
		return reopen(terminals[0], at, flags)
	}})
	memory("urandom", 9, &random{special{node: func() vfs.Node { return nodes["urandom"] }}})
	memory("zero", 5, &zero{special{node: func() vfs.Node { return nodes["zero"] }}})

	root := &pseudofs.Dir{Attr: attr("", unix.S_IFDIR|0o755)}
	root.Lookup, root.List = pseudofs.Static(names, nodes)
	return root
}

// device is the inode of a device.
type device struct {
	pseudofs.Attr
	open func(ctx context.Context, at *vfs.Dentry, flags uint32) (*vfs.FileDescription, error)
}

// Open implements vfs.Node.
func (d *device) Open(ctx context.Context, at *vfs.Dentry, flags uint32) (*vfs.FileDescription, error) {
	return d.open(ctx, at, flags)
}

// terminalNodes returns the entries of /dev/pts.
func terminalNodes(terminals []*vfs.FileDescription) (names []string, nodes map[string]vfs.Node) {
	nodes = map[string]vfs.Node{}
	for _, f := range terminals {
		name, ok := strings.CutPrefix(f.Path(), "/dev/pts/")
		if !ok || nodes[name] != nil || strings.Contains(name, "/") {
			continue
		}
		names = append(names, name)
		nodes[name] = &terminal{f}
	}
	return names, nodes
}

// terminal is the inode of a terminal from outside.
type terminal struct{ file *vfs.FileDescription }

// IncRef implements vfs.Node.
func (*terminal) IncRef() {}

// DecRef implements vfs.Node.
func (*terminal) DecRef() {}

// Mode implements vfs.Node.
func (t *terminal) Mode() uint32 {
	st, err := t.file.Stat(context.Background())
	if err != nil {
		return unix.S_IFCHR
	}
	return st.Mode
}

// Stat implements vfs.Node.
func (t *terminal) Stat(ctx context.Context) (unix.Stat_t, error) { return t.file.Stat(ctx) }

// Open implements vfs.Node.
func (t *terminal) Open(_ context.Context, d *vfs.Dentry, flags uint32) (*vfs.FileDescription, error) {
	return reopen(t.file, d, flags)
}

// reopen opens a terminal again, at d.
func reopen(f *vfs.FileDescription, d *vfs.Dentry, flags uint32) (*vfs.FileDescription, error) {
	r, ok := f.Impl().(vfs.Reopener)
	if !ok {
		return nil, unix.ENXIO
	}
	path := d.String()
	file, err := r.Reopen(flags, func() string { return path })
	if err == nil {
		d.Drop()
	}
	return file, err
}

// special is what the open devices have in common.
type special struct {
	waiter.AlwaysReady
	node func() vfs.Node
}

// Stat implements vfs.Impl.
func (s *special) Stat(ctx context.Context) (unix.Stat_t, error) { return s.node().Stat(ctx) }

// Release implements vfs.Impl.
func (*special) Release() {}

// Seek implements vfs.Seeker.
func (*special) Seek(context.Context, int64, int64, int) (int64, error) { return 0, nil }

// null is /dev/null.
type null struct{ special }

// Read implements vfs.StreamReader.
func (*null) Read(context.Context, []byte) (int, error) { return 0, nil }

// Write implements vfs.StreamWriter.
func (*null) Write(_ context.Context, p []byte) (int, error) { return len(p), nil }

// ReadAt implements vfs.ReaderAt.
func (*null) ReadAt(context.Context, []byte, int64) (int, error) { return 0, nil }

// zero is /dev/zero.
type zero struct{ special }

// Read implements vfs.StreamReader.
func (*zero) Read(_ context.Context, p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// Write implements vfs.StreamWriter.
func (*zero) Write(_ context.Context, p []byte) (int, error) { return len(p), nil }

// ReadAt implements vfs.ReaderAt.
func (z *zero) ReadAt(ctx context.Context, p []byte, _ int64) (int, error) { return z.Read(ctx, p) }

// ConfigureMMap implements vfs.MMapper: a mapping of it is anonymous memory.
func (*zero) ConfigureMMap(_ context.Context, opts *memmap.MMapOpts) error {
	opts.Mappable, opts.MappingIdentity, opts.Offset = nil, nil, 0
	return nil
}

// full is /dev/full.
type full struct{ special }

// Read implements vfs.StreamReader.
func (*full) Read(_ context.Context, p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// Write implements vfs.StreamWriter.
func (*full) Write(_ context.Context, p []byte) (int, error) { return 0, unix.ENOSPC }

// random is /dev/random and /dev/urandom.
type random struct{ special }

// Read implements vfs.StreamReader.
func (*random) Read(_ context.Context, p []byte) (int, error) { return rand.Read(p) }

// Write implements vfs.StreamWriter.
func (*random) Write(_ context.Context, p []byte) (int, error) { return len(p), nil }

// rndgetentcnt is RNDGETENTCNT of linux/random.h.
const rndgetentcnt = 0x80045200

// Ioctl implements vfs.Ioctler.
func (*random) Ioctl(ctx context.Context, uio usermem.IO, request uint32, arg uintptr) (uintptr, error) {
	if request != rndgetentcnt {
		return 0, unix.ENOTTY
	}
	return 0, usermem.CopyUint32Out(ctx, uio, hostarch.Addr(arg), 256, usermem.IOOpts{})
}
