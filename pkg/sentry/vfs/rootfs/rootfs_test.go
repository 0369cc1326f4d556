package rootfs_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/rootfs"
)

var ctx = context.Background()

const secret = "this is outside"

// proc is a ProcProvider with one process, number 7, with two threads.
type proc struct {
	fds *vfs.FDTable
	fs  *vfs.FSContext
}

func (*proc) Self(context.Context) (tgid, tid int32) { return 7, 8 }
func (*proc) Processes() []int32                     { return []int32{7} }
func (*proc) Hostname() string                       { return "sandbox" }
func (*proc) Release() string                        { return "6.1" }
func (*proc) Version() string                        { return "#1" }
func (*proc) BootTime() time.Time                    { return time.Unix(1000, 0) }
func (*proc) MemoryUsage() (used, total uint64)      { return 1 << 20, 1 << 30 }

func (p *proc) Task(tid int32) vfs.ProcTask {
	if tid == 7 || tid == 8 {
		return p
	}
	return nil
}

func (*proc) Status() vfs.ProcStatus {
	return vfs.ProcStatus{PID: 7, TGID: 7, PPID: 1, Comm: "a b)", State: 'S', Threads: 2, VMSize: 8192, RSS: 4096, Start: time.Unix(1002, 0)}
}
func (*proc) Threads() []int32   { return []int32{7, 8} }
func (*proc) Maps() string       { return "maps\n" }
func (*proc) Cmdline() []byte    { return []byte("prog\x00arg\x00") }
func (*proc) Environ() []byte    { return []byte("A=b\x00") }
func (*proc) Auxv() []byte       { return make([]byte, 16) }
func (*proc) Executable() string { return "/bin/prog" }
func (p *proc) FDTable() *vfs.FDTable {
	p.fds.IncRef()
	return p.fds
}
func (p *proc) FSContext() *vfs.FSContext {
	p.fs.IncRef()
	return p.fs
}
func (*proc) SetComm(string)        {}
func (*proc) Limits() [16][2]uint64 { return [16][2]uint64{} }

// sandbox is a Namespace over the directory root, which has a sibling "outside".
type sandbox struct {
	*testing.T
	host string // of the root
	fs   *vfs.FSContext
	fds  *vfs.FDTable
}

