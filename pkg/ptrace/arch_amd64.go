package ptrace

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

const (
	// callKeepsFP says that a system call of the host leaves the floating point
	// state alone.
	callKeepsFP = true

	// entryHidesState says that not all registers can be read while a thread is
	// stopped for a system call (see leaveSyscall).
	entryHidesState = false

	// ptraceSysemu is PTRACE_SYSEMU (asm/ptrace-abi.h).
	ptraceSysemu = 31
)

// noSyscall in Orig_rax keeps the kernel from restarting what it takes for an
// interrupted system call when the thread is resumed
// (arch/x86/kernel/signal.c, arch_do_signal_or_restart).
const noSyscall = ^uint64(0)

// Selectors of 64-bit user code and data, and the flags of a new program
// (asm/segment.h).
const (
	userCS    = 0x33
	userDS    = 0x2b
	userFlags = 0x202
)

// Exceptions (Intel SDM vol. 3, 6.15).
const (
	vectorDB = 1
	vectorBP = 3
	vectorUD = 6
	vectorGP = 13
	vectorPF = 14
)

// Bits of a page fault's error code (Intel SDM vol. 3, 4.7).
const (
	pfPresent = 1 << 0
	pfWrite   = 1 << 1
	pfUser    = 1 << 2
	pfFetch   = 1 << 4
)

// runRequest is the ptrace request that runs application code. A single step is
// in the flags.
func runRequest(*arch.Context64) int { return ptraceSysemu }

// leaveSyscall gets a thread that is stopped for a system call out of it, where
// that must be before its registers are read or written.
func (t *thread) leaveSyscall() error { return nil }

// mergeRegs sets every register that is the same in regs and known to what it is
// in fresh.
func mergeRegs(regs, known, fresh *arch.Registers) {
	mergeWords(regs.PRStatus(), known.PRStatus(), fresh.PRStatus())
}

// getFP reads the floating point state.
func getFP(tid int, f arch.FPState) error {
	_, err := getRegSet(tid, unix.NT_X86_XSTATE, f)
	return err
}

// setFP writes it.
func setFP(tid int, f arch.FPState) error { return setRegSet(tid, unix.NT_X86_XSTATE, f) }

// probeFP checks that the kernel's register set has the size that the CPU says.
func (t *thread) probeFP() error {
	fp := make([]byte, 1<<16)
	n, err := getRegSet(t.tid, unix.NT_X86_XSTATE, fp)
	if err != nil {
		return t.fail("reading the floating point state", err)
	}
	if want := len(arch.NewFPState()); n != want {
		return fmt.Errorf("the host's floating point register set has %d bytes, and the CPU says %d: %w", n, want, platform.ErrNotSupported)
	}
	return nil
}

// getRegs reads the general registers. PTRACE_GETREGSET would read those of a
// 32-bit process while the thread is in 32-bit code.
func getRegs(tid int, r *arch.Registers) error {
	return ptraceRegs(unix.PTRACE_GETREGS, tid, r.PRStatus())
}

// setRegs writes the general registers of a thread that is to run user code.
func setRegs(tid int, r *arch.Registers) error {
	regs := *r
	regs.Orig_rax = noSyscall
	return ptraceRegs(unix.PTRACE_SETREGS, tid, regs.PRStatus())
}

func instructionPointer(r *arch.Registers) uintptr { return uintptr(r.Rip) }

// injectRegs sets regs so that a thread makes a system call at gadget. There is
// no stack.
func injectRegs(regs *arch.Registers, gadget, nr uintptr, args []uintptr) {
	*regs = arch.Registers{Rip: uint64(gadget), Rax: uint64(nr), Cs: userCS, Ss: userDS, Eflags: userFlags}
	for i, p := range []*uint64{&regs.Rdi, &regs.Rsi, &regs.Rdx, &regs.R10, &regs.R8, &regs.R9}[:len(args)] {
		*p = uint64(args[i])
	}
}

// maxGadget is more than the length of a gadget in bytes.
const maxGadget = 32

// injectResult returns the result of the system call made at gadget. done is
// false when the thread has not come to the breakpoint after it.
func injectResult(regs *arch.Registers, gadget uintptr) (result uintptr, done bool) {
	return uintptr(regs.Rax), regs.Rip > uint64(gadget)+2 && regs.Rip < uint64(gadget)+maxGadget
}

// hasSyscallMark reports whether a thread that stopped for a system call has what
// SYSCALL leaves in 64-bit code: its return address in RCX, and the flags in R11
// (Intel SDM vol. 2, SYSCALL). An application that arranges the same before int
// $0x80 makes a 64-bit system call with other bytes, and gains nothing.
func hasSyscallMark(r *arch.Registers) bool {
	return r.Cs == userCS && r.Rcx == r.Rip && r.R11 == r.Eflags
}

// getSyscall sets the registers of r that a system call is made with. native is
// false, and r unchanged, when it is no 64-bit one: int $0x80, sysenter and 32-bit
// code use other numbers. known is false when the kernel (before Linux 5.3) cannot
// tell.
func getSyscall(tid int, r *arch.Registers) (native, known bool, err error) {
	var info syscallInfo
	if err := getSyscallInfo(tid, &info); err == unix.EIO {
		return false, false, nil
	} else if err != nil {
		return false, false, err
	}
	if info.Arch != unix.AUDIT_ARCH_X86_64 {
		return false, true, nil
	}
	r.Orig_rax, r.Rip, r.Rsp = info.Nr, info.IP, info.SP
	r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8, r.R9 = info.Args[0], info.Args[1], info.Args[2], info.Args[3], info.Args[4], info.Args[5]
	r.Rax = resultNone
	return true, true, nil
}

