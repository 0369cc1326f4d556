package vfs

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/waiter"
)

var bg = context.Background()

func mustRead(t *testing.T, f *FileDescription, size int, want string, wantErr error) {
	t.Helper()
	buf := make([]byte, size)
	n, err := f.Read(bg, buf)
	if string(buf[:n]) != want || !errors.Is(err, wantErr) {
		t.Errorf("read = %q, %v; want %q, %v", buf[:n], err, want, wantErr)
	}
}

func mustWrite(t *testing.T, f *FileDescription, p string, want int, wantErr error) {
	t.Helper()
	n, err := f.Write(bg, []byte(p))
	if n != want || !errors.Is(err, wantErr) {
		t.Errorf("write of %d bytes = %d, %v; want %d, %v", len(p), n, err, want, wantErr)
	}
}

func TestPipe(t *testing.T) {
	r, w := NewPipeFiles(0)
	mustRead(t, r, 10, "", unix.EAGAIN)
	mustWrite(t, r, "x", 0, unix.EBADF)
	mustRead(t, w, 1, "", unix.EBADF)
	mustWrite(t, w, "hello", 5, nil)
	mustRead(t, r, 3, "hel", nil)
	mustRead(t, r, 10, "lo", nil)
	if _, err := r.Seek(bg, 0, 0); err != unix.ESPIPE {
		t.Errorf("seek: %v, want ESPIPE", err)
	}

	// What is at most PIPE_BUF bytes goes in as a whole or not at all.
	big := string(bytes.Repeat([]byte("b"), defaultPipeBytes-10))
	mustWrite(t, w, big, len(big), nil)
	mustWrite(t, w, "eleven bytes", 0, unix.EAGAIN)
	mustWrite(t, w, string(make([]byte, pipeAtomicBytes+1)), 10, nil)
	mustWrite(t, w, "x", 0, unix.EAGAIN)
	if got := w.Readiness(waiter.AllEvents); got&waiter.WritableEvents != 0 {
		t.Errorf("full pipe is writable: %#x", got)
	}
	mustRead(t, r, len(big), big, nil)
	mustRead(t, r, 20, string(make([]byte, 10)), nil)

	w.DecRef()
	if got := r.Readiness(waiter.EventIn); got&waiter.EventHUp == 0 {
		t.Errorf("no writer: %#x, want EventHUp", got)
	}
	mustRead(t, r, 1, "", nil)
	r.DecRef()
}

// The ring keeps order over many wraps with sizes that do not divide it.
func TestPipeWraps(t *testing.T) {
	r, w := NewPipeFiles(0)
	defer r.DecRef()
	defer w.DecRef()
	var sent, got int
	buf := make([]byte, 40000)
	for got < 1<<20 {
		for i := range 30011 {
			buf[i] = byte((sent + i) % 251)
		}
		n, err := w.Write(bg, buf[:30011])
		if err != nil && err != unix.EAGAIN {
			t.Fatal(err)
		}
		sent += n
		n, err = r.Read(bg, buf[:23456])
		if err != nil {
			t.Fatal(err)
		}
		for i, b := range buf[:n] {
			if b != byte((got+i)%251) {
				t.Fatalf("byte %d is %d, want %d", got+i, b, (got+i)%251)
			}
		}
		got += n
	}
}

func TestPipeBroken(t *testing.T) {
	r, w := NewPipeFiles(0)
	e, c := waiter.NewChannelEntry(waiter.WritableEvents)
	w.EventRegister(e)
	r.DecRef()
	select {
	case <-c:
	default:
		t.Error("a waiting writer was not woken by the last reader's end")
	}
	w.EventUnregister(e)
	mustWrite(t, w, "x", 0, unix.EPIPE)
	w.DecRef()
}

func TestPipeSize(t *testing.T) {
	r, w := NewPipeFiles(0)
	defer r.DecRef()
	defer w.DecRef()
	mustWrite(t, w, "abc", 3, nil)
	if n, err := SetPipeSize(r, 100000); n != 131072 || err != nil {
		t.Errorf("SetPipeSize = %d, %v", n, err)
	}
	mustWrite(t, w, string(make([]byte, 131072)), 131072-3, nil)
	if _, err := SetPipeSize(r, 4096); err != unix.EBUSY {
		t.Errorf("shrinking a full pipe: %v, want EBUSY", err)
	}
	if _, err := SetPipeSize(r, maxPipeBytes+1); err != unix.EPERM {
		t.Errorf("too large: %v, want EPERM", err)
	}
	if n, _ := PipeSize(w); n != 131072 {
		t.Errorf("PipeSize = %d", n)
	}
}