func newSandbox(t *testing.T, write bool, binds ...rootfs.Bind) *sandbox {
	t.Helper()
	dir := t.TempDir()
	host := filepath.Join(dir, "root")
	must(t, os.MkdirAll(filepath.Join(host, "dir/sub"), 0o755))
	must(t, os.MkdirAll(filepath.Join(host, "etc"), 0o755))
	must(t, os.MkdirAll(filepath.Join(host, "tmp"), 0o755))
	must(t, os.WriteFile(filepath.Join(host, "file"), []byte("inside"), 0o644))
	must(t, os.WriteFile(filepath.Join(host, "etc/passwd"), []byte("inside"), 0o644))
	must(t, os.WriteFile(filepath.Join(host, "dir/sub/deep"), []byte("deep"), 0o644))
	must(t, os.Symlink("dir/sub", filepath.Join(host, "link")))
	must(t, os.Symlink("../file", filepath.Join(host, "dir/up")))
	must(t, os.WriteFile(filepath.Join(dir, "secret"), []byte(secret), 0o644))
	p := &proc{fds: vfs.NewFDTable()}
	r, err := rootfs.New(rootfs.Config{Root: host, Write: write, Binds: binds, Proc: p, TmpSize: 64 << 20})
	must(t, err)
	p.fs = vfs.NewFSContext(r.Namespace)
	t.Cleanup(func() {
		p.fds.DecRef()
		p.fs.DecRef()
		r.Close()
	})
	return &sandbox{t, host, p.fs, p.fds}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (s *sandbox) must(err error) {
	s.Helper()
	must(s.T, err)
}

func (s *sandbox) open(path string, flags uint32) *vfs.FileDescription {
	s.Helper()
	f, err := s.fs.OpenAt(ctx, nil, path, flags, 0o644, 0)
	if err != nil {
		s.Fatalf("open %s: %v", path, err)
	}
	s.Cleanup(f.DecRef)
	return f
}

func (s *sandbox) read(path string) (string, error) {
	f, err := s.fs.OpenAt(ctx, nil, path, unix.O_RDONLY, 0, 0)
	if err != nil {
		return "", err
	}
	defer f.DecRef()
	buf := make([]byte, 1<<16)
	n := 0
	for {
		m, err := f.Read(ctx, buf[n:])
		if err != nil {
			return "", err
		}
		if n += m; m == 0 || n == len(buf) {
			return string(buf[:n]), nil
		}
	}
}

func (s *sandbox) write(path, text string) {
	s.Helper()
	f := s.open(path, unix.O_CREAT|unix.O_WRONLY|unix.O_TRUNC)
	if _, err := f.Write(ctx, []byte(text)); err != nil {
		s.Fatalf("write %s: %v", path, err)
	}
}

func (s *sandbox) list(path string) []string {
	s.Helper()
	f := s.open(path, unix.O_RDONLY|unix.O_DIRECTORY)
	var names []string
	// A small buffer, so that reading is resumed.
	buf := make([]byte, 80)
	for {
		n, err := f.ReadDirRaw(ctx, buf)
		s.must(err)
		if n == 0 {
			slices.Sort(names)
			return names
		}
		for b := buf[:n]; len(b) > 0; {
			l := int(b[16]) | int(b[17])<<8
			name, _, _ := strings.Cut(string(b[19:l]), "\x00")
			names = append(names, name)
			b = b[l:]
		}
	}
}

// expect checks an errno; nil means success.
func (s *sandbox) expect(name string, got, want error) {
	s.Helper()
	if !errors.Is(got, want) {
		s.Errorf("%s: %v, want %v", name, got, want)
	}
}

func TestResolve(t *testing.T) {
	s := newSandbox(t, false)
	for _, link := range [][2]string{
		{"../../../../secret", "escape"}, {"/../secret", "absescape"}, {"/etc/passwd", "abs"}, {"loop2", "loop1"},
		{"loop1", "loop2"}, {"self", "self"}, {"..", "dir/parent"}, {"/", "slash"}, {"link/deep", "linkdeep"},
		{"/proc/self/root/etc/passwd", "viaproc"}, {"/tmp", "totmp"}, {"missing", "dangling"}, {"/proc/self/cwd", "cwd"},
	} {
		s.must(os.Symlink(link[0], filepath.Join(s.host, link[1])))
	}
	s.must(os.WriteFile(filepath.Join(s.host, "tmp/hidden"), []byte("shadowed"), 0o644))
	s.write("/tmp/visible", "tmpfs")
	for _, test := range []struct {
		path, want string
		err        error
	}{
		{"/file", "inside", nil},
		{"file", "inside", nil},
		{"//file", "inside", nil},
		{"./dir/.././file", "inside", nil},
		{"/link/deep", "deep", nil},
		{"/link/../sub/deep", "deep", nil}, // ".." of what the link leads to
		{"/linkdeep", "deep", nil},
		{"/dir/up", "inside", nil},
		{"/dir/parent/parent", "", unix.ENOENT},
		{"/dir/parent/file", "inside", nil},
		{"/slash/slash/file", "inside", nil},
		{"/abs", "inside", nil},
		{"/viaproc", "inside", nil},
		{"/proc/self/root/file", "inside", nil},
		{"/proc/self/cwd/file", "inside", nil},
		{"/cwd/file", "inside", nil},
		{"/totmp/visible", "tmpfs", nil},
		{"/totmp/../file", "inside", nil},
		{"/tmp/hidden", "", unix.ENOENT},
		{"/../../../file", "inside", nil},
		{"/../secret", "", unix.ENOENT},
		{"../../../../../secret", "", unix.ENOENT},
		{"/escape", "", unix.ENOENT},
		{"/absescape", "", unix.ENOENT},
		{"/proc/self/root/../secret", "", unix.ENOENT},
		{"/proc/self/root/../../../../../../" + s.host + "/../secret", "", unix.ENOENT},
		{"/proc/self/cwd/../secret", "", unix.ENOENT},
		{s.host + "/file", "", unix.ENOENT},
		{"/loop1", "", unix.ELOOP},
		{"/self/x", "", unix.ELOOP},
		{"/dangling", "", unix.ENOENT},
		{"/file/", "", unix.ENOTDIR},
		{"/file/x", "", unix.ENOTDIR},
		{"/file/..", "", unix.ENOTDIR},
		{"/file/.", "", unix.ENOTDIR},
		{"/abs/", "", unix.ENOTDIR},
		{"/dir/sub/deep/x", "", unix.ENOTDIR},
		{"/link/deep/x", "", unix.ENOTDIR},
		{"/missing/x", "", unix.ENOENT},
		{"/missing/../file", "", unix.ENOENT},
		{"", "", unix.ENOENT},
		{"/" + strings.Repeat("x", 256), "", unix.ENAMETOOLONG},
		{strings.Repeat("x/", 2048), "", unix.ENAMETOOLONG},
		{"/dir", "", unix.EISDIR},
		{"/", "", unix.EISDIR},
	} {
		got, err := s.read(test.path)
		if got != test.want || !errors.Is(err, test.err) {
			t.Errorf("read %.80q = %q, %v; want %q, %v", test.path, got, err, test.want, test.err)
		}
	}
	// A second time, with the links known.
	for range 2 {
		if got, err := s.read("/link/deep"); got != "deep" {
			t.Errorf("read of a known link = %q, %v", got, err)
		}
	}
	// What was a link is a directory now.
	s.must(os.Remove(filepath.Join(s.host, "link")))
	s.must(os.Mkdir(filepath.Join(s.host, "link"), 0o755))
	s.must(os.WriteFile(filepath.Join(s.host, "link/deep"), []byte("new"), 0o644))
	if got, err := s.read("/link/deep"); got != "new" {
		t.Errorf("read of a replaced link = %q, %v", got, err)
	}
}

func TestResolveFlags(t *testing.T) {
	s := newSandbox(t, false)
	s.must(os.Symlink("/etc", filepath.Join(s.host, "dir/abs")))
	s.must(os.Symlink("sub", filepath.Join(s.host, "dir/rel")))
	dir := s.open("/dir", unix.O_PATH|unix.O_DIRECTORY)
	for _, test := range []struct {
		path    string
		resolve uint64
		err     error
	}{
		{"sub/deep", unix.RESOLVE_BENEATH, nil},
		{"rel/deep", unix.RESOLVE_BENEATH, nil},
		{"sub/../sub/deep", unix.RESOLVE_BENEATH, nil},
		{"../file", unix.RESOLVE_BENEATH, unix.EXDEV},
		{"sub/../../file", unix.RESOLVE_BENEATH, unix.EXDEV},
		{"up", unix.RESOLVE_BENEATH, unix.EXDEV},
		{"/file", unix.RESOLVE_BENEATH, unix.EXDEV},
		{"abs/passwd", unix.RESOLVE_BENEATH, unix.EXDEV},
		{"/sub/deep", unix.RESOLVE_IN_ROOT, nil},
		{"../../sub/deep", unix.RESOLVE_IN_ROOT, nil},
		{"abs/passwd", unix.RESOLVE_IN_ROOT, unix.ENOENT},
		{"rel/deep", unix.RESOLVE_NO_SYMLINKS, unix.ELOOP},
		{"sub/deep", unix.RESOLVE_NO_SYMLINKS, nil},
		{"/proc/version", unix.RESOLVE_NO_XDEV, unix.EXDEV},
		{"/proc/self/root/file", unix.RESOLVE_NO_MAGICLINKS, unix.ELOOP},
	} {
		f, err := s.fs.OpenAt(ctx, dir, test.path, unix.O_RDONLY, 0, test.resolve)
		if err == nil {
			f.DecRef()
		}
		s.expect(fmt.Sprintf("%s with %#x", test.path, test.resolve), err, test.err)
	}
}

// TestRaces walks paths while the host moves their directories about. Whatever
// comes of it, it must not be the file outside.
func TestRaces(t *testing.T) {
	s := newSandbox(t, true)
	s.must(os.MkdirAll(filepath.Join(s.host, "a/b/c"), 0o755))
	s.must(os.MkdirAll(filepath.Join(s.host, "x/secret"), 0o755))
	h := func(name string) string { return filepath.Join(s.host, name) }
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			os.Rename(h("a/b/c"), h("c"))
			os.Rename(h("c"), h("a/b/c"))
			os.Rename(h("x"), h("y"))
			os.Symlink("../..", h("x"))
			os.Remove(h("x"))
			os.Symlink("..", h("x"))
			os.Remove(h("x"))
			os.Rename(h("y"), h("x"))
		}
	})
	cwd := s.fs.Fork()
	defer cwd.DecRef()
	cwd.Chdir(ctx, "/a/b/c")
	found := 0
	end := time.Now().Add(2 * time.Second)
	for time.Now().Before(end) {
		for _, path := range []string{
			"/a/b/c/../../../../secret", "/x/secret", "/x/../secret", "/a/b/c/../../../secret",
			"../../../../secret", "../secret", "/a/b/c/../../../file", "/x/../file",
		} {
			f, err := cwd.OpenAt(ctx, nil, path, unix.O_RDONLY, 0, 0)
			if err != nil {
				continue
			}
			buf := make([]byte, 100)
			n, _ := f.Read(ctx, buf)
			f.DecRef()
			if string(buf[:n]) == secret {
				t.Fatalf("%s led outside", path)
			}
			if string(buf[:n]) == "inside" {
				found++
			}
		}
	}
	close(stop)
	wg.Wait()
	if found == 0 {
		t.Error("no path was ever found: the test shows nothing")
	}
}

