package stub

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
)

func newZygote(t *testing.T) *Zygote {
	t.Helper()
	z, err := Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(z.Close)
	return z
}

func fork(t *testing.T, z *Zygote) (pid, tid int) {
	t.Helper()
	pid, tid, err := z.Fork()
	if err != nil {
		t.Fatal(err)
	}
	return pid, tid
}

func procFile(t *testing.T, pid int, name string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestImage(t *testing.T) {
	const base, end = 0x7000_0000_0000, 0x7fff_ffff_f000
	image, l, err := buildImage(base, end, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range image {
		if p.Access.Write && p.Access.Execute {
			t.Errorf("segment at %#x can be written and executed", p.Addr)
		}
	}
	for name, addr := range map[string]uintptr{"Park": l.Park, "Call": l.Call, "Clone": l.Clone, "Handler": l.Handler, "AltStack": l.AltStack} {
		if addr < base || addr >= base+textSize {
			t.Errorf("%s is %#x: not in the text", name, addr)
		}
	}
	if l.Start != base || l.End != base+imageSize || l.SignalStack[1] != l.End || l.SignalStack[0] <= l.Start {
		t.Errorf("layout %+v", l)
	}
}

// A stub maps its image and nothing else, and has no file but its socket.
func TestForkIsBare(t *testing.T) {
	z := newZygote(t)
	for range 3 {
		pid, tid := fork(t, z)
		if tid == pid {
			t.Errorf("process %d has one thread", pid)
		}
		for line := range strings.Lines(procFile(t, pid, "maps")) {
			var start, end uint64
			var perms string
			if _, err := fmt.Sscanf(line, "%x-%x %s", &start, &end, &perms); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(line, "[vsyscall]") {
				continue
			}
			if start < uint64(z.Layout.Start) || end > uint64(z.Layout.End) || strings.Contains(perms, "wx") {
				t.Errorf("mapping %s", line)
			}
		}
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			t.Fatal(err)
		}
		if len(fds) != 1 {
			t.Errorf("%d descriptors, want 1", len(fds))
		}
		if env := procFile(t, pid, "environ"); env != "" {
			t.Errorf("environment %q", env)
		}
		status := procFile(t, pid, "status")
		for _, want := range []string{"Name:\t" + stubName + "\n", "NoNewPrivs:\t1\n", "Seccomp:\t2\n", fmt.Sprintf("PPid:\t%d\n", os.Getpid())} {
			if !strings.Contains(status, want) {
				t.Errorf("status has no %q:\n%s", want, status)
			}
		}
		var core unix.Rlimit
		if err := unix.Prlimit(pid, unix.RLIMIT_CORE, nil, &core); err != nil || core.Max > 1 {
			t.Errorf("it may write a core of %d bytes, %v", core.Max, err)
		}
		z.Release(pid)
		if err := unix.Kill(pid, 0); err != unix.ESRCH {
			t.Errorf("after Release process %d is there: %v", pid, err)
		}
	}
}

// Descriptors that our process would let its children inherit do not reach stubs.
func TestInheritedDescriptors(t *testing.T) {
	var fds []int
	for range 3 {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY, 0) // without O_CLOEXEC
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		fds = append(fds, fd)
	}
	z := newZygote(t)
	got, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", z.pid))
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || got[0].Name() != "0" {
		t.Errorf("the zygote has descriptors %v, want 0 alone; we had %d", got, fds)
	}
}

// file is a memmap.File with nothing but a descriptor.
type file struct{ fd int }

func (*file) IncRef(memmap.FileRange) {}
func (*file) DecRef(memmap.FileRange) {}
func (*file) MapInternal(memmap.FileRange, hostarch.AccessType) ([][]byte, error) {
	return nil, unix.ENOSYS
}
func (f *file) FD() int { return f.fd }

func newFile(t *testing.T, name string) *file {
	t.Helper()
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := &file{fd}
	t.Cleanup(func() { unix.Close(f.fd) })
	return f
}

// held returns the files that the zygote holds, by number.
func held(t *testing.T, z *Zygote) map[string]string {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", z.pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]string)
	for _, fd := range fds {
		if what, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && strings.HasPrefix(what, "/memfd:") {
			files[fd.Name()] = what
		}
	}
	return files
}

