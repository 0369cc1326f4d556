package rootfs_test

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/hostfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/rootfs"
)

// The terminal that a sandbox starts on is /dev/tty, and has the name that it
// has outside, also when no task has it open any more.
func TestTerminal(t *testing.T) {
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(master)
	must(t, unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(master, unix.TIOCGPTN)
	must(t, err)
	name := fmt.Sprintf("/dev/pts/%d", n)
	slave, err := unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(slave)
	p, err := hostfs.NewPoller()
	must(t, err)
	defer p.Close()
	f, err := hostfs.NewFile(p, slave)
	must(t, err)
	r, err := rootfs.New(rootfs.Config{Root: t.TempDir(), Proc: &proc{}, TmpSize: 1 << 20, Stdio: []*vfs.FileDescription{f}})
	must(t, err)
	defer r.Close()
	fs := vfs.NewFSContext(r.Namespace)
	defer fs.DecRef()

	var want unix.Stat_t
	must(t, unix.Fstat(slave, &want))
	if got, err := fs.StatAt(ctx, nil, name, 0); got.Rdev != want.Rdev || got.Ino != want.Ino || f.Path() != name {
		t.Errorf("stat %s = %#x, inode %d, %v; the open terminal is %#x, inode %d, named %s",
			name, got.Rdev, got.Ino, err, want.Rdev, want.Ino, f.Path())
	}
	f.DecRef() // every task has closed it
	for _, path := range []string{"/dev/tty", name} {
		f, err := fs.OpenAt(ctx, nil, path, unix.O_RDWR, 0, 0)
		must(t, err)
		if _, err := f.Write(ctx, []byte("hi")); err != nil {
			t.Errorf("write to %s: %v", path, err)
		}
		f.DecRef()
		buf := make([]byte, 10)
		if n, err := unix.Read(master, buf); string(buf[:n]) != "hi" {
			t.Errorf("through %s came %q, %v", path, buf[:n], err)
		}
	}
	if _, err := fs.StatAt(ctx, nil, "/dev/pts/99999", 0); err != unix.ENOENT {
		t.Errorf("another terminal: %v, want ENOENT", err)
	}
}
