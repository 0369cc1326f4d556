package fd

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// isOpen reports whether the number fd is an open descriptor.
func isOpen(fd int) bool {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	return err == nil
}

func open(t *testing.T) *FD {
	t.Helper()
	f, err := Open("/dev/null", unix.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestClose(t *testing.T) {
	f := open(t)
	n := f.FD()
	if !isOpen(n) {
		t.Fatalf("descriptor %d is not open", n)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if isOpen(n) {
		t.Errorf("descriptor %d is open after Close", n)
	}
	if f.FD() != -1 {
		t.Errorf("FD after Close = %d", f.FD())
	}
	if err := f.Close(); !errors.Is(err, unix.EBADF) {
		t.Errorf("second Close: %v, want EBADF", err)
	}
	if f.Release() != -1 {
		t.Error("Release after Close gives a number")
	}
}

// A second Close must not close what has the number by then.
func TestCloseTwiceSparesOthers(t *testing.T) {
	f := open(t)
	n := f.FD()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	g := open(t)
	defer g.Close()
	if err := unix.Dup3(g.FD(), n, unix.O_CLOEXEC); err != nil && g.FD() != n {
		t.Fatal(err)
	}
	if f.Close() == nil {
		t.Error("second Close succeeds")
	}
	if !isOpen(n) {
		t.Errorf("second Close closed another's descriptor %d", n)
	}
	if g.FD() != n {
		unix.Close(n)
	}
}

func TestRelease(t *testing.T) {
	f := open(t)
	want := f.FD()
	n := f.Release()
	if n != want || f.FD() != -1 {
		t.Errorf("Release = %d, FD then %d", n, f.FD())
	}
	if !isOpen(n) {
		t.Error("Release closed the descriptor")
	}
	if err := f.Close(); !errors.Is(err, unix.EBADF) {
		t.Errorf("Close after Release: %v, want EBADF", err)
	}
	rounds := 0
	collect(t, func() bool { rounds++; return rounds > 5 })
	if !isOpen(n) {
		t.Error("a released descriptor was closed when its FD was collected")
	}
	unix.Close(n)
}

// collect runs the garbage collector until done returns true.
func collect(t *testing.T, done func() bool) {
	t.Helper()
	for range 200 {
		runtime.GC()
		if done() {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Error("not collected")
}

func TestUnreachableIsClosed(t *testing.T) {
	n := open(t).FD()
	collect(t, func() bool { return !isOpen(n) })
}

func TestNewNegative(t *testing.T) {
	for _, n := range []int{-1, -100} {
		f := New(n)
		if f.FD() != -1 || f.Release() != -1 || !errors.Is(f.Close(), unix.EBADF) {
			t.Errorf("New(%d) is not closed", n)
		}
	}
}

func TestOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	f, err := Open(path, unix.O_CREAT|unix.O_WRONLY, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if flags, err := unix.FcntlInt(uintptr(f.FD()), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("flags %#x, %v: not close-on-exec", flags, err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm()&^0o640 != 0 || st.Mode().Perm()&0o600 != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	missing := filepath.Join(t.TempDir(), "missing")
	if f, err := Open(missing, unix.O_RDONLY, 0); f != nil || !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), missing) {
		t.Errorf("Open of a missing file = %v, %v", f, err)
	}
}

// Of many that close at once exactly one does.
func TestConcurrentClose(t *testing.T) {
	for range 100 {
		f := open(t)
		n := f.FD()
		var closed atomic.Int32
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if f.Close() == nil {
					closed.Add(1)
				}
			})
		}
		wg.Wait()
		if closed.Load() != 1 || isOpen(n) {
			t.Fatalf("closed %d times, open %v", closed.Load(), isOpen(n))
		}
	}
}

func TestCloseError(t *testing.T) {
	f := open(t)
	n := f.FD()
	unix.Close(n) // behind its back
	if err := f.Close(); !errors.Is(err, unix.EBADF) || !strings.Contains(err.Error(), "close") {
		t.Errorf("Close of a descriptor that is gone: %v", err)
	}
}
