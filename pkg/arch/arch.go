// Package arch holds the state of an application thread as its CPU sees it:
// registers, floating point state, the system call convention, single-stepping
// and signal frames.
//
// It depends on hostarch, abi/linux, cpuid and usermem. It must not know of
// platforms, nor make host calls. What differs between architectures stands in _amd64 and
// _arm64 files with the same names in both.
package arch

import (
	"github.com/ringfence/ringfence/pkg/hostarch"
)

// SyscallArgument is one argument of a system call, as the register holds it.
type SyscallArgument struct {
	Value uintptr
}

// SyscallArguments are the six arguments of a system call.
type SyscallArguments [6]SyscallArgument

// Pointer returns a as an address.
func (a SyscallArgument) Pointer() hostarch.Addr { return hostarch.Addr(a.Value) }

// Int returns a as an int.
func (a SyscallArgument) Int() int32 { return int32(a.Value) }

// Uint returns a as an unsigned int.
func (a SyscallArgument) Uint() uint32 { return uint32(a.Value) }

// Int64 returns a as a long.
func (a SyscallArgument) Int64() int64 { return int64(a.Value) }

// Uint64 returns a as an unsigned long.
func (a SyscallArgument) Uint64() uint64 { return uint64(a.Value) }

// SizeT returns a as a size_t.
func (a SyscallArgument) SizeT() uint { return uint(a.Value) }

// ModeT returns a as a mode_t.
func (a SyscallArgument) ModeT() uint { return uint(uint16(a.Value)) }

// Context64 is the state of one 64-bit application thread. The zero value is
// not ready: use New.
//
// A platform's Context.Switch reads and writes it; the Sentry does between two
// Switches. It is not safe for concurrent use.
type Context64 struct {
	// Regs are the general registers, in the layout of the host's
	// NT_PRSTATUS register set (ptrace(2), PTRACE_GETREGSET).
	Regs Registers

	// fpu is the floating point and vector state, never nil.
	fpu FPState

	// Fault is what the CPU said of the last fault, for signal frames. A
	// platform fills it with every signal that comes from an exception.
	Fault FaultInfo

	// frame is kept between signal frames, which are built and read in it.
	frame []byte
}

// frameBuffer returns n bytes, with anything in them, until the next call.
func (c *Context64) frameBuffer(n uint64) []byte {
	if uint64(cap(c.frame)) < n {
		c.frame = make([]byte, n)
	}
	return c.frame[:n]
}

// FPState is the floating point and vector state of a thread: on amd64 an XSAVE
// area that is not compacted, as large as the host's XCR0 asks for (the register
// set NT_X86_XSTATE); on arm64 the register set NT_ARM_SVE with or without SVE
// registers in it.
type FPState []byte

// FaultInfo is what the CPU reports of an exception. Zero means nothing.
type FaultInfo struct {
	// TrapNo is the exception's vector on amd64 (uc_mcontext.gregs[REG_TRAPNO]).
	TrapNo uint64
	// ErrorCode is the error code that the CPU pushed on amd64 (REG_ERR), and
	// ESR_EL1 on arm64 (the esr_context record of a signal frame).
	ErrorCode uint64
	// Addr is CR2 on amd64 and FAR_EL1 on arm64: the address of the access.
	Addr uint64
}

// New returns the state of a thread before its first instruction: all zero but
// for what the kernel gives a new program (flags, segments, floating point
// defaults), and not in a system call.
func New() *Context64 {
	c := &Context64{fpu: NewFPState()}
	c.Regs.reset()
	return c
}

// Fork returns a copy of c.
func (c *Context64) Fork() *Context64 {
	n := *c
	n.fpu = append(FPState(nil), c.fpu...)
	n.frame = nil
	return &n
}

// FloatingPointData returns the thread's floating point state; it may be edited
// in place. Platforms save and restore all of it.
func (c *Context64) FloatingPointData() FPState { return c.fpu }
