package arch

// Registers are amd64's general registers as struct user_regs_struct orders
// them (arch/x86/include/asm/user_64.h).
type Registers struct {
	R15      uint64
	R14      uint64
	R13      uint64
	R12      uint64
	Rbp      uint64
	Rbx      uint64
	R11      uint64
	R10      uint64
	R9       uint64
	R8       uint64
	Rax      uint64
	Rcx      uint64
	Rdx      uint64
	Rsi      uint64
	Rdi      uint64
	Orig_rax uint64
	Rip      uint64
	Cs       uint64
	Eflags   uint64
	Rsp      uint64
	Ss       uint64
	Fs_base  uint64
	Gs_base  uint64
	Ds       uint64
	Es       uint64
	Fs       uint64
	Gs       uint64
}

// Selectors of 64-bit user code and data in Linux's GDT
// (arch/x86/include/asm/segment.h).
const (
	userCS = 0x33
	userDS = 0x2b
)

// Bits of EFLAGS (Intel SDM vol. 1, 3.4.3).
const (
	eflagsCF       = 1 << 0
	eflagsReserved = 1 << 1
	eflagsPF       = 1 << 2
	eflagsAF       = 1 << 4
	eflagsZF       = 1 << 6
	eflagsSF       = 1 << 7
	eflagsTF       = 1 << 8
	eflagsIF       = 1 << 9
	eflagsDF       = 1 << 10
	eflagsOF       = 1 << 11
	eflagsNT       = 1 << 14
	eflagsRF       = 1 << 16
	eflagsAC       = 1 << 18
	eflagsID       = 1 << 21

	// eflagsSigreturn are those that rt_sigreturn restores (FIX_EFLAGS in
	// arch/x86/include/asm/sighandling.h), eflagsUser those that user code can
	// set, with POPF or otherwise.
	eflagsSigreturn = eflagsCF | eflagsPF | eflagsAF | eflagsZF | eflagsSF | eflagsTF | eflagsDF | eflagsOF | eflagsRF | eflagsAC
	eflagsUser      = eflagsSigreturn | eflagsNT | eflagsID
)

// noSyscall is Orig_rax of a thread that is not in a system call.
const noSyscall = ^uint64(0)

// prstatusSize is the size of struct user_regs_struct.
const prstatusSize = 27 * 8

func (r *Registers) reset() {
	*r = Registers{Cs: userCS, Ss: userDS, Eflags: eflagsReserved | eflagsIF, Orig_rax: noSyscall}
}

// SanitizeRegs makes registers that an application, or a stub that it broke, may
// have forged safe to run with: flags that user code cannot set, selectors that
// are not those of 64-bit user code, and segment bases beyond user space go.
//
// It returns false if the thread cannot run from here, because the instruction
// pointer is not canonical or the code segment was another one: it then deserves
// SIGSEGV with SI_KERNEL, as the host's return to user mode would give it.
func (c *Context64) SanitizeRegs() bool {
	r := &c.Regs
	ok := r.Cs == userCS && isCanonical(r.Rip)
	r.Cs, r.Ss = userCS, userDS
	r.Eflags = r.Eflags&eflagsUser | eflagsReserved | eflagsIF
	for _, s := range []*uint64{&r.Ds, &r.Es, &r.Fs, &r.Gs} {
		// Null selectors, with any privilege level, or user data.
		if *s > 3 && *s != userDS {
			*s = 0
		}
	}
	for _, base := range []*uint64{&r.Fs_base, &r.Gs_base} {
		if *base >= maxUserAddr {
			*base = 0
		}
	}
	return ok
}

// isCanonical reports whether v is sign-extended from bit 47 (Intel SDM vol. 1,
// 3.3.7.1).
func isCanonical(v uint64) bool { return uint64(int64(v<<16)>>16) == v }

// InSyscall reports whether the thread is in a system call: it stopped for one
// and has not been through a signal handler or rt_sigreturn since.
func (c *Context64) InSyscall() bool { return int64(c.Regs.Orig_rax) >= 0 }

// SyscallNo returns the number of the system call that was made.
func (c *Context64) SyscallNo() uintptr { return uintptr(c.Regs.Orig_rax) }

// SyscallArgs returns the arguments of the system call that was made.
func (c *Context64) SyscallArgs() SyscallArguments {
	r := &c.Regs
	return SyscallArguments{
		{uintptr(r.Rdi)}, {uintptr(r.Rsi)}, {uintptr(r.Rdx)},
		{uintptr(r.R10)}, {uintptr(r.R8)}, {uintptr(r.R9)},
	}
}

// Return returns the value in the register that holds a system call's result.
func (c *Context64) Return() uintptr { return uintptr(c.Regs.Rax) }

// SetReturn sets the result of the system call.
func (c *Context64) SetReturn(v uintptr) { c.Regs.Rax = uint64(v) }

// RestartSyscall moves the thread back onto its system call instruction, with
// the number where the instruction wants it.
func (c *Context64) RestartSyscall() {
	c.Regs.Rip -= syscallSize
	c.Regs.Rax = c.Regs.Orig_rax
}

// RestartSyscallWithRestartBlock is RestartSyscall with restart_syscall(2) as
// the number.
func (c *Context64) RestartSyscallWithRestartBlock() {
	c.Regs.Rip -= syscallSize
	c.Regs.Rax = restartSyscallNr
}

const (
	syscallSize      = 2   // both `syscall` and `int $0x80`
	restartSyscallNr = 219 // asm/unistd_64.h
)

// IP returns the instruction pointer.
func (c *Context64) IP() uintptr { return uintptr(c.Regs.Rip) }

// SetIP sets the instruction pointer.
func (c *Context64) SetIP(v uintptr) { c.Regs.Rip = uint64(v) }

// Stack returns the stack pointer.
func (c *Context64) Stack() uintptr { return uintptr(c.Regs.Rsp) }

// SetStack sets the stack pointer.
func (c *Context64) SetStack(v uintptr) { c.Regs.Rsp = uint64(v) }

// TLS returns the thread pointer: FS.base.
func (c *Context64) TLS() uintptr { return uintptr(c.Regs.Fs_base) }

// SetTLS sets the thread pointer. It returns false for an address that no user
// segment may have.
func (c *Context64) SetTLS(v uintptr) bool {
	if v >= maxUserAddr {
		return false
	}
	c.Regs.Fs = 0
	c.Regs.Fs_base = uint64(v)
	return true
}

// maxUserAddr is TASK_SIZE_MAX with 4-level page tables.
const maxUserAddr = 0x7ffffffff000

// SingleStep reports whether the thread traps after each instruction.
func (c *Context64) SingleStep() bool { return c.Regs.Eflags&eflagsTF != 0 }

// SetSingleStep makes the thread trap after each instruction.
func (c *Context64) SetSingleStep() { c.Regs.Eflags |= eflagsTF }

// ClearSingleStep undoes SetSingleStep.
func (c *Context64) ClearSingleStep() { c.Regs.Eflags &^= eflagsTF }
