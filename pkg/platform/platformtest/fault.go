package platformtest

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
)

var faultSubjects = []subject{
	{"Read", testFaultRead},
	{"Write", testFaultWrite},
	{"Execute", testFaultExecute},
	{"Resume", testFaultResume},
	{"KernelAddress", testFaultKernelAddress},
	{"NullPage", testFaultNullPage},
	{"SIGBUS", testSIGBUS},
	{"SIGILL", testSIGILL},
	{"Breakpoint", testBreakpoint},
	{"SingleStep", testSingleStep},
	{"SingleStepSyscall", testSingleStepSyscall},
}

func testFaultRead(t *T) {
	sp := t.newSpace()
	th := sp.newThread(progLoad)
	for _, off := range []hostarch.Addr{0, 8, 0x123, pageSize - 8} {
		th.fault(fault{addr: dataBase + off, at: hostarch.Read}, progLoad, uint64(dataBase+off))
	}
	// After a mapping was there.
	sp.mapData(1, hostarch.Read)
	sp.data.store(8, 42)
	th.mustLoad(dataBase+8, 42)
	sp.unmap(dataBase, pageSize)
	th.fault(fault{addr: dataBase + 8, at: hostarch.Read}, progLoad, uint64(dataBase+8))
	// The page beside it.
	sp.mapData(1, hostarch.Read)
	th.fault(fault{addr: dataBase + pageSize, at: hostarch.Read}, progLoad, uint64(dataBase+pageSize))
	th.mustLoad(dataBase+pageSize-8, 0)
}

func testFaultWrite(t *T) {
	sp := t.newSpace()
	th := sp.newThread(progStore)
	th.fault(fault{addr: dataBase + 16, at: hostarch.Write}, progStore, uint64(dataBase+16), 1)
	for _, at := range []hostarch.AccessType{hostarch.Read, hostarch.ReadExec} {
		sp.mapData(2, at)
		th.fault(fault{addr: dataBase + 24, at: hostarch.Write, code: linux.SEGV_ACCERR}, progStore, uint64(dataBase+24), 1)
		// Present in the host's tables, too.
		th.mustLoad(dataBase+24, 0)
		th.fault(fault{addr: dataBase + 24, at: hostarch.Write, code: linux.SEGV_ACCERR}, progStore, uint64(dataBase+24), 1)
	}
	if v := sp.data.load(24); v != 0 {
		t.Errorf("a forbidden write changed memory to %#x", v)
	}
	// The programs cannot be written.
	th.fault(fault{addr: textBase, at: hostarch.Write, code: linux.SEGV_ACCERR}, progStore, uint64(textBase), 1)
}

func testFaultExecute(t *T) {
	sp := t.newSpace()
	th := sp.newThread(progJump)
	copy(sp.data.data[64:], code(progCount))
	target := dataBase + 64
	th.fault(fault{addr: target, at: hostarch.Execute}, progJump, uint64(target))
	if got := th.ac.IP(); got != uintptr(target) {
		t.Errorf("IP is %#x at an execute fault, want %v", got, target)
	}
	for _, at := range []hostarch.AccessType{hostarch.Read, hostarch.ReadWrite} {
		sp.mapData(1, at)
		th.fault(fault{addr: target, at: hostarch.Execute, code: linux.SEGV_ACCERR}, progJump, uint64(target))
		th.mustLoad(dataBase, 0)
		th.fault(fault{addr: target, at: hostarch.Execute, code: linux.SEGV_ACCERR}, progJump, uint64(target))
	}
	for _, at := range []hostarch.AccessType{hostarch.ReadExec, hostarch.AnyAccess, hostarch.Execute} {
		sp.mapData(1, at)
		th.call(progJump, uint64(target))
	}
}

// A thread goes on at the instruction that faulted once the Sentry has mapped
// what was missing.
func testFaultResume(t *T) {
	sp := t.newSpace()
	th := sp.newThread(progLoad)
	for i := range uint64(10) {
		addr := dataBase + hostarch.Addr(i)*pageSize
		sp.data.store(i*pageSize, 100+i)
		th.fault(fault{addr: addr, at: hostarch.Read}, progLoad, uint64(addr))
		ip := th.ac.IP()
		// Without the page it faults again, with the same state.
		th.mustFault(fault{addr: addr, at: hostarch.Read})
		if th.ac.IP() != ip {
			t.Fatalf("IP is %#x at the second fault, %#x at the first", th.ac.IP(), ip)
		}
		sp.mustMap(addr, sp.data, i*pageSize, pageSize, hostarch.Read)
		if got := th.report()[1]; got != 100+i {
			t.Fatalf("page %d: loaded %d, want %d", i, got, 100+i)
		}
		th.fault(fault{addr: addr, at: hostarch.Write, code: linux.SEGV_ACCERR}, progStore, uint64(addr), 200+i)
		sp.mustMap(addr, sp.data, i*pageSize, pageSize, hostarch.ReadWrite)
		th.report()
		if got := sp.data.load(i * pageSize); got != 200+i {
			t.Fatalf("page %d: the application stored %d, want %d", i, got, 200+i)
		}
	}
}

