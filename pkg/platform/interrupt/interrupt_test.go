package interrupt

import "testing"

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
	f.Disable()

	// Any number of interrupts while disabled are one for the next Enable.
	f.NotifyInterrupt()
	f.NotifyInterrupt()
	if c != 1 {
		t.Errorf("disabled receiver was called")
	}
	if f.Enable(&c) {
		t.Fatal("Enable lost a pending interrupt")
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
