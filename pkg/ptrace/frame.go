package ptrace

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
)

// signalFrame makes the kernel write a signal frame for sig, for which the thread
// has just stopped, and stops it again before the handler's first instruction: the
// frame has what the CPU said of the exception, which ptrace(2) does not tell. It
// returns the frame's address; the frame is there until unlock is called.
//
// The frame is memory that other threads of the application can write, so what it
// says is true only if they let it be; a lie hurts nobody but them.
func (t *thread) signalFrame(c *threadContext, sig unix.Signal) (sp uintptr, unlock func(), err error) {
	// The kernel resets the floating point state for a handler.
	if err := c.pullFP(); err != nil {
		return 0, nil, err
	}
	t.owner = nil
	t.as.frameMu.Lock()
	sp, err = t.writeFrame(sig)
	if err != nil {
		t.as.frameMu.Unlock()
		return 0, nil, err
	}
	return sp, t.as.frameMu.Unlock, nil
}

func (t *thread) writeFrame(sig unix.Signal) (sp uintptr, err error) {
	if err := ptraceCall(unix.PTRACE_SINGLESTEP, t.tid, 0, uintptr(sig)); err != nil {
		return 0, t.fail("ptrace(PTRACE_SINGLESTEP)", err)
	}
	if _, err := t.wait(); err != nil {
		return 0, err
	}
	var regs arch.Registers
	if err := getRegs(t.tid, &regs); err != nil {
		return 0, t.fail("reading the general registers", err)
	}
	l := &t.as.Zygote.Layout
	sp = stackPointer(&regs)
	if instructionPointer(&regs) != l.Handler || sp < l.SignalStack[0] || sp >= l.SignalStack[1] {
		return 0, t.fail("writing a signal frame", unix.ENOMEM)
	}
	return sp, nil
}
