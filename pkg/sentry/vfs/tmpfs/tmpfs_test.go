package tmpfs

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
)

var ctx = context.Background()

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newFS(size int64) (*FS, *vfs.FSContext) {
	fs := New(1, 0o777, size)
	return fs, vfs.NewFSContext(vfs.NewNamespace(&vfs.Mount{Root: fs.Root()}))
}

func create(t *testing.T, fsc *vfs.FSContext, path string) *vfs.FileDescription {
	t.Helper()
	f, err := fsc.OpenAt(ctx, nil, path, unix.O_CREAT|unix.O_RDWR, 0o644, 0)
	must(t, err)
	return f
}

func descriptors(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(names)
}

func TestLimit(t *testing.T) {
	const limit = 1 << 20
	before := descriptors(t)
	fs, fsc := newFS(limit)
	defer fsc.DecRef()
	f := create(t, fsc, "/f")
	big := make([]byte, limit/2)
	if n, err := f.Write(ctx, big); n != len(big) || err != nil {
		t.Fatalf("write = %d, %v", n, err)
	}
	if _, err := f.Write(ctx, make([]byte, limit)); err != unix.ENOSPC {
		t.Errorf("write beyond the limit: %v, want ENOSPC", err)
	}
	must(t, f.Truncate(ctx, 100<<20)) // a hole
	if st, _ := fsc.Statfs(ctx, "/"); st.Bfree*4096 != limit/2 {
		t.Errorf("%d bytes free, want %d", st.Bfree*4096, limit/2)
	}
	must(t, fsc.UnlinkAt(ctx, nil, "/f", 0))
	if fs.used.Load() == 0 {
		t.Error("an open file that was removed uses nothing")
	}
	f.DecRef()
	if used, inodes := fs.used.Load(), fs.inodes.Load(); used != 0 || inodes != 1 {
		t.Errorf("%d bytes in %d inodes are left, want the root alone", used, inodes)
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// Small files need no descriptor.
func TestManyFiles(t *testing.T) {
	before := descriptors(t)
	_, fsc := newFS(1 << 30)
	defer fsc.DecRef()
	for i := range 2000 {
		f := create(t, fsc, fmt.Sprintf("/%d", i))
		if _, err := f.Write(ctx, make([]byte, 5000)); err != nil {
			t.Fatal(err)
		}
		f.DecRef()
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// TestContents compares random operations with a host file.
func TestContents(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	host, err := os.CreateTemp(t.TempDir(), "")
	must(t, err)
	defer host.Close()
	_, fsc := newFS(1 << 30)
	defer fsc.DecRef()
	f := create(t, fsc, "/f")
	defer f.DecRef()
	a, b := make([]byte, 1<<20), make([]byte, 1<<20)
	max := int64(1000)
	for i := range 3000 {
		if i == 1500 {
			max = 200000 // now it does not fit into the heap
		}
		off, n := rng.Int64N(max), rng.Int64N(max/4)
		switch rng.IntN(5) {
		case 0:
			must(t, f.Truncate(ctx, off))
			must(t, host.Truncate(off))
		case 1, 2:
			data := bytes.Repeat([]byte{byte(i)}, int(n))
			if m, err := f.PWrite(ctx, data, off); m != int(n) || err != nil {
				t.Fatalf("seed %d step %d: write = %d, %v", seed, i, m, err)
			}
			_, err := host.WriteAt(data, off)
			must(t, err)
		default:
			m, err := f.PRead(ctx, a[:n], off)
			must(t, err)
			k, _ := host.ReadAt(b[:n], off)
			if m != k || !bytes.Equal(a[:m], b[:k]) {
				t.Fatalf("seed %d step %d: read at %d of %d bytes differs (%d, %d)", seed, i, off, n, m, k)
			}
		}
	}
}

func TestMapping(t *testing.T) {
	before := descriptors(t)
	fs, fsc := newFS(1 << 30)
	defer fsc.DecRef()
	f := create(t, fsc, "/f")
	if _, err := f.Write(ctx, []byte("mapped")); err != nil {
		t.Fatal(err)
	}
	opts := memmap.MMapOpts{Length: 4096, Perms: hostarch.ReadWrite, MaxPerms: hostarch.AnyAccess}
	must(t, f.ConfigureMMap(ctx, &opts))
	opts.MappingIdentity.IncRef()
	must(t, fsc.UnlinkAt(ctx, nil, "/f", 0))
	mr := memmap.MappableRange{Start: 0, End: 4096}
	ts, err := opts.Mappable.Translate(ctx, mr, mr, hostarch.Write)
	must(t, err)
	fr := ts[0].FileRange()
	ts[0].File.IncRef(fr)
	blocks, err := ts[0].File.MapInternal(fr, hostarch.ReadWrite)
	must(t, err)
	copy(blocks[0], "MAP")
	buf := make([]byte, 6)
	if _, err := f.PRead(ctx, buf, 0); err != nil || string(buf) != "MAPped" {
		t.Errorf("file has %q, %v", buf, err)
	}
	f.DecRef()
	if string(blocks[0][:6]) != "MAPped" {
		t.Error("mapping is gone with the file")
	}
	// Somebody else may have a descriptor: the memory goes all the same.
	held, err := unix.Dup(ts[0].File.FD())
	must(t, err)
	defer unix.Close(held)
	before++
	ts[0].File.DecRef(fr)
	opts.MappingIdentity.DecRef()
	var st unix.Stat_t
	must(t, unix.Fstat(held, &st))
	if st.Size != 0 || st.Blocks != 0 {
		t.Errorf("a file that is gone has %d bytes, %d blocks", st.Size, st.Blocks)
	}
	if after := descriptors(t); after != before || fs.inodes.Load() != 1 {
		t.Errorf("%d descriptors before, %d after; %d inodes", before, after, fs.inodes.Load())
	}
}

func TestMemfd(t *testing.T) {
	fs, fsc := newFS(1 << 30)
	defer fsc.DecRef()
	f := NewMemfd(ctx, fs, "x", true)
	defer f.DecRef()
	if f.Path() != "/memfd:x (deleted)" {
		t.Errorf("path %q", f.Path())
	}
	if _, err := f.Write(ctx, []byte("sealed")); err != nil {
		t.Fatal(err)
	}
	s := f.Impl().(vfs.Sealer)
	must(t, s.AddSeals(unix.F_SEAL_GROW|unix.F_SEAL_SHRINK))
	if err := f.Truncate(ctx, 3); err != unix.EPERM {
		t.Errorf("shrink: %v, want EPERM", err)
	}
	if err := f.Truncate(ctx, 30); err != unix.EPERM {
		t.Errorf("grow: %v, want EPERM", err)
	}
	if _, err := f.PWrite(ctx, []byte("S"), 0); err != nil {
		t.Errorf("write: %v", err)
	}
	must(t, s.AddSeals(unix.F_SEAL_WRITE|unix.F_SEAL_SEAL))
	if _, err := f.PWrite(ctx, []byte("S"), 0); err != unix.EPERM {
		t.Errorf("write: %v, want EPERM", err)
	}
	if err := s.AddSeals(unix.F_SEAL_GROW); err != unix.EPERM {
		t.Errorf("seal after F_SEAL_SEAL: %v, want EPERM", err)
	}
	opts := memmap.MMapOpts{Length: 4096, Perms: hostarch.ReadWrite, MaxPerms: hostarch.AnyAccess}
	if err := f.ConfigureMMap(ctx, &opts); err != unix.EPERM {
		t.Errorf("shared writable mapping: %v, want EPERM", err)
	}
	plain := NewMemfd(ctx, fs, "y", false)
	defer plain.DecRef()
	if err := plain.Impl().(vfs.Sealer).AddSeals(unix.F_SEAL_GROW); err != unix.EPERM {
		t.Errorf("seal without MFD_ALLOW_SEALING: %v, want EPERM", err)
	}
}

// Reading a directory in pieces shows every entry once that is there all along.
func TestReadDirWhileChanging(t *testing.T) {
	_, fsc := newFS(1 << 30)
	defer fsc.DecRef()
	for i := range 100 {
		create(t, fsc, fmt.Sprintf("/keep%d", i)).DecRef()
		create(t, fsc, fmt.Sprintf("/drop%d", i)).DecRef()
	}
	d, err := fsc.OpenAt(ctx, nil, "/", unix.O_RDONLY|unix.O_DIRECTORY, 0, 0)
	must(t, err)
	defer d.DecRef()
	seen := map[string]int{}
	for i := 0; ; i++ {
		n := 0
		must(t, d.ReadDir(ctx, func(e vfs.Dirent) bool {
			if n++; n > 3 {
				return false
			}
			seen[e.Name]++
			return true
		}))
		if n == 0 {
			break
		}
		if i < 100 {
			must(t, fsc.UnlinkAt(ctx, nil, fmt.Sprintf("/drop%d", (i*37)%100), 0))
		}
	}
	for i := range 100 {
		if n := seen[fmt.Sprintf("keep%d", i)]; n != 1 {
			t.Errorf("keep%d was seen %d times", i, n)
		}
	}
}

func TestXattr(t *testing.T) {
	_, fsc := newFS(1 << 30)
	defer fsc.DecRef()
	create(t, fsc, "/f").DecRef()
	must(t, fsc.WithXattrs(ctx, "/f", true, true, func(x vfs.Xattrer) error {
		must(t, x.SetXattr(ctx, "user.a", []byte("value"), unix.XATTR_CREATE))
		if err := x.SetXattr(ctx, "user.a", nil, unix.XATTR_CREATE); err != unix.EEXIST {
			t.Errorf("create again: %v", err)
		}
		if err := x.SetXattr(ctx, "security.a", nil, 0); err != unix.EOPNOTSUPP {
			t.Errorf("security: %v", err)
		}
		buf := make([]byte, 100)
		if n, err := x.GetXattr(ctx, "user.a", buf); string(buf[:n]) != "value" || err != nil {
			t.Errorf("get %q, %v", buf[:n], err)
		}
		if _, err := x.GetXattr(ctx, "user.a", buf[:2]); err != unix.ERANGE {
			t.Errorf("get into a small buffer: %v", err)
		}
		if n, err := x.ListXattr(ctx, buf); string(buf[:n]) != "user.a\x00" || err != nil {
			t.Errorf("list %q, %v", buf[:n], err)
		}
		must(t, x.RemoveXattr(ctx, "user.a"))
		if _, err := x.GetXattr(ctx, "user.a", buf); err != unix.ENODATA {
			t.Errorf("get removed: %v", err)
		}
		return nil
	}))
}
