package platformtest

import (
	"encoding/binary"
	"math"
	"math/rand/v2"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
)

// setArgs puts args into the registers of a system call's arguments.
func setArgs(ac *arch.Context64, args ...uint64) {
	copy(ac.Regs.Regs[:6], args)
	if len(args) > 0 {
		ac.Regs.OrigX0 = args[0]
	}
}

// setSyscallNo makes nr what the next system call instruction uses.
func setSyscallNo(ac *arch.Context64, nr uint64) { ac.Regs.Regs[8] = nr }

// syscallLen is the size of the system call instruction, nopLen that of the
// instructions in progNops, breakpointLen how far IP is beyond the breakpoint
// when the thread gets SIGTRAP.
const (
	syscallLen    = 4
	nopLen        = 4
	breakpointLen = 0
)

// Values of FaultInfo.TrapNo: arm64 has none.
const (
	trapBreakpoint = 0
	trapStep       = 0
	trapIllegal    = 0
)

// kernelAddr is an address of the kernel's.
const kernelAddr = 0xffff_8000_0000_1000

// Fields of ESR_EL1 (Arm ARM, D24.2.40).
const (
	esrECShift       = 26
	esrECInstruction = 0x20 // instruction abort from EL0
	esrECData        = 0x24 // data abort from EL0
	esrWnR           = 1 << 6
)

// checkFaultInfo compares what th's CPU reported with want.
func checkFaultInfo(th *thread, want fault) {
	th.t.Helper()
	f := th.ac.Fault
	if f.Addr != uint64(want.addr) {
		th.t.Errorf("%v at %v: Fault.Addr (FAR) %#x", want.sig, want.addr, f.Addr)
	}
	ec := uint64(esrECData)
	if want.at.Execute {
		ec = esrECInstruction
	}
	if got := f.ErrorCode >> esrECShift & 0x3f; got != ec {
		th.t.Errorf("%v at %v: ESR %#x has class %#x, want %#x", want.sig, want.addr, f.ErrorCode, got, ec)
	}
	if got := f.ErrorCode&esrWnR != 0; !want.at.Execute && got != want.at.Write {
		th.t.Errorf("%v at %v: ESR %#x has WnR %v", want.sig, want.addr, f.ErrorCode, got)
	}
}

// checkTrapNo has nothing to compare: arm64 has no vectors.
func checkTrapNo(*thread, uint64) {}

// reg is a general register.
type reg struct {
	name string
	v    *uint64
	mask uint64 // the bits that matter
}

var regNames = [31]string{
	"x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15",
	"x16", "x17", "x18", "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "x29", "x30",
}

// pstateNZCV are the flags that an application may set.
const pstateNZCV = 0xf << 28

// generalRegs returns ac's registers, in the order of progDump.
func generalRegs(ac *arch.Context64) []reg {
	var regs []reg
	for i := range ac.Regs.Regs {
		regs = append(regs, reg{regNames[i], &ac.Regs.Regs[i], math.MaxUint64})
	}
	return append(regs, reg{"sp", &ac.Regs.Sp, math.MaxUint64}, reg{"pstate", &ac.Regs.Pstate, pstateNZCV})
}

// setDump makes addr progDump's buffer, in which it needs dumpSize bytes.
func setDump(ac *arch.Context64, addr uint64) { ac.Regs.Regs[26] = addr }

const dumpSize = 33 * 8

// randomRegs gives every general register but IP and the stack pointer a random
// value; the system call number is a positive int.
func randomRegs(ac *arch.Context64, rnd *rand.Rand) {
	sp := ac.Regs.Sp
	for _, r := range generalRegs(ac) {
		*r.v = rnd.Uint64()
	}
	ac.Regs.Sp = sp
	ac.Regs.Pstate &= pstateNZCV
	ac.Regs.Regs[8] &= math.MaxInt32
	ac.Regs.OrigX0 = ac.Regs.Regs[0]
}

