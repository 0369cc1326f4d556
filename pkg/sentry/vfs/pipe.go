package vfs

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// Limits of pipes (pipe(7)).
const (
	pipeAtomicBytes  = 4096 // PIPE_BUF
	defaultPipeBytes = 64 << 10
	minPipeBytes     = 4096
	maxPipeBytes     = 1 << 20
)

// Pipe is the buffer of a pipe or FIFO and the counts of its ends.
type Pipe struct {
	anonFile

	waiter.Queue // of both ends

	mu      sync.Mutex
	buf     []byte // ring of len(buf) bytes, grown up to capacity
	start   int
	n       int
	cap     int
	rCount  int
	wCount  int
	rOpened uint64 // number of read ends ever opened, for FIFOs
	wOpened uint64
}

// NewPipe returns an empty pipe without ends.
func NewPipe() *Pipe {
	return &Pipe{anonFile: newAnonFile(unix.S_IFIFO | 0o600), cap: defaultPipeBytes}
}

// NewPipeFiles returns the two ends of a new pipe (pipe2(2)). flags are status
// flags for both.
func NewPipeFiles(flags uint32) (r, w *FileDescription) {
	p := NewPipe()
	path := func() string { return fmt.Sprintf("pipe:[%d]", p.ino) }
	return p.Open(unix.O_RDONLY|flags, path), p.Open(unix.O_WRONLY|flags, path)
}

// Open adds the end, or with O_RDWR both, that flags ask for. It does not wait
// for the other end: see PeerCount.
func (p *Pipe) Open(flags uint32, path func() string) *FileDescription {
	end := &pipeEnd{p: p}
	p.mu.Lock()
	switch flags & unix.O_ACCMODE {
	case unix.O_RDONLY:
		end.reads = true
	case unix.O_WRONLY:
		end.writes = true
	default:
		end.reads, end.writes = true, true
	}
	if end.reads {
		p.rCount++
		p.rOpened++
	}
	if end.writes {
		p.wCount++
		p.wOpened++
	}
	p.mu.Unlock()
	p.Notify(fifoOpened)
	return NewFileDescription(end, flags, path)
}

// fifoOpened is an event beyond those of poll(2): an end was opened.
const fifoOpened waiter.EventMask = 1 << 31

// PeerCount returns how many ends of the other kind than flags' have ever been
// opened, and whether one is open now. open(2) of a FIFO waits until either one
// is open or the number has grown (fifo(7)).
func (p *Pipe) PeerCount(flags uint32) (opened uint64, open bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if flags&unix.O_ACCMODE == unix.O_RDONLY {
		return p.wOpened, p.wCount > 0
	}
	return p.rOpened, p.rCount > 0
}

// RegisterOpen makes e, whose mask is set here, notified when an end is opened.
func (p *Pipe) RegisterOpen(e *waiter.Entry) {
	e.Mask = fifoOpened
	p.EventRegister(e)
}

// UnregisterOpen undoes RegisterOpen.
func (p *Pipe) UnregisterOpen(e *waiter.Entry) { p.EventUnregister(e) }

// grow makes the ring large enough for want bytes, within the capacity.
func (p *Pipe) grow(want int) {
	size := max(len(p.buf), minPipeBytes)
	for size < want {
		size *= 2
	}
	size = min(size, p.cap)
	if size <= len(p.buf) {
		return
	}
	buf := make([]byte, size)
	p.copyOut(buf[:p.n])
	p.buf, p.start = buf, 0
}

// copyOut copies the first len(dst) buffered bytes.
func (p *Pipe) copyOut(dst []byte) {
	n := copy(dst, p.buf[p.start:])
	copy(dst[n:], p.buf)
}

func (p *Pipe) read(dst []byte) (int, error) {
	p.mu.Lock()
	if p.n == 0 {
		eof := p.wCount == 0
		p.mu.Unlock()
		if eof || len(dst) == 0 {
			return 0, nil
		}
		return 0, unix.EAGAIN
	}
	n := min(len(dst), p.n)
	p.copyOut(dst[:n])
	p.n -= n
	if p.n == 0 {
		p.start = 0
	} else {
		p.start = (p.start + n) % len(p.buf)
	}
	p.mu.Unlock()
	p.Notify(waiter.WritableEvents)
	return n, nil
}