func TestEventFD(t *testing.T) {
	e := NewEventFD(3, false, 0)
	defer e.DecRef()
	mustRead(t, e, 8, "\x03\x00\x00\x00\x00\x00\x00\x00", nil)
	mustRead(t, e, 8, "", unix.EAGAIN)
	mustRead(t, e, 7, "", unix.EINVAL)
	mustWrite(t, e, "\xff\xff\xff\xff\xff\xff\xff\xff", 0, unix.EINVAL)
	mustWrite(t, e, "\xfe\xff\xff\xff\xff\xff\xff\xff", 8, nil)
	mustWrite(t, e, "\x01\x00\x00\x00\x00\x00\x00\x00", 0, unix.EAGAIN)
	if got := e.Readiness(waiter.EventIn | waiter.EventOut); got != waiter.EventIn {
		t.Errorf("readiness %#x, want EventIn", got)
	}

	s := NewEventFD(2, true, 0)
	defer s.DecRef()
	mustRead(t, s, 8, "\x01\x00\x00\x00\x00\x00\x00\x00", nil)
	mustRead(t, s, 8, "\x01\x00\x00\x00\x00\x00\x00\x00", nil)
	mustRead(t, s, 8, "", unix.EAGAIN)
}

func TestTimerFD(t *testing.T) {
	f := NewTimerFD(false, 0)
	defer f.DecRef()
	mustRead(t, f, 8, "", unix.EAGAIN)
	e, c := waiter.NewChannelEntry(waiter.ReadableEvents)
	f.EventRegister(e)
	defer f.EventUnregister(e)
	if _, _, err := SetTimerFD(f, time.Millisecond, 0, false); err != nil {
		t.Fatal(err)
	}
	<-c
	mustRead(t, f, 8, "\x01\x00\x00\x00\x00\x00\x00\x00", nil)

	// Disarmed, it says what was left, and does not fire.
	SetTimerFD(f, time.Hour, time.Minute, false)
	v, i, err := SetTimerFD(f, 0, 0, false)
	if v <= 0 || v > time.Hour || i != time.Minute || err != nil {
		t.Errorf("old value %v, %v, %v", v, i, err)
	}
	if v, i, err := GetTimerFD(f); v != 0 || i != 0 || err != nil {
		t.Errorf("disarmed: %v, %v, %v", v, i, err)
	}

	// An absolute time that has passed fires at once.
	SetTimerFD(f, 1, 0, true)
	<-c
	mustRead(t, f, 8, "\x01\x00\x00\x00\x00\x00\x00\x00", nil)
	if _, _, err := GetTimerFD(NewEventFD(0, false, 0)); err != unix.EINVAL {
		t.Errorf("GetTimerFD of an eventfd: %v, want EINVAL", err)
	}
}

func mustEvents(t *testing.T, ep *FileDescription, want ...EpollEvent) {
	t.Helper()
	got, err := ReadEpoll(ep, 10)
	if err != nil || len(got) != len(want) {
		t.Errorf("events %v, %v; want %v", got, err, want)
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Errorf("events %v; want %v", got, want)
		}
	}
}

