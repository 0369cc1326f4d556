// Package interrupt lets any goroutine interrupt code that blocks in the host,
// without losing a request that comes a moment too early.
//
// It depends on the standard library alone, and knows nothing of how a platform
// reaches its thread.
package interrupt

import (
	"sync"
	"sync/atomic"
)

// Receiver gets interrupts. NotifyInterrupt must not block.
type Receiver interface {
	NotifyInterrupt()
}

// Forwarder passes interrupts to the Receiver that is enabled, or keeps one
// until the next Enable. The zero value has none pending.
type Forwarder struct {
	// state is one of those below. Enable and Disable, which are part of every
	// system call, get by with one change of it.
	state atomic.Uint32
	dst   Receiver

	// mu is held by those who interrupt.
	mu sync.Mutex
}

const (
	idle = iota
	// pending is idle with an interrupt for the next Enable.
	pending
	// enabled says that dst is the receiver.
	enabled
	// notifying is enabled while dst is called. The holder of mu ends it.
	notifying
)

// Enable makes r the receiver of interrupts until Disable. It returns false
// when an interrupt was pending: that one is consumed, r is not enabled, and
// the caller acts on it at once.
//
// Preconditions: no Receiver is enabled; r is not nil.
func (f *Forwarder) Enable(r Receiver) bool {
	if r == nil {
		panic("interrupt: nil Receiver")
	}
	if f.state.Load() >= enabled {
		panic("interrupt: Enable of a Forwarder that is enabled")
	}
	f.dst = r
	if f.state.CompareAndSwap(idle, enabled) {
		return true
	}
	f.state.Store(idle)
	return false
}

// Pending reports whether Enable would return false now.
func (f *Forwarder) Pending() bool { return f.state.Load() == pending }

// Disable ends the receiver's turn. After it returns, NotifyInterrupt is not
// called.
func (f *Forwarder) Disable() {
	if f.state.CompareAndSwap(enabled, idle) {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state.CompareAndSwap(enabled, idle)
}

// NotifyInterrupt interrupts the enabled Receiver; if there is none, it makes
// the next Enable return false.
func (f *Forwarder) NotifyInterrupt() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		switch {
		case f.state.CompareAndSwap(enabled, notifying):
			defer f.state.Store(enabled)
			f.dst.NotifyInterrupt()
			return
		case f.state.CompareAndSwap(idle, pending), f.state.Load() == pending:
			return
		}
	}
}
