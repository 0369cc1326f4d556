package platformtest

import (
	"encoding/binary"
	"math"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
)

var archFaultSubjects = []subject{
	{"NonCanonical", testNonCanonical},
	{"DivideError", testDivideError},
	{"X87Exception", testX87Exception},
	{"SIMDException", testSIMDException},
	{"HardwareTF", testHardwareTF},
	{"AlignmentCheck", testAlignmentCheck},
	{"PrivilegedInstructions", testPrivileged},
	{"ICEBP", testICEBP},
	{"CPUID", testCPUID},
	{"SelfModifyingCode", testSelfModifyingCode},
}

const nonCanonical = 0x8000_0000_0000_0000

// Addresses that are none: #GP or #SS, which report no address.
func testNonCanonical(t *T) {
	sp := t.newSpace()
	th := sp.newThread(progLoad)
	for _, addr := range []uint64{nonCanonical, 1 << 62, 0xdead_0000_0000_0000} {
		for _, prog := range []program{progLoad, progStore} {
			th.start(prog, addr, 1)
			e := th.exceptionSignal(linux.SIGSEGV, vectorGP)
			if e.info.Code != linux.SI_KERNEL {
				t.Errorf("%#x: si_code %#x, want SI_KERNEL", addr, e.info.Code)
			}
			if got := th.ac.IP(); got != t.s.text.addr(prog) {
				t.Errorf("%#x: IP is %#x", addr, got)
			}
		}
		th.start(progJump, addr)
		th.exceptionSignal(linux.SIGSEGV, vectorGP)
	}
	// Through RBP it is the stack segment. Linux says SIGBUS.
	th.start(progLoadBP)
	th.edit(func(ac *arch.Context64) { ac.Regs.Rbp = nonCanonical })
	th.exceptionSignal(linux.SIGBUS, vectorSS)
	th.call(progCount, 0)
}

func testDivideError(t *T) {
	th := t.newSpace().newThread(progDivide)
	for _, c := range [][2]uint64{{1, 0}, {1 << 63, math.MaxUint64}} {
		th.start(progDivide, c[0], c[1])
		e := th.exceptionSignal(linux.SIGFPE, vectorDE)
		if e.info.Code != linux.FPE_INTDIV {
			t.Errorf("%#x: si_code %d, want FPE_INTDIV", c, e.info.Code)
		}
		if got := th.ac.IP(); uint64(got) != e.info.Addr() || got == t.s.text.addr(progDivide) {
			t.Errorf("%#x: IP is %#x, si_addr %#x", c, got, e.info.Addr())
		}
	}
	th.call(progDivide, 10, 5)
}

func testX87Exception(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	binary.LittleEndian.PutUint16(sp.data.data, 0x037f&^4) // division by zero unmasked
	th := sp.newThread(progX87Divide, uint64(dataBase))
	if e := th.exceptionSignal(linux.SIGFPE, vectorMF); e.info.Code != linux.FPE_FLTDIV {
		t.Errorf("si_code %d, want FPE_FLTDIV", e.info.Code)
	}
	binary.LittleEndian.PutUint16(sp.data.data, 0x037f)
	// With the exception still pending the thread faults again: a new state.
	th.pull()
	th.ac = arch.New()
	th.ac.SetIP(t.s.text.addr(progX87Divide))
	setArgs(th.ac, uint64(dataBase))
	th.c.FullStateChanged()
	th.report()
}

func testSIMDException(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	binary.LittleEndian.PutUint32(sp.data.data, 0x1f80&^0x200) // division by zero unmasked
	th := sp.newThread(progSSEDivide, uint64(dataBase))
	if e := th.exceptionSignal(linux.SIGFPE, vectorXM); e.info.Code != linux.FPE_FLTDIV {
		t.Errorf("si_code %d, want FPE_FLTDIV", e.info.Code)
	}
	binary.LittleEndian.PutUint32(sp.data.data, 0x1f80)
	th.call(progSSEDivide, uint64(dataBase))
}

// The application sets TF itself: a SIGTRAP after each instruction that follows.
func testHardwareTF(t *T) {
	th := t.newSpace().newThread(progPopf)
	const popfLen = 2 // push and popf
	for range 3 {
		th.start(progPopf, flagTF|flagIF|2)
		base := t.s.text.addr(progPopf) + popfLen
		for i := range numNops {
			th.mustStep(base + uintptr(i+1))
		}
		th.edit(func(ac *arch.Context64) {
			if ac.Regs.Eflags&flagTF == 0 {
				t.Errorf("the application's TF is not in Eflags")
			}
			ac.Regs.Eflags &^= flagTF
		})
		th.report()
	}
}

func testAlignmentCheck(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progAlign)
	th.call(progAlign, flagAC|flagIF|2, uint64(dataBase)+8)
	th.start(progAlign, flagAC|flagIF|2, uint64(dataBase)+1)
	if e := th.exceptionSignal(linux.SIGBUS, vectorAC); e.info.Code != linux.BUS_ADRALN {
		t.Errorf("si_code %d, want BUS_ADRALN", e.info.Code)
	}
	th.edit(func(ac *arch.Context64) { ac.Regs.Eflags &^= flagAC })
	th.report()
	th.call(progAlign, flagIF|2, uint64(dataBase)+1)
}

func testPrivileged(t *T) {
	th := t.newSpace().newThread(progHalt)
	for _, prog := range []program{progHalt, progOut, progInt} {
		th.start(prog, 0, 0, 0x80)
		e := th.exceptionSignal(linux.SIGSEGV, vectorGP)
		if e.info.Code != linux.SI_KERNEL {
			t.Errorf("si_code %#x, want SI_KERNEL", e.info.Code)
		}
		if got := th.ac.IP(); got != t.s.text.addr(prog) {
			t.Errorf("IP is %#x, want %#x", got, t.s.text.addr(prog))
		}
	}
	th.call(progCount, 0)
}

// int1 traps like a breakpoint.
func testICEBP(t *T) {
	th := t.newSpace().newThread(progICEBP)
	for range 2 {
		th.start(progICEBP)
		th.exceptionSignal(linux.SIGTRAP, vectorDB)
		th.edit(func(ac *arch.Context64) { ac.SetIP(t.s.text.addr(progICEBP) + 1) })
		th.report()
	}
}

// Code that the application, or the Sentry, has just written is what runs.
func testSelfModifyingCode(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.AnyAccess)
	th, writer := sp.newThread(progCount), sp.newThread(progStore)
	for i := range 20 {
		nr := uint64(100 + i)
		// mov $nr, %eax; syscall; ud2: in two words.
		b := []byte{0xb8, 0, 0, 0, 0, 0x0f, 0x05, 0x90, 0x0f, 0x0b, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90}
		binary.LittleEndian.PutUint32(b[1:], uint32(nr))
		if i%3 == 0 {
			copy(sp.data.data, b)
		} else {
			writer.mustStore(dataBase, binary.LittleEndian.Uint64(b))
			writer.mustStore(dataBase+8, binary.LittleEndian.Uint64(b[8:]))
		}
		for range 3 {
			th.startAt(uintptr(dataBase))
			th.syscall()
			if got := th.ac.SyscallNo(); uint64(got) != nr {
				t.Fatalf("round %d: system call %d, want %d", i, got, nr)
			}
			th.exceptionSignal(linux.SIGILL, vectorUD)
		}
	}
}