// TestReadOnly checks the errno of every change on a file system that is not
// writable: what Linux gives on a read-only bind mount.
func TestReadOnly(t *testing.T) {
	s := newSandbox(t, false)
	fs := s.fs
	creds := vfs.CredsFromContext(ctx)
	open := func(path string, flags uint32) error {
		f, err := fs.OpenAt(ctx, nil, path, flags, 0o644, 0)
		if err == nil {
			f.DecRef()
		}
		return err
	}
	before := s.hostTree()
	for _, test := range []struct {
		name string
		got  error
		want error
	}{
		{"unlink", fs.UnlinkAt(ctx, nil, "file", 0), unix.EROFS},
		{"unlink missing", fs.UnlinkAt(ctx, nil, "missing", 0), unix.EROFS},
		{"unlink in missing", fs.UnlinkAt(ctx, nil, "missing/file", 0), unix.ENOENT},
		{"unlink .", fs.UnlinkAt(ctx, nil, ".", 0), unix.EISDIR},
		{"rmdir", fs.UnlinkAt(ctx, nil, "dir", unix.AT_REMOVEDIR), unix.EROFS},
		{"rmdir .", fs.UnlinkAt(ctx, nil, "dir/.", unix.AT_REMOVEDIR), unix.EINVAL},
		{"rmdir ..", fs.UnlinkAt(ctx, nil, "dir/..", unix.AT_REMOVEDIR), unix.ENOTEMPTY},
		{"mkdir", fs.MkdirAt(ctx, nil, "new", 0o755), unix.EROFS},
		{"mkdir new/", fs.MkdirAt(ctx, nil, "new/", 0o755), unix.EROFS},
		{"mkdir existing", fs.MkdirAt(ctx, nil, "file", 0o755), unix.EEXIST},
		{"mkdir /", fs.MkdirAt(ctx, nil, "/", 0o755), unix.EEXIST},
		{"mkdir in missing", fs.MkdirAt(ctx, nil, "missing/new", 0o755), unix.ENOENT},
		{"mknod", fs.MknodAt(ctx, nil, "new", unix.S_IFREG|0o644), unix.EROFS},
		{"mkfifo", fs.MknodAt(ctx, nil, "new", unix.S_IFIFO|0o644), unix.EROFS},
		{"mkfifo existing", fs.MknodAt(ctx, nil, "file", unix.S_IFIFO|0o644), unix.EEXIST},
		{"mknod device", fs.MknodAt(ctx, nil, "new", unix.S_IFCHR|0o644), unix.EROFS},
		{"symlink", fs.SymlinkAt(ctx, "x", nil, "new"), unix.EROFS},
		{"symlink existing", fs.SymlinkAt(ctx, "x", nil, "file"), unix.EEXIST},
		{"link", fs.LinkAt(ctx, nil, "file", nil, "new", 0), unix.EROFS},
		{"link existing", fs.LinkAt(ctx, nil, "file", nil, "dir", 0), unix.EEXIST},
		{"link missing", fs.LinkAt(ctx, nil, "missing", nil, "new", 0), unix.ENOENT},
		{"rename", fs.RenameAt(ctx, nil, "file", nil, "new", 0), unix.EROFS},
		{"rename missing", fs.RenameAt(ctx, nil, "missing", nil, "new", 0), unix.EROFS},
		{"rename to /tmp", fs.RenameAt(ctx, nil, "file", nil, "/tmp/new", 0), unix.EXDEV},
		{"chmod", fs.ChmodAt(ctx, nil, "file", 0o600, 0), unix.EROFS},
		{"chmod missing", fs.ChmodAt(ctx, nil, "missing", 0o600, 0), unix.ENOENT},
		{"chown", fs.ChownAt(ctx, nil, "file", 1, 1, 0), unix.EROFS},
		{"utimens", fs.UtimensAt(ctx, nil, "file", [2]unix.Timespec{}, 0), unix.EROFS},
		{"truncate", fs.Truncate(ctx, "file", 0), unix.EROFS},
		{"truncate dir", fs.Truncate(ctx, "dir", 0), unix.EISDIR},
		{"open O_CREAT existing", open("file", unix.O_CREAT), nil},
		{"open O_CREAT|O_WRONLY existing", open("file", unix.O_CREAT|unix.O_WRONLY), unix.EROFS},
		{"open O_RDWR", open("file", unix.O_RDWR), unix.EROFS},
		{"open O_CREAT new", open("new", unix.O_CREAT), unix.EROFS},
		{"open O_CREAT|O_EXCL existing", open("file", unix.O_CREAT|unix.O_EXCL), unix.EEXIST},
		{"open O_TRUNC", open("file", unix.O_TRUNC), unix.EROFS},
		{"open dir O_WRONLY", open("dir", unix.O_WRONLY), unix.EISDIR},
		{"open dir O_CREAT", open("dir", unix.O_CREAT), unix.EISDIR},
		{"open new/ O_CREAT", open("new/", unix.O_CREAT), unix.EISDIR},
		{"open O_TMPFILE", open(".", unix.O_TMPFILE|unix.O_WRONLY), unix.EROFS},
		{"access W_OK", fs.AccessAt(ctx, creds, nil, "file", vfs.MayWrite, 0), unix.EROFS},
		{"access R_OK", fs.AccessAt(ctx, creds, nil, "file", vfs.MayRead, 0), nil},
		{"access missing", fs.AccessAt(ctx, creds, nil, "missing", 0, 0), unix.ENOENT},
		{"setxattr", fs.WithXattrs(ctx, "file", true, true, func(vfs.Xattrer) error { return nil }), unix.EROFS},
		{"create in /proc", open("/proc/new", unix.O_CREAT), unix.EPERM},
		{"create in /dev", open("/dev/new", unix.O_CREAT|unix.O_WRONLY), unix.EROFS},
		{"write /dev/null", open("/dev/null", unix.O_CREAT|unix.O_WRONLY|unix.O_TRUNC), nil},
		{"create in /tmp", open("/tmp/new", unix.O_CREAT|unix.O_WRONLY), nil},
		{"create in /dev/shm", open("/dev/shm/new", unix.O_CREAT|unix.O_WRONLY), nil},
		{"rmdir /tmp", fs.UnlinkAt(ctx, nil, "/tmp", unix.AT_REMOVEDIR), unix.EROFS},
	} {
		s.expect(test.name, test.got, test.want)
	}
	f := s.open("file", unix.O_RDONLY)
	s.expect("fchmod", f.Chmod(ctx, 0o600), unix.EROFS)
	s.expect("ftruncate", f.Truncate(ctx, 0), unix.EINVAL)
	_, err := f.Write(ctx, []byte("x"))
	s.expect("write", err, unix.EBADF)
	// Opening it again through its descriptor gives no more.
	fd, err := s.fds.NewFD(0, f, false, 10)
	s.must(err)
	f.IncRef()
	s.expect("reopen for writing", open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDWR), unix.EROFS)
	s.expect("reopen for reading", open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY), nil)
	s.expect("mount point", fs.UnlinkAt(ctx, nil, "/dev/shm", unix.AT_REMOVEDIR), unix.EROFS)
	if diff := cmp.Diff(before, s.hostTree()); diff != "" {
		t.Errorf("the host directory has changed:\n%s", diff)
	}
}

