package platformtest

import (
	"encoding/binary"
	"math/rand/v2"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

var archHostileSubjects = []subject{
	{"Selectors", testSelectors},
	{"Flags", testHostileFlags},
	{"SegmentBases", testSegmentBases},
	{"MXCSR", testMXCSR},
	{"XSAVEHeader", testXSAVEHeader},
	{"Int80", testInt80},
	{"Sysenter", testSysenter},
	{"Vsyscall", testVsyscall},
	{"CompatInt80", func(t *T) { testCompat(t, progCompatInt80) }},
	{"CompatSyscall", func(t *T) { testCompat(t, progCompatSyscall) }},
	{"CompatSysenter", func(t *T) { testCompat(t, progCompatSysenter) }},
	{"CompatSpin", testCompatSpin},
}

// scrambleRegs gives every register a random value, those of the segments and
// the kernel's own too.
func scrambleRegs(ac *arch.Context64, rnd *rand.Rand) {
	r := &ac.Regs
	randomRegs(ac, rnd)
	word := func() uint64 {
		switch rnd.IntN(3) {
		case 0:
			return rnd.Uint64()
		case 1:
			return rnd.Uint64N(1 << 16)
		}
		return wildAddrs()[rnd.IntN(len(wildAddrs()))]
	}
	for _, p := range []*uint64{&r.Rsp, &r.Rip, &r.Cs, &r.Ss, &r.Ds, &r.Es, &r.Fs, &r.Gs, &r.Fs_base, &r.Gs_base, &r.Eflags, &r.Orig_rax} {
		if rnd.IntN(2) == 0 {
			*p = word()
		}
	}
}

// Selectors that do not exist, of the kernel, of the wrong kind, of 32-bit code.
func testSelectors(t *T) {
	sp := t.newSpace()
	w := sp.newWitness()
	for _, sel := range []uint64{0, 3, 0x08, 0x10, 0x18, 0x23, 0x2b, 0x33, 0x3b, 0x43, 0x7b, 0xff, 0xffff, 0x10000, 1 << 63} {
		for _, f := range []func(r *arch.Registers){
			func(r *arch.Registers) { r.Cs = sel },
			func(r *arch.Registers) { r.Ss = sel },
			func(r *arch.Registers) { r.Ds = sel },
			func(r *arch.Registers) { r.Es = sel },
			func(r *arch.Registers) { r.Fs = sel },
			func(r *arch.Registers) { r.Gs = sel },
		} {
			sp.tryState(w, "a bad selector", func(ac *arch.Context64) { f(&ac.Regs) })
		}
	}
}

// Flags that user code must not have: they are refused or ignored. With TF the
// thread single-steps, and that is all.
func testHostileFlags(t *T) {
	sp := t.newSpace()
	w := sp.newWitness()
	for bit := range 64 {
		try := func() event {
			return sp.tryState(w, "hostile flags", func(ac *arch.Context64) { ac.Regs.Eflags ^= 1 << bit })
		}
		e := try()
		for i := 0; i < 20 && bit == 8 && e.err == platform.ErrContextInterrupt; i++ {
			e = try() // on a busy host the bound may have come before its first instruction
		}
		if bit == 8 && e.signal() != linux.SIGTRAP {
			t.Errorf("with TF set the thread gets %v, want SIGTRAP", e)
		}
	}
	sp.tryState(w, "no flags", func(ac *arch.Context64) { ac.Regs.Eflags = 0 })
	sp.tryState(w, "all flags", func(ac *arch.Context64) { ac.Regs.Eflags = ^uint64(0) })
	// IOPL and IF must not get through: OUT and HLT still fault.
	for _, prog := range []program{progOut, progHalt} {
		th := sp.newThread(prog)
		th.ac.Regs.Eflags |= 3 << 12
		if e := th.bounded(); e.err == nil {
			t.Errorf("with IOPL 3 a privileged instruction works")
		}
		th.release()
	}
}

func testSegmentBases(t *T) {
	sp := t.newSpace()
	w := sp.newWitness()
	for _, v := range wildAddrs() {
		sp.tryState(w, "a wild FS base", func(ac *arch.Context64) { ac.Regs.Fs_base = v })
		sp.tryState(w, "a wild GS base", func(ac *arch.Context64) { ac.Regs.Gs_base = v })
		sp.tryState(w, "wild bases and selectors", func(ac *arch.Context64) {
			ac.Regs.Fs_base, ac.Regs.Gs_base, ac.Regs.Fs, ac.Regs.Gs = v, v, 0x2b, 0x2b
		})
	}
}

// Reserved bits of MXCSR: XRSTOR faults on them (Intel SDM vol. 1, 13.8.1).
func testMXCSR(t *T) {
	sp := t.newSpace()
	w := sp.newWitness()
	for bit := range 32 {
		sp.tryState(w, "a bad MXCSR", func(ac *arch.Context64) {
			fp := ac.FloatingPointData()
			fp[xstateBVOffset] |= 1<<1 | 1<<2
			binary.LittleEndian.PutUint32(fp[mxcsrOffset:], 0x1f80^1<<bit)
		})
	}
}

// The header of the XSAVE area: components that do not exist, the compacted
// format, reserved bytes.
func testXSAVEHeader(t *T) {
	sp := t.newSpace()
	w := sp.newWitness()
	for off := xstateBVOffset; off < xstateBVOffset+64; off++ {
		for _, v := range []byte{0xff, 0x80, 0x04} {
			sp.tryState(w, "a bad XSAVE header", func(ac *arch.Context64) { ac.FloatingPointData()[off] = v })
		}
	}
}

// otherEntry checks what a way into the kernel other than SYSCALL gives: a
// signal, or a system call with a number that none has. A 64-bit call with the
// same number would be another one, and if the host's kernel made the call, the
// report after it would come.
func otherEntry(th *thread, name string, nr uint64) {
	th.t.Helper()
	e := th.next()
	if e.signal() != 0 {
		th.t.Logf("%s gives %v", name, e)
		return
	}
	if e.err != nil {
		th.t.Fatalf("%s gives %v, want a signal", name, e)
	}
	got := th.ac.SyscallNo()
	if got == nrReport {
		th.t.Fatalf("%s was executed by the host's kernel: result %#x", name, th.args()[0])
	}
	if int32(got) >= 0 && int32(got) < 0x4000_0000 {
		th.t.Fatalf("%s with number %d is seen as the 64-bit system call %d", name, nr, got)
	}
	th.t.Logf("%s gives system call %#x", name, got)
}

// entryNumbers are 32-bit system calls: getpid, exit, write, fork, and what is
// not one.
var entryNumbers = []uint64{20, 1, 4, 2, 252, 600}

func testInt80(t *T) {
	sp := t.newSpace()
	w := sp.newWitness()
	for _, nr := range entryNumbers {
		th := sp.newThread(progInt80, nr)
		otherEntry(th, "int $0x80", nr)
		w.check("int $0x80")
		th.release()
	}
}

func testSysenter(t *T) {
	sp := t.newSpace()
	w := sp.newWitness()
	for _, nr := range entryNumbers {
		th := sp.newThread(progSysenter, nr)
		otherEntry(th, "sysenter", nr)
		w.check("sysenter")
		th.release()
	}
}

// The vsyscall page (asm/vsyscall.h), where the host's kernel answers calls by
// itself: a fault, or the system call that the function stands for.
func testVsyscall(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	w := sp.newWitness()
	const vsyscallBase = 0xffff_ffff_ff60_0000
	for i, nr := range []uintptr{96, 201, 309} { // gettimeofday, time, getcpu
		th := sp.newThread(progVsyscall, uint64(dataBase), uint64(dataBase)+64, vsyscallBase+uint64(i)*1024, 0, uint64(t.s.text.addr(progReportAX)))
		// What the function returns if the host's kernel executes it: not this.
		th.ac.Regs.Rax = 0x1234
		e := th.next()
		switch {
		case e.signal() != 0:
			t.Logf("vsyscall %d gives %v", i, e)
		case e.err == nil && th.ac.SyscallNo() == nr:
			t.Logf("vsyscall %d gives system call %d", i, nr)
		case e.err == nil && th.ac.SyscallNo() == nrReport:
			t.Errorf("vsyscall %d was executed by the host's kernel: result %#x", i, th.args()[0])
		default:
			t.Errorf("vsyscall %d gives %v, number %d", i, e, th.ac.SyscallNo())
		}
		w.check("a vsyscall")
	}
	for _, addr := range []uint64{vsyscallBase + 8, vsyscallBase + 3072, vsyscallBase + 4095} {
		th := sp.newThread(progJump, addr)
		if e := th.next(); e.signal() == 0 {
			t.Errorf("a jump to %#x gives %v", addr, e)
		}
	}
	// It can be seen, if at all, only by executing it.
	th := sp.newThread(progLoad)
	th.fault(fault{addr: vsyscallBase, at: hostarch.Read}, progLoad, vsyscallBase)
}

// 32-bit code is in the reach of every application. Its system calls are no
// 64-bit ones.
func testCompat(t *T, prog program) {
	sp := t.newSpace()
	w := sp.newWitness()
	for _, nr := range entryNumbers {
		th := sp.newThread(progCompat, uint64(t.s.text.addr(prog)), nr)
		e := th.next()
		switch {
		case e.signal() == linux.SIGILL && th.ac.IP() == t.s.text.addr(prog)+2:
			t.Fatalf("a 32-bit system call %d was executed by the host's kernel: result %#x", nr, th.ac.Return())
		case e.signal() != 0, e.contextError() != nil:
			t.Logf("a 32-bit system call gives %v", e)
		case e.err == nil && int32(th.ac.SyscallNo()) >= 0 && th.ac.SyscallNo() < 0x4000_0000:
			t.Fatalf("a 32-bit system call %d is seen as the 64-bit system call %d", nr, th.ac.SyscallNo())
		default:
			t.Logf("a 32-bit system call gives %v, number %#x", e, th.ac.SyscallNo())
		}
		w.check("a 32-bit system call")
		th.release()
	}
}

// 32-bit code that never ends can be interrupted, and the Context has its 64-bit
// life back afterwards.
func testCompatSpin(t *T) {
	sp := t.newSpace()
	w := sp.newWitness()
	th := sp.newThread(progCompat, uint64(t.s.text.addr(progCompatSpin)))
	e := th.bounded()
	for range 5 {
		if e.err == nil {
			t.Fatalf("got %v", e)
		}
		if e.contextError() != nil {
			t.Logf("32-bit code gives %v", e)
			return
		}
		w.check("32-bit code")
		e = th.bounded()
	}
	th.pull()
	th.ac = arch.New()
	th.ac.SetIP(t.s.text.addr(progCount))
	th.c.FullStateChanged()
	th.report()
}
