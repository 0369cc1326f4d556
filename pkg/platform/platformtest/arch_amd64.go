package platformtest

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"

	"golang.org/x/sys/cpu"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
)

// Exception vectors (Intel SDM vol. 3, 6.15).
const (
	vectorDE = 0
	vectorDB = 1
	vectorBP = 3
	vectorUD = 6
	vectorSS = 12
	vectorGP = 13
	vectorPF = 14
	vectorMF = 16
	vectorAC = 17
	vectorXM = 19
)

// Bits of a page fault's error code (Intel SDM vol. 3, 4.7).
const (
	pfWrite = 1 << 1
	pfUser  = 1 << 2
	pfFetch = 1 << 4
)

// Bits of EFLAGS.
const (
	flagTF = 1 << 8
	flagIF = 1 << 9
	flagDF = 1 << 10
	flagAC = 1 << 18

	// flagsUser are those that a Sentry may set and that a Switch keeps: CF, PF,
	// AF, ZF, SF, DF, OF and AC. Linux lets no one set ID but by POPF.
	flagsUser = 0x8d5 | flagDF | flagAC
)

// setArgs puts args into the registers of a system call's arguments.
func setArgs(ac *arch.Context64, args ...uint64) {
	r := &ac.Regs
	for i, p := range []*uint64{&r.Rdi, &r.Rsi, &r.Rdx, &r.R10, &r.R8, &r.R9}[:len(args)] {
		*p = args[i]
	}
}

// setSyscallNo makes nr what the next system call instruction uses.
func setSyscallNo(ac *arch.Context64, nr uint64) { ac.Regs.Rax = nr }

// syscallLen is the size of the system call instruction, nopLen that of the
// instructions in progNops, breakpointLen how far IP is beyond the breakpoint
// when the thread gets SIGTRAP.
const (
	syscallLen    = 2
	nopLen        = 1
	breakpointLen = 1
)

// Values of FaultInfo.TrapNo.
const (
	trapBreakpoint = vectorBP
	trapStep       = vectorDB
	trapIllegal    = vectorUD
)

// kernelAddr is an address of the kernel's, or of nobody's, that is canonical.
const kernelAddr = 0xffff_8880_0000_1000

// checkFaultInfo compares what th's CPU reported with want.
func checkFaultInfo(th *thread, want fault) {
	th.t.Helper()
	f := th.ac.Fault
	if f.TrapNo != vectorPF {
		th.t.Errorf("%v at %v: Fault.TrapNo %d, want %d (#PF)", want.sig, want.addr, f.TrapNo, vectorPF)
	}
	if f.Addr != uint64(want.addr) {
		th.t.Errorf("%v at %v: Fault.Addr (CR2) %#x", want.sig, want.addr, f.Addr)
	}
	code := uint64(pfUser)
	if want.at.Write {
		code |= pfWrite
	}
	if want.at.Execute {
		code |= pfFetch
	}
	if got := f.ErrorCode & (pfUser | pfWrite | pfFetch); got != code {
		th.t.Errorf("%v at %v: Fault.ErrorCode %#x has %#x of W, U and I, want %#x", want.sig, want.addr, f.ErrorCode, got, code)
	}
}

// checkTrapNo compares the vector of th's last exception with want.
func checkTrapNo(th *thread, want uint64) {
	th.t.Helper()
	if got := th.ac.Fault.TrapNo; got != want {
		th.t.Errorf("Fault.TrapNo is %d, want %d", got, want)
	}
}

// reg is a general register.
type reg struct {
	name string
	v    *uint64
	mask uint64 // the bits that matter
}

// generalRegs returns ac's registers, in the order of progDump.
func generalRegs(ac *arch.Context64) []reg {
	r := &ac.Regs
	all := uint64(math.MaxUint64)
	return []reg{
		{"rax", &r.Rax, all}, {"rbx", &r.Rbx, all}, {"rcx", &r.Rcx, all}, {"rdx", &r.Rdx, all},
		{"rsi", &r.Rsi, all}, {"rdi", &r.Rdi, all}, {"rbp", &r.Rbp, all}, {"rsp", &r.Rsp, all},
		{"r8", &r.R8, all}, {"r9", &r.R9, all}, {"r10", &r.R10, all}, {"r11", &r.R11, all},
		{"r12", &r.R12, all}, {"r13", &r.R13, all}, {"r14", &r.R14, all}, {"r15", &r.R15, all},
		{"eflags", &r.Eflags, flagsUser},
	}
}

// setDump makes addr progDump's buffer, in which it needs dumpSize bytes.
func setDump(ac *arch.Context64, addr uint64) { ac.Regs.R15 = addr }

const dumpSize = 17 * 8

// randomRegs gives every general register but IP and the stack pointer a random
// value; the system call number is a positive int.
func randomRegs(ac *arch.Context64, rnd *rand.Rand) {
	rsp := ac.Regs.Rsp
	for _, r := range generalRegs(ac) {
		*r.v = rnd.Uint64()
	}
	ac.Regs.Rsp = rsp
	ac.Regs.Rax &= math.MaxInt32
	ac.Regs.Eflags = ac.Regs.Eflags&flagsUser | flagIF | 2
}

