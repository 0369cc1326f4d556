// Package interrupt lets any goroutine interrupt code that blocks in the host,
// without losing a request that comes a moment too early.
//
// It depends on the standard library alone, and knows nothing of how a platform
// reaches its thread.
package interrupt

import "sync"

// Receiver gets interrupts. NotifyInterrupt must not block.
type Receiver interface {
	NotifyInterrupt()
}

// Forwarder passes interrupts to the Receiver that is enabled, or keeps one
// until the next Enable. The zero value has none pending.
type Forwarder struct {
	mu      sync.Mutex
	dst     Receiver
	pending bool
}

// Enable makes r the receiver of interrupts until Disable. It returns false
// when an interrupt was pending: that one is consumed, r is not enabled, and
// the caller acts on it at once.
//
// Preconditions: no Receiver is enabled; r is not nil.
func (f *Forwarder) Enable(r Receiver) bool {
	if r == nil {
		panic("interrupt: nil Receiver")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dst != nil {
		panic("interrupt: Enable of a Forwarder that is enabled")
	}
	if f.pending {
		f.pending = false
		return false
	}
	f.dst = r
	return true
}

// Disable ends the receiver's turn. After it returns, NotifyInterrupt is not
// called.
func (f *Forwarder) Disable() {
	f.mu.Lock()
	f.dst = nil
	f.mu.Unlock()
}

// NotifyInterrupt interrupts the enabled Receiver; if there is none, it makes
// the next Enable return false.
func (f *Forwarder) NotifyInterrupt() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dst != nil {
		f.dst.NotifyInterrupt()
	} else {
		f.pending = true
	}
}