// hostTree describes everything below the host directory.
func (s *sandbox) hostTree() []string {
	s.Helper()
	var tree []string
	s.must(filepath.Walk(s.host, func(path string, info os.FileInfo, err error) error {
		if err == nil {
			tree = append(tree, fmt.Sprint(path, info.Mode(), info.Size(), info.ModTime()))
		}
		return err
	}))
	return tree
}

// checkChanges does the same on every writable file system, in directory dir.
func checkChanges(t *testing.T, s *sandbox, dir string) {
	fs := s.fs
	s.must(fs.Chdir(ctx, dir))
	fs.SetUmask(0o022)
	s.must(fs.MkdirAt(ctx, nil, "d", 0o777))
	s.must(fs.MkdirAt(ctx, nil, "d/e/", 0o777))
	s.expect("mkdir again", fs.MkdirAt(ctx, nil, "d", 0o777), unix.EEXIST)
	s.write("d/f", "hello")
	st, err := fs.StatAt(ctx, nil, "d/f", 0)
	s.must(err)
	if st.Mode != unix.S_IFREG|0o644 || st.Size != 5 || st.Nlink != 1 {
		t.Errorf("new file has mode %o, size %d, %d links", st.Mode, st.Size, st.Nlink)
	}
	s.must(fs.LinkAt(ctx, nil, "d/f", nil, "d/g", 0))
	if st, _ := fs.StatAt(ctx, nil, "d/g", 0); st.Nlink != 2 {
		t.Errorf("%d links, want 2", st.Nlink)
	}
	s.must(fs.SymlinkAt(ctx, "f", nil, "d/l"))
	if got, err := fs.ReadlinkAt(ctx, nil, "d/l"); got != "f" || err != nil {
		t.Errorf("readlink = %q, %v", got, err)
	}
	s.must(fs.SymlinkAt(ctx, "made", nil, "d/dangling"))
	s.write("d/dangling", "through the link")
	if got, err := s.read("d/made"); got != "through the link" {
		t.Errorf("file made through a dangling link = %q, %v", got, err)
	}
	s.expect("O_EXCL on a dangling link", func() error {
		_, err := fs.OpenAt(ctx, nil, "d/l", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644, 0)
		return err
	}(), unix.EEXIST)
	s.expect("O_NOFOLLOW", func() error {
		_, err := fs.OpenAt(ctx, nil, "d/l", unix.O_NOFOLLOW, 0, 0)
		return err
	}(), unix.ELOOP)

	want := []string{".", "..", "dangling", "e", "f", "g", "l", "made"}
	if diff := cmp.Diff(want, s.list("d")); diff != "" {
		t.Errorf("directory (-want +got):\n%s", diff)
	}

	s.expect("rmdir of a full one", fs.UnlinkAt(ctx, nil, "d", unix.AT_REMOVEDIR), unix.ENOTEMPTY)
	s.expect("rmdir of a file", fs.UnlinkAt(ctx, nil, "d/f", unix.AT_REMOVEDIR), unix.ENOTDIR)
	s.expect("unlink of a directory", fs.UnlinkAt(ctx, nil, "d/e", 0), unix.EISDIR)
	s.expect("unlink of nothing", fs.UnlinkAt(ctx, nil, "d/x", 0), unix.ENOENT)
	s.expect("rename into itself", fs.RenameAt(ctx, nil, "d", nil, "d/e/d", 0), unix.EINVAL)
	s.expect("rename onto parent", fs.RenameAt(ctx, nil, "d/e", nil, "d", 0), unix.ENOTEMPTY)
	s.expect("rename dir onto file", fs.RenameAt(ctx, nil, "d/e", nil, "d/f", 0), unix.ENOTDIR)
	s.expect("rename file onto dir", fs.RenameAt(ctx, nil, "d/f", nil, "d/e", 0), unix.EISDIR)
	s.expect("rename noreplace", fs.RenameAt(ctx, nil, "d/made", nil, "d/g", unix.RENAME_NOREPLACE), unix.EEXIST)
	s.must(fs.RenameAt(ctx, nil, "d/f", nil, "d/g", 0)) // the same file: nothing happens
	if _, err := s.read("d/f"); err != nil {
		t.Errorf("after a rename to another name of the same file: %v", err)
	}
	s.must(fs.RenameAt(ctx, nil, "d/made", nil, "d/g", 0))
	if got, _ := s.read("d/g"); got != "through the link" {
		t.Errorf("after rename = %q", got)
	}
	s.must(fs.RenameAt(ctx, nil, "d/g", nil, "d/e", unix.RENAME_EXCHANGE))
	if st, _ := fs.StatAt(ctx, nil, "d/g", 0); st.Mode&unix.S_IFMT != unix.S_IFDIR {
		t.Errorf("after exchange d/g has mode %o", st.Mode)
	}

	// Names follow renames, also those of open files and working directories.
	s.must(fs.Chdir(ctx, "d/g"))
	f := s.open("../f", unix.O_RDWR)
	s.must(fs.RenameAt(ctx, nil, dir+"/d", nil, dir+"/moved", 0))
	if got, err := fs.Getcwd(ctx); got != dir+"/moved/g" || err != nil {
		t.Errorf("getcwd after rename = %q, %v", got, err)
	}
	if got := f.Path(); got != dir+"/moved/f" {
		t.Errorf("path of an open file after rename = %q", got)
	}
	if got, err := s.read("../f"); got != "hello" {
		t.Errorf("../f from a moved directory = %q, %v", got, err)
	}
	s.must(fs.UnlinkAt(ctx, nil, "../f", 0))
	if got := f.Path(); got != dir+"/moved/f (deleted)" {
		t.Errorf("path of a removed file = %q", got)
	}
	if got, err := f.PRead(ctx, make([]byte, 10), 0); got != 5 || err != nil {
		t.Errorf("read of a removed file = %d, %v", got, err)
	}
	s.must(fs.UnlinkAt(ctx, nil, dir+"/moved/g", unix.AT_REMOVEDIR))
	_, err = fs.Getcwd(ctx)
	s.expect("getcwd of a removed directory", err, unix.ENOENT)
	_, err = fs.OpenAt(ctx, nil, "x", unix.O_CREAT|unix.O_WRONLY, 0o644, 0)
	s.expect("create in a removed directory", err, unix.ENOENT)
	s.must(fs.Chdir(ctx, dir))

	// Contents.
	f = s.open("c", unix.O_CREAT|unix.O_RDWR)
	for _, w := range []struct {
		off  int64
		data string
	}{{0, "abcdef"}, {3, "XY"}, {100000, "far"}} {
		if n, err := f.PWrite(ctx, []byte(w.data), w.off); n != len(w.data) || err != nil {
			t.Errorf("pwrite at %d = %d, %v", w.off, n, err)
		}
	}
	buf := make([]byte, 200000)
	n, err := f.PRead(ctx, buf, 0)
	if n != 100003 || err != nil || string(buf[:7]) != "abcXYf\x00" || string(buf[100000:n]) != "far" {
		t.Errorf("pread = %d, %v, %q", n, err, buf[:7])
	}
	s.must(f.Truncate(ctx, 4))
	s.must(f.Truncate(ctx, 8))
	if n, _ := f.PRead(ctx, buf, 0); string(buf[:n]) != "abcX\x00\x00\x00\x00" {
		t.Errorf("after truncate %q", buf[:n])
	}
	a := s.open("c", unix.O_WRONLY|unix.O_APPEND)
	if _, err := a.Write(ctx, []byte("end")); err != nil {
		t.Error(err)
	}
	if pos, err := a.Seek(ctx, 0, unix.SEEK_CUR); pos != 11 || err != nil {
		t.Errorf("offset after append %d, %v", pos, err)
	}
	if pos, err := f.Seek(ctx, -3, unix.SEEK_END); pos != 8 || err != nil {
		t.Errorf("SEEK_END = %d, %v", pos, err)
	}
	if pos, err := f.Seek(ctx, 0, unix.SEEK_HOLE); pos != 11 || err != nil {
		t.Errorf("SEEK_HOLE = %d, %v", pos, err)
	}
	_, err = f.Seek(ctx, 11, unix.SEEK_DATA)
	s.expect("SEEK_DATA at the end", err, unix.ENXIO)

	// Attributes.
	s.must(fs.ChmodAt(ctx, nil, "c", 0o751, 0))
	times := [2]unix.Timespec{{Sec: 1000, Nsec: 5}, {Sec: 2000, Nsec: 7}}
	s.must(fs.UtimensAt(ctx, nil, "c", times, 0))
	st, err = fs.StatAt(ctx, nil, "c", 0)
	s.must(err)
	if st.Mode&0o7777 != 0o751 || st.Atim != times[0] || st.Mtim != times[1] {
		t.Errorf("attributes %o %v %v", st.Mode, st.Atim, st.Mtim)
	}
	s.must(fs.Truncate(ctx, "c", 2))
	if got, _ := s.read("c"); got != "ab" {
		t.Errorf("after truncate(2) %q", got)
	}
	if os.Getuid() == 0 {
		s.must(fs.ChownAt(ctx, nil, "c", 12, 34, 0))
		if st, _ := fs.StatAt(ctx, nil, "c", 0); st.Uid != 12 || st.Gid != 34 {
			t.Errorf("owner %d:%d", st.Uid, st.Gid)
		}
	}

	// Attributes of what has been open for long are as of now.
	s.must(fs.Chdir(ctx, dir))
	fd, err := s.fds.NewFD(0, f, false, 100)
	s.must(err)
	f.IncRef()
	for i, size := range []int64{10, 20} {
		s.must(f.Truncate(ctx, size))
		s.must(fs.MkdirAt(ctx, nil, fmt.Sprint("sub", i), 0o755))
		if st, err := fs.StatAt(ctx, nil, fmt.Sprintf("/proc/self/fd/%d", fd), 0); st.Size != size {
			t.Errorf("size through /proc %d, %v; want %d", st.Size, err, size)
		}
		st, err := fs.StatAt(ctx, nil, ".", 0)
		if st2, _ := fs.StatAt(ctx, nil, dir, 0); st != st2 || err != nil {
			t.Errorf("attributes of . differ: %+v, %+v, %v", st, st2, err)
		}
	}

	// A file without a name that gets one.
	tf, err := fs.OpenAt(ctx, nil, ".", unix.O_TMPFILE|unix.O_RDWR, 0o600, 0)
	s.must(err)
	defer tf.DecRef()
	if _, err := tf.Write(ctx, []byte("nameless")); err != nil {
		t.Error(err)
	}
	s.must(fs.LinkAt(ctx, tf, "", nil, "named", unix.AT_EMPTY_PATH))
	if got, err := s.read("named"); got != "nameless" {
		t.Errorf("O_TMPFILE file = %q, %v", got, err)
	}
}