// resultNone is what the kernel has in RAX before a system call is made: -ENOSYS.
const resultNone = ^uint64(unix.ENOSYS - 1)

// setResult writes what r has instead of known, as the thread has it, if that is
// no more than the result of a system call. Otherwise done is false.
func setResult(tid int, r, known *arch.Registers) (done bool, err error) {
	same := *r
	same.Rax = known.Rax
	// The kernel might take these for its own (see noSyscall).
	const restartFirst, restartLast = ^uint64(516 - 1), ^uint64(512 - 1)
	if same != *known || r.Rax >= restartFirst && r.Rax <= restartLast {
		return false, nil
	}
	if r.Rax == known.Rax {
		return true, nil
	}
	return true, ptraceCall(unix.PTRACE_POKEUSR, tid, offsetRax, uintptr(r.Rax))
}

// offsetRax is where struct user has RAX (asm/user_64.h).
const offsetRax = 10 * 8

// foreignSyscall turns a system call that is no 64-bit one into what a kernel
// without 32-bit system calls makes of int $0x80: a general protection fault at
// the instruction. (Where sysenter works at all the kernel does not tell its
// address.)
func foreignSyscall(ac *arch.Context64) *linux.SignalInfo {
	const instruction = 2 // bytes
	ac.Regs.Rip -= instruction
	ac.Regs.Rax = ac.Regs.Orig_rax
	ac.Regs.Orig_rax = noSyscall
	return protectionFault(ac)
}

// protectionFault returns the signal for a general protection fault: a state that
// no thread can have gets it as well.
func protectionFault(ac *arch.Context64) *linux.SignalInfo {
	ac.Fault = arch.FaultInfo{TrapNo: vectorGP}
	return &linux.SignalInfo{Signo: int32(linux.SIGSEGV), Code: linux.SI_KERNEL}
}

// isFakeSyscall reports whether a SIGSYS comes from a call of the vsyscall page,
// and then makes ac what it would be after the same system call: the kernel has
// already returned to the caller.
func isFakeSyscall(info *linux.SignalInfo, ac *arch.Context64) bool {
	if info.Code != linux.SYS_SECCOMP {
		return false
	}
	ac.Regs.Orig_rax = uint64(info.Syscall())
	return true
}

// Offsets from the stack pointer in a signal handler: the return address, then
// ucontext_t up to uc_mcontext (asm/sigcontext.h).
const (
	frameError = 8 + 40 + 19*8
	frameTrap  = 8 + 40 + 20*8
)

// fault returns what the CPU said of the exception behind sig.
func (t *thread) fault(c *threadContext, ac *arch.Context64, sig unix.Signal, info *linux.SignalInfo) (arch.FaultInfo, hostarch.AccessType, error) {
	switch sig {
	case unix.SIGILL:
		return arch.FaultInfo{TrapNo: vectorUD}, hostarch.NoAccess, nil
	case unix.SIGTRAP:
		if info.Code == linux.SI_KERNEL {
			return arch.FaultInfo{TrapNo: vectorBP}, hostarch.NoAccess, nil
		}
		return arch.FaultInfo{TrapNo: vectorDB}, hostarch.NoAccess, nil
	}
	trap, code, known := uint64(vectorPF), uint64(0), false
	if sig == unix.SIGSEGV && (info.Code == linux.SEGV_MAPERR || info.Code == linux.SEGV_ACCERR) {
		if decoding {
			code, known = t.decodeFault(&ac.Regs, info.Addr())
		}
		code |= pfUser
		if info.Code == linux.SEGV_ACCERR {
			code |= pfPresent
		}
	}
	if !known {
		var err error
		if trap, code, err = t.frameFault(c, sig); err != nil {
			return arch.FaultInfo{}, hostarch.NoAccess, err
		}
	}
	f := arch.FaultInfo{TrapNo: trap, ErrorCode: code}
	if trap != vectorPF {
		return f, hostarch.NoAccess, nil
	}
	f.Addr = info.Addr()
	switch {
	case code&pfFetch != 0:
		return f, hostarch.Execute, nil
	case code&pfWrite != 0:
		return f, hostarch.Write, nil
	}
	return f, hostarch.Read, nil
}

// frameFault returns the exception's vector and error code as the CPU gave them.
func (t *thread) frameFault(c *threadContext, sig unix.Signal) (trap, code uint64, err error) {
	sp, unlock, err := t.signalFrame(c, sig)
	if err != nil {
		return 0, 0, err
	}
	defer unlock()
	for _, w := range []struct {
		off uintptr
		v   *uint64
	}{{frameTrap, &trap}, {frameError, &code}} {
		if *w.v, err = peek(t.tid, sp+w.off); err != nil {
			return 0, 0, t.fail("ptrace(PTRACE_PEEKDATA)", err)
		}
	}
	return trap, code, nil
}

func stackPointer(r *arch.Registers) uintptr { return uintptr(r.Rsp) }
