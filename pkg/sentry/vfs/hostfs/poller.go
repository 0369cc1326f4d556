package hostfs

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/waiter"
)

// Poller waits for host descriptors in one goroutine, for a whole Sentry.
type Poller struct {
	epoll int
	stop  int // eventfd

	mu      sync.Mutex
	files   map[int32]*waiter.Queue // by the number that epoll returns
	lastID  int32
	running bool
	closed  bool
	done    chan struct{}
}

// NewPoller returns a Poller. Its goroutine starts with the first wait.
func NewPoller() (*Poller, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err == nil {
		err = unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, stop, &unix.EpollEvent{Events: unix.EPOLLIN})
		if err != nil {
			unix.Close(stop)
		}
	}
	if err != nil {
		unix.Close(epoll)
		return nil, fmt.Errorf("set up poller: %w", err)
	}
	return &Poller{epoll: epoll, stop: stop, files: map[int32]*waiter.Queue{}, done: make(chan struct{})}, nil
}

// Close ends the goroutine. Files made with p are not notified any more.
func (p *Poller) Close() {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	p.closed = true
	running := p.running
	p.mu.Unlock()
	if running {
		unix.Write(p.stop, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // an eventfd takes this always
		<-p.done
	}
	unix.Close(p.stop)
	unix.Close(p.epoll)
}

// watch notifies q of every change of fd, until unwatch. id is 0 for files that
// are always ready: epoll refuses them.
func (p *Poller) watch(fd int, q *waiter.Queue) (id int32, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return 0, unix.EBADF
	}
	p.lastID++
	e := unix.EpollEvent{
		Events: unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLPRI | unix.EPOLLRDHUP | unix.EPOLLET,
		Fd:     p.lastID,
	}
	switch err := unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, fd, &e); err {
	case nil:
	case unix.EPERM:
		return 0, nil
	default:
		return 0, err
	}
	p.files[p.lastID] = q
	if !p.running {
		p.running = true
		go p.run()
	}
	return p.lastID, nil
}

func (p *Poller) unwatch(fd int, id int32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		unix.EpollCtl(p.epoll, unix.EPOLL_CTL_DEL, fd, nil) // fd is there: watch has added it
	}
	delete(p.files, id)
}

func (p *Poller) run() {
	defer close(p.done)
	var events [64]unix.EpollEvent
	for {
		n, err := unix.EpollWait(p.epoll, events[:], -1)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return // p.epoll is gone: nothing can be notified
		}
		for _, e := range events[:n] {
			if e.Fd == 0 {
				return
			}
			p.mu.Lock()
			q := p.files[e.Fd]
			p.mu.Unlock()
			if q != nil {
				q.Notify(fromPoll(e.Events))
			}
		}
	}
}

// fromPoll adds to events of poll(2) what the host leaves out.
func fromPoll(events uint32) waiter.EventMask {
	m := waiter.EventMask(events) & waiter.AllEvents
	if m&waiter.EventIn != 0 {
		m |= waiter.EventRdNorm
	}
	if m&waiter.EventOut != 0 {
		m |= waiter.EventWrNorm
	}
	return m
}