func TestChangesTmpfs(t *testing.T) {
	s := newSandbox(t, false)
	before := s.hostTree()
	s.must(s.fs.MkdirAt(ctx, nil, "/tmp/work", 0o755))
	checkChanges(t, s, "/tmp/work")
	if diff := cmp.Diff(before, s.hostTree()); diff != "" {
		t.Errorf("the host directory has changed:\n%s", diff)
	}
}

func TestChangesHost(t *testing.T) {
	s := newSandbox(t, true)
	checkChanges(t, s, "/dir/sub")
	if got, err := os.ReadFile(filepath.Join(s.host, "dir/sub/named")); string(got) != "nameless" {
		t.Errorf("on the host: %q, %v", got, err)
	}
	s.expect("mkfifo", s.fs.MknodAt(ctx, nil, "fifo", unix.S_IFIFO|0o600), unix.EPERM)
	s.expect("mount point", s.fs.UnlinkAt(ctx, nil, "/tmp", unix.AT_REMOVEDIR), unix.EBUSY)
	s.expect("above a mount point", s.fs.RenameAt(ctx, nil, "/dev", nil, "/x", 0), unix.EBUSY)
	s.expect("across mounts", s.fs.LinkAt(ctx, nil, "/file", nil, "/tmp/x", 0), unix.EXDEV)
}

