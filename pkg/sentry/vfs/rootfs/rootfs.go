// Package rootfs puts together the Namespace that a sandbox starts with: a host
// directory as the root, binds, and private /tmp, /dev and /proc.
//
// It depends on vfs and on every file system. It holds no file system of its own.
package rootfs

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/devfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/hostfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/procfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/tmpfs"
)

// Bind is a host directory or file that the Namespace shows at another place.
type Bind struct {
	Source, Target string
}

// Config says what a Namespace is made of.
type Config struct {
	// Root is the host directory at "/".
	Root string
	// Write lets tasks change files under Root and the Binds.
	Write bool
	Binds []Bind
	// Proc is what /proc shows.
	Proc vfs.ProcProvider
	// Stdio are the files that the first task is given. /dev/tty and /dev/pts show
	// the terminals among them, and hold references until Close.
	Stdio []*vfs.FileDescription
	// TmpSize bounds what /tmp holds, and /dev/shm as well, in bytes each; 0
	// means half of the host's memory.
	TmpSize int64
}

// Minor device numbers of the private file systems. Their major number is 0, as
// that of the host's own without a device, whose minor numbers start at 1.
const (
	firstMinor = 1<<20 - 1<<10

	procMinor = firstMinor + iota
	devMinor
	tmpMinor
	shmMinor
	memfdMinor
	emptyMinor // and up
)

// dev returns the st_dev for a minor number.
func dev(minor uint32) uint64 { return unix.Mkdev(0, minor) }

// Root is a Namespace and what goes with it.
type Root struct {
	*vfs.Namespace

	hosts     []*hostfs.FS
	terminals []*vfs.FileDescription
}

// Close closes the host directories and terminals. No task may run any more.
func (r *Root) Close() {
	for _, fs := range r.hosts {
		fs.Close()
	}
	for _, f := range r.terminals {
		f.DecRef()
	}
}

// New returns a Namespace. Errors name the directory and the fix.
func New(c Config) (*Root, error) {
	r := &Root{}
	ok := false
	defer func() {
		if !ok {
			r.Close()
		}
	}()
	if c.TmpSize == 0 {
		var info unix.Sysinfo_t
		if err := unix.Sysinfo(&info); err != nil {
			return nil, fmt.Errorf("sysinfo: %w", err)
		}
		c.TmpSize = int64(uint64(info.Totalram) * uint64(info.Unit) / 2)
	}
	for _, f := range c.Stdio {
		if t, ok := f.Impl().(vfs.Terminal); ok && t.IsTerminal() {
			f.IncRef()
			r.terminals = append(r.terminals, f)
		}
	}

	root, err := r.host(c.Root, c.Write, "/")
	if err != nil {
		return nil, err
	}
	if root.Root.Mode()&unix.S_IFMT != unix.S_IFDIR {
		return nil, fmt.Errorf("root %s: %w: name a directory", c.Root, unix.ENOTDIR)
	}
	r.Namespace = vfs.NewNamespace(root)

	memfds := tmpfs.New(dev(memfdMinor), 0o777, c.TmpSize)
	r.Memfd = func(ctx context.Context, name string, sealable bool) *vfs.FileDescription {
		return tmpfs.NewMemfd(ctx, memfds, name, sealable)
	}
	for _, m := range []*vfs.Mount{
		{Point: "/dev", Root: devfs.New(dev(devMinor), r.terminals), Source: "none", Type: "devtmpfs", Dev: dev(devMinor), ReadOnly: true},
		{Point: "/dev/shm", Root: tmpfs.New(dev(shmMinor), 0o1777, c.TmpSize).Root(), Source: "none", Type: "tmpfs", Dev: dev(shmMinor)},
		{Point: "/proc", Root: procfs.New(dev(procMinor), c.Proc, func() *vfs.Namespace { return r.Namespace }), Source: "none", Type: "proc", Dev: dev(procMinor)},
		{Point: "/tmp", Root: tmpfs.New(dev(tmpMinor), 0o1777, c.TmpSize).Root(), Source: "none", Type: "tmpfs", Dev: dev(tmpMinor)},
	} {
		r.AddMount(m)
	}
	for i, b := range c.Binds {
		target := b.Target
		if target == "" {
			target = b.Source
		}
		if !path.IsAbs(target) {
			return nil, fmt.Errorf("bind %s:%s: the target must be an absolute path", b.Source, b.Target)
		}
		target = path.Clean(target)
		if target == "/" {
			return nil, fmt.Errorf("bind %s:/: use the root option to replace the root directory", b.Source)
		}
		m, err := r.host(b.Source, c.Write, target)
		if err != nil {
			return nil, err
		}
		if err := r.ancestors(target, emptyMinor+uint32(i)); err != nil {
			return nil, fmt.Errorf("bind %s:%s: %w", b.Source, target, err)
		}
		r.AddMount(m)
	}
	ok = true
	return r, nil
}

// host returns the mount of a host directory or file.
func (r *Root) host(source string, write bool, point string) (*vfs.Mount, error) {
	fs, err := hostfs.New(source, write)
	if err != nil {
		return nil, err
	}
	r.hosts = append(r.hosts, fs)
	if err := fs.Accessible(); err != nil {
		return nil, fmt.Errorf("open %s: %w: choose one that you may read", source, err)
	}
	st, err := fs.Root().Stat(context.Background())
	if err != nil {
		return nil, fmt.Errorf("stat %s: %w", source, err)
	}
	return &vfs.Mount{
		Point: point, Root: fs.Root(), ReadOnly: !write, Host: true,
		Source: source, Type: "hostfs", Dev: st.Dev,
	}, nil
}

// ancestors makes sure that the directories above target are there. The first
// one missing becomes an empty file system that holds the rest.
func (r *Root) ancestors(target string, n uint32) error {
	ctx := context.Background()
	fsc := vfs.NewFSContext(r.Namespace)
	defer fsc.DecRef()
	names := strings.Split(strings.TrimPrefix(target, "/"), "/")
	at := ""
	for i, name := range names[:len(names)-1] {
		at += "/" + name
		st, err := fsc.StatAt(ctx, nil, at, unix.AT_SYMLINK_NOFOLLOW)
		switch {
		case errors.Is(err, unix.ENOENT):
			fs := tmpfs.New(dev(n), 0o755, 0)
			for d, rest := fs.Root().(vfs.MutableDirectory), names[i+1:len(names)-1]; len(rest) > 0; rest = rest[1:] {
				if err := d.Mkdir(ctx, rest[0], 0o755); err != nil {
					return err
				}
				node, _, err := d.Walk(ctx, rest[0], false)
				if err != nil {
					return err
				}
				d = node.(vfs.MutableDirectory)
			}
			r.AddMount(&vfs.Mount{Point: at, Root: fs.Root(), ReadOnly: true, Source: "none", Type: "tmpfs", Dev: dev(n)})
			return nil
		case err != nil:
			return fmt.Errorf("%s: %w", at, err)
		case st.Mode&unix.S_IFMT == unix.S_IFLNK:
			return fmt.Errorf("%s is a symbolic link in the root directory: name what it leads to", at)
		case st.Mode&unix.S_IFMT != unix.S_IFDIR:
			return fmt.Errorf("%s: %w", at, unix.ENOTDIR)
		}
	}
	return nil
}
