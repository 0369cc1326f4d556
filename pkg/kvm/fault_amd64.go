package kvm

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// stopped finds out why the vCPU is in a stub, and reads its state into ac. done is
// false when the thread is to go on with that.
func (c *vcpuContext) stopped(as *addressSpace, v *vcpu, ac *arch.Context64) (info *linux.SignalInfo, at hostarch.AccessType, done bool, err error) {
	r := &ac.Regs
	switch rip := v.run.regs.rip - 1; { // HLT is behind us
	case rip == lstarAddr:
		v.save(r)
		r.Rsp = v.run.regs.rsp
		v.m.ring0Syscalls.Store(true)
		madeSyscall(r)
		return nil, at, true, nil
	case rip == cstarAddr:
		// SYSCALL of 32-bit code. Without 32-bit system calls it is what int $0x80 is.
		v.save(r)
		r.Rip, r.Rsp, r.Eflags, r.Cs = r.Rcx-syscallLen, v.run.regs.rsp, r.R11, userCS32
		return protectionFault(ac, 0), at, true, platform.ErrContextSignal
	case rip >= stubsAddr && rip < stubsAddr+numVectors*stubSize:
		return c.exception(as, v, ac, int(rip-stubsAddr)/stubSize)
	}
	v.failed = true
	return nil, at, true, contextError(fmt.Errorf("vCPU %d halted at %#x, where no stub is: %w", v.id, v.run.regs.rip, unix.EIO))
}

// syscallLen is the length of SYSCALL in bytes, and of INT n.
const syscallLen = 2

// madeSyscall makes r, which is as SYSCALL left it, that of a system call of the
// instruction before.
func madeSyscall(r *arch.Registers) {
	r.Rip, r.Eflags, r.Cs = r.Rcx, r.R11, userCS
	setSyscall(r, r.Rax)
}

// setSyscall makes r that of a thread that made a system call.
func setSyscall(r *arch.Registers, nr uint64) {
	r.Orig_rax = nr
	r.Rax = ^uint64(unix.ENOSYS - 1) // what Linux has there until it knows
}

// protectionFault returns the signal for a general protection fault.
func protectionFault(ac *arch.Context64, code uint64) *linux.SignalInfo {
	ac.Fault = arch.FaultInfo{TrapNo: vectorGP, ErrorCode: code}
	return &linux.SignalInfo{Signo: int32(linux.SIGSEGV), Code: linux.SI_KERNEL}
}

// signal returns a signal for something at addr.
func signal(sig linux.Signal, code int32, addr uint64) *linux.SignalInfo {
	info := &linux.SignalInfo{Signo: int32(sig), Code: code}
	info.SetAddr(addr)
	return info
}

// exception makes a signal of an exception, as Linux does (arch/x86/kernel/traps.c).
func (c *vcpuContext) exception(as *addressSpace, v *vcpu, ac *arch.Context64, vector int) (info *linux.SignalInfo, at hostarch.AccessType, done bool, err error) {
	r := &ac.Regs
	code := v.saveFrame(r, vector)
	if r.Cs&3 != 3 {
		return nil, at, true, contextError(fmt.Errorf("vCPU %d: exception %d with error %#x at %#x in ring 0: %w", v.id, vector, code, r.Rip, unix.EIO))
	}
	if vector == vectorPF {
		return c.pageFault(as, v, ac, code)
	}
	ac.Fault = arch.FaultInfo{TrapNo: uint64(vector), ErrorCode: code}
	kernel := func(sig linux.Signal) *linux.SignalInfo {
		return &linux.SignalInfo{Signo: int32(sig), Code: linux.SI_KERNEL}
	}
	switch vector {
	case vectorDE:
		info = signal(linux.SIGFPE, linux.FPE_INTDIV, r.Rip)
	case vectorDB:
		info = c.debugTrap(as, v, r)
	case vectorBP:
		info = kernel(linux.SIGTRAP)
	case vectorUD:
		// kvm-pvm makes this of software interrupts.
		var b [syscallLen]byte
		if as.read(hostarch.Addr(r.Rip), b[:]) && b[0] == 0xcd {
			const idt = 1 << 1 // in a selector's error code: a gate
			info = protectionFault(ac, uint64(b[1])<<3|idt)
			break
		}
		info = signal(linux.SIGILL, linux.ILL_ILLOPN, r.Rip)
	case vectorNP, vectorSS:
		info = kernel(linux.SIGBUS)
	case vectorMF, vectorXM:
		if err := c.pullFP(ac); err != nil {
			return nil, at, true, contextError(err)
		}
		info = signal(linux.SIGFPE, floatingPointCode(ac.FloatingPointData(), vector), r.Rip)
	case vectorAC:
		info = signal(linux.SIGBUS, linux.BUS_ADRALN, 0)
	default:
		info = kernel(linux.SIGSEGV)
	}
	return info, at, true, platform.ErrContextSignal
}

