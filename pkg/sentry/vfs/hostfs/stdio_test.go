package hostfs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
	"github.com/ringfence/ringfence/pkg/usermem"
)

var ctx = context.Background()

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newPoller(t *testing.T) *Poller {
	t.Helper()
	p, err := NewPoller()
	must(t, err)
	t.Cleanup(p.Close)
	return p
}

func newTestFile(t *testing.T, p *Poller, fd int) *vfs.FileDescription {
	t.Helper()
	f, err := NewFile(p, fd)
	must(t, err)
	t.Cleanup(f.DecRef)
	return f
}

// blockingFlags checks that the description of fd is as it was.
func blockingFlags(t *testing.T, fd int) {
	t.Helper()
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
		t.Errorf("flags of the inherited descriptor are %#x, %v: O_NONBLOCK is set", flags, err)
	}
}

// await waits until the events hold.
func await(t *testing.T, f *vfs.FileDescription, events waiter.EventMask) {
	t.Helper()
	e, c := waiter.NewChannelEntry(events)
	must(t, f.EventRegister(e))
	defer f.EventUnregister(e)
	for f.Readiness(events)&events == 0 {
		select {
		case <-c:
		case <-time.After(10 * time.Second):
			t.Fatalf("events %#x did not come", events)
		}
	}
}

