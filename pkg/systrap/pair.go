package systrap

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/affinity"
	"github.com/ringfence/ringfence/pkg/sysmsg"
)

// The Sentry and a stub's thread that both find the slot theirs while they look at
// it, each on a CPU of its own, are fastest. When they have to wake each other
// instead they are best off on one CPU (package affinity), and do not look.

// BindThread implements platform.ThreadBinder.BindThread.
func (c *threadContext) BindThread() {
	c.osThread = unix.Gettid()
	if c.thread != nil {
		c.unpair()
		c.pair()
	}
}

// pair is called when the Context has got a thread.
func (c *threadContext) pair() {
	if c.osThread != 0 {
		c.thread.pair = affinity.New(c.osThread, c.thread.tid, &c.thread.as.group)
	}
}

// unpair is called before the Context loses its thread.
func (c *threadContext) unpair() {
	c.thread.pair.Release()
	c.thread.pair.Forget()
	c.thread.pair = nil
}

// PrepareSleep implements platform.Context.PrepareSleep: the thread sleeps by
// itself.
func (c *threadContext) PrepareSleep() {
	if c.thread != nil {
		c.thread.pair.Sleep()
	}
}

// spins returns how often to look at the slot before sleeping, for both sides.
func (t *thread) spins() uint32 {
	if t.pair.Pin() {
		t.spinner = sysmsg.Spinner{} // for the time after
		return 0
	}
	return t.spinner.Next(spinLimit())
}

// turned says that an event has come, and whether the thread and then the Sentry
// had to be woken.
func (t *thread) turned(o sysmsg.Outcome, woke bool) {
	if woke || o == sysmsg.Slept {
		t.pair.Slow()
	} else {
		t.pair.Fast()
	}
	t.spinner.Report(o)
}
