package platformtest

import (
	"encoding/binary"
	"os"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
)

var archStateSubjects = []subject{
	{"RCXAndR11", testRCXAndR11},
	{"GSBase", testGSBase},
	{"BasesWrittenByApplication", testWriteBases},
}

// SYSCALL leaves the return address in RCX and the flags in R11. A Sentry that
// sets them, as rt_sigreturn(2) does, gets what it set.
func testRCXAndR11(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progDump)
	setDump(th.ac, uint64(dataBase))
	th.ac.Regs.Rcx, th.ac.Regs.R11 = 1, 2
	th.syscall()
	th.pull()
	if got := th.ac.Regs.Rcx; got != uint64(th.ac.IP()) {
		t.Errorf("after the system call RCX is %#x, want %#x", got, th.ac.IP())
	}
	if got, want := th.ac.Regs.R11&flagsUser, th.ac.Regs.Eflags&flagsUser; got != want {
		t.Errorf("after the system call R11 is %#x, want the flags %#x", got, want)
	}
	th.edit(func(ac *arch.Context64) { ac.Regs.Rcx, ac.Regs.R11 = 0x1111, 0x2222 })
	th.syscall()
	regs := dumped(th.ac, sp.data, 0).Regs
	if regs.Rcx != 0x1111 || regs.R11 != 0x2222 {
		t.Errorf("the application has RCX %#x and R11 %#x, want what the Sentry set: 0x1111 and 0x2222", regs.Rcx, regs.R11)
	}
}

func testGSBase(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	a, b := sp.newThread(progGS), sp.newThread(progGS)
	sp.data.store(64, 1)
	sp.data.store(128, 2)
	a.ac.Regs.Gs_base, b.ac.Regs.Gs_base = uint64(dataBase)+64, uint64(dataBase)+128
	for range 3 {
		for i, th := range []*thread{a, b} {
			if got := th.report()[0]; got != uint64(i+1) {
				t.Fatalf("Context %d reads %d through GS", i, got)
			}
		}
	}
	a.pull()
	if got := a.ac.Regs.Gs_base; got != uint64(dataBase)+64 {
		t.Errorf("Gs_base is %#x", got)
	}
}

// hasFSGSBASE reports whether applications may use WRFSBASE: bit 1 of AT_HWCAP2
// (Documentation/arch/x86/elf_auxvec.rst).
func hasFSGSBASE(t *T) bool {
	b, err := os.ReadFile("/proc/self/auxv")
	if err != nil {
		t.Fatal(err)
	}
	const atHWCAP2 = 26
	for ; len(b) >= 16; b = b[16:] {
		if binary.LittleEndian.Uint64(b) == atHWCAP2 {
			return binary.LittleEndian.Uint64(b[8:])&2 != 0
		}
	}
	return false
}

// The application writes the bases without a system call: the Sentry sees them,
// and they are kept.
func testWriteBases(t *T) {
	if !hasFSGSBASE(t) {
		t.Log("the host does not let applications use WRFSBASE: nothing to test")
		return
	}
	sp := t.newSpace()
	var ths []*thread
	for range 3 {
		ths = append(ths, sp.newThread(progWriteBases))
	}
	t.onThreads(12, func(i int) {
		th, k := ths[i%3], uint64(i%3)
		fs, gs := 0x1000*(k+1), 0x7fff_0000_0000+k
		if i/3%2 == 0 {
			th.start(progWriteBases, fs, gs)
			th.report()
			th.pull()
			if th.ac.TLS() != uintptr(fs) || th.ac.Regs.Gs_base != gs {
				t.Fatalf("Context %d wrote %#x and %#x, the Sentry sees %#x and %#x", k, fs, gs, th.ac.TLS(), th.ac.Regs.Gs_base)
			}
		} else if a := th.report(); a[0] != fs || a[1] != gs {
			t.Fatalf("Context %d wrote %#x and %#x, and reads %#x and %#x", k, fs, gs, a[0], a[1])
		}
	})
}