// atSyscall turns ac, which is about to make a system call, into what it is when
// Switch has returned from it. X0 is left for the result: a platform may have
// anything there.
func atSyscall(ac, got *arch.Context64) {
	ac.Regs.Pc += syscallLen
	ac.Regs.Regs[0] = got.Regs.Regs[0]
}

// setVector0 sets the first vector register: V0 in user_fpsimd_state.
func setVector0(ac *arch.Context64, v [16]byte) { copy(ac.FloatingPointData()[vector0Offset:], v[:]) }

// vector0Offset is where V0, or the low end of Z0, is in arch.FPState.
const vector0Offset = 16

// vector0 returns the first vector register.
func vector0(ac *arch.Context64) (v [16]byte) {
	copy(v[:], ac.FloatingPointData()[vector0Offset:])
	return v
}

// vectorStates returns the vector states that this CPU has.
func vectorStates() []vectorState {
	const size = 32*16 + 8
	vs := plainVectorState("FPSIMD", progFPSIMD, progSaveFPSIMD, size)
	random := vs.random
	vs.random = func(rnd *rand.Rand) []byte {
		b := random(rnd)
		// FPCR: the rounding mode and flush to zero.
		binary.LittleEndian.PutUint64(b[32*16:], rnd.Uint64N(8)<<22)
		return b
	}
	return []vectorState{vs}
}

var archStateSubjects []subject

var archFaultSubjects = []subject{
	{"Privileged", testPrivileged},
	{"UnalignedExclusive", testUnalignedExclusive},
}

func testPrivileged(t *T) {
	th := t.newSpace().newThread(progPrivileged)
	th.mustSignal(linux.SIGILL)
	if got, want := th.ac.IP(), t.s.text.addr(progPrivileged); got != want {
		t.Errorf("IP is %#x, want %#x", got, want)
	}
	th.call(progCount, 0)
}

func testUnalignedExclusive(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progExclusive)
	th.call(progExclusive, uint64(dataBase)+8)
	// Across 16 bytes: inside, CPUs with FEAT_LSE2 need no alignment (Arm ARM, B2.2.1).
	th.start(progExclusive, uint64(dataBase)+13)
	if e := th.mustSignal(linux.SIGBUS); e.info.Code != linux.BUS_ADRALN {
		t.Errorf("si_code %d, want BUS_ADRALN", e.info.Code)
	}
}

var archHostileSubjects = []subject{
	{"Pstate", testHostilePstate},
	{"ThreadPointer", testWildThreadPointer},
}

// scrambleRegs gives every register a random value, PSTATE too.
func scrambleRegs(ac *arch.Context64, rnd *rand.Rand) {
	randomRegs(ac, rnd)
	word := func() uint64 {
		if rnd.IntN(2) == 0 {
			return rnd.Uint64()
		}
		return wildAddrs()[rnd.IntN(len(wildAddrs()))]
	}
	for _, p := range []*uint64{&ac.Regs.Sp, &ac.Regs.Pc, &ac.Regs.Pstate, &ac.Regs.TPIDR, &ac.Regs.OrigX0} {
		if rnd.IntN(2) == 0 {
			*p = word()
		}
	}
}

// PSTATE with another exception level, AArch32, masked interrupts: refused or
// ignored.
func testHostilePstate(t *T) {
	sp := t.newSpace()
	w := sp.newWitness()
	for bit := range 64 {
		sp.tryState(w, "a hostile PSTATE", func(ac *arch.Context64) { ac.Regs.Pstate ^= 1 << bit })
	}
	sp.tryState(w, "a hostile PSTATE", func(ac *arch.Context64) { ac.Regs.Pstate = math.MaxUint64 })
}

func testWildThreadPointer(t *T) {
	sp := t.newSpace()
	w := sp.newWitness()
	for _, v := range wildAddrs() {
		sp.tryState(w, "a wild thread pointer", func(ac *arch.Context64) { ac.Regs.TPIDR = v })
	}
}
