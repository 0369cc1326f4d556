package filter

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/bpf"
	"github.com/ringfence/ringfence/pkg/seccomp"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// Monitor is a process that waits for the Sentry to make a forbidden system call,
// says which, and kills it. Until then the kernel keeps the thread from going on
// (seccomp_unotify(2)).
//
// It is a process of its own because nobody in the Sentry could do it: the thread
// may hold locks of the Go runtime or have its signals blocked, and os/signal
// gets no SIGSYS. The Sentry gives the only listener away and so cannot answer
// itself. When the Monitor is gone, forbidden calls fail with ENOSYS.
type Monitor struct {
	pid  int
	sock int // the Monitor ends when this is closed
}

const (
	// monitorFD is the descriptor on which the Monitor gets the listener.
	monitorFD = 3
	// monitorExe is this program, for watch.
	//lint:ignore U1000 the assembler uses it
	monitorExe = 4
)

// StartMonitor starts a process that executes this program with arguments argv, the
// name included, once there is something to say; for which it must call MonitorMain.
// Its standard error is where it reports.
func StartMonitor(argv []string) (*Monitor, error) {
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("start the monitor: open %s: %w", os.DevNull, err)
	}
	defer unix.Close(null)
	const self = "/proc/self/exe"
	exe, err := unix.Open(self, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("start the monitor: open %s: %w: mount /proc", self, err)
	}
	defer unix.Close(exe)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("start the monitor: socketpair: %w", err)
	}
	defer unix.Close(fds[1])
	path := self
	if watch, err := watchProgram(); err == nil {
		defer watch.Close()
		path = fmt.Sprintf("/proc/self/fd/%d", watch.Fd())
	} // else the host allows no program in memory: it does without
	pid, err := syscall.ForkExec(path, argv, &syscall.ProcAttr{
		Dir: "/",
		// It needs few threads, and no memory to speak of.
		Env:   append(os.Environ(), "GOMAXPROCS=1"),
		Files: []uintptr{uintptr(null), uintptr(null), 2, uintptr(fds[1]), uintptr(exe)},
		// The signals of our terminal are not for it.
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		unix.Close(fds[0])
		return nil, fmt.Errorf("start the monitor: execute %s: %w: mount /proc, and raise RLIMIT_NPROC (ulimit -u) if that is the reason", path, err)
	}
	return &Monitor{pid: pid, sock: fds[0]}, nil
}

// Stop ends the Monitor and waits for it. A nil Monitor is none.
func (m *Monitor) Stop() {
	if m == nil {
		return
	}
	unix.Close(m.sock)
	for {
		if _, err := unix.Wait4(m.pid, nil, 0, nil); err != unix.EINTR {
			return
		}
	}
}

// install installs p with the Monitor as the listener.
func (m *Monitor) install(p bpf.Program) error {
	if err := seccomp.Probe(seccomp.FeatureTSyncListener); err != nil {
		return err
	}
	listener, err := seccomp.InstallWithListener(p)
	if err != nil {
		return err
	}
	defer unix.Close(listener)
	if err := unix.Sendmsg(m.sock, []byte{0}, unix.UnixRights(listener), nil, unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("tell the monitor, process %d: sendmsg: %w", m.pid, err)
	}
	return nil
}

// canDoWithout reports whether err of Monitor.install leaves us without a filter
// that one without a listener could replace: the kernel is too old, or a
// container's filter has a listener already.
func canDoWithout(err error) bool {
	var e *seccomp.InstallError
	return errors.As(err, &e) && (e.Errno == unix.EINVAL || e.Errno == unix.EBUSY || e.Errno == unix.EOPNOTSUPP)
}

// MonitorMain is the body of the process that StartMonitor starts. It returns the
// exit status.
func MonitorMain(stderr io.Writer) int {
	buf, rights := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	n, nr, _, _, err := recvmsg(monitorFD, buf, rights)
	if err == nil && n == 0 {
		return 0 // the Sentry ended before it was confined
	}
	var listener int
	if err == nil {
		listener, err = oneRight(rights[:nr])
	}
	if err != nil {
		fmt.Fprintf(stderr, "ringfence: seccomp monitor: receive the listener: %v: it is started by ringfence run only\n", err)
		return 1
	}
	for {
		fds := []unix.PollFd{{Fd: monitorFD, Events: unix.POLLIN}, {Fd: int32(listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil {
			if err == unix.EINTR {
				continue
			}
			fmt.Fprintf(stderr, "ringfence: seccomp monitor: poll: %v\n", err)
			return 1
		}
		if fds[1].Revents&unix.POLLIN != 0 {
			call, err := receive(listener)
			if err == nil {
				fmt.Fprintf(stderr, "ringfence: %s\n", call)
				// A thread's ID does for its process's. A signal may have made the
				// thread start the call anew: once is enough to be said.
				if unix.Kill(int(call.tid), unix.SIGKILL) == nil {
					return 0
				}
			}
			continue // else it has ended meanwhile, or a signal came first
		}
		if fds[0].Revents != 0 {
			return 0 // the Sentry has ended
		}
	}
}

func recvmsg(fd int, buf, rights []byte) (n, nr, flags int, from unix.Sockaddr, err error) {
	for {
		n, nr, flags, from, err = unix.Recvmsg(fd, buf, rights, unix.MSG_CMSG_CLOEXEC)
		if err != unix.EINTR {
			return
		}
	}
}

// oneRight returns the only descriptor of a control message.
func oneRight(b []byte) (int, error) {
	msgs, err := unix.ParseSocketControlMessage(b)
	if err != nil {
		return 0, err
	}
	for _, m := range msgs {
		if fds, err := unix.ParseUnixRights(&m); err == nil && len(fds) == 1 {
			return fds[0], nil
		}
	}
	return 0, unix.EBADMSG
}

// violation is a system call that broke the rules.
type violation struct {
	tid  uint32
	data bpf.Data
}

// String names the call: what is to be said of it.
func (v *violation) String() string {
	name := fmt.Sprintf("system call %d of the architecture %#x", v.data.Nr, v.data.Arch)
	if v.data.Arch == sysno.Native.AuditArch() {
		name = sysno.Native.Name(uintptr(v.data.Nr))
	}
	a := v.data.Args
	return fmt.Sprintf("the Sentry was killed: its seccomp filter forbids %s(%#x, %#x, %#x, %#x, %#x, %#x), which was not executed: an attack, or a bug that --no-self-filter works around",
		name, a[0], a[1], a[2], a[3], a[4], a[5])
}
