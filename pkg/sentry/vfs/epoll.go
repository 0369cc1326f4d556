package vfs

import (
	"context"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/waiter"
)

// Flags in the events of epoll_ctl(2) that are not events of poll(2).
const (
	epollExclusive = 1 << 28
	epollWakeup    = 1 << 29
	epollOneShot   = 1 << 30
	epollET        = 1 << 31
	epollFlags     = epollExclusive | epollWakeup | epollOneShot | epollET
)

// maxEpollDepth bounds chains of epoll instances that watch each other.
const maxEpollDepth = 5

// EpollEvent is what epoll_wait(2) returns of one file.
type EpollEvent struct {
	Events uint32
	Data   uint64
}

// epoll is the file of epoll_create1(2).
//
// Locks are taken in the order mu, locks of the watched files, readyMu, queue.
// Files notify with locks of their own held, so the callbacks take only the
// last two.
type epoll struct {
	anonFile
	queue waiter.Queue

	// mu protects items, and is held while readiness is looked at.
	mu    sync.Mutex
	items map[epollKey]*epollItem

	// readyMu protects ready, a list of items that may be ready, and queued of
	// every item.
	readyMu sync.Mutex
	ready   []*epollItem
}

type epollKey struct {
	fd   int32
	file *FileDescription
}

// epollItem is a file of interest. It holds no reference on it: the file tells
// when it goes.
type epollItem struct {
	key    epollKey
	file   waiter.Waitable // as its adder sees it
	entry  waiter.Entry
	events uint32
	data   uint64
	// disabled is set by EPOLLONESHOT.
	disabled bool
	queued   bool
}

// NewEpoll returns an epoll instance.
func NewEpoll() *FileDescription {
	ep := &epoll{anonFile: newAnonFile(0o600), items: make(map[epollKey]*epollItem)}
	return NewFileDescription(ep, unix.O_RDWR, func() string { return "anon_inode:[eventpoll]" })
}

// EpollCtl changes what the epoll instance f watches (epoll_ctl(2)), for the task
// of ctx.
func EpollCtl(ctx context.Context, f *FileDescription, op int, fd int32, file *FileDescription, event EpollEvent) error {
	ep, ok := f.Impl().(*epoll)
	if !ok || file == f {
		return unix.EINVAL
	}
	switch file.Impl().(type) {
	case ReaderAt, WriterAt, DirReader: // always ready: Linux refuses them
		return unix.EPERM
	}
	if nested, ok := file.Impl().(*epoll); ok && op == unix.EPOLL_CTL_ADD && nested.reaches(ep, maxEpollDepth) {
		return unix.ELOOP
	}
	key := epollKey{fd, file}
	ep.mu.Lock()
	defer ep.mu.Unlock()
	item := ep.items[key]
	switch op {
	case unix.EPOLL_CTL_ADD:
		if item != nil {
			return unix.EEXIST
		}
		item = &epollItem{key: key, file: file.For(ctx)}
		item.entry.Notify = func(waiter.EventMask) { ep.markReady(item) }
		if err := ep.armLocked(item, event); err != nil {
			return err
		}
		ep.items[key] = item
		file.watchRelease(item, func() { ep.forget(item) })
	case unix.EPOLL_CTL_MOD:
		if item == nil {
			return unix.ENOENT
		}
		if item.events&epollExclusive != 0 || event.Events&epollExclusive != 0 {
			return unix.EINVAL
		}
		item.file.EventUnregister(&item.entry)
		return ep.armLocked(item, event)
	case unix.EPOLL_CTL_DEL:
		if item == nil {
			return unix.ENOENT
		}
		file.unwatchRelease(item)
		ep.dropLocked(item)
	default:
		return unix.EINVAL
	}
	return nil
}

// reaches reports whether ep watches target, directly or through others, or
// through more than depth instances.
func (ep *epoll) reaches(target *epoll, depth int) bool {
	if ep == target || depth == 0 {
		return true
	}
	ep.mu.Lock()
	var nested []*epoll
	for key := range ep.items {
		if n, ok := key.file.Impl().(*epoll); ok {
			nested = append(nested, n)
		}
	}
	ep.mu.Unlock()
	for _, n := range nested {
		if n.reaches(target, depth-1) {
			return true
		}
	}
	return false
}

