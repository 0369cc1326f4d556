package systrap

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
)

// A call without a signal. Patched code jumps to ·call (text_amd64.s), which saves
// what a system call consists of in the header and gives the slot away. All other
// registers stay where they are, in the CPU, and so does the floating point state:
// whoever wants more has the thread write it into the slot (saveCall), or does so with
// the next call (putOrder). A thread that has made a call can go on with any state
// (putState). None of that takes a signal, or the kernel.
//
// A signal before the call is made finds the thread on its way there; its state is
// that before the system call instruction, which is executed again. A signal after
// that waits in the handler until the slot is the stub's, as if it were blocked;
// then the thread's state is what the Sentry has answered.

// headerAddr is where the header is in the stub, and the GS base of a thread that
// may run patched code.
func (t *thread) headerAddr() uint64 { return t.addr + stackSize }

// gsBase returns the GS base to run with when the application wants v.
func (t *thread) gsBase(v uint64) uint64 {
	if v == 0 && t.as.patches() {
		return t.headerAddr()
	}
	return v
}

// syscallSize is the size of the instruction, in bytes.
const syscallSize = 2

// takeCall reads a call into r and known, or returns false if the thread has got
// something else. Of r it changes what a system call consists of, and more only if the
// thread has written that.
func (t *thread) takeCall(r, known *arch.Registers) bool {
	kind := t.header32(headerKind)
	if kind != kindCall && kind != kindState {
		return false
	}
	if !t.called {
		*known = *r // later they are the same, but for these
	}
	t.called, t.saved = true, kind == kindState
	r.Orig_rax = t.header(headerRAX)
	r.Rdi, r.Rsi, r.Rdx = t.header(headerRDI), t.header(headerRSI), t.header(headerRDX)
	r.R10, r.R8, r.R9 = t.header(headerR10), t.header(headerR8), t.header(headerR9)
	r.Rip, r.Rsp = t.header(headerRIP), t.header(headerRSP)
	r.Rcx = r.Rip
	r.Rax = resultNone
	r.Cs, r.Ss = userCS, userDS
	if t.saved {
		t.takeState(r)
		*known = *r
		return true
	}
	known.Orig_rax, known.Rdi, known.Rsi, known.Rdx, known.R10, known.R8, known.R9 = r.Orig_rax, r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8, r.R9
	known.Rip, known.Rsp, known.Rcx, known.Rax = r.Rip, r.Rsp, r.Rcx, r.Rax
	known.Cs, known.Ss = r.Cs, r.Ss
	return true
}

// takeState reads the registers that a call does not consist of.
func (t *thread) takeState(r *arch.Registers) {
	r.Rbx, r.Rbp = t.header(headerRBX), t.header(headerRBP)
	r.R12, r.R13, r.R14, r.R15 = t.header(headerR12), t.header(headerR13), t.header(headerR14), t.header(headerR15)
	r.Fs_base, r.Gs_base = t.header(headerFS), 0
	r.Eflags = t.flags(t.header(headerRFlags))
	r.R11 = r.Eflags
}

// answer lets the thread return from its call, if regs differ from known in no
// more than the result.
func (t *thread) answer(known, regs *arch.Registers) bool {
	rax := known.Rax
	known.Rax = regs.Rax
	if *known != *regs {
		known.Rax = rax
		return false
	}
	t.setHeader(headerRAX, regs.Rax)
	t.order = orderReturn
	return true
}

// putState lets the thread go on with regs, and the floating point state that is in
// the slot.
//
// Precondition: t.called.
func (t *thread) putState(regs *arch.Registers) {
	for _, r := range [...]struct {
		off int
		v   uint64
	}{
		{headerRDI, regs.Rdi}, {headerRSI, regs.Rsi}, {headerRDX, regs.Rdx}, {headerR10, regs.R10},
		{headerR8, regs.R8}, {headerR9, regs.R9},
		{headerRBX, regs.Rbx}, {headerRBP, regs.Rbp}, {headerR12, regs.R12}, {headerR13, regs.R13},
		{headerR14, regs.R14}, {headerR15, regs.R15}, {headerRCX, regs.Rcx}, {headerR11, regs.R11},
		{headerStack, regs.Fs_base}, {headerStack + 8, t.gsBase(regs.Gs_base)}, {headerStack + 16, regs.Rax}, {headerStack + 24, regs.Rip},
		{headerStack + 32, userCS}, {headerStack + 40, regs.Eflags}, {headerStack + 48, regs.Rsp}, {headerStack + 56, userDS},
	} {
		t.setHeader(r.off, r.v)
	}
	t.order = orderLoad
}

