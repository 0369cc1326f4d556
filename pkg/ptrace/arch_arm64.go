package ptrace

import (
	"encoding/binary"
	"math"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
)

const (
	// callKeepsFP says that a system call of the host leaves the floating point
	// state alone. Of SVE's registers no more is kept than what FPSIMD has
	// (Documentation/arch/arm64/sve.rst).
	callKeepsFP = false

	// entryHidesState says that not all registers can be read while a thread is
	// stopped for a system call (see leaveSyscall).
	entryHidesState = true
)

// Requests of ptrace(2) (asm/ptrace.h).
const (
	ptraceSysemu           = 31 // PTRACE_SYSEMU
	ptraceSysemuSingleStep = 32 // PTRACE_SYSEMU_SINGLESTEP
)

// pstateSS is PSTATE's software step bit, which the kernel keeps for itself.
const pstateSS = 1 << 21

// runRequest is the ptrace request that runs application code.
func runRequest(ac *arch.Context64) int {
	if ac.SingleStep() {
		return ptraceSysemuSingleStep
	}
	return ptraceSysemu
}

// leaveSyscall gets a thread that is stopped for a system call out of it. While
// it is stopped there X7 says that this is the entry, and what is written to it
// is lost (arch/arm64/kernel/ptrace.c, report_syscall).
func (t *thread) leaveSyscall() error {
	if !t.inSyscall {
		return nil
	}
	t.inSyscall = false
	// The kernel must not take X0 for the result of a call that is to be restarted.
	if err := setSyscallNo(t.tid, -1); err != nil {
		return t.fail("ptrace(PTRACE_SETREGSET, NT_ARM_SYSTEM_CALL)", err)
	}
	if err := ptraceCall(unix.PTRACE_INTERRUPT, t.tid, 0, 0); err != nil {
		return t.fail("ptrace(PTRACE_INTERRUPT)", err)
	}
	if err := ptraceCall(ptraceSysemu, t.tid, 0, 0); err != nil {
		return t.fail("ptrace(PTRACE_SYSEMU)", err)
	}
	// It stops before it runs anything.
	_, err := t.wait()
	return err
}

func setSyscallNo(tid int, nr int32) error {
	return setRegSet(tid, unix.NT_ARM_SYSTEM_CALL, binary.NativeEndian.AppendUint32(nil, uint32(nr)))
}

// mergeRegs sets every register that is the same in regs and known to what it is
// in fresh.
func mergeRegs(regs, known, fresh *arch.Registers) {
	fresh.Pstate = fresh.Pstate&^pstateSS | regs.Pstate&pstateSS
	mergeWords(regs.PRStatus(), known.PRStatus(), fresh.PRStatus())
	if regs.TPIDR == known.TPIDR {
		regs.TPIDR = fresh.TPIDR
	}
}

// getRegs reads the general registers of a thread that is in no system call.
func getRegs(tid int, r *arch.Registers) error {
	step := r.Pstate & pstateSS
	if _, err := getRegSet(tid, unix.NT_PRSTATUS, r.PRStatus()); err != nil {
		return err
	}
	r.Pstate = r.Pstate&^pstateSS | step
	r.SyscallNo = -1
	r.OrigX0 = r.Regs[0]
	var tls [8]byte
	if _, err := getRegSet(tid, unix.NT_ARM_TLS, tls[:]); err != nil {
		return err
	}
	r.TPIDR = binary.NativeEndian.Uint64(tls[:])
	return nil
}

// setRegs writes the general registers of a thread that is to run user code.
func setRegs(tid int, r *arch.Registers) error {
	if err := setRegSet(tid, unix.NT_PRSTATUS, r.PRStatus()); err != nil {
		return err
	}
	if maybeRestart(r.Regs[0]) {
		if err := setSyscallNo(tid, -1); err != nil {
			return err
		}
	}
	return setRegSet(tid, unix.NT_ARM_TLS, binary.NativeEndian.AppendUint64(nil, r.TPIDR))
}

// maybeRestart reports whether the kernel, when a signal comes, takes x for the
// result of a system call that it has to restart (linux/errno.h, ERESTARTSYS and
// others).
func maybeRestart(x uint64) bool {
	return x >= ^uint64(516-1) && x <= ^uint64(512-1)
}

// Where struct user_sve_header has the size of all, and the vector length, both in
// bytes (asm/ptrace.h), and where user_fpsimd_state follows it.
const (
	sveSize   = 0
	sveVL     = 8
	sveFPSIMD = 16
)

// getFP reads the floating point state.
func getFP(tid int, f arch.FPState) error {
	if binary.NativeEndian.Uint16(f[sveVL:]) == 0 { // the host has no SVE
		_, err := getRegSet(tid, unix.NT_PRFPREG, f.FPSIMD())
		return err
	}
	_, err := getRegSet(tid, unix.NT_ARM_SVE, f)
	return err
}

// setFP writes it.
func setFP(tid int, f arch.FPState) error {
	if binary.NativeEndian.Uint16(f[sveVL:]) == 0 {
		return setRegSet(tid, unix.NT_PRFPREG, f.FPSIMD())
	}
	size := binary.NativeEndian.Uint32(f[sveSize:])
	if size < sveFPSIMD || size > uint32(len(f)) {
		return unix.EINVAL
	}
	return setRegSet(tid, unix.NT_ARM_SVE, f[:size])
}

// probeFP checks that the floating point state can be read.
func (t *thread) probeFP() error {
	if err := getFP(t.tid, arch.NewFPState()); err != nil {
		return t.fail("reading the floating point state", err)
	}
	return nil
}

func instructionPointer(r *arch.Registers) uintptr { return uintptr(r.Pc) }