// atSyscall turns ac, which is about to make a system call, into what it is when
// Switch has returned from it: SYSCALL saves RIP in RCX and RFLAGS in R11. RAX is
// left for the result: a platform may have anything there.
func atSyscall(ac, got *arch.Context64) {
	ac.Regs.Rip += syscallLen
	ac.Regs.Rcx = ac.Regs.Rip
	ac.Regs.R11 = got.Regs.R11&^flagsUser | ac.Regs.Eflags&flagsUser
	ac.Regs.Rax = got.Regs.Rax
}

// vector0Offset is where XMM0 lies in the XSAVE area (Intel SDM vol. 1, 10.5.1),
// xstateBVOffset where XSTATE_BV does (13.4.2).
const (
	mxcsrOffset    = 24
	vector0Offset  = 160
	xstateBVOffset = 512
)

// setVector0 sets the first vector register.
func setVector0(ac *arch.Context64, v [16]byte) {
	fp := ac.FloatingPointData()
	copy(fp[vector0Offset:], v[:])
	// Without its bit, SSE state has its initial value whatever the area holds.
	fp[xstateBVOffset] |= 1 << 1
}

// vector0 returns the first vector register.
func vector0(ac *arch.Context64) (v [16]byte) {
	fp := ac.FloatingPointData()
	if fp[xstateBVOffset]&(1<<1) != 0 {
		copy(v[:], fp[vector0Offset:])
	}
	return v
}

// vectorStates returns the vector states that this CPU has.
func vectorStates() []vectorState {
	vs := []vectorState{{
		name: "x87-SSE", prog: progFX, save: progSaveFX, size: 512,
		random: randomFX, initial: initialFX, diff: diffFX,
		vector0: func(b []byte) []byte { return b[vector0Offset:][:16] },
	}}
	if cpu.X86.HasAVX {
		vs = append(vs, plainVectorState("AVX", progAVX, progSaveAVX, 16*32))
	}
	if cpu.X86.HasAVX512F && cpu.X86.HasAVX512BW {
		vs = append(vs, plainVectorState("AVX-512", progAVX512, progSaveAVX512, 32*64+8*8))
	}
	return vs
}

// randomFX returns an FXSAVE image (Intel SDM vol. 1, 10.5.1) without a pending
// exception. The pointers of the last x87 instruction stay 0: AMD's CPUs keep
// these only while an exception is pending.
func randomFX(rnd *rand.Rand) []byte {
	b := make([]byte, 512)
	binary.LittleEndian.PutUint16(b[0:], 0x037f&^(3<<10)|uint16(rnd.UintN(4))<<10) // FCW: rounding
	binary.LittleEndian.PutUint16(b[2:], uint16(rnd.UintN(8))<<11|uint16(rnd.UintN(8))<<8&0x4700)
	b[4] = 0xff // FTW: all in use
	binary.LittleEndian.PutUint32(b[mxcsrOffset:], 0x1f80|uint32(rnd.UintN(4))<<13|uint32(rnd.UintN(64)))
	binary.LittleEndian.PutUint32(b[28:], 0xffff)
	for i := range 8 {
		st := b[32+16*i:]
		binary.LittleEndian.PutUint64(st, rnd.Uint64()|1<<63)
		binary.LittleEndian.PutUint16(st[8:], uint16(rnd.UintN(0x7ffe)+1))
	}
	for i := vector0Offset; i < 416; i++ {
		b[i] = byte(rnd.Uint32())
	}
	return b
}

// initialFX returns the state that Linux gives a new program.
func initialFX() []byte {
	b := make([]byte, 512)
	binary.LittleEndian.PutUint16(b[0:], 0x037f)
	binary.LittleEndian.PutUint32(b[mxcsrOffset:], 0x1f80)
	return b
}

// diffFX compares two FXSAVE images in what is not reserved.
func diffFX(got, want []byte) string {
	if d := diffBytes(got[:5], want[:5]); d != "" {
		return "x87 control: " + d
	}
	if d := diffBytes(got[mxcsrOffset:28], want[mxcsrOffset:28]); d != "" {
		return "MXCSR: " + d
	}
	for i := range 8 {
		if d := diffBytes(got[32+16*i:][:10], want[32+16*i:][:10]); d != "" {
			return fmt.Sprintf("ST%d: %s", i, d)
		}
	}
	for i := range 16 {
		if d := diffBytes(got[vector0Offset+16*i:][:16], want[vector0Offset+16*i:][:16]); d != "" {
			return fmt.Sprintf("XMM%d: %s", i, d)
		}
	}
	return ""
}

// exceptionSignal runs th until it gets sig from the exception with the given
// vector.
func (th *thread) exceptionSignal(sig linux.Signal, vector uint64) event {
	th.t.Helper()
	e := th.mustSignal(sig)
	checkTrapNo(th, vector)
	return e
}
