package platformtest

import (
	"math"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/platform"
)

var syscallSubjects = []subject{
	{"Arguments", testSyscallArguments},
	{"Number", testSyscallNumber},
	{"Result", testSyscallResult},
	{"Restart", testSyscallRestart},
	{"IP", testSyscallIP},
	{"PrepareSleep", testPrepareSleep},
}

// Every argument register arrives with all its bits, and no other.
func testSyscallArguments(t *T) {
	th := t.newSpace().newThread(progSyscall)
	rnd := random(20)
	check := func(want [6]uint64) {
		t.Helper()
		th.start(progSyscall, want[:]...)
		if got := th.syscall(); got != want {
			t.Fatalf("arguments %#x, want %#x", got, want)
		}
	}
	for i := range 6 {
		for _, v := range []uint64{1, 1 << 31, 1 << 32, 1 << 47, 1 << 63, math.MaxUint64} {
			var want [6]uint64
			want[i] = v
			check(want)
		}
	}
	for range 20 {
		var want [6]uint64
		for i := range want {
			want[i] = rnd.Uint64()
		}
		check(want)
	}
}

// Every number arrives, the host's and others, and none has an effect of its
// own: Linux has special paths for -1, and filters for the x32 numbers.
func testSyscallNumber(t *T) {
	th := t.newSpace().newThread(progSyscall)
	nrs := []int32{-1, -2, math.MinInt32, math.MaxInt32, 0x4000_0000, 0x4000_0001, 0x4000_0208, nrReport}
	for nr := range int32(512) {
		nrs = append(nrs, nr)
	}
	for _, nr := range nrs {
		th.edit(func(ac *arch.Context64) {
			ac.SetIP(t.s.text.addr(progSyscall))
			setArgs(ac, 0, 0, 0, 0, 0, 0)
			setSyscallNo(ac, uint64(int64(nr)))
		})
		th.syscall()
		// The kernel takes the low half as an int.
		if got := int32(th.ac.SyscallNo()); got != nr {
			t.Fatalf("system call number %d, want %d", got, nr)
		}
	}
}

// The application gets the result, with and without the full state.
func testSyscallResult(t *T) {
	th := t.newSpace().newThread(progCount)
	th.report()
	for i, want := range []uint64{0, 1, math.MaxUint64, 1 << 63, 0x0123456789abcdef, uint64(math.MaxUint64 - 511)} {
		th.ac.SetReturn(uintptr(want))
		switch i % 3 {
		case 1:
			th.pull()
		case 2:
			th.edit(func(*arch.Context64) {})
		}
		if a := th.report(); a[1] != want || a[0] != uint64(i+2) {
			t.Fatalf("call %d: the application got %#x at its call %d, want %#x at call %d", i, a[1], a[0], want, i+2)
		}
	}
}

// RestartSyscall makes the thread do the same call again.
func testSyscallRestart(t *T) {
	th := t.newSpace().newThread(progCount)
	first := th.report()
	for range 5 {
		th.edit(func(ac *arch.Context64) { ac.RestartSyscall() })
		if a := th.report(); a != first {
			t.Fatalf("the restarted call has arguments %#x, want %#x", a, first)
		}
	}
	th.ac.SetReturn(7)
	if a := th.report(); a[0] != first[0]+1 || a[1] != 7 {
		t.Fatalf("after restarts: arguments %#x", a)
	}
}

// IP is the instruction after the call.
func testSyscallIP(t *T) {
	th := t.newSpace().newThread(progSyscall)
	for range 5 {
		th.syscall()
		if got, want := th.ac.IP(), t.s.text.addr(progSyscall)+syscallLen; got != want {
			t.Fatalf("IP is %#x, want %#x", got, want)
		}
	}
}

// PrepareSleep changes nothing, and a sleeper can be woken.
func testPrepareSleep(t *T) {
	th := t.newSpace().newThread(progCount)
	for i := range uint64(5) {
		if a := th.report(); a[0] != i+1 {
			t.Fatalf("call %d, want %d", a[0], i+1)
		}
		th.c.PrepareSleep()
	}
	th.c.PrepareSleep()
	th.c.Interrupt()
	if e := th.switchOnce(); e.err != platform.ErrContextInterrupt {
		t.Fatalf("after PrepareSleep and Interrupt: got %v", e)
	}
	if a := th.report(); a[0] != 6 {
		t.Fatalf("call %d, want 6", a[0])
	}
}
