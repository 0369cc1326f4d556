package linux

import (
	"math"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSignals(t *testing.T) {
	for s := SIGHUP; s < SIGRTMIN; s++ {
		name := unix.SignalName(unix.Signal(s))
		// x/sys has two older names.
		switch name {
		case "SIGABRT", "SIGIOT":
			name = "SIGABRT"
		case "SIGIO", "SIGPOLL":
			name = "SIGIO"
		}
		if s.String() != name || !s.IsStandard() || !s.IsValid() || s.IsRealtime() {
			t.Errorf("signal %d is called %v, want %s, a standard signal", int(s), s, name)
		}
	}
	for s, want := range map[Signal]string{0: "signal 0", -1: "signal -1", 65: "signal 65", 32: "SIGRT32", 64: "SIGRT64"} {
		if s.String() != want {
			t.Errorf("Signal(%d).String() = %q, want %q", int(s), s.String(), want)
		}
	}
	if Signal(0).IsValid() || Signal(65).IsValid() || !Signal(64).IsRealtime() {
		t.Error("wrong bounds of the signal numbers")
	}
	set := MakeSignalSet(SIGHUP, SIGRTMAX)
	if set != 1|1<<63 || !set.Has(SIGHUP) || set.Has(SIGINT) || !set.Has(SIGRTMAX) {
		t.Errorf("MakeSignalSet = %#x", uint64(set))
	}
}

func TestSignalInfoFields(t *testing.T) {
	var s SignalInfo
	s.SetPID(-2)
	s.SetUID(3)
	s.SetStatus(4)
	if s.PID() != -2 || s.UID() != 3 || s.Status() != 4 || s.Addr() != 0x3fffffffe {
		t.Errorf("SIGCHLD's fields: %+v", s)
	}
	s = SignalInfo{}
	s.SetTimerID(5)
	s.SetOverrun(6)
	s.SetSigval(1 << 40)
	if s.TimerID() != 5 || s.Overrun() != 6 || s.Sigval() != 1<<40 {
		t.Errorf("a timer's fields: %+v", s)
	}
	s = SignalInfo{}
	s.SetCallAddr(1 << 41)
	s.SetSyscall(-1)
	s.SetArch(AUDIT_ARCH_NATIVE)
	if s.CallAddr() != 1<<41 || s.Syscall() != -1 || s.Arch() != AUDIT_ARCH_NATIVE {
		t.Errorf("SIGSYS's fields: %+v", s)
	}
	var c SignalInfo
	c.SetBytes(s.Bytes())
	if c != s {
		t.Errorf("SetBytes(Bytes) = %+v, want %+v", c, s)
	}
}

func TestSignalStackContains(t *testing.T) {
	s := SignalStack{Addr: 0x1000, Size: 0x1000}
	for sp, want := range map[uint64]bool{0x1000: false, 0x1001: true, 0x2000: true, 0x2001: false, 0: false} {
		if s.Contains(sp) != want {
			t.Errorf("Contains(%#x) = %v", sp, !want)
		}
	}
	s.Flags = SS_DISABLE
	if s.Contains(0x1800) {
		t.Error("a disabled stack contains an address")
	}
	// A stack up to the last address, and one that wraps.
	if s := (SignalStack{Addr: math.MaxUint64 - 15, Size: 100}); s.Contains(4) {
		t.Error("a stack that wraps contains a low address")
	}
}

func TestTimes(t *testing.T) {
	for ns, want := range map[int64]Timespec{
		0: {0, 0}, 1: {0, 1}, -1: {-1, 999999999}, 1999999999: {1, 999999999}, math.MinInt64: {-9223372037, 145224192},
	} {
		if got := NsecToTimespec(ns); got != want {
			t.Errorf("NsecToTimespec(%d) = %v, want %v", ns, got, want)
		}
	}
	for ts, want := range map[Timespec]int64{
		{1, 2}: 1000000002, {math.MaxInt64, 0}: math.MaxInt64, {9223372036, 0}: math.MaxInt64, {9223372035, 999999999}: 9223372035999999999,
	} {
		if !ts.Valid() || ts.Nanoseconds() != want {
			t.Errorf("%v: valid %v, %d ns; want %d", ts, ts.Valid(), ts.Nanoseconds(), want)
		}
	}
	for _, ts := range []Timespec{{-1, 0}, {0, -1}, {0, 1e9}} {
		if ts.Valid() {
			t.Errorf("%v is valid", ts)
		}
	}
	if tv := NsecToTimeval(1500001999); tv != (Timeval{1, 500001}) || tv.Nanoseconds() != 1500001000 || !tv.Valid() {
		t.Errorf("NsecToTimeval = %v", tv)
	}
	if (Timeval{0, 1e6}).Valid() || (Timeval{0, -1}).Valid() {
		t.Error("a Timeval out of range is valid")
	}
}

func TestDevices(t *testing.T) {
	for _, d := range [][2]uint32{{0, 0}, {8, 1}, {0xfff, 0xff}, {0x1000, 0x100}, {math.MaxUint32, math.MaxUint32}} {
		dev := MakeDev(d[0], d[1])
		if want := unix.Mkdev(d[0], d[1]); dev != want || DevMajor(dev) != d[0] || DevMinor(dev) != d[1] {
			t.Errorf("MakeDev(%#x, %#x) = %#x (major %#x, minor %#x), want %#x", d[0], d[1], dev, DevMajor(dev), DevMinor(dev), want)
		}
	}
}

func TestDirents(t *testing.T) {
	names := []string{"a", "abcd", "abcde", "a longer name, with spaces"}
	var b []byte
	for i, n := range names {
		before := len(b)
		b = AppendDirent(b, uint64(i+1), int64(i), DT_REG, n)
		if len(b)-before != DirentSize(n) || len(b)%8 != 0 {
			t.Errorf("%q takes %d bytes, want %d", n, len(b)-before, DirentSize(n))
		}
	}
	_, _, got := unix.ParseDirent(b, -1, nil)
	if !slices.Equal(got, names) {
		t.Errorf("ParseDirent = %q, want %q", got, names)
	}
	for mode, want := range map[uint32]uint8{S_IFDIR | 0755: DT_DIR, S_IFREG: DT_REG, S_IFLNK | 0777: DT_LNK, S_IFSOCK: DT_SOCK, S_IFCHR | S_ISVTX: DT_CHR} {
		if got := DirentType(mode); got != want {
			t.Errorf("DirentType(%#o) = %d, want %d", mode, got, want)
		}
	}
}

func TestWaitStatus(t *testing.T) {
	if s := unix.WaitStatus(WaitStatusExited(0x1ff)); !s.Exited() || s.ExitStatus() != 0xff {
		t.Errorf("exited: %#x", s)
	}
	if s := unix.WaitStatus(WaitStatusKilled(SIGSEGV, true)); !s.Signaled() || s.Signal() != unix.SIGSEGV || !s.CoreDump() {
		t.Errorf("killed: %#x", s)
	}
	if s := unix.WaitStatus(WaitStatusKilled(SIGKILL, false)); !s.Signaled() || s.Signal() != unix.SIGKILL || s.CoreDump() {
		t.Errorf("killed: %#x", s)
	}
	if s := unix.WaitStatus(WaitStatusStopped(SIGTSTP)); !s.Stopped() || s.StopSignal() != unix.SIGTSTP {
		t.Errorf("stopped: %#x", s)
	}
	if s := unix.WaitStatus(WaitStatusContinued); !s.Continued() {
		t.Errorf("continued: %#x", s)
	}
}

// Marshalling allocates nothing: it is on the path of every poll and stat.
func TestMarshalAllocates(t *testing.T) {
	b := make([]byte, 256)
	var s Stat
	if n := testing.AllocsPerRun(10, func() { s.MarshalBytes(b); s.UnmarshalBytes(b) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