// use hands f over and checks that the number is that of the right file.
func use(t *testing.T, z *Zygote, f *file, name string) int {
	t.Helper()
	num := -1
	err := z.WithFile(f, func(n int) error {
		num = n
		if got := held(t, z)[fmt.Sprint(n)]; got != "/memfd:"+name+" (deleted)" {
			t.Errorf("number %d is %q, want %s", n, got, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return num
}

func TestFiles(t *testing.T) {
	z := newZygote(t)
	pid, _ := fork(t, z)
	a, b := newFile(t, "a"), newFile(t, "b")
	first := use(t, z, a, "a")
	use(t, z, b, "b")
	if again := use(t, z, a, "a"); again != first {
		t.Errorf("the same file has the number %d, then %d", first, again)
	}
	// The same File that means another one by now.
	unix.Close(b.fd)
	b.fd = newFile(t, "c").fd
	use(t, z, b, "c")
	if n := len(held(t, z)); n != 2 {
		t.Errorf("%d files are held, want 2: %v", n, held(t, z))
	}
	want := errors.New("from the callback")
	if err := z.WithFile(a, func(int) error { return want }); err != want {
		t.Errorf("WithFile returned %v", err)
	}
	if err := z.WithFile(&file{-1}, func(int) error { return nil }); !errors.Is(err, unix.EBADF) {
		t.Errorf("a file without descriptor: %v, want EBADF", err)
	}
	z.Release(pid)
	if got := held(t, z); len(got) != 0 {
		t.Errorf("without stubs the zygote holds %v", got)
	}
}

// DropFiles closes what is not in use, on both sides of what is.
func TestDropFiles(t *testing.T) {
	z := newZygote(t)
	var files []*file
	for i := range 9 {
		name := fmt.Sprint(i)
		files = append(files, newFile(t, name))
		use(t, z, files[i], name)
	}
	// Used in another order than that of their numbers.
	for i := range files {
		use(t, z, files[i*5%9], fmt.Sprint(i*5%9))
	}
	err := z.WithFile(files[3], func(num int) error {
		z.DropFiles()
		if got := held(t, z); len(got) != 1 || got[fmt.Sprint(num)] != "/memfd:3 (deleted)" {
			t.Errorf("with number %d in use the zygote holds %v", num, got)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	z.DropFiles()
	if got := held(t, z); len(got) != 0 {
		t.Errorf("the zygote holds %v", got)
	}
}

// More files than the zygote keeps, or may have.
func TestManyFiles(t *testing.T) {
	z := newZygote(t)
	for i := range maxFiles + 10 {
		name := fmt.Sprint(i)
		fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		if err := z.WithFile(&file{fd}, func(int) error { return nil }); err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
	}
	if n := len(held(t, z)); n > maxFiles {
		t.Errorf("%d files are held, want at most %d", n, maxFiles)
	}
	z.DropFiles()
	if err := unix.Prlimit(z.pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 4, Max: 4}, nil); err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		name := fmt.Sprint(i)
		use(t, z, newFile(t, name), name)
	}
	// With all of them in use.
	f := []*file{newFile(t, "x"), newFile(t, "y"), newFile(t, "z"), newFile(t, "w")}
	err := z.WithFile(f[0], func(int) error {
		return z.WithFile(f[1], func(int) error {
			return z.WithFile(f[2], func(int) error {
				return z.WithFile(f[3], func(int) error { return nil })
			})
		})
	})
	if !errors.Is(err, unix.EMFILE) || !strings.Contains(err.Error(), "RLIMIT_NOFILE") {
		t.Errorf("with the table full: %v, want EMFILE and RLIMIT_NOFILE", err)
	}
}

// A dead zygote is an error, and SharedWith starts another one.
func TestZygoteKilled(t *testing.T) {
	z, err := SharedWith(nil)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := SharedWith(nil); err != nil || again != z {
		t.Fatalf("SharedWith returned %p, %v, then %p", z, err, again)
	}
	pid, _ := fork(t, z)
	Kill(z.pid)
	for deadline := time.Now().Add(time.Minute); z.Alive(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the zygote seems to be alive")
		}
	}
	// Its death may also come to light while a request is under way.
	other := newZygote(t)
	otherPid, _ := fork(t, other)
	Kill(other.pid)
	if _, _, err := other.Fork(); !errors.Is(err, unix.EPIPE) {
		t.Errorf("Fork off a zygote that has just been killed: %v, want EPIPE", err)
	}
	other.Release(otherPid)
	if _, _, err := z.Fork(); !errors.Is(err, unix.EPIPE) {
		t.Errorf("Fork off a dead zygote: %v, want EPIPE", err)
	}
	if err := z.WithFile(newFile(t, "f"), func(int) error { return nil }); !errors.Is(err, unix.EPIPE) {
		t.Errorf("WithFile of a dead zygote: %v, want EPIPE", err)
	}
	if err := unix.Kill(pid, 0); err != nil {
		t.Errorf("its stub is gone: %v", err)
	}
	z.Release(pid)
	next, err := SharedWith(nil)
	if err != nil || next == z {
		t.Fatalf("SharedWith after the death of the zygote: %p, %v", next, err)
	}
	pid, _ = fork(t, next)
	next.Release(pid)
	next.Close()
}

// Whoever needs a stub gets one, even when the zygote has been killed a moment ago,
// which does not show yet. Another error is none of the zygote's.
func TestWithShared(t *testing.T) {
	var last *Zygote
	for range 20 {
		err := WithShared(nil, func(z *Zygote) error {
			pid, _, err := z.Fork()
			if err == nil {
				z.Release(pid)
			}
			last = z
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		Kill(last.pid)
	}
	n := 0
	err := WithShared(nil, func(z *Zygote) error {
		n, last = n+1, z
		return unix.EIO
	})
	if err != unix.EIO || n != 1 {
		// The first try may have met the dead one.
		if n != 2 {
			t.Errorf("what fails for another reason is tried %d times: %v", n, err)
		}
	}
	last.Close()
}

func TestCloseLeavesNothing(t *testing.T) {
	before := children(t)
	for range 3 {
		z, err := Start()
		if err != nil {
			t.Fatal(err)
		}
		z.Close()
		z.Close()
	}
	if after := children(t); !slices.Equal(before, after) {
		t.Errorf("children were %v and are %v", before, after)
	}
}

// children returns the processes whose parent this one is, zombies too.
func children(t *testing.T) (pids []string) {
	t.Helper()
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range tasks {
		if b, err := os.ReadFile(f); err == nil {
			pids = append(pids, strings.Fields(string(b))...)
		}
	}
	slices.Sort(pids)
	return pids
}

// What a host without room says names the fix.
func TestHints(t *testing.T) {
	for err, want := range map[error]string{
		unix.EMFILE: "RLIMIT_NOFILE", unix.EAGAIN: "RLIMIT_NPROC", unix.ENOMEM: "memory.max",
		unix.ENFILE: "fs.file-max", fmt.Errorf("x: %w", unix.EPERM): "seccomp",
	} {
		if got := hint(err); !strings.Contains(got, want) {
			t.Errorf("the hint for %v is %q", err, got)
		}
	}
	if got := hint(unix.EIO); got != "" {
		t.Errorf("the hint for EIO is %q", got)
	}
}

// The filter traps the vsyscall page and nothing else.
func TestFilter(t *testing.T) {
	prog := filter()
	run := func(ip uint64) uint32 {
		data := make([]byte, 64)
		binary.LittleEndian.PutUint64(data[8:], ip)
		var a uint32
		for pc := 0; ; pc++ {
			switch ins := prog[pc]; ins.Code {
			case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
				a = binary.LittleEndian.Uint32(data[ins.K:])
			case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
				pc += jump(a == ins.K, ins)
			case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
				pc += jump(a >= ins.K, ins)
			case unix.BPF_RET | unix.BPF_K:
				return ins.K
			default:
				t.Fatalf("instruction %+v", ins)
			}
		}
	}
	for ip, want := range filterCases {
		if got := run(ip); got != want {
			t.Errorf("from %#x: %#x, want %#x", ip, got, want)
		}
	}
}

func jump(cond bool, ins unix.SockFilter) int {
	if cond {
		return int(ins.Jt)
	}
	return int(ins.Jf)
}

// The zygote follows whoever hands it a file from CPU to CPU; its stubs do not.
func TestForkAnywhere(t *testing.T) {
	z := newZygote(t)
	cpus := func(pid int) (s unix.CPUSet) {
		if err := unix.SchedGetaffinity(pid, &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	all := cpus(0)
	if err := z.WithFile(newFile(t, "a"), func(int) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if got := cpus(z.pid); got.Count() != 1 {
		t.Errorf("the zygote can run on %d CPUs, want 1", got.Count())
	}
	pid, _ := fork(t, z)
	defer z.Release(pid)
	if got := cpus(pid); got != all {
		t.Errorf("a stub can run on %v, want %v", got, all)
	}
}