// armLocked registers item for event, and marks it ready if it is.
func (ep *epoll) armLocked(item *epollItem, event EpollEvent) error {
	item.events, item.data, item.disabled = event.Events, event.Data, false
	item.entry.Mask = item.mask()
	if err := item.file.EventRegister(&item.entry); err != nil {
		return err
	}
	if item.file.Readiness(item.mask()) != 0 {
		ep.markReady(item)
	}
	return nil
}

func (i *epollItem) mask() waiter.EventMask {
	return waiter.EventMask(i.events&^epollFlags) | waiter.EventErr | waiter.EventHUp
}

// markReady puts item on the ready list and wakes waiters.
func (ep *epoll) markReady(item *epollItem) {
	ep.readyMu.Lock()
	if !item.queued {
		item.queued = true
		ep.ready = append(ep.ready, item)
	}
	ep.readyMu.Unlock()
	ep.queue.Notify(waiter.ReadableEvents)
}

// forget removes item when its file is closed.
func (ep *epoll) forget(item *epollItem) {
	ep.mu.Lock()
	defer ep.mu.Unlock()
	ep.dropLocked(item)
}

func (ep *epoll) dropLocked(item *epollItem) {
	if ep.items[item.key] != item {
		return
	}
	item.file.EventUnregister(&item.entry)
	delete(ep.items, item.key)
	ep.readyMu.Lock()
	defer ep.readyMu.Unlock()
	for i, r := range ep.ready {
		if r == item {
			ep.ready = append(ep.ready[:i], ep.ready[i+1:]...)
			break
		}
	}
}

// ReadEpoll returns up to max events of the epoll instance f that are ready
// (epoll_wait(2)); it does not wait.
func ReadEpoll(f *FileDescription, max int) ([]EpollEvent, error) {
	ep, ok := f.Impl().(*epoll)
	if !ok {
		return nil, unix.EINVAL
	}
	return ep.collect(max, true), nil
}

// collect returns the events that are ready now. With consume, edge-triggered
// and one-shot items are used up.
func (ep *epoll) collect(max int, consume bool) []EpollEvent {
	ep.mu.Lock()
	defer ep.mu.Unlock()
	ep.readyMu.Lock()
	list := ep.ready
	ep.ready = nil
	for _, item := range list {
		item.queued = false
	}
	ep.readyMu.Unlock()

	var events []EpollEvent
	var again []*epollItem // stay on the list, behind those not looked at
	var rest []*epollItem
	for i, item := range list {
		if len(events) == max {
			rest = list[i:]
			break
		}
		if item.disabled {
			continue
		}
		ready := item.file.Readiness(item.mask()) & item.mask()
		if ready == 0 {
			continue
		}
		events = append(events, EpollEvent{Events: uint32(ready), Data: item.data})
		switch {
		case !consume:
			again = append(again, item)
		case item.events&epollOneShot != 0:
			item.disabled = true
		case item.events&epollET == 0:
			again = append(again, item)
		}
	}
	ep.readyMu.Lock()
	defer ep.readyMu.Unlock()
	// What was marked meanwhile goes behind, once each.
	marked := ep.ready
	ep.ready = nil
	for _, item := range marked {
		item.queued = false
	}
	for _, l := range [][]*epollItem{rest, again, marked} {
		for _, item := range l {
			if !item.queued {
				item.queued = true
				ep.ready = append(ep.ready, item)
			}
		}
	}
	return events
}

// Stat implements Impl.
func (ep *epoll) Stat(context.Context) (unix.Stat_t, error) { return ep.stat(), nil }

// Release implements Impl.
func (ep *epoll) Release() {
	ep.mu.Lock()
	defer ep.mu.Unlock()
	for _, item := range ep.items {
		item.key.file.unwatchRelease(item)
		ep.dropLocked(item)
	}
}

// Readiness implements waiter.Waitable.
func (ep *epoll) Readiness(mask waiter.EventMask) waiter.EventMask {
	if len(ep.collect(1, false)) > 0 {
		return waiter.ReadableEvents & mask
	}
	return 0
}

// EventRegister implements waiter.Waitable.
func (ep *epoll) EventRegister(e *waiter.Entry) error { return ep.queue.EventRegister(e) }

// EventUnregister implements waiter.Waitable.
func (ep *epoll) EventUnregister(e *waiter.Entry) { ep.queue.EventUnregister(e) }