// Files that would lead out of the sandbox when opened.
func TestSpecialFiles(t *testing.T) {
	s := newSandbox(t, true)
	s.must(unix.Mkfifo(filepath.Join(s.host, "fifo"), 0o666))
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	s.must(err)
	defer unix.Close(l)
	s.must(unix.Bind(l, &unix.SockaddrUnix{Name: filepath.Join(s.host, "sock")}))
	for path, want := range map[string]error{"/fifo": unix.ENXIO, "/sock": unix.ENXIO} {
		for _, flags := range []uint32{unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR} {
			_, err := s.fs.OpenAt(ctx, nil, path, flags, 0, 0)
			s.expect(path, err, want)
		}
		if _, err := s.fs.StatAt(ctx, nil, path, 0); err != nil {
			t.Errorf("stat %s: %v", path, err)
		}
	}
	if os.Getuid() == 0 {
		if err := unix.Mknod(filepath.Join(s.host, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err == nil {
			_, err := s.fs.OpenAt(ctx, nil, "/null", unix.O_RDWR, 0, 0)
			s.expect("device", err, unix.EACCES)
		}
	}
}

// A proc file system of the host would show the Sentry's own memory.
func TestHostProc(t *testing.T) {
	r, err := rootfs.New(rootfs.Config{Root: "/", Write: false, Proc: &proc{}, TmpSize: 1 << 20,
		Binds: []rootfs.Bind{{Source: "/", Target: "/other"}}})
	must(t, err)
	defer r.Close()
	fs := vfs.NewFSContext(r.Namespace)
	defer fs.DecRef()
	for _, path := range []string{"/other/proc", "/other/proc/self", "/other/proc/self/mem", "/other/proc/self/root",
		fmt.Sprintf("/other/proc/%d/environ", os.Getpid()), "/other/proc/version"} {
		if _, err := fs.StatAt(ctx, nil, path, 0); !errors.Is(err, unix.EACCES) {
			t.Errorf("stat %s: %v, want EACCES", path, err)
		}
		if f, err := fs.OpenAt(ctx, nil, path, unix.O_RDONLY, 0, 0); !errors.Is(err, unix.EACCES) {
			t.Errorf("open %s: %v, %v, want EACCES", path, f, err)
		}
	}
	if _, err := fs.StatAt(ctx, nil, "/other/etc/passwd", 0); err != nil {
		t.Error(err)
	}
}

func TestBinds(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "data"), []byte("bound"), 0o644))
	must(t, os.Symlink("/file", filepath.Join(dir, "abs")))
	must(t, os.Symlink("../../secret", filepath.Join(dir, "out")))
	s := newSandbox(t, false,
		rootfs.Bind{Source: dir, Target: "/new/deep/dir"},
		rootfs.Bind{Source: filepath.Join(dir, "data"), Target: "/etc/passwd"},
		rootfs.Bind{Source: dir, Target: "/dir/bound"},
	)
	for path, want := range map[string]string{
		"/new/deep/dir/data": "bound", "/etc/passwd": "bound", "/dir/bound/data": "bound",
		"/new/deep/dir/abs": "inside", "/new/deep/dir/../../../file": "inside", "/dir/bound/../sub/deep": "deep",
	} {
		if got, err := s.read(path); got != want {
			t.Errorf("%s = %q, %v; want %q", path, got, err, want)
		}
	}
	_, err := s.read("/dir/bound/out")
	s.expect("out of a bind", err, unix.ENOENT)
	_, err = s.fs.OpenAt(ctx, nil, "/new/x", unix.O_CREAT|unix.O_WRONLY, 0, 0)
	s.expect("create above a bind", err, unix.EROFS)
	for path, want := range map[string][]string{
		"/":    {".", "..", "dev", "dir", "etc", "file", "link", "new", "proc", "tmp"},
		"/dir": {".", "..", "bound", "sub", "up"},
		"/new": {".", "..", "deep"},
	} {
		if diff := cmp.Diff(want, s.list(path)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", path, diff)
		}
	}
	// Every mount has a device number of its own, as find -xdev counts on.
	seen := map[uint64]string{}
	for _, path := range []string{"/", "/dev", "/dev/shm", "/proc", "/tmp", "/new"} {
		st, err := s.fs.StatAt(ctx, nil, path, 0)
		s.must(err)
		if other, dup := seen[st.Dev]; dup {
			t.Errorf("%s and %s have the same st_dev %#x", path, other, st.Dev)
		}
		seen[st.Dev] = path
	}
	var host unix.Stat_t
	s.must(unix.Stat(filepath.Join(s.host, "file"), &host))
	st, err := s.fs.StatAt(ctx, nil, "/file", 0)
	s.must(err)
	if st != host {
		t.Errorf("stat differs from the host's: %+v, %+v", st, host)
	}
}

func TestConfigErrors(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, nil, 0o644))
	must(t, os.Symlink("/x", filepath.Join(dir, "link")))
	for _, test := range []struct {
		c    rootfs.Config
		want string
	}{
		{rootfs.Config{Root: filepath.Join(dir, "missing")}, "name a directory that exists"},
		{rootfs.Config{Root: file}, "name a directory"},
		{rootfs.Config{Root: dir, Binds: []rootfs.Bind{{Source: dir, Target: "rel"}}}, "absolute path"},
		{rootfs.Config{Root: dir, Binds: []rootfs.Bind{{Source: dir, Target: "/"}}}, "root option"},
		{rootfs.Config{Root: dir, Binds: []rootfs.Bind{{Source: dir + "/missing", Target: "/x"}}}, "name a directory that exists"},
		{rootfs.Config{Root: dir, Binds: []rootfs.Bind{{Source: dir, Target: "/link/x"}}}, "symbolic link"},
		{rootfs.Config{Root: dir, Binds: []rootfs.Bind{{Source: dir, Target: "/file/x"}}}, "not a directory"},
	} {
		test.c.Proc = &proc{}
		if r, err := rootfs.New(test.c); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("New(%+v) = %v, %v; want an error with %q", test.c, r, err, test.want)
		}
	}
}

