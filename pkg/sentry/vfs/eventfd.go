package vfs

import (
	"context"
	"math"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/waiter"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// eventFD is the file of eventfd2(2).
type eventFD struct {
	anonFile
	waiter.Queue
	semaphore bool

	mu    sync.Mutex
	count uint64
}

// NewEventFD returns an eventfd. flags are status flags.
func NewEventFD(initial uint64, semaphore bool, flags uint32) *FileDescription {
	e := &eventFD{anonFile: newAnonFile(0o600), semaphore: semaphore, count: initial}
	return NewFileDescription(e, unix.O_RDWR|flags, func() string { return "anon_inode:[eventfd]" })
}

// Stat implements Impl.
func (e *eventFD) Stat(context.Context) (unix.Stat_t, error) { return e.stat(), nil }

// Release implements Impl.
func (e *eventFD) Release() {}

// Read implements StreamReader.
func (e *eventFD) Read(_ context.Context, p []byte) (int, error) {
	if len(p) < 8 {
		return 0, unix.EINVAL
	}
	e.mu.Lock()
	v := e.count
	if v == 0 {
		e.mu.Unlock()
		return 0, unix.EAGAIN
	}
	if e.semaphore {
		v = 1
	}
	e.count -= v
	e.mu.Unlock()
	usermem.ByteOrder.PutUint64(p, v)
	e.Notify(waiter.WritableEvents)
	return 8, nil
}

// Write implements StreamWriter.
func (e *eventFD) Write(_ context.Context, p []byte) (int, error) {
	if len(p) < 8 {
		return 0, unix.EINVAL
	}
	v := usermem.ByteOrder.Uint64(p)
	if v == math.MaxUint64 {
		return 0, unix.EINVAL
	}
	e.mu.Lock()
	if v > math.MaxUint64-1-e.count {
		e.mu.Unlock()
		return 0, unix.EAGAIN
	}
	e.count += v
	e.mu.Unlock()
	e.Notify(waiter.ReadableEvents)
	return 8, nil
}

// Readiness implements waiter.Waitable.
func (e *eventFD) Readiness(mask waiter.EventMask) waiter.EventMask {
	e.mu.Lock()
	defer e.mu.Unlock()
	var ready waiter.EventMask
	if e.count > 0 {
		ready |= waiter.ReadableEvents
	}
	if e.count < math.MaxUint64-1 {
		ready |= waiter.WritableEvents
	}
	return ready & mask
}
