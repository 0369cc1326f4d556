package stub

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Zygote is the process off which stubs are cloned. It is safe for concurrent
// use.
type Zygote struct {
	// Layout is that of the zygote and its stubs.
	Layout Layout

	pid   int
	files files
	stubs atomic.Int64

	// mu is held for a request and its reply.
	mu   sync.Mutex
	sock int // -1 when the zygote is gone
	dead error
}

// shared are the zygotes by the backend's text that they have.
var shared struct {
	sync.Mutex
	zygotes map[string]*Zygote
}

// Shared returns this process's zygote. It starts one if there is none, or if it
// is gone.
func Shared() (*Zygote, error) { return SharedWith(nil) }

// SharedWith is Shared for a backend that has text of its own in its stubs: the
// zygote is that of all callers with the same text.
func SharedWith(text []byte) (*Zygote, error) {
	shared.Lock()
	defer shared.Unlock()
	if z := shared.zygotes[string(text)]; z != nil && z.alive() {
		return z, nil
	}
	z, err := startWith(text)
	if err != nil {
		return nil, err
	}
	if shared.zygotes == nil {
		shared.zygotes = make(map[string]*Zygote)
	}
	shared.zygotes[string(text)] = z
	return z, nil
}

// A zygote that is stopped, and does not reply for so long, is as good as dead.
const (
	replyTimeout = 10 * time.Second
	// replyCheck is how often we look whether it is dead altogether. Its socket
	// does not say so: stubs hold it as well.
	replyCheck = 100 * time.Millisecond
)

// startAttempts is how often an image is started at one address: the kernel may
// have put the new process's stack there.
const startAttempts = 3

// Start starts a zygote of its own. Most callers want Shared.
func Start() (*Zygote, error) { return startWith(nil) }

func startWith(text []byte) (*Zygote, error) {
	var last error
	for _, taskEnd := range taskEnds {
		// As high as can be, or, where the stack is always at the end because
		// address space randomisation is switched off, some way below.
		for _, base := range []uint64{taskEnd - sizeOf(text), taskEnd - 1<<24} {
			image, layout, err := buildImage(base, taskEnd, text)
			if err != nil {
				return nil, err
			}
			for range startAttempts {
				z, err := start(image, layout)
				if err == nil {
					return z, nil
				}
				last = err
				if !errors.Is(err, errDiedEarly) {
					return nil, err
				}
			}
		}
	}
	return nil, last
}

// errDiedEarly says that the zygote said nothing before it died: the kernel
// could not load it.
var errDiedEarly = errors.New("the stub process died before its first instruction")

// start starts image.
func start(image []byte, layout Layout) (*Zygote, error) {
	f, err := imageFile(image)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair for the stub process: %w%s", err, hint(err))
	}
	z := &Zygote{Layout: layout, sock: fds[0]}
	z.files.zygote = z
	path := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	OnKeeper(func() {
		z.pid, err = syscall.ForkExec(path, []string{stubName}, &syscall.ProcAttr{
			Dir:   "/",
			Env:   []string{},
			Files: []uintptr{uintptr(fds[1])},
			// A session of its own: the signals of our terminal are not for stubs.
			Sys: &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL},
		})
	})
	unix.Close(fds[1])
	if err != nil {
		unix.Close(z.sock)
		if _, serr := os.Stat("/proc/self/fd"); serr != nil {
			return nil, fmt.Errorf("starting the stub process: %w: mount /proc", err)
		}
		return nil, fmt.Errorf("starting the stub process %s: %w%s", path, err, hint(err))
	}
	timeout := unix.NsecToTimeval(int64(replyCheck))
	if err := unix.SetsockoptTimeval(z.sock, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		z.fail(fmt.Errorf("setsockopt(SO_RCVTIMEO): %w", err))
		return nil, z.dead
	}
	errno, stage, err := z.receive()
	switch {
	case err != nil:
		if errors.Is(err, unix.EPIPE) {
			err = errDiedEarly
		}
		z.fail(err)
		return nil, err
	case stage == stageReady:
		return z, nil
	}
	err = unix.Errno(-errno)
	switch stage {
	case stageUnmap:
		err = fmt.Errorf("stub process: munmap of the stack and the vDSO: %w: the kernel may be built with CONFIG_MSEAL_SYSTEM_MAPPINGS, which must be off", err)
	case stageSeccomp:
		err = fmt.Errorf("stub process: installing a seccomp filter: %w: the kernel needs CONFIG_SECCOMP_FILTER, and no filter of our own may forbid seccomp(2)", err)
	default:
		err = fmt.Errorf("stub process: start, stage %d: %w", stage, err)
	}
	z.fail(err)
	return nil, err
}

// hint returns what to do about a limit of the host, to be added to an error.
func hint(err error) string {
	switch {
	case errors.Is(err, unix.EMFILE):
		return ": raise RLIMIT_NOFILE (ulimit -n)"
	case errors.Is(err, unix.ENFILE):
		return ": raise sysctl fs.file-max"
	case errors.Is(err, unix.EAGAIN):
		return ": raise RLIMIT_NPROC (ulimit -u) or the pids limit of the control group (pids.max)"
	case errors.Is(err, unix.ENOMEM):
		return ": the host is out of memory, or out of the control group's (memory.max)"
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return ": a security module or seccomp filter forbids it"
	}
	return ""
}

