package syscalls

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// pollSyscalls wait for files.
var pollSyscalls = []kernel.Syscall{
	unix.SYS_PPOLL:         {Name: "ppoll", Fn: sysPpoll},
	unix.SYS_PSELECT6:      {Name: "pselect6", Fn: sysPselect6},
	unix.SYS_EPOLL_CREATE1: {Name: "epoll_create1", Fn: sysEpollCreate1},
	unix.SYS_EPOLL_CTL:     {Name: "epoll_ctl", Fn: sysEpollCtl},
	unix.SYS_EPOLL_PWAIT:   {Name: "epoll_pwait", Fn: sysEpollPwait},
	unix.SYS_EPOLL_PWAIT2:  {Name: "epoll_pwait2", Fn: sysEpollPwait2},
}

// forever is the time-out of a wait without one.
const forever = time.Duration(-1)

// deadline returns the time when timeout has passed; the zero Time for forever.
func deadline(timeout time.Duration) time.Time {
	if timeout < 0 || timeout == maxDuration {
		return time.Time{}
	}
	return time.Now().Add(timeout)
}

// pollFD is an entry of poll(2) while it is waited for.
type pollFD struct {
	fd      int32
	events  waiter.EventMask
	revents waiter.EventMask
	file    *vfs.FileDescription
	ready   waiter.Waitable // of file, for the task
}

// poll waits until one of fds is ready, or timeout has passed, and returns how
// many are.
func poll(t *kernel.Task, fds []pollFD, timeout time.Duration) (int, error) {
	for i := range fds {
		if fds[i].fd >= 0 {
			if file := t.FDTable().Get(fds[i].fd); file != nil {
				fds[i].file, fds[i].ready = file, file.For(t)
			}
		}
	}
	defer func() {
		for i := range fds {
			if fds[i].file != nil {
				fds[i].file.DecRef()
			}
		}
	}()
	look := func() (ready int) {
		for i := range fds {
			p := &fds[i]
			switch {
			case p.fd < 0:
				continue
			case p.file == nil:
				p.revents = linux.POLLNVAL
			default:
				want := p.events | waiter.EventErr | waiter.EventHUp
				p.revents = p.ready.Readiness(want) & want
			}
			if p.revents != 0 {
				ready++
			}
		}
		return ready
	}
	if n := look(); n > 0 || timeout == 0 {
		return n, nil
	}

	woken := make(chan struct{}, 1)
	notify := func(waiter.EventMask) {
		select {
		case woken <- struct{}{}:
		default:
		}
	}
	for i := range fds {
		p := &fds[i]
		if p.file == nil {
			continue
		}
		e := &waiter.Entry{Mask: p.events | waiter.EventErr | waiter.EventHUp, Notify: notify}
		if err := p.ready.EventRegister(e); err != nil {
			return 0, err
		}
		defer p.ready.EventUnregister(e)
	}
	end := deadline(timeout)
	for {
		if n := look(); n > 0 {
			return n, nil
		}
		switch err := t.BlockUntil(woken, end); err {
		case nil:
		case unix.ETIMEDOUT:
			return look(), nil
		default:
			return 0, err
		}
	}
}

// pollFDSize is the size of struct pollfd in bytes.
const pollFDSize = 8

// pollAt is poll(2) with the array of n struct pollfd at addr.
func pollAt(t *kernel.Task, addr hostarch.Addr, n uint, timeout time.Duration) (uintptr, error) {
	if limit, _ := t.Limit(unix.RLIMIT_NOFILE); uint64(n) > limit {
		return 0, unix.EINVAL
	}
	buf := make([]byte, n*pollFDSize)
	if err := t.CopyIn(addr, buf); err != nil {
		return 0, err
	}
	fds := make([]pollFD, n)
	for i := range fds {
		e := buf[i*pollFDSize:]
		fds[i].fd = int32(usermem.ByteOrder.Uint32(e))
		fds[i].events = waiter.EventMask(usermem.ByteOrder.Uint16(e[4:]))
	}
	ready, err := poll(t, fds, timeout)
	if err != nil {
		return 0, err
	}
	for i := range fds {
		usermem.ByteOrder.PutUint16(buf[i*pollFDSize+6:], uint16(fds[i].revents))
	}
	if n > 0 {
		if err := t.CopyOut(addr, buf); err != nil {
			return 0, err
		}
	}
	return uintptr(ready), nil
}

