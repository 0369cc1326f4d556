package stub

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/affinity"
	"github.com/ringfence/ringfence/pkg/freestanding"
	"github.com/ringfence/ringfence/pkg/hostarch"
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
	mu       sync.Mutex
	sock     int // -1 when the zygote is gone
	dead     error
	follower *affinity.Follower
}

// shared are the zygotes by the backend's text that they have.
var shared struct {
	sync.Mutex
	zygotes map[string]*Zygote
}

// SharedWith returns this process's zygote with a backend's own text in its stubs,
// or none: it is that of all callers with the same text. It starts one if there is
// none, or if it is gone.
func SharedWith(text []byte) (*Zygote, error) {
	shared.Lock()
	defer shared.Unlock()
	old := shared.zygotes[string(text)]
	if old != nil && old.Alive() {
		return old, nil
	}
	z, err := startWith(text)
	if err != nil {
		if old != nil {
			err = fmt.Errorf("the stub zygote %d has died, and there is no other: %w", old.pid, err)
		}
		return nil, err
	}
	if shared.zygotes == nil {
		shared.zygotes = make(map[string]*Zygote)
	}
	shared.zygotes[string(text)] = z
	return z, nil
}

// WithShared calls f with the zygote that SharedWith returns for text. If f fails
// because that has died, which only shows when it is used, f is called once more
// with another.
func WithShared(text []byte, f func(*Zygote) error) error {
	for again := true; ; again = false {
		z, err := SharedWith(text)
		if err != nil {
			return err
		}
		if err = f(z); err == nil || !again || z.Alive() {
			return err
		}
	}
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

// Start starts a zygote of its own. Most callers want WithShared.
func Start() (*Zygote, error) { return startWith(nil) }

func startWith(text []byte) (*Zygote, error) {
	if err := hostarch.CheckPageSize(); err != nil {
		return nil, err
	}
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
func start(image []freestanding.Segment, layout Layout) (*Zygote, error) {
	f, err := freestanding.Program(stubName, uint64(layout.Start), image)
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
	// The host is not to write applications' memory into cores. With 0 it would still hand
	// them to a program, if it has one for that (core(5), fs/coredump.c). If the limit was 0
	// before, and we may not raise it, that cannot be helped.
	unix.Prlimit(z.pid, unix.RLIMIT_CORE, &unix.Rlimit{Cur: 1, Max: 1}, nil)
	timeout := unix.NsecToTimeval(int64(replyCheck))
	if err := unix.SetsockoptTimeval(z.sock, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		z.fail(fmt.Errorf("setsockopt(SO_RCVTIMEO): %w", err))
		return nil, z.dead
	}
	r, err := z.receive(0)
	switch {
	case err != nil:
		if errors.Is(err, unix.EPIPE) {
			err = errDiedEarly
		}
		z.fail(err)
		return nil, err
	case r.op == stageReady:
		z.follower = affinity.NewFollower(z.pid, z.pid)
		return z, nil
	}
	err = unix.Errno(-r.result)
	switch r.op {
	case stageUnmap:
		err = fmt.Errorf("stub process: munmap of the stack and the vDSO: %w: the kernel may be built with CONFIG_MSEAL_SYSTEM_MAPPINGS, which must be off", err)
	case stageSeccomp:
		err = fmt.Errorf("stub process: installing a seccomp filter: %w: the kernel needs CONFIG_SECCOMP_FILTER, and no filter of our own may forbid seccomp(2)", err)
	default:
		err = fmt.Errorf("stub process: start, stage %d: %w", r.op, err)
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

// PID returns the zygote's process id.
func (z *Zygote) PID() int { return z.pid }

// Alive returns false if the zygote is gone: there are no new stubs then, and no
// files for the old ones.
func (z *Zygote) Alive() bool {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.dead != nil {
		return false
	}
	if exited(z.pid) {
		z.fail(fmt.Errorf("the stub zygote %d has died: %w", z.pid, unix.EPIPE))
		return false
	}
	return true
}

// exited reports whether the child pid, which was not reaped, is a zombie.
func exited(pid int) bool {
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
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

// reply is what the zygote or a new stub sends.
type reply struct {
	result int64
	op     uint32
	pid    int // of a new stub
}

// errStillborn says that a new stub died before it sent anything.
var errStillborn = fmt.Errorf("the stub process died when it was just born: %w", unix.EAGAIN)

// receive returns the next reply. While the stub born, if not 0, has not sent
// anything its death is errStillborn; any other error is the end of the zygote.
func (z *Zygote) receive(born int) (reply, error) {
	var buf [16]byte
	dead := false
	for start := time.Now(); ; {
		n, _, err := unix.Recvfrom(z.sock, buf[:], 0)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN && !exited(z.pid):
			if dead {
				return reply{}, errStillborn
			}
			// What it sent before is still to be received.
			dead = born != 0 && exited(born)
			if time.Since(start) > replyTimeout {
				return reply{}, fmt.Errorf("the stub zygote %d does not answer: %w", z.pid, unix.ETIMEDOUT)
			}
		case err != nil && err != unix.EAGAIN && err != unix.ECONNRESET:
			return reply{}, fmt.Errorf("recvfrom the stub zygote %d: %w", z.pid, err)
		case n != len(buf):
			return reply{}, fmt.Errorf("the stub zygote %d has died: %w", z.pid, unix.EPIPE)
		default:
			kind := binary.LittleEndian.Uint64(buf[8:])
			return reply{int64(binary.LittleEndian.Uint64(buf[:])), uint32(kind), int(kind >> 32)}, nil
		}
	}
}

// send makes a request. An error of the file that goes with it is an Errno; any
// other is the end of the zygote.
func (z *Zygote) send(op, arg uint64, rights []byte) error {
	if z.dead != nil {
		return z.dead
	}
	var buf [16]byte
	binary.LittleEndian.PutUint64(buf[:], op)
	binary.LittleEndian.PutUint64(buf[8:], arg)
	for {
		err := unix.Sendmsg(z.sock, buf[:], rights, nil, unix.MSG_NOSIGNAL)
		switch err {
		case unix.EINTR:
		case nil, unix.EBADF, unix.ETOOMANYREFS, unix.EINVAL:
			return err
		default:
			err = fmt.Errorf("sendmsg to the stub zygote %d: %w", z.pid, err)
			z.fail(err)
			return err
		}
	}
}

// unexpected gives the zygote up because of a reply to request op.
func (z *Zygote) unexpected(op uint64, r reply) error {
	err := fmt.Errorf("the stub zygote %d answers request %d with %d: %w", z.pid, op, r.op, unix.EPROTO)
	z.fail(err)
	return err
}

// request makes a request with one reply and returns its result. An error from
// the zygote's system call is an Errno; any other error is the end of the zygote.
func (z *Zygote) request(op, arg uint64, rights []byte) (int, error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.follower.Follow()
	if err := z.send(op, arg, rights); err != nil {
		return 0, err
	}
	r, err := z.receive(0)
	switch {
	case err != nil:
		z.fail(err)
		return 0, err
	case r.op != uint32(op):
		return 0, z.unexpected(op, r)
	case r.result < 0:
		return 0, unix.Errno(-r.result)
	}
	return int(r.result), nil
}

// tell makes a request without a reply.
func (z *Zygote) tell(op, arg uint64) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.send(op, arg, nil)
}

// Fork clones a stub off the zygote. It returns the process's id, and that of the
// one thread that the caller can do with what it likes; it is in Layout.Park, or on
// its way there. That thread, and the process's first one, which parks for ever,
// have all signals blocked. The caller must Release the stub.
func (z *Zygote) Fork() (pid, tid int, err error) { return z.fork(0) }

// ForkAt is Fork for a stub with one thread, the process's first, which does not park
// but goes to entry, in the image. It has param in RDI (X0 on arm64) and the end of
// the image's first page in R12 (X19); nothing else is known of its registers, and it
// has no signal stack.
func (z *Zygote) ForkAt(entry uintptr, param uint32) (pid, tid int, err error) {
	return z.fork(uint64(param)<<32 | uint64(entry-z.Layout.Start))
}

func (z *Zygote) fork(arg uint64) (pid, tid int, err error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.follower.Free() // the stub inherits it
	if err := z.send(opFork, arg, nil); err != nil {
		return 0, 0, fmt.Errorf("clone of a stub process: %w", err)
	}
	// The zygote's reply and the stub's, in any order.
	var told, born reply
	for told.op == 0 || born.op == 0 {
		r, err := z.receive(int(told.result))
		switch {
		case err == errStillborn:
			Reap(int(told.result))
			return 0, 0, fmt.Errorf("clone of a stub process: %w", err)
		case err != nil:
			z.fail(err)
			if pid := max(int(told.result), born.pid); pid > 0 {
				Kill(pid)
				Reap(pid)
			}
			return 0, 0, err
		case r.op == opFork && told.op == 0:
			if told = r; r.result <= 0 {
				err := unix.Errno(-r.result)
				return 0, 0, fmt.Errorf("clone of a stub process: %w%s", err, hint(err))
			}
		case r.op == opBorn && born.op == 0:
			born = r
		default:
			return 0, 0, z.unexpected(opFork, r)
		}
	}
	if born.result < 0 { // It ends.
		Reap(born.pid)
		err := unix.Errno(-born.result)
		return 0, 0, fmt.Errorf("clone of a stub process's thread: %w%s", err, hint(err))
	}
	z.stubs.Add(1)
	return born.pid, int(born.result), nil
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