func (p *Pipe) write(src []byte) (int, error) {
	p.mu.Lock()
	if p.rCount == 0 {
		p.mu.Unlock()
		return 0, unix.EPIPE
	}
	room := p.cap - p.n
	if len(src) == 0 {
		p.mu.Unlock()
		return 0, nil
	}
	if room == 0 || (len(src) <= pipeAtomicBytes && room < len(src)) {
		p.mu.Unlock()
		return 0, unix.EAGAIN
	}
	n := min(len(src), room)
	p.grow(p.n + n)
	end := (p.start + p.n) % len(p.buf)
	m := copy(p.buf[end:], src[:n])
	copy(p.buf, src[m:n])
	p.n += n
	p.mu.Unlock()
	p.Notify(waiter.ReadableEvents)
	return n, nil
}

// resize sets the capacity (fcntl(F_SETPIPE_SZ)) and returns it.
func (p *Pipe) resize(size int) (int, error) {
	if size < 0 || size > maxPipeBytes {
		return 0, unix.EPERM
	}
	n := minPipeBytes
	for n < size {
		n *= 2
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.n > n {
		return 0, unix.EBUSY
	}
	buf := make([]byte, min(len(p.buf), n))
	if p.n > 0 {
		buf = make([]byte, n)
		p.copyOut(buf[:p.n])
	}
	p.buf, p.start, p.cap = buf, 0, n
	return n, nil
}

// pipeEnd is one end of a Pipe, or both of a FIFO opened O_RDWR.
type pipeEnd struct {
	p             *Pipe
	reads, writes bool
}

// Stat implements Impl.
func (e *pipeEnd) Stat(context.Context) (unix.Stat_t, error) { return e.p.stat(), nil }

// Release implements Impl.
func (e *pipeEnd) Release() {
	p := e.p
	p.mu.Lock()
	if e.reads {
		p.rCount--
	}
	if e.writes {
		p.wCount--
	}
	noReaders, noWriters := p.rCount == 0, p.wCount == 0
	if noReaders && noWriters {
		p.buf, p.start, p.n = nil, 0, 0
	}
	p.mu.Unlock()
	if e.writes && noWriters {
		p.Notify(waiter.EventHUp | waiter.ReadableEvents)
	}
	if e.reads && noReaders {
		p.Notify(waiter.EventErr | waiter.WritableEvents)
	}
}

// Read implements StreamReader.
func (e *pipeEnd) Read(_ context.Context, dst []byte) (int, error) { return e.p.read(dst) }

// Write implements StreamWriter.
func (e *pipeEnd) Write(_ context.Context, src []byte) (int, error) { return e.p.write(src) }

// Readiness implements waiter.Waitable.
func (e *pipeEnd) Readiness(mask waiter.EventMask) waiter.EventMask {
	p := e.p
	p.mu.Lock()
	defer p.mu.Unlock()
	var ready waiter.EventMask
	if e.reads {
		if p.n > 0 {
			ready |= waiter.ReadableEvents
		}
		if p.wCount == 0 && p.wOpened > 0 {
			ready |= waiter.EventHUp
		}
	}
	if e.writes {
		if p.cap-p.n >= pipeAtomicBytes {
			ready |= waiter.WritableEvents
		}
		if p.rCount == 0 {
			ready |= waiter.EventErr
		}
	}
	return ready & (mask | waiter.EventErr | waiter.EventHUp)
}

// EventRegister implements waiter.Waitable.
func (e *pipeEnd) EventRegister(en *waiter.Entry) error { return e.p.EventRegister(en) }

// EventUnregister implements waiter.Waitable.
func (e *pipeEnd) EventUnregister(en *waiter.Entry) { e.p.EventUnregister(en) }

// Ioctl implements Ioctler.
func (e *pipeEnd) Ioctl(ctx context.Context, uio usermem.IO, request uint32, arg uintptr) (uintptr, error) {
	if request != unix.TIOCINQ {
		return 0, unix.ENOTTY
	}
	e.p.mu.Lock()
	n := e.p.n
	e.p.mu.Unlock()
	return 0, usermem.CopyUint32Out(ctx, uio, hostarch.Addr(arg), uint32(n), usermem.IOOpts{})
}

// PipeSize returns the capacity of f if it is a pipe (fcntl(F_GETPIPE_SZ)).
func PipeSize(f *FileDescription) (int, error) {
	e, ok := f.Impl().(*pipeEnd)
	if !ok {
		return 0, unix.EBADF
	}
	e.p.mu.Lock()
	defer e.p.mu.Unlock()
	return e.p.cap, nil
}

// SetPipeSize sets the capacity of f if it is a pipe (fcntl(F_SETPIPE_SZ)) and
// returns what it is now.
func SetPipeSize(f *FileDescription, size int) (int, error) {
	e, ok := f.Impl().(*pipeEnd)
	if !ok {
		return 0, unix.EBADF
	}
	return e.p.resize(size)
}