// injectRegs sets regs so that a thread makes a system call at gadget. There is
// no stack.
func injectRegs(regs *arch.Registers, gadget, nr uintptr, args []uintptr) {
	*regs = arch.Registers{Pc: uint64(gadget)}
	for i, v := range args {
		regs.Regs[i] = uint64(v)
	}
	regs.Regs[8] = uint64(nr)
}

// maxGadget is more than the length of a gadget in bytes.
const maxGadget = 64

// injectResult returns the result of the system call made at gadget. done is
// false when the thread has not come to the breakpoint after it.
func injectResult(regs *arch.Registers, gadget uintptr) (result uintptr, done bool) {
	return uintptr(regs.Regs[0]), regs.Pc > uint64(gadget) && regs.Pc < uint64(gadget)+maxGadget
}

// hasSyscallMark has nothing to look for: 64-bit code has one way into the kernel,
// and cannot switch to 32-bit code.
func hasSyscallMark(*arch.Registers) bool { return true }

// getSyscall sets the registers of r that a system call is made with. native is
// false, and r unchanged, when it is no 64-bit one.
func getSyscall(tid int, r *arch.Registers) (native, known bool, err error) {
	// PTRACE_SYSEMU is as old, on arm64, as PTRACE_GET_SYSCALL_INFO.
	var info syscallInfo
	if err := getSyscallInfo(tid, &info); err != nil {
		return false, false, err
	}
	if info.Arch != unix.AUDIT_ARCH_AARCH64 {
		return false, true, nil
	}
	copy(r.Regs[:], info.Args[:])
	r.Regs[8], r.Pc, r.Sp = info.Nr, info.IP, info.SP
	r.OrigX0, r.SyscallNo = info.Args[0], int32(info.Nr)
	return true, true, nil
}

// setResult writes what r has instead of known, as the thread has it, if that is
// no more than the result of a system call. Otherwise done is false.
func setResult(tid int, r, known *arch.Registers) (done bool, err error) {
	same := *r
	same.Regs[0] = known.Regs[0]
	if same != *known || maybeRestart(r.Regs[0]) {
		return false, nil
	}
	// X7 is kept by the kernel.
	var regs arch.Registers
	if _, err := getRegSet(tid, unix.NT_PRSTATUS, regs.PRStatus()); err != nil {
		return false, err
	}
	regs.Regs[0] = r.Regs[0]
	return true, setRegSet(tid, unix.NT_PRSTATUS, regs.PRStatus())
}

// foreignSyscall returns the signal for a system call that is no 64-bit one.
func foreignSyscall(ac *arch.Context64) *linux.SignalInfo { return protectionFault(ac) }

// protectionFault returns the signal for a state that no thread can have.
func protectionFault(ac *arch.Context64) *linux.SignalInfo {
	ac.Fault = arch.FaultInfo{}
	return &linux.SignalInfo{Signo: int32(linux.SIGSEGV), Code: linux.SI_KERNEL}
}

// isFakeSyscall has nothing to look for: no page answers system calls by itself.
func isFakeSyscall(*linux.SignalInfo, *arch.Context64) bool { return false }

// Where things are in a signal frame, from the stack pointer in the handler:
// struct rt_sigframe with siginfo_t and ucontext_t before the sigcontext
// (arch/arm64/kernel/signal.c, asm/ucontext.h), and in that the address of the
// fault and the records behind the registers (asm/sigcontext.h).
const (
	frameContext = 128 + 176
	frameAddr    = frameContext
	frameRecords = frameContext + 8 + 31*8 + 3*8 + 8 // aligned to 16

	maxRecords = 16
	esrMagic   = 0x45535201
)

// Fields of ESR_EL1 (Arm ARM, D24.2.40).
const (
	esrClassShift  = 26
	esrInstruction = 0x20 // instruction abort from EL0
	esrData        = 0x24 // data abort from EL0
	esrWnR         = 1 << 6
)

// fault returns what the CPU said of the exception behind sig.
func (t *thread) fault(c *threadContext, ac *arch.Context64, sig unix.Signal, info *linux.SignalInfo) (arch.FaultInfo, hostarch.AccessType, error) {
	var f arch.FaultInfo
	if sig != unix.SIGSEGV && sig != unix.SIGBUS {
		return f, hostarch.NoAccess, nil
	}
	sp, unlock, err := t.signalFrame(c, sig)
	if err != nil {
		return f, hostarch.NoAccess, err
	}
	defer unlock()
	word := func(off uintptr) (v uint64) {
		if err == nil {
			v, err = peek(t.tid, sp+off)
		}
		return v
	}
	f.Addr = word(frameAddr)
	off := uintptr(frameRecords)
	for range maxRecords {
		head := word(off)
		magic, size := uint32(head), uintptr(head>>32)
		if magic == esrMagic {
			f.ErrorCode = word(off + 8)
			break
		}
		if magic == 0 || size == 0 || size > math.MaxUint16 || size%16 != 0 {
			break
		}
		off += size
		if sp+off >= t.as.Zygote.Layout.SignalStack[1] {
			break
		}
	}
	if err != nil {
		return f, hostarch.NoAccess, t.fail("ptrace(PTRACE_PEEKDATA)", err)
	}
	switch f.ErrorCode >> esrClassShift & 0x3f {
	case esrInstruction:
		return f, hostarch.Execute, nil
	case esrData:
		if f.ErrorCode&esrWnR != 0 {
			return f, hostarch.Write, nil
		}
		return f, hostarch.Read, nil
	}
	return f, hostarch.NoAccess, nil
}

func stackPointer(r *arch.Registers) uintptr { return uintptr(r.Sp) }