func testFaultKernelAddress(t *T) {
	th := t.newSpace().newThread(progLoad)
	th.fault(fault{addr: kernelAddr, at: hostarch.Read}, progLoad, kernelAddr)
	th.fault(fault{addr: kernelAddr, at: hostarch.Write}, progStore, kernelAddr, 1)
	th.fault(fault{addr: kernelAddr, at: hostarch.Execute}, progJump, kernelAddr)
	th.call(progCount, 0)
}

func testFaultNullPage(t *T) {
	th := t.newSpace().newThread(progLoad)
	th.fault(fault{addr: 0, at: hostarch.Read}, progLoad, 0)
	th.fault(fault{addr: 8, at: hostarch.Write}, progStore, 8, 1)
	th.fault(fault{addr: 0, at: hostarch.Execute}, progJump, 0)
}

// A mapping without a page behind it: the file was truncated.
func testSIGBUS(t *T) {
	sp := t.newSpace()
	f := t.newFile(4 * pageSize)
	sp.mustMap(dataBase, f, 0, 4*pageSize, hostarch.ReadWrite)
	th := sp.newThread(progLoad)
	th.mustLoad(dataBase+3*pageSize, 0)
	th.mustStore(dataBase+pageSize, 5)
	truncate := func(size int64) {
		if err := unix.Ftruncate(f.fd, size); err != nil {
			t.Fatal(err)
		}
	}
	truncate(pageSize)
	for i, at := range []hostarch.AccessType{hostarch.Read, hostarch.Write} {
		addr := dataBase + hostarch.Addr(i+1)*pageSize + 8
		prog := []program{progLoad, progStore}[i]
		th.fault(fault{addr: addr, at: at, sig: linux.SIGBUS, code: linux.BUS_ADRERR}, prog, uint64(addr), 1)
	}
	th.mustLoad(dataBase, 0)
	truncate(4 * pageSize)
	th.mustLoad(dataBase+pageSize, 0)
	th.mustStore(dataBase+2*pageSize, 6)
}

func testSIGILL(t *T) {
	th := t.newSpace().newThread(progIllegal)
	for range 3 {
		th.start(progIllegal)
		th.mustSignal(linux.SIGILL)
		checkTrapNo(th, trapIllegal)
		if got, want := th.ac.IP(), t.s.text.addr(progIllegal); got != want {
			t.Errorf("IP is %#x, want %#x", got, want)
		}
	}
	th.call(progCount, 0)
}

func testBreakpoint(t *T) {
	th := t.newSpace().newThread(progBreakpoint)
	for range 3 {
		th.start(progBreakpoint)
		th.mustSignal(linux.SIGTRAP)
		checkTrapNo(th, trapBreakpoint)
		if got, want := th.ac.IP(), t.s.text.addr(progBreakpoint)+breakpointLen; got != want {
			t.Fatalf("IP is %#x, want %#x", got, want)
		}
	}
	th.call(progCount, 0)
}

// mustStep makes th do one instruction.
func (th *thread) mustStep(want uintptr) {
	th.t.Helper()
	e := th.mustSignal(linux.SIGTRAP)
	if e.info.Code != linux.TRAP_TRACE {
		th.t.Errorf("single step: si_code %d, want TRAP_TRACE", e.info.Code)
	}
	checkTrapNo(th, trapStep)
	if got := th.ac.IP(); got != want {
		th.t.Fatalf("single step: IP is %#x, want %#x", got, want)
	}
}

// SetSingleStep makes each Switch do one instruction, also across interrupts.
func testSingleStep(t *T) {
	th := t.newSpace().newThread(progNops)
	base := t.s.text.addr(progNops)
	for round := range 3 {
		th.start(progNops)
		th.edit(func(ac *arch.Context64) { ac.SetSingleStep() })
		for i := range numNops - 1 {
			if round == 1 {
				th.c.Interrupt()
			}
			th.mustStep(base + uintptr(i+1)*nopLen)
		}
		th.edit(func(ac *arch.Context64) { ac.ClearSingleStep() })
		th.report()
	}
	// Another Context of the AddressSpace does not step.
	th.start(progNops)
	th.edit(func(ac *arch.Context64) { ac.SetSingleStep() })
	th.mustStep(base + nopLen)
	th.sp.newThread(progNops).report()
}

// A system call is seen while single-stepping, once.
func testSingleStepSyscall(t *T) {
	th := t.newSpace().newThread(progCount)
	th.edit(func(ac *arch.Context64) { ac.SetSingleStep() })
	for i := uint64(1); i <= 3; i++ {
		var trace []string
		for {
			e := th.next()
			if e.err == nil {
				break
			}
			trace = append(trace, fmt.Sprintf("%v at %#x", e, th.ac.IP()))
			if e.signal() != linux.SIGTRAP || len(trace) > 10 {
				t.Fatalf("no system call while single-stepping:\n\t%s", lines(trace))
			}
		}
		if a := th.args(); th.ac.SyscallNo() != nrReport || a[0] != i {
			t.Fatalf("call %d, want %d; before it:\n\t%s", a[0], i, lines(trace))
		}
		if len(trace) < 2 {
			t.Fatalf("%d steps before the system call, want at least 2:\n\t%s", len(trace), lines(trace))
		}
		th.pull()
		th.ac.SetReturn(uintptr(i))
	}
	th.edit(func(ac *arch.Context64) { ac.ClearSingleStep() })
	if a := th.report(); a[0] != 4 || a[1] != 3 {
		t.Fatalf("after ClearSingleStep: arguments %#x", a)
	}
}