func (z *Zygote) alive() bool {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.dead != nil {
		return false
	}
	if z.exited() {
		z.fail(fmt.Errorf("the stub zygote %d has died: %w", z.pid, unix.EPIPE))
		return false
	}
	return true
}

// exited reports whether the zygote is a zombie.
func (z *Zygote) exited() bool {
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, z.pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	return err == nil && info.Signo != 0
}

// Close ends the zygote; stubs cloned off it live on.
func (z *Zygote) Close() {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.dead == nil {
		z.fail(fmt.Errorf("the stub zygote was closed: %w", unix.EPIPE))
	}
}

// fail gives the zygote up because of err.
//
// Preconditions: z.mu is held, or nobody else knows z; z.dead is nil.
func (z *Zygote) fail(err error) {
	z.dead = err
	unix.Close(z.sock)
	z.sock = -1
	Kill(z.pid)
	Reap(z.pid)
}

// Kill sends a SIGKILL to the process pid, which has not been reaped.
func Kill(pid int) { unix.Kill(pid, unix.SIGKILL) }

// Reap waits until the process or traced thread id, a child of this process that
// was killed, is gone.
func Reap(id int) {
	for {
		var status unix.WaitStatus
		_, err := unix.Wait4(id, &status, unix.WALL, nil)
		if err != nil && err != unix.EINTR || err == nil && (status.Exited() || status.Signaled()) {
			return
		}
	}
}

// receive returns the two words of a reply.
func (z *Zygote) receive() (int64, uint64, error) {
	var buf [16]byte
	for start := time.Now(); ; {
		n, _, err := unix.Recvfrom(z.sock, buf[:], 0)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN && !z.exited():
			if time.Since(start) > replyTimeout {
				return 0, 0, fmt.Errorf("the stub zygote %d does not answer: %w", z.pid, unix.ETIMEDOUT)
			}
		case err != nil && err != unix.EAGAIN && err != unix.ECONNRESET:
			return 0, 0, fmt.Errorf("recvfrom the stub zygote %d: %w", z.pid, err)
		case n != len(buf):
			return 0, 0, fmt.Errorf("the stub zygote %d has died: %w", z.pid, unix.EPIPE)
		default:
			return int64(binary.LittleEndian.Uint64(buf[:])), binary.LittleEndian.Uint64(buf[8:]), nil
		}
	}
}

// request makes a request and returns its result, and what is above bit 32 of
// the reply's second word. An error from the zygote's
// system call is an Errno; any other error is the end of the zygote.
func (z *Zygote) request(op, arg uint64, rights []byte) (result, extra int, err error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.dead != nil {
		return 0, 0, z.dead
	}
	var buf [16]byte
	binary.LittleEndian.PutUint64(buf[:], op)
	binary.LittleEndian.PutUint64(buf[8:], arg)
	for {
		err := unix.Sendmsg(z.sock, buf[:], rights, nil, unix.MSG_NOSIGNAL)
		if err == unix.EINTR {
			continue
		}
		if err == unix.EBADF || err == unix.ETOOMANYREFS || err == unix.EINVAL {
			return 0, 0, err // of the file that we send
		}
		if err != nil {
			err = fmt.Errorf("sendmsg to the stub zygote %d: %w", z.pid, err)
			z.fail(err)
			return 0, 0, err
		}
		break
	}
	v, kind, err := z.receive()
	if err == nil && kind&math.MaxUint32 != op {
		err = fmt.Errorf("the stub zygote %d answers request %d with %d: %w", z.pid, op, kind, unix.EPROTO)
	}
	if err != nil {
		z.fail(err)
		return 0, 0, err
	}
	if v < 0 {
		return 0, int(kind >> 32), unix.Errno(-v)
	}
	return int(v), int(kind >> 32), nil
}

// Fork clones a stub off the zygote. It returns the process's id, and that of the
// one thread that the caller can do with what it likes; it is in Layout.Park, or on
// its way there. That thread, and the process's first one, which parks for ever,
// have all signals blocked. The caller must Release the stub.
func (z *Zygote) Fork() (pid, tid int, err error) { return z.fork(0) }

// ForkAt is Fork for a stub whose thread does not park but goes to entry, in the
// image. It has param in RDI (X0 on arm64) and the end of the image's first page
// in R12 (X19); nothing else is known of its registers, and it has no signal stack.
func (z *Zygote) ForkAt(entry uintptr, param uint32) (pid, tid int, err error) {
	return z.fork(uint64(param)<<32 | uint64(entry-z.Layout.Start))
}

func (z *Zygote) fork(arg uint64) (pid, tid int, err error) {
	tid, pid, err = z.request(opFork, arg, nil)
	if err != nil {
		if pid != 0 {
			Reap(pid)
		}
		return 0, 0, fmt.Errorf("clone of a stub process: %w%s", err, hint(err))
	}
	z.stubs.Add(1)
	return pid, tid, nil
}

// Release kills and reaps the stub pid, all of whose traced threads were reaped.
// When the last stub is gone the zygote closes its files.
func (z *Zygote) Release(pid int) {
	Kill(pid)
	Reap(pid)
	if z.stubs.Add(-1) == 0 {
		z.DropFiles()
	}
}