func TestEpoll(t *testing.T) {
	ep := NewEpoll()
	defer ep.DecRef()
	ctl := func(op int, fd int32, f *FileDescription, events uint32, want error) {
		t.Helper()
		if err := EpollCtl(t.Context(), ep, op, fd, f, EpollEvent{events, uint64(fd)}); err != want {
			t.Errorf("EpollCtl(%d, %d): %v, want %v", op, fd, err, want)
		}
	}
	const in = unix.EPOLLIN
	r, w := NewPipeFiles(0)

	// Level-triggered.
	ctl(unix.EPOLL_CTL_ADD, 3, r, in, nil)
	ctl(unix.EPOLL_CTL_ADD, 3, r, in, unix.EEXIST)
	ctl(unix.EPOLL_CTL_ADD, 4, ep, in, unix.EINVAL)
	mustEvents(t, ep)
	mustWrite(t, w, "abc", 3, nil)
	mustEvents(t, ep, EpollEvent{in, 3})
	mustEvents(t, ep, EpollEvent{in, 3})
	mustRead(t, r, 10, "abc", nil)
	mustEvents(t, ep)

	// Edge-triggered: once per write.
	ctl(unix.EPOLL_CTL_MOD, 3, r, in|unix.EPOLLET, nil)
	mustWrite(t, w, "a", 1, nil)
	mustEvents(t, ep, EpollEvent{in, 3})
	mustEvents(t, ep)
	mustWrite(t, w, "b", 1, nil)
	mustEvents(t, ep, EpollEvent{in, 3})
	mustEvents(t, ep)

	// One-shot: until modified.
	ctl(unix.EPOLL_CTL_MOD, 3, r, in|unix.EPOLLONESHOT, nil)
	mustEvents(t, ep, EpollEvent{in, 3})
	mustWrite(t, w, "c", 1, nil)
	mustEvents(t, ep)
	ctl(unix.EPOLL_CTL_MOD, 3, r, in|unix.EPOLLONESHOT, nil)
	mustEvents(t, ep, EpollEvent{in, 3})

	// Deleted.
	ctl(unix.EPOLL_CTL_MOD, 3, r, in, nil)
	ctl(unix.EPOLL_CTL_DEL, 3, r, 0, nil)
	ctl(unix.EPOLL_CTL_DEL, 3, r, 0, unix.ENOENT)
	ctl(unix.EPOLL_CTL_MOD, 3, r, in, unix.ENOENT)
	mustEvents(t, ep)

	// A closed file is forgotten.
	ctl(unix.EPOLL_CTL_ADD, 3, r, in, nil)
	ctl(unix.EPOLL_CTL_ADD, 5, w, unix.EPOLLOUT, nil)
	r.DecRef()
	mustEvents(t, ep, EpollEvent{unix.EPOLLOUT | unix.EPOLLERR, 5})
	w.DecRef()
	mustEvents(t, ep)
}