// streams makes pairs of connected descriptors of every kind.
func streams(t *testing.T) map[string][2]int {
	var pipe [2]int
	must(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	sock, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	t.Cleanup(func() {
		for _, fd := range append(pipe[:], sock[:]...) {
			unix.Close(fd)
		}
	})
	return map[string][2]int{"pipe": pipe, "socket": sock}
}

func TestStreamsNeverBlock(t *testing.T) {
	for name, fds := range streams(t) {
		for _, own := range []bool{true, false} {
			p := newPoller(t)
			r, w := newTestFile(t, p, fds[0]), newTestFile(t, p, fds[1])
			if !own { // as if the host did not let us open the pipe again
				for _, f := range []*vfs.FileDescription{r, w} {
					in := f.Impl().(*stream).inherited
					if in.nonblock >= 0 {
						unix.Close(in.nonblock)
						in.nonblock = -1
					}
				}
			}
			buf := make([]byte, 1<<20)
			if _, err := r.Read(ctx, buf); err != unix.EAGAIN {
				t.Errorf("%s: read of nothing: %v, want EAGAIN", name, err)
			}
			if r.Readiness(waiter.EventIn) != 0 {
				t.Errorf("%s: readable with nothing in it", name)
			}
			total := 0
			for {
				n, err := w.Write(ctx, buf)
				if err == unix.EAGAIN {
					break
				}
				must(t, err)
				total += n
			}
			if total == 0 || w.Readiness(waiter.EventOut)&waiter.EventOut != 0 {
				t.Errorf("%s: wrote %d bytes until full, writable still", name, total)
			}
			done := make(chan int)
			go func() {
				got := 0
				for got < total {
					n, err := unix.Read(fds[0], buf)
					if err != nil || n == 0 {
						break
					}
					got += n
				}
				done <- got
			}()
			await(t, w, waiter.EventOut)
			if got := <-done; got != total {
				t.Errorf("%s: read %d of %d bytes", name, got, total)
			}
			go func() {
				time.Sleep(time.Millisecond)
				unix.Write(fds[1], []byte("late"))
			}()
			await(t, r, waiter.EventIn)
			if n, err := r.Read(ctx, buf); string(buf[:n]) != "late" || err != nil {
				t.Errorf("%s: read %q, %v", name, buf[:n], err)
			}
			blockingFlags(t, fds[0])
			blockingFlags(t, fds[1])
		}
	}
}

// The end of a pipe whose writers have gone before we looked.
func TestPipeEnd(t *testing.T) {
	p := newPoller(t)
	var pipe [2]int
	must(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	defer unix.Close(pipe[0])
	unix.Write(pipe[1], []byte("last"))
	unix.Close(pipe[1])
	r := newTestFile(t, p, pipe[0])
	await(t, r, waiter.EventIn)
	buf := make([]byte, 10)
	if n, err := r.Read(ctx, buf); n != 4 || err != nil {
		t.Errorf("read = %d, %v", n, err)
	}
	await(t, r, waiter.EventHUp)
	if n, err := r.Read(ctx, buf); n != 0 || err != nil {
		t.Errorf("read at the end = %d, %v", n, err)
	}
}

func TestBrokenPipe(t *testing.T) {
	p := newPoller(t)
	for name, fds := range streams(t) {
		w := newTestFile(t, p, fds[1])
		unix.Close(fds[0])
		if _, err := w.Write(ctx, []byte("x")); err != unix.EPIPE {
			t.Errorf("%s: write without a reader: %v, want EPIPE", name, err)
		}
	}
}

// A regular file goes on where the program before left off, and leaves its own
// offset for the one after.
func TestSharedOffset(t *testing.T) {
	p := newPoller(t)
	h, err := os.Create(filepath.Join(t.TempDir(), "f"))
	must(t, err)
	defer h.Close()
	h.WriteString("one ")
	f := newTestFile(t, p, int(h.Fd()))
	if _, err := f.Write(ctx, []byte("two ")); err != nil {
		t.Error(err)
	}
	h.WriteString("three")
	if pos, err := f.Seek(ctx, 0, io.SeekCurrent); pos != 13 || err != nil {
		t.Errorf("offset = %d, %v", pos, err)
	}
	if _, err := f.Seek(ctx, 4, io.SeekStart); err != nil {
		t.Error(err)
	}
	buf := make([]byte, 3)
	if n, err := f.Read(ctx, buf); string(buf[:n]) != "two" || err != nil {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	if pos, _ := h.Seek(0, io.SeekCurrent); pos != 7 {
		t.Errorf("the host's offset is %d", pos)
	}
	must(t, f.SetStatusFlags(unix.O_APPEND|unix.O_NONBLOCK))
	blockingFlags(t, int(h.Fd()))
	if _, err := f.Write(ctx, []byte("!")); err != nil {
		t.Error(err)
	}
	data, _ := os.ReadFile(h.Name())
	if string(data) != "one two three!" {
		t.Errorf("file is %q", data)
	}
	// Opened again through /proc/self/fd it has an offset of its own, and no more
	// access than it was inherited with.
	ro, err := os.Open(h.Name())
	must(t, err)
	defer ro.Close()
	d, err := vfs.FileDentry(ctx, newTestFile(t, p, int(ro.Fd())))
	must(t, err)
	if _, err := d.Node().Open(ctx, d, unix.O_RDWR); err != unix.EACCES {
		t.Errorf("reopen a read-only descriptor for writing: %v, want EACCES", err)
	}
	again, err := d.Node().Open(ctx, d, unix.O_RDONLY)
	must(t, err)
	defer again.DecRef()
	all := make([]byte, 100)
	if n, _ := again.Read(ctx, all); !bytes.Equal(all[:n], data) {
		t.Errorf("opened again: %q", all[:n])
	}
}

// memory is application memory from address 0 on.
type memory struct {
	usermem.IO
	b []byte
}

func (m *memory) CopyIn(_ context.Context, addr hostarch.Addr, dst []byte, _ usermem.IOOpts) (int, error) {
	return copy(dst, m.b[addr:]), nil
}

func (m *memory) CopyOut(_ context.Context, addr hostarch.Addr, src []byte, _ usermem.IOOpts) (int, error) {
	return copy(m.b[addr:], src), nil
}

func TestTerminal(t *testing.T) {
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(master)
	must(t, unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(master, unix.TIOCGPTN)
	must(t, err)
	name := filepath.Join("/dev/pts", itoa(n))
	slave, err := unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(slave)
	must(t, unix.IoctlSetWinsize(master, unix.TIOCSWINSZ, &unix.Winsize{Row: 33, Col: 44}))

	p := newPoller(t)
	f := newTestFile(t, p, slave)
	if tty, ok := f.Impl().(vfs.Terminal); !ok || !tty.IsTerminal() {
		t.Fatal("not a terminal")
	}
	mem := &memory{b: make([]byte, 4096)}
	if _, err := f.Ioctl(ctx, mem, linux.TIOCGWINSZ, 0); err != nil || mem.b[0] != 33 || mem.b[2] != 44 {
		t.Errorf("TIOCGWINSZ: %v, %v", mem.b[:8], err)
	}
	if _, err := f.Ioctl(ctx, mem, linux.TCGETS, 0); err != nil {
		t.Errorf("TCGETS: %v", err)
	}
	var tio linux.Termios
	tio.UnmarshalBytes(mem.b)
	tio.LocalFlags &^= linux.ECHO
	tio.MarshalBytes(mem.b)
	if _, err := f.Ioctl(ctx, mem, linux.TCSETSW, 0); err != nil {
		t.Errorf("TCSETSW: %v", err)
	}
	if h, err := unix.IoctlGetTermios(slave, unix.TCGETS); err != nil || h.Lflag&unix.ECHO != 0 {
		t.Errorf("ECHO is still set: %v", err)
	}
	for _, request := range []uint32{linux.TIOCSTI, linux.TIOCSCTTY, linux.TIOCNOTTY, linux.TIOCSETD, linux.TIOCEXCL, 0x12345678} {
		if _, err := f.Ioctl(ctx, mem, request, 0); !errors.Is(err, unix.ENOTTY) && !errors.Is(err, unix.EPERM) {
			t.Errorf("request %#x: %v, want a refusal", request, err)
		}
	}
	buf := make([]byte, 100)
	if _, err := f.Read(ctx, buf); err != unix.EAGAIN {
		t.Errorf("read of nothing: %v, want EAGAIN", err)
	}
	go unix.Write(master, []byte("line\n"))
	await(t, f, waiter.EventIn)
	if n, err := f.Read(ctx, buf); string(buf[:n]) != "line\n" || err != nil {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	blockingFlags(t, slave)
	tty, err := f.Impl().(vfs.Reopener).Reopen(unix.O_RDWR, func() string { return "/dev/tty" })
	must(t, err)
	defer tty.DecRef()
	if _, err := tty.Write(ctx, []byte("hi")); err != nil {
		t.Error(err)
	}
	if n, err := unix.Read(master, buf); string(buf[:n]) != "hi" {
		t.Errorf("terminal shows %q, %v", buf[:n], err)
	}
}

func itoa(n int) string { return procName(n) }

// Closing everything leaves no descriptor and no goroutine that polls.
func TestNoLeak(t *testing.T) {
	count := func() int {
		names, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		return len(names)
	}
	var pipe [2]int
	must(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	null, err := os.Open(os.DevNull)
	must(t, err)
	defer null.Close()
	before := count()
	p, err := NewPoller()
	must(t, err)
	for _, fd := range []int{pipe[0], pipe[1], int(null.Fd())} {
		f, err := NewFile(p, fd)
		must(t, err)
		e, _ := waiter.NewChannelEntry(waiter.AllEvents)
		must(t, f.EventRegister(e))
		f.EventUnregister(e)
		d, err := vfs.FileDentry(ctx, f)
		must(t, err)
		if again, err := d.Node().Open(ctx, d, f.StatusFlags()&unix.O_ACCMODE); err != nil {
			t.Error(err)
		} else {
			again.DecRef()
		}
		f.DecRef()
	}
	p.Close()
	select {
	case <-p.done:
	default:
		t.Error("the poller still runs")
	}
	if after := count(); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
	if _, err := NewFile(p, 12345); !errors.Is(err, unix.EBADF) {
		t.Errorf("NewFile of a closed descriptor: %v, want EBADF", err)
	}
}
