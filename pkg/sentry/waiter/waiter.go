// Package waiter lets a goroutine wait until an object is ready for reading or
// writing: files, pipes, epoll instances, timers.
//
// It depends on the standard library alone and must never block.
package waiter

import "sync"

// EventMask is a set of events, with the values of poll(2).
type EventMask uint32

// The events.
const (
	EventIn     EventMask = 0x0001 // POLLIN
	EventPri    EventMask = 0x0002 // POLLPRI
	EventOut    EventMask = 0x0004 // POLLOUT
	EventErr    EventMask = 0x0008 // POLLERR
	EventHUp    EventMask = 0x0010 // POLLHUP
	EventRdNorm EventMask = 0x0040 // POLLRDNORM
	EventWrNorm EventMask = 0x0100 // POLLWRNORM
	EventRdHUp  EventMask = 0x2000 // POLLRDHUP

	ReadableEvents = EventIn | EventRdNorm
	WritableEvents = EventOut | EventWrNorm
	AllEvents      = EventIn | EventPri | EventOut | EventErr | EventHUp | EventRdNorm | EventWrNorm | EventRdHUp
)

// Waitable is an object that can be waited for.
type Waitable interface {
	// Readiness returns the events of mask that hold now. EventErr and EventHUp
	// may be returned whether or not they are asked for.
	Readiness(mask EventMask) EventMask

	// EventRegister makes e be notified of each event in its mask from now on.
	// Register first, then look at Readiness: else an event can be missed.
	EventRegister(e *Entry) error

	// EventUnregister undoes EventRegister. When it returns e is not called any
	// more.
	EventUnregister(e *Entry)
}

// Entry is one waiter. It can be registered with one Queue at a time.
type Entry struct {
	// Mask are the events of interest, Notify is called for each; it must not
	// block, nor call back into the Queue.
	Mask   EventMask
	Notify func(EventMask)

	prev, next *Entry
	queue      *Queue
}

// NewChannelEntry returns an Entry that sends to the returned channel, which
// holds one token: several events may give one.
func NewChannelEntry(mask EventMask) (*Entry, <-chan struct{}) {
	c := make(chan struct{}, 1)
	return &Entry{Mask: mask, Notify: func(EventMask) {
		select {
		case c <- struct{}{}:
		default:
		}
	}}, c
}

// Queue holds the Entries that wait for one object. The zero value is empty.
type Queue struct {
	mu   sync.Mutex
	head *Entry
}

// EventRegister adds e. See Waitable.
func (q *Queue) EventRegister(e *Entry) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	e.queue, e.prev, e.next = q, nil, q.head
	if q.head != nil {
		q.head.prev = e
	}
	q.head = e
	return nil
}

// EventUnregister removes e if it is there.
func (q *Queue) EventUnregister(e *Entry) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if e.queue != q {
		return
	}
	if e.prev != nil {
		e.prev.next = e.next
	} else {
		q.head = e.next
	}
	if e.next != nil {
		e.next.prev = e.prev
	}
	e.queue, e.prev, e.next = nil, nil, nil
}

// Notify calls every Entry whose mask has one of the events. EventErr and
// EventHUp reach every Entry.
func (q *Queue) Notify(events EventMask) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for e := q.head; e != nil; e = e.next {
		if ev := events & (e.Mask | EventErr | EventHUp); ev != 0 {
			e.Notify(ev)
		}
	}
}

// AlwaysReady is embedded by objects that never block, such as regular files.
type AlwaysReady struct{}

// Readiness implements Waitable.Readiness.
func (AlwaysReady) Readiness(mask EventMask) EventMask {
	return mask & (ReadableEvents | WritableEvents)
}

// EventRegister implements Waitable.EventRegister.
func (AlwaysReady) EventRegister(*Entry) error { return nil }

// EventUnregister implements Waitable.EventUnregister.
func (AlwaysReady) EventUnregister(*Entry) {}