// fpOffset is where the floating point state is in the slot.
func (t *thread) fpOffset() int {
	if t.called {
		return 0
	}
	return theFrame.fp
}

// flags returns flags with the part that the thread has saved when it made a call:
// by LAHF, and SETO.
func (t *thread) flags(flags uint64) uint64 {
	const inAH, of = 0xd5, 1 << 11
	saved := t.header(headerFlags)
	return flags&^(inAH|of) | saved>>8&inAH | saved&1*of
}

// settle makes of the registers in a signal frame, r, those that the application
// has without patches. answered are those that the thread was to return with from
// a call.
func (t *thread) settle(e *event, r, answered *arch.Registers) {
	called := t.called
	t.called, t.saved = false, false
	at := &t.as.at
	switch ip := uintptr(r.Rip); {
	case ip >= at.call && ip <= at.makeCall:
		// Not made yet: it is before the system call instruction.
		e.early, e.inCall = true, true
		r.Rip = r.Rcx - syscallSize
		if ip > at.call {
			r.Rax = t.header(headerRAX)
		}
		if ip > at.callArgs {
			r.Eflags = t.flags(r.Eflags)
		}
		if ip >= at.callState {
			r.Rdx, r.Rsp = t.header(headerRDX), t.header(headerRSP)
		}
	case ip > at.makeCall && ip < at.callEnd && called:
		e.called, e.loading = true, t.order == orderLoad
		frame := *r
		*r = *answered
		if !e.loading {
			r.Rbx, r.Rbp, r.R12, r.R13, r.R14, r.R15 = frame.Rbx, frame.Rbp, frame.R12, frame.R13, frame.R14, frame.R15
			r.Fs_base, r.Gs_base = frame.Fs_base, frame.Gs_base
			r.Eflags = t.flags(frame.Eflags)
			r.R11 = r.Eflags
		}
	default:
		if to, ok := t.as.table.Load().Settle(r.Rip); ok {
			e.early = true
			r.Rip = to
		}
	}
}

// beyondCall are the registers that takeCall does not read.
func beyondCall(r *arch.Registers) [10]*uint64 {
	return [10]*uint64{&r.Rbx, &r.Rbp, &r.R11, &r.R12, &r.R13, &r.R14, &r.R15, &r.Eflags, &r.Fs_base, &r.Gs_base}
}

// saveCall completes regs: it has a thread that has made a call write its state into the
// slot. If a signal comes first, the thread is not in the call afterwards, and has a
// signal frame; interrupted says that it was an interrupt, and one that was sent.
func (t *thread) saveCall(c *threadContext, regs *arch.Registers) (interrupted bool, err error) {
	t.order = orderSave
	stale, all := c.known, c.known
	err = t.resume(c)
	t.order = orderReturn
	if err != nil {
		return false, err
	}
	var e event
	switch t.header32(headerKind) {
	case kindState:
		t.saved = true
		t.takeState(&all)
		c.known = all
	case kindFrame:
		if e, err = t.event(c, &all); err == nil && !e.called {
			err = unix.EPROTO
		}
	default:
		err = unix.EPROTO
	}
	if err != nil {
		return false, t.as.fail(fmt.Errorf("stub process %d: a thread does not write the state of a call: %w", t.as.pid, err))
	}
	// What was not changed meanwhile.
	now, old, full := beyondCall(regs), beyondCall(&stale), beyondCall(&all)
	for i := range now {
		if *now[i] == *old[i] {
			*now[i] = *full[i]
		}
	}
	return e.code <= 0 && !t.called && c.sent.Swap(false), nil
}

// wantsGS reports whether the application wants the register that leads to the
// slot.
func wantsGS(ac *arch.Context64) bool { return ac.Regs.Gs_base != 0 }

// header32 returns half a word of the header.
func (t *thread) header32(off int) uint32 {
	return binary.LittleEndian.Uint32(t.slot[stackSize+off:])
}