// debugTrap returns the signal for a #DB: a single step, or INT1. kvm-pvm stops at
// INT1, the CPU behind it.
func (c *vcpuContext) debugTrap(as *addressSpace, v *vcpu, r *arch.Registers) *linux.SignalInfo {
	if r.Eflags&flagTF != 0 {
		return signal(linux.SIGTRAP, linux.TRAP_TRACE, r.Rip)
	}
	const opcodeINT1 = 0xf1
	var b [1]byte
	if !v.m.ring0Syscalls.Load() && as.read(hostarch.Addr(r.Rip), b[:]) && b[0] == opcodeINT1 {
		r.Rip++
	}
	return signal(linux.SIGTRAP, linux.TRAP_BRKPT, r.Rip)
}

// floatingPointCode returns si_code for an exception whose cause is in fp
// (arch/x86/kernel/fpu/core.c, fpu__exception_code).
func floatingPointCode(fp arch.FPState, vector int) int32 {
	var e uint32
	if vector == vectorMF {
		control, status := binary.LittleEndian.Uint16(fp), binary.LittleEndian.Uint16(fp[2:])
		e = uint32(status &^ control)
	} else {
		mxcsr := binary.LittleEndian.Uint32(fp[24:])
		e = mxcsr &^ (mxcsr >> 7)
	}
	switch {
	case e&1 != 0:
		return linux.FPE_FLTINV
	case e&4 != 0:
		return linux.FPE_FLTDIV
	case e&8 != 0:
		return linux.FPE_FLTOVF
	case e&(2|16) != 0:
		return linux.FPE_FLTUND
	case e&32 != 0:
		return linux.FPE_FLTRES
	}
	return 0
}

// maskXState drops the state components of an XSAVE area that are not in xcr0.
func maskXState(b []byte, xcr0 uint64) {
	const header = 512
	binary.LittleEndian.PutUint64(b[header:], binary.LittleEndian.Uint64(b[header:])&xcr0)
}

// pageFault handles a page fault with an error code.
func (c *vcpuContext) pageFault(as *addressSpace, v *vcpu, ac *arch.Context64, code uint64) (info *linux.SignalInfo, at hostarch.AccessType, done bool, err error) {
	r := &ac.Regs
	addr := hostarch.Addr(v.run.sregs.cr2)
	// On kvm-pvm SYSCALL goes on in ring 3, where the page is forbidden. Nothing but
	// SYSCALL clears IF.
	if r.Rip == lstarAddr && r.Eflags&flagIF == 0 {
		madeSyscall(r)
		return nil, at, true, nil
	}
	switch {
	case code&pfFetch != 0:
		at = hostarch.Execute
		if vsyscall(as, r, addr) {
			return nil, hostarch.NoAccess, true, nil
		}
	case code&pfWrite != 0:
		at = hostarch.Write
	default:
		at = hostarch.Read
	}
	sig, si := linux.SIGSEGV, int32(linux.SEGV_MAPERR)
	code &^= pfPresent
	switch as.whyFault(addr, at) {
	case causeNone:
		// Mapped meanwhile, or known to be forbidden from before.
		if s := &c.spurious; s.ip != r.Rip || s.addr != addr {
			s.ip, s.addr = r.Rip, addr
			return nil, hostarch.NoAccess, false, nil
		}
		si = linux.SEGV_ACCERR
		code |= pfPresent
	case causePermission:
		si = linux.SEGV_ACCERR
		code |= pfPresent
	case causeTruncated:
		sig, si = linux.SIGBUS, linux.BUS_ADRERR
	}
	c.spurious.ip, c.spurious.addr = 0, 0
	ac.Fault = arch.FaultInfo{TrapNo: vectorPF, ErrorCode: code, Addr: uint64(addr)}
	return signal(sig, si, uint64(addr)), at, true, platform.ErrContextSignal
}

// vsyscall makes r that of a system call if the thread called a function of the
// vsyscall page (arch/x86/include/uapi/asm/vsyscall.h).
func vsyscall(as *addressSpace, r *arch.Registers, addr hostarch.Addr) bool {
	const base = 0xffff_ffff_ff60_0000
	var nr uint64
	switch {
	case r.Rip != uint64(addr) || r.Cs != userCS:
		return false
	case addr == base:
		nr = unix.SYS_GETTIMEOFDAY
	case addr == base+0x400:
		nr = unix.SYS_TIME
	case addr == base+0x800:
		nr = unix.SYS_GETCPU
	default:
		return false
	}
	var b [8]byte
	if !as.read(hostarch.Addr(r.Rsp), b[:]) {
		return false
	}
	r.Rip = binary.LittleEndian.Uint64(b[:])
	r.Rsp += 8
	setSyscall(r, nr)
	return true
}
