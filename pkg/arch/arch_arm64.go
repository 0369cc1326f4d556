package arch

// Registers are arm64's general registers as struct user_pt_regs orders them
// (arch/arm64/include/uapi/asm/ptrace.h), followed by what Linux keeps in
// register sets of its own: NT_ARM_SYSTEM_CALL and NT_ARM_TLS.
type Registers struct {
	Regs   [31]uint64
	Sp     uint64
	Pc     uint64
	Pstate uint64

	// SyscallNo is the number of the system call that the thread is in, or -1.
	SyscallNo int32
	_         uint32

	// OrigX0 is X0 at the system call instruction: its first argument, which the
	// result overwrites.
	OrigX0 uint64

	// TPIDR is TPIDR_EL0, the thread pointer.
	TPIDR uint64
}

// noSyscall is Registers.SyscallNo of a thread that is not in a system call.
const noSyscall = -1

// prstatusSize is the size of struct user_pt_regs.
const prstatusSize = 34 * 8

func (r *Registers) reset() { *r = Registers{SyscallNo: noSyscall} }

// Bits of PSTATE as SPSR_EL1 holds them (Arm ARM, C5.2.19).
const (
	pstateBTypeC    = 1 << 10 // the target of an indirect call
	pstateBTypeMask = 3 << 10
	pstateSSBS      = 1 << 12
	pstateSS        = 1 << 21 // software step (Arm ARM, D2.12)
	pstateDIT       = 1 << 24
	pstateTCO       = 1 << 25
	pstateNZCV      = 0xf << 28

	// pstateUser are the bits that user code can set.
	pstateUser = pstateNZCV | pstateTCO | pstateDIT | pstateSSBS | pstateBTypeMask

	// pstateRefused are the mode and the masks of interrupts: not 0 means that
	// the thread would run at another exception level or in AArch32.
	pstateRefused = 0x1f | 0xf<<6
)

// SanitizeRegs makes registers that an application, or a stub that it broke, may
// have forged safe to run with: it clears the bits of PSTATE that user code
// cannot set, but for SetSingleStep's.
//
// It returns false if PSTATE asked for another mode: the thread then deserves
// SIGSEGV.
func (c *Context64) SanitizeRegs() bool {
	r := &c.Regs
	ok := r.Pstate&pstateRefused == 0
	r.Pstate &= pstateUser | pstateSS
	return ok
}

// InSyscall reports whether the thread is in a system call: it stopped for one
// and has not been through a signal handler or rt_sigreturn since.
func (c *Context64) InSyscall() bool { return c.Regs.SyscallNo >= 0 }

// SyscallNo returns the number of the system call that was made.
func (c *Context64) SyscallNo() uintptr { return uintptr(c.Regs.Regs[8]) }

// SyscallArgs returns the arguments of the system call that was made.
func (c *Context64) SyscallArgs() SyscallArguments {
	r := &c.Regs
	return SyscallArguments{
		{uintptr(r.OrigX0)}, {uintptr(r.Regs[1])}, {uintptr(r.Regs[2])},
		{uintptr(r.Regs[3])}, {uintptr(r.Regs[4])}, {uintptr(r.Regs[5])},
	}
}

// Return returns the value in the register that holds a system call's result.
func (c *Context64) Return() uintptr { return uintptr(c.Regs.Regs[0]) }

// SetReturn sets the result of the system call.
func (c *Context64) SetReturn(v uintptr) { c.Regs.Regs[0] = uint64(v) }

// RestartSyscall moves the thread back onto its system call instruction, with
// the first argument where the instruction wants it.
func (c *Context64) RestartSyscall() {
	c.Regs.Pc -= syscallSize
	c.Regs.Regs[0] = c.Regs.OrigX0
}

// RestartSyscallWithRestartBlock is RestartSyscall with restart_syscall(2) as
// the number.
func (c *Context64) RestartSyscallWithRestartBlock() {
	c.Regs.Pc -= syscallSize
	c.Regs.Regs[0] = c.Regs.OrigX0
	c.Regs.Regs[8] = restartSyscallNr
}

const (
	syscallSize      = 4
	restartSyscallNr = 128 // asm-generic/unistd.h
)

// IP returns the program counter.
func (c *Context64) IP() uintptr { return uintptr(c.Regs.Pc) }

// SetIP sets the program counter.
func (c *Context64) SetIP(v uintptr) { c.Regs.Pc = uint64(v) }

// Stack returns the stack pointer.
func (c *Context64) Stack() uintptr { return uintptr(c.Regs.Sp) }

// SetStack sets the stack pointer.
func (c *Context64) SetStack(v uintptr) { c.Regs.Sp = uint64(v) }

// TLS returns the thread pointer, TPIDR_EL0.
func (c *Context64) TLS() uintptr { return uintptr(c.Regs.TPIDR) }

// SetTLS sets the thread pointer; every value is allowed.
func (c *Context64) SetTLS(v uintptr) bool {
	c.Regs.TPIDR = uint64(v)
	return true
}

// SingleStep reports whether the thread traps after each instruction.
func (c *Context64) SingleStep() bool { return c.Regs.Pstate&pstateSS != 0 }

// SetSingleStep makes the thread trap after each instruction.
func (c *Context64) SetSingleStep() { c.Regs.Pstate |= pstateSS }

// ClearSingleStep undoes SetSingleStep.
func (c *Context64) ClearSingleStep() { c.Regs.Pstate &^= pstateSS }