func TestEpollNested(t *testing.T) {
	inner, outer := NewEpoll(), NewEpoll()
	defer inner.DecRef()
	defer outer.DecRef()
	e := NewEventFD(0, false, 0)
	defer e.DecRef()
	for _, err := range []error{
		EpollCtl(t.Context(), inner, unix.EPOLL_CTL_ADD, 1, e, EpollEvent{unix.EPOLLIN, 1}),
		EpollCtl(t.Context(), outer, unix.EPOLL_CTL_ADD, 2, inner, EpollEvent{unix.EPOLLIN, 2}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := EpollCtl(t.Context(), inner, unix.EPOLL_CTL_ADD, 3, outer, EpollEvent{unix.EPOLLIN, 3}); err != unix.ELOOP {
		t.Errorf("loop: %v, want ELOOP", err)
	}
	mustEvents(t, outer)
	mustWrite(t, e, "\x01\x00\x00\x00\x00\x00\x00\x00", 8, nil)
	mustEvents(t, outer, EpollEvent{unix.EPOLLIN, 2})
	mustEvents(t, inner, EpollEvent{unix.EPOLLIN, 1})
}

func TestSocketPair(t *testing.T) {
	a, b := NewUnixSocketPair(unix.SOCK_STREAM, 0, unix.Ucred{Pid: 1})
	sa, sb := a.Impl().(*UnixSocket), b.Impl().(*UnixSocket)
	mustRead(t, b, 1, "", unix.EAGAIN)
	mustWrite(t, a, "one", 3, nil)
	mustWrite(t, a, "two", 3, nil)
	mustRead(t, b, 4, "onet", nil)
	mustRead(t, b, 4, "wo", nil)

	// Rights stay with their bytes and are not joined.
	e1, e2 := NewEventFD(1, false, 0), NewEventFD(2, false, 0)
	sa.Send([]byte("x"), nil)
	sa.Send([]byte("y"), []*FileDescription{e1})
	sa.Send([]byte("z"), []*FileDescription{e2})
	buf := make([]byte, 10)
	for _, want := range []struct {
		data   string
		rights int
	}{{"x", 0}, {"y", 1}, {"z", 1}} {
		n, _, rights, err := sb.Receive(buf, false)
		if string(buf[:n]) != want.data || len(rights) != want.rights || err != nil {
			t.Errorf("received %q with %d rights, %v; want %v", buf[:n], len(rights), err, want)
		}
		for _, f := range rights {
			f.DecRef()
		}
	}
	if e1.TryIncRef() || e2.TryIncRef() {
		t.Error("references on rights were kept")
	}

	// Rights that nobody receives are dropped with the socket.
	e3 := NewEventFD(3, false, 0)
	sa.Send([]byte("w"), []*FileDescription{e3})
	if err := sa.Shutdown(unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, a, "x", 0, unix.EPIPE)
	mustRead(t, b, 10, "w", nil)
	mustRead(t, b, 10, "", nil)
	mustWrite(t, b, "back", 4, nil)
	b.DecRef()
	mustRead(t, a, 10, "back", nil)
	mustRead(t, a, 10, "", nil)
	if got := a.Readiness(waiter.AllEvents); got&waiter.EventHUp == 0 {
		t.Errorf("readiness after the peer closed: %#x", got)
	}
	a.DecRef()
	if e3.TryIncRef() {
		t.Error("a right in flight was kept")
	}
}

func TestSocketMessages(t *testing.T) {
	a, b := NewUnixSocketPair(unix.SOCK_SEQPACKET, 0, unix.Ucred{})
	defer a.DecRef()
	mustWrite(t, a, "first", 5, nil)
	mustWrite(t, a, "second", 6, nil)
	sb := b.Impl().(*UnixSocket)
	buf := make([]byte, 3)
	if n, full, _, err := sb.Receive(buf, true); n != 3 || full != 5 || err != nil {
		t.Errorf("peek = %d, %d, %v", n, full, err)
	}
	if n, full, _, err := sb.Receive(buf, false); n != 3 || full != 5 || err != nil {
		t.Errorf("receive = %d, %d, %v", n, full, err)
	}
	mustRead(t, b, 10, "second", nil)
	mustWrite(t, a, string(make([]byte, SocketBufferSize+1)), 0, unix.EMSGSIZE)
	b.DecRef()
	mustWrite(t, a, "x", 0, unix.EPIPE)

	u := NewUnixSocket(unix.SOCK_STREAM, 0)
	defer u.DecRef()
	mustWrite(t, u, "x", 0, unix.ENOTCONN)
	mustRead(t, u, 1, "", unix.EINVAL)
}

func TestFDTable(t *testing.T) {
	table := NewFDTable()
	open := func(min int32, cloexec bool) int32 {
		t.Helper()
		fd, err := table.NewFD(min, NewEventFD(0, false, 0), cloexec, 10)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	for i := range int32(3) {
		if fd := open(0, i == 1); fd != i {
			t.Errorf("descriptor %d, want %d", fd, i)
		}
	}
	if fd := open(7, false); fd != 7 {
		t.Errorf("descriptor %d, want 7", fd)
	}
	table.Remove(0).DecRef()
	if fd := open(0, false); fd != 0 {
		t.Errorf("descriptor %d, want the freed 0", fd)
	}
	if fd := open(0, false); fd != 3 {
		t.Errorf("descriptor %d, want 3", fd)
	}
	fork := table.Fork()
	fork.CloseOnExec()
	if got := fork.FDs(); len(got) != 4 || got[1] != 2 {
		t.Errorf("after exec: %v", got)
	}
	if f := table.Get(1); f == nil {
		t.Error("the parent lost its descriptor")
	} else {
		f.DecRef()
	}
	for range 5 {
		table.NewFD(0, NewEventFD(0, false, 0), false, 10)
	}
	if _, err := table.NewFD(0, NewEventFD(0, false, 0), false, 10); err != unix.EMFILE {
		t.Errorf("full table: %v, want EMFILE", err)
	}
	if _, err := table.NewFDAt(10, NewEventFD(0, false, 0), false, 10); err != unix.EBADF {
		t.Errorf("NewFDAt beyond the limit: %v, want EBADF", err)
	}
	file := table.Get(2)
	old, err := table.NewFDAt(2, NewEventFD(0, false, 0), false, 10)
	if old != file || err != nil {
		t.Errorf("NewFDAt = %p, %v; want %p", old, err, file)
	}
	old.DecRef()
	file.DecRef()
	fork.DecRef()
	if file.TryIncRef() {
		t.Error("a file that is closed everywhere still has a reference")
	}
	table.DecRef()
}