// optionalTimeout copies in a struct timespec; no pointer means forever.
func optionalTimeout(t *kernel.Task, addr hostarch.Addr) (time.Duration, error) {
	if addr == 0 {
		return forever, nil
	}
	return copyInDuration(t, addr)
}

// leaveTimeout writes what is left of a time-out back, as Linux does for
// ppoll(2) and pselect6(2). Failure to write is not an error there.
func leaveTimeout(t *kernel.Task, addr hostarch.Addr, timeout time.Duration, start time.Time) {
	if addr != 0 && timeout > 0 {
		copyOutDuration(t, addr, max(timeout-time.Since(start), 0))
	}
}

func sysPpoll(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	timeout, err := optionalTimeout(t, args[2].Pointer())
	if err != nil {
		return 0, nil, err
	}
	if err := setWaitMask(t, args[3].Pointer(), args[4].SizeT()); err != nil {
		return 0, nil, err
	}
	start := time.Now()
	n, err := pollAt(t, args[0].Pointer(), args[1].SizeT(), timeout)
	leaveTimeout(t, args[2].Pointer(), timeout, start)
	return n, nil, noHandRestart(err)
}

// noHandRestart makes an interrupted wait restart only if no handler runs, as
// Linux does for calls that wait for files (signal(7)).
func noHandRestart(err error) error {
	if err == kernel.ERESTARTSYS {
		return kernel.ERESTARTNOHAND
	}
	return err
}

// setWaitMask installs the signal mask at addr, if there is one, until the
// system call is over or a handler has run.
func setWaitMask(t *kernel.Task, addr hostarch.Addr, size uint) error {
	if addr == 0 {
		return nil
	}
	if size != linux.SignalSetSize {
		return unix.EINVAL
	}
	var buf [linux.SignalSetSize]byte
	if err := t.CopyIn(addr, buf[:]); err != nil {
		return err
	}
	t.SetTemporarySignalMask(linux.SignalSet(usermem.ByteOrder.Uint64(buf[:])))
	return nil
}

// The events that the three sets of select(2) stand for.
const (
	selectRead   = waiter.EventIn | waiter.EventRdNorm | waiter.EventHUp | waiter.EventErr
	selectWrite  = waiter.EventOut | waiter.EventWrNorm | waiter.EventErr
	selectExcept = waiter.EventPri
)

// selectAt is select(2) with the three sets at addrs.
func selectAt(t *kernel.Task, nfds int32, addrs [3]hostarch.Addr, timeout time.Duration) (uintptr, error) {
	if nfds < 0 {
		return 0, unix.EINVAL
	}
	limit, _ := t.Limit(unix.RLIMIT_NOFILE)
	n := int(min(uint64(nfds), limit))
	size := (n + 63) / 64 * 8
	var sets [3][]byte
	for i, addr := range addrs {
		sets[i] = make([]byte, size)
		if addr != 0 {
			if err := t.CopyIn(addr, sets[i]); err != nil {
				return 0, err
			}
		}
	}
	masks := [3]waiter.EventMask{selectRead, selectWrite, selectExcept}
	var fds []pollFD
	for fd := range n {
		var events waiter.EventMask
		for i := range sets {
			if sets[i][fd/8]&(1<<(fd%8)) != 0 {
				events |= masks[i]
			}
		}
		if events != 0 {
			fds = append(fds, pollFD{fd: int32(fd), events: events})
		}
	}
	for i := range fds {
		f := t.FDTable().Get(fds[i].fd)
		if f == nil {
			return 0, unix.EBADF
		}
		f.DecRef()
	}
	if _, err := poll(t, fds, timeout); err != nil {
		return 0, err
	}
	bits := 0
	for i, addr := range addrs {
		if addr == 0 {
			continue
		}
		out := make([]byte, size)
		for _, p := range fds {
			fd := int(p.fd)
			if sets[i][fd/8]&(1<<(fd%8)) != 0 && p.revents&masks[i] != 0 {
				out[fd/8] |= 1 << (fd % 8)
				bits++
			}
		}
		if err := t.CopyOut(addr, out); err != nil {
			return 0, err
		}
	}
	return uintptr(bits), nil
}

