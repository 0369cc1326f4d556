package interrupt

import (
	"sync/atomic"
	"testing"
)

type counter int

func (c *counter) NotifyInterrupt() { *c++ }

func TestForwarder(t *testing.T) {
	var f Forwarder
	var c counter
	if !f.Enable(&c) {
		t.Fatal("Enable of a fresh Forwarder found an interrupt")
	}
	f.NotifyInterrupt()
	if c != 1 {
		t.Errorf("enabled receiver got %d interrupts, want 1", c)
	}
	if f.Pending() {
		t.Error("an interrupt that was delivered is pending")
	}
	f.Disable()

	// Any number of interrupts while disabled are one for the next Enable.
	f.NotifyInterrupt()
	f.NotifyInterrupt()
	if c != 1 {
		t.Errorf("disabled receiver was called")
	}
	if !f.Pending() {
		t.Error("an interrupt without a receiver is not pending")
	}
	if f.Enable(&c) {
		t.Fatal("Enable lost a pending interrupt")
	}
	if f.Pending() {
		t.Error("an interrupt is pending that was consumed")
	}
	if !f.Enable(&c) {
		t.Fatal("pending interrupt was not consumed")
	}
	f.Disable()
}

func TestForwarderMisuse(t *testing.T) {
	mustPanic := func(name string, f func()) {
		defer func() {
			if recover() == nil {
				t.Errorf("%s did not panic", name)
			}
		}()
		f()
	}
	var c counter
	mustPanic("nil receiver", func() { new(Forwarder).Enable(nil) })
	mustPanic("double Enable", func() {
		var f Forwarder
		f.Enable(&c)
		f.Enable(&c)
	})
}

// After each interrupt one Enable returns false, or the receiver is called; it never
// is after Disable.
func TestForwarderConcurrent(t *testing.T) {
	var f Forwarder
	r := &guarded{t: t}
	const interrupts = 20000
	seen := make(chan struct{}, 1)
	go func() {
		for range interrupts {
			f.NotifyInterrupt()
			<-seen
		}
	}()
	for n := 0; n < interrupts; {
		r.enabled.Store(true)
		if !f.Enable(r) {
			r.enabled.Store(false)
			n++
			seen <- struct{}{}
			continue
		}
		f.Disable()
		r.enabled.Store(false)
		if r.calls.Swap(0) > 0 {
			n++
			seen <- struct{}{}
		}
	}
}

// guarded is a Receiver that must only be called while it is enabled.
type guarded struct {
	t       *testing.T
	enabled atomic.Bool
	calls   atomic.Int32
}

func (g *guarded) NotifyInterrupt() {
	if !g.enabled.Load() {
		g.t.Error("called after Disable")
	}
	g.calls.Add(1)
}