func TestProc(t *testing.T) {
	s := newSandbox(t, false)
	f := s.open("/file", unix.O_RDONLY)
	f.IncRef()
	fd, err := s.fds.NewFD(5, f, false, 100)
	s.must(err)
	r, w := vfs.NewPipeFiles(0)
	_, err = s.fds.NewFD(6, r, false, 100)
	s.must(err)
	_, err = s.fds.NewFD(7, w, false, 100)
	s.must(err)
	for path, want := range map[string]string{
		"/proc/self/cmdline":                    "prog\x00arg\x00",
		"/proc/7/environ":                       "A=b\x00",
		"/proc/thread-self/maps":                "maps\n",
		"/proc/self/task/8/comm":                "a b)\n",
		"/proc/self/statm":                      "2 1 0 0 0 2 0\n",
		"/proc/sys/kernel/hostname":             "sandbox\n",
		"/proc/sys/vm/overcommit_memory":        "0\n",
		fmt.Sprintf("/proc/self/fd/%d", fd):     "inside",
		fmt.Sprintf("/proc/self/fdinfo/%d", fd): "pos:\t0\nflags:\t00\nmnt_id:\t1\n",
	} {
		if got, err := s.read(path); got != want {
			t.Errorf("%s = %q, %v; want %q", path, got, err, want)
		}
	}
	for path, want := range map[string]string{
		"/proc/self": "7", "/proc/thread-self": "7/task/8", "/proc/self/exe": "/bin/prog", "/proc/self/cwd": "/",
		"/proc/self/root": "/", "/proc/self/fd/5": "/file", "/proc/mounts": "self/mounts", "/dev/stdin": "/proc/self/fd/0",
	} {
		if got, err := s.fs.ReadlinkAt(ctx, nil, path); got != want {
			t.Errorf("readlink %s = %q, %v; want %q", path, got, err, want)
		}
	}
	if got, err := s.read("/proc/self/stat"); len(strings.Fields(got)) != 52+1 { // the name has a space
		t.Errorf("stat has %d fields: %q, %v", len(strings.Fields(got)), got, err)
	}
	if got := s.list("/proc/self/fd"); !slices.Equal(got, []string{".", "..", "5", "6", "7"}) {
		t.Errorf("/proc/self/fd has %q", got)
	}
	if got := s.list("/proc/self/task"); !slices.Equal(got, []string{".", "..", "7", "8"}) {
		t.Errorf("/proc/self/task has %q", got)
	}
	if got := s.list("/proc"); !slices.Contains(got, "7") || !slices.Contains(got, "self") {
		t.Errorf("/proc has %q", got)
	}
	// The same pipe, opened again.
	again, err := s.fs.OpenAt(ctx, nil, "/proc/self/fd/7", unix.O_WRONLY, 0, 0)
	s.must(err)
	if _, err := again.Write(ctx, []byte("hi")); err != nil {
		t.Error(err)
	}
	buf := make([]byte, 10)
	if n, err := r.Read(ctx, buf); string(buf[:n]) != "hi" {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	// And its other end when nobody writes any more: no wait.
	again.DecRef()
	s.fds.Remove(7).DecRef()
	end, err := s.fs.OpenAt(ctx, nil, "/proc/self/fd/6", unix.O_RDONLY, 0, 0)
	s.must(err)
	s.must(end.FIFOWait(func(<-chan struct{}) error { return unix.EINTR }))
	if n, err := end.Read(ctx, buf); n != 0 || err != nil {
		t.Errorf("read at the end = %d, %v", n, err)
	}
	end.DecRef()
	for _, path := range []string{"/proc/8", "/proc/9", "/proc/07", "/proc/self/fd/9", "/proc/self/fd/05"} {
		_, err := s.fs.StatAt(ctx, nil, path, 0)
		if path != "/proc/8" { // a thread is there, though not listed
			s.expect(path, err, unix.ENOENT)
		}
	}
	// Everything can be read, or refused with an errno.
	var walk func(dir string)
	walk = func(dir string) {
		for _, name := range s.list(dir) {
			path := dir + "/" + name
			st, err := s.fs.StatAt(ctx, nil, path, unix.AT_SYMLINK_NOFOLLOW)
			if err != nil {
				t.Errorf("stat %s: %v", path, err)
				continue
			}
			switch {
			case name == "." || name == "..":
			case st.Mode&unix.S_IFMT == unix.S_IFDIR:
				walk(path)
			case st.Mode&unix.S_IFMT == unix.S_IFREG:
				if _, err := s.read(path); err != nil {
					t.Errorf("read %s: %v", path, err)
				}
			}
		}
	}
	walk("/proc")
}

func TestDevices(t *testing.T) {
	s := newSandbox(t, false)
	buf := []byte("xxxx")
	for _, test := range []struct {
		path     string
		n        int
		werr     error
		zeroFill bool
	}{
		{"/dev/null", 0, nil, false}, {"/dev/zero", 4, nil, true}, {"/dev/full", 4, unix.ENOSPC, true}, {"/dev/urandom", 4, nil, false},
	} {
		f := s.open(test.path, unix.O_RDWR)
		copy(buf, "xxxx")
		n, err := f.Read(ctx, buf)
		if n != test.n || err != nil || (test.zeroFill && string(buf) != "\x00\x00\x00\x00") {
			t.Errorf("read %s = %d, %v, %q", test.path, n, err, buf)
		}
		_, err = f.Write(ctx, buf)
		s.expect("write "+test.path, err, test.werr)
		st, err := f.Stat(ctx)
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || unix.Major(st.Rdev) != 1 {
			t.Errorf("stat %s = %o, %#x, %v", test.path, st.Mode, st.Rdev, err)
		}
	}
	_, err := s.fs.OpenAt(ctx, nil, "/dev/tty", unix.O_RDWR, 0, 0)
	s.expect("/dev/tty", err, unix.ENXIO)
}

func TestFIFO(t *testing.T) {
	s := newSandbox(t, false)
	s.must(s.fs.MknodAt(ctx, nil, "/tmp/fifo", unix.S_IFIFO|0o666))
	_, err := s.fs.OpenAt(ctx, nil, "/tmp/fifo", unix.O_WRONLY|unix.O_NONBLOCK, 0, 0)
	s.expect("no reader", err, unix.ENXIO)
	block := func(c <-chan struct{}) error {
		select {
		case <-c:
			return nil
		case <-time.After(10 * time.Second):
			return unix.ETIMEDOUT
		}
	}
	done := make(chan error)
	go func() {
		r, err := s.fs.OpenAt(ctx, nil, "/tmp/fifo", unix.O_RDONLY, 0, 0)
		if err == nil {
			defer r.DecRef()
			err = r.FIFOWait(block)
		}
		done <- err
	}()
	w, err := s.fs.OpenAt(ctx, nil, "/tmp/fifo", unix.O_WRONLY, 0, 0)
	s.must(err)
	defer w.DecRef()
	s.must(w.FIFOWait(block))
	s.must(<-done)
	st, err := w.Stat(ctx)
	named, _ := s.fs.StatAt(ctx, nil, "/tmp/fifo", 0)
	if st.Ino != named.Ino || err != nil {
		t.Errorf("fstat of a FIFO gives inode %d, its name %d, %v", st.Ino, named.Ino, err)
	}
}

// A task with other credentials than the Sentry's is checked by the Sentry.
func TestPermissions(t *testing.T) {
	s := newSandbox(t, true)
	user := context.WithValue(ctx, vfs.CtxCreds, &vfs.Creds{UID: 4242, GID: 4242, Groups: []uint32{77}})
	s.must(os.Chmod(filepath.Join(s.host, "dir"), 0o700))
	s.must(os.Chmod(filepath.Join(s.host, "etc/passwd"), 0o600))
	open := func(path string, flags uint32) error {
		f, err := s.fs.OpenAt(user, nil, path, flags, 0o644, 0)
		if err == nil {
			f.DecRef()
		}
		return err
	}
	for _, test := range []struct {
		name string
		got  error
		want error
	}{
		{"readable", open("/file", unix.O_RDONLY), nil},
		{"writable", open("/file", unix.O_WRONLY), unix.EACCES},
		{"private", open("/etc/passwd", unix.O_RDONLY), unix.EACCES},
		{"below a private directory", open("/dir/sub/deep", unix.O_RDONLY), unix.EACCES},
		{"create", open("/new", unix.O_CREAT|unix.O_WRONLY), unix.EACCES},
		{"unlink", s.fs.UnlinkAt(user, nil, "/file", 0), unix.EACCES},
		{"chmod", s.fs.ChmodAt(user, nil, "/file", 0o777, 0), unix.EPERM},
		{"create in /tmp", open("/tmp/mine", unix.O_CREAT|unix.O_WRONLY), nil},
		{"unlink in /tmp", s.fs.UnlinkAt(user, nil, "/tmp/mine", 0), nil},
	} {
		s.expect(test.name, test.got, test.want)
	}
	s.write("/tmp/theirs", "x")
	s.expect("sticky /tmp", s.fs.UnlinkAt(user, nil, "/tmp/theirs", 0), unix.EPERM)
	s.must(s.fs.MkdirAt(ctx, nil, "/tmp/private", 0o700))
	s.must(s.fs.MkdirAt(ctx, nil, "/tmp/private/public", 0o777))
	s.expect("below a private directory in /tmp", open("/tmp/private/public/x", unix.O_CREAT|unix.O_WRONLY), unix.EACCES)
	s.must(os.Chmod(filepath.Join(s.host, "dir"), 0o755))
}

func TestChroot(t *testing.T) {
	s := newSandbox(t, false)
	user := context.WithValue(ctx, vfs.CtxCreds, &vfs.Creds{UID: 4242})
	s.expect("chroot without privilege", s.fs.Chroot(user, "/dir"), unix.EPERM)
	root := context.WithValue(ctx, vfs.CtxCreds, &vfs.Creds{Override: true})
	s.must(s.fs.Chroot(root, "/dir"))
	s.must(s.fs.Chdir(ctx, "/sub"))
	if got, err := s.fs.Getcwd(ctx); got != "/sub" {
		t.Errorf("getcwd = %q, %v", got, err)
	}
	if got, err := s.read("/../../sub/deep"); got != "deep" {
		t.Errorf("read = %q, %v", got, err)
	}
	_, err := s.read("/../file")
	s.expect("out of the chroot", err, unix.ENOENT)
}

func TestExecutable(t *testing.T) {
	s := newSandbox(t, false)
	s.must(os.WriteFile(filepath.Join(s.host, "prog"), []byte("#!/bin/sh\n"), 0o755))
	s.must(os.Symlink("prog", filepath.Join(s.host, "plink")))
	e, err := s.fs.OpenExecutable(ctx, nil, "/plink", 0)
	s.must(err)
	defer e.Close()
	buf := make([]byte, 100)
	n, err := e.ReadAt(buf, 2)
	if string(buf[:n]) != "/bin/sh\n" || err == nil || e.Path() != "/prog" {
		t.Errorf("ReadAt = %q, %v; path %q", buf[:n], err, e.Path())
	}
	for path, want := range map[string]error{
		"/file": unix.EACCES, "/dir": unix.EACCES, "/missing": unix.ENOENT, "/file/x": unix.ENOTDIR, "/dev/null": unix.EACCES,
	} {
		_, err := s.fs.OpenExecutable(ctx, nil, path, 0)
		s.expect(path, err, want)
	}
}

// No operation keeps a host descriptor.
func TestNoDescriptorLeak(t *testing.T) {
	s := newSandbox(t, true)
	count := func() int {
		names, err := os.ReadDir("/proc/self/fd")
		s.must(err)
		return len(names)
	}
	work := func() {
		s.read("/link/deep")
		s.read("/missing/x")
		s.read("/dir/sub/deep/x")
		s.read("/link/../../file")
		s.fs.StatAt(ctx, nil, "/dir/up", 0)
		s.fs.MkdirAt(ctx, nil, "/d", 0o755)
		s.fs.MkdirAt(ctx, nil, "/d", 0o755)
		s.fs.RenameAt(ctx, nil, "/d", nil, "/e", 0)
		s.fs.UnlinkAt(ctx, nil, "/e", unix.AT_REMOVEDIR)
		s.fs.Chdir(ctx, "/dir/sub")
		s.fs.Chdir(ctx, "/file")
		s.fs.Chdir(ctx, "/")
		s.fs.ReadlinkAt(ctx, nil, "/link")
		s.fs.LinkAt(ctx, nil, "/file", nil, "/file2", 0)
		s.fs.UnlinkAt(ctx, nil, "/file2", 0)
		s.fs.ChmodAt(ctx, nil, "/file", 0o644, 0)
		s.fs.Truncate(ctx, "/file", 6)
		if f, err := s.fs.OpenAt(ctx, nil, "/dir", unix.O_RDONLY, 0, 0); err == nil {
			f.ReadDirRaw(ctx, make([]byte, 1000))
			s.fs.StatAt(ctx, f, "sub/deep", 0)
			vfs.LocksOf(f).Flock(f, true)
			f.DecRef()
		}
		if e, err := s.fs.OpenExecutable(ctx, nil, "/file", 0); err == nil {
			e.Close()
		}
	}
	work()
	before := count()
	for range 20 {
		work()
	}
	if after := count(); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
