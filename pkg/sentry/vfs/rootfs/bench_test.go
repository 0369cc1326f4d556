package rootfs_test

import (
	"encoding/binary"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/rootfs"
)

// newHostContext returns a context over the host's own root directory.
func newHostContext(b *testing.B) *vfs.FSContext {
	b.Helper()
	r, err := rootfs.New(rootfs.Config{Root: "/", Proc: &proc{}, TmpSize: 64 << 20})
	if err != nil {
		b.Fatal(err)
	}
	fs := vfs.NewFSContext(r.Namespace)
	b.Cleanup(func() {
		fs.DecRef()
		r.Close()
	})
	return fs
}

// ratio runs ours and the same host calls in turn, and reports the time of ours
// per call beside how many times that is of the host's.
func ratio(b *testing.B, ours, host func()) {
	b.Helper()
	ours()
	host()
	var to, th time.Duration
	for b.Loop() {
		start := time.Now()
		ours()
		mid := time.Now()
		host()
		to += mid.Sub(start)
		th += time.Since(mid)
	}
	b.ReportMetric(float64(to)/float64(b.N), "ours-ns/op")
	b.ReportMetric(float64(to)/float64(th), "x-host")
}

func BenchmarkStat(b *testing.B) {
	fs := newHostContext(b)
	for _, path := range []string{"/etc", "/usr/bin/env", "/lib/os-release", "/usr/lib/os-release"} {
		if _, err := os.Stat(path); err != nil {
			b.Fatal(err)
		}
		b.Run(path[1:], func(b *testing.B) {
			ratio(b, func() {
				if _, err := fs.StatAt(ctx, nil, path, 0); err != nil {
					b.Fatal(err)
				}
			}, func() {
				var st unix.Stat_t
				if err := unix.Stat(path, &st); err != nil {
					b.Fatal(err)
				}
			})
		})
	}
}

func BenchmarkOpenClose(b *testing.B) {
	fs := newHostContext(b)
	ratio(b, func() {
		f, err := fs.OpenAt(ctx, nil, "/etc/passwd", unix.O_RDONLY, 0, 0)
		if err != nil {
			b.Fatal(err)
		}
		f.DecRef()
	}, func() {
		fd, err := unix.Open("/etc/passwd", unix.O_RDONLY, 0)
		if err != nil {
			b.Fatal(err)
		}
		unix.Close(fd)
	})
}

// BenchmarkWalk lists a tree and reads the attributes of all in it, as find and
// ls -lR do.
func BenchmarkWalk(b *testing.B) {
	fs := newHostContext(b)
	const top = "/usr/lib"
	buf := make([]byte, 32<<10)
	eachName := func(b []byte, f func(name string, typ byte)) {
		for len(b) > 0 {
			n := int(binary.LittleEndian.Uint16(b[16:]))
			name := b[19:n]
			for i, c := range name {
				if c == 0 {
					name = name[:i]
					break
				}
			}
			if s := string(name); s != "." && s != ".." {
				f(s, b[18])
			}
			b = b[n:]
		}
	}
	var ours func(at *vfs.FileDescription, name string)
	ours = func(at *vfs.FileDescription, name string) {
		d, err := fs.OpenAt(ctx, at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0, 0)
		if err != nil {
			b.Fatal(err)
		}
		defer d.DecRef()
		var dirs []string
		for {
			n, err := d.ReadDirRaw(ctx, buf)
			if err != nil {
				b.Fatal(err)
			}
			if n == 0 {
				break
			}
			eachName(buf[:n], func(name string, typ byte) {
				fs.StatAt(ctx, d, name, unix.AT_SYMLINK_NOFOLLOW)
				if typ == unix.DT_DIR {
					dirs = append(dirs, name)
				}
			})
		}
		for _, dir := range dirs {
			ours(d, dir)
		}
	}
	var host func(at int, name string)
	host = func(at int, name string) {
		d, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			b.Fatal(err)
		}
		defer unix.Close(d)
		var dirs []string
		for {
			n, err := unix.Getdents(d, buf)
			if err != nil {
				b.Fatal(err)
			}
			if n == 0 {
				break
			}
			eachName(buf[:n], func(name string, typ byte) {
				var st unix.Stat_t
				unix.Fstatat(d, name, &st, unix.AT_SYMLINK_NOFOLLOW)
				if typ == unix.DT_DIR {
					dirs = append(dirs, name)
				}
			})
		}
		for _, dir := range dirs {
			host(d, dir)
		}
	}
	ratio(b, func() { ours(nil, top) }, func() { host(unix.AT_FDCWD, top) })
}