func sysPselect6(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	timeout, err := optionalTimeout(t, args[4].Pointer())
	if err != nil {
		return 0, nil, err
	}
	if addr := args[5].Pointer(); addr != 0 { // {const sigset_t *ss; size_t len}
		var buf [16]byte
		if err := t.CopyIn(addr, buf[:]); err != nil {
			return 0, nil, err
		}
		set, size := hostarch.Addr(usermem.ByteOrder.Uint64(buf[0:])), usermem.ByteOrder.Uint64(buf[8:])
		if err := setWaitMask(t, set, uint(size)); err != nil {
			return 0, nil, err
		}
	}
	start := time.Now()
	addrs := [3]hostarch.Addr{args[1].Pointer(), args[2].Pointer(), args[3].Pointer()}
	n, err := selectAt(t, args[0].Int(), addrs, timeout)
	leaveTimeout(t, args[4].Pointer(), timeout, start)
	return n, nil, noHandRestart(err)
}

func sysEpollCreate1(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return epollCreate(t, args[0].Uint())
}

func epollCreate(t *kernel.Task, flags uint32) (uintptr, *kernel.SyscallControl, error) {
	if flags&^unix.EPOLL_CLOEXEC != 0 {
		return 0, nil, unix.EINVAL
	}
	fd, err := addFD(t, vfs.NewEpoll(), flags&unix.EPOLL_CLOEXEC != 0)
	return uintptr(fd), nil, err
}

func sysEpollCtl(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	op, fd := int(args[1].Int()), args[2].Int()
	var event vfs.EpollEvent
	if op != unix.EPOLL_CTL_DEL {
		var buf [epollEventSize]byte
		if err := t.CopyIn(args[3].Pointer(), buf[:]); err != nil {
			return 0, nil, err
		}
		event.Events = usermem.ByteOrder.Uint32(buf[0:])
		event.Data = usermem.ByteOrder.Uint64(buf[epollDataOffset:])
	}
	ep, err := t.GetFile(args[0].Int())
	if err != nil {
		return 0, nil, err
	}
	defer ep.DecRef()
	file, err := t.GetFile(fd)
	if err != nil {
		return 0, nil, err
	}
	defer file.DecRef()
	return 0, nil, vfs.EpollCtl(t, ep, op, fd, file, event)
}

// epollWait waits for events of the epoll instance fd, and copies at most max
// of them to addr.
func epollWait(t *kernel.Task, fd int32, addr hostarch.Addr, max int32, timeout time.Duration) (uintptr, error) {
	if max <= 0 || max > (1<<31-1)/epollEventSize {
		return 0, unix.EINVAL
	}
	ep, err := t.GetFile(fd)
	if err != nil {
		return 0, err
	}
	defer ep.DecRef()
	events, err := vfs.ReadEpoll(ep, int(max))
	if err == nil && len(events) == 0 && timeout != 0 {
		e, woken := waiter.NewChannelEntry(waiter.ReadableEvents)
		if err := ep.EventRegister(e); err != nil {
			return 0, err
		}
		defer ep.EventUnregister(e)
		end := deadline(timeout)
		for {
			if events, err = vfs.ReadEpoll(ep, int(max)); err != nil || len(events) > 0 {
				break
			}
			if err = t.BlockUntil(woken, end); err == unix.ETIMEDOUT {
				return 0, nil
			} else if err != nil {
				if err == kernel.ERESTARTSYS {
					err = unix.EINTR // never restarted: signal(7)
				}
				return 0, err
			}
		}
	}
	if err != nil {
		return 0, err
	}
	buf := make([]byte, len(events)*epollEventSize)
	for i, ev := range events {
		b := buf[i*epollEventSize:]
		usermem.ByteOrder.PutUint32(b, ev.Events)
		usermem.ByteOrder.PutUint64(b[epollDataOffset:], ev.Data)
	}
	if err := t.CopyOut(addr, buf); err != nil {
		return 0, err
	}
	return uintptr(len(events)), nil
}

// millis returns a time-out given in milliseconds, negative for forever.
func millis(ms int32) time.Duration {
	if ms < 0 {
		return forever
	}
	return time.Duration(ms) * time.Millisecond
}

func sysEpollPwait(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	if err := setWaitMask(t, args[4].Pointer(), args[5].SizeT()); err != nil {
		return 0, nil, err
	}
	n, err := epollWait(t, args[0].Int(), args[1].Pointer(), args[2].Int(), millis(args[3].Int()))
	return n, nil, err
}

func sysEpollPwait2(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	timeout, err := optionalTimeout(t, args[3].Pointer())
	if err != nil {
		return 0, nil, err
	}
	if err := setWaitMask(t, args[4].Pointer(), args[5].SizeT()); err != nil {
		return 0, nil, err
	}
	n, err := epollWait(t, args[0].Int(), args[1].Pointer(), args[2].Int(), timeout)
	return n, nil, err
}
