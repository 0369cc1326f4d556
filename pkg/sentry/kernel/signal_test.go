package kernel_test

import (
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
)

func TestExitStatus(t *testing.T) {
	for _, test := range []struct {
		name    string
		program func(*app)
		status  uint32
	}{
		{"exit", func(a *app) { a.exit(7) }, 7 << 8},
		{"exit-256", func(a *app) { a.exit(256 + 3) }, 3 << 8},
		{"exit-thread", func(a *app) { a.syscall(unix.SYS_EXIT, 9) }, 9 << 8},
		{"leader-first", func(a *app) {
			a.thread(func(a *app) { a.sleep(10 * time.Millisecond); a.syscall(unix.SYS_EXIT, 4) })
			a.syscall(unix.SYS_EXIT, 3)
		}, 3 << 8},
		{"group-by-thread", func(a *app) {
			a.thread(func(a *app) { a.exit(5) })
			a.spin(func() bool { return false })
		}, 5 << 8},
		{"default-term", func(a *app) { a.kill(1, linux.SIGTERM) }, uint32(linux.SIGTERM)},
		{"default-segv", func(a *app) { a.kill(1, linux.SIGSEGV) }, uint32(linux.SIGSEGV)},
		{"default-rt", func(a *app) { a.kill(1, linux.SIGRTMIN+3) }, uint32(linux.SIGRTMIN + 3)},
		{"kill-blocked", func(a *app) { a.sigmask(linux.SIG_BLOCK, ^linux.SignalSet(0)); a.kill(1, linux.SIGKILL) }, uint32(linux.SIGKILL)},
		{"ignored-by-default", func(a *app) { a.kill(1, linux.SIGCHLD); a.kill(1, linux.SIGURG); a.exit(1) }, 1 << 8},
		{"fault-blocked", func(a *app) {
			a.sigaction(linux.SIGFPE, 0, 0, func(*app, int, linux.SignalInfo) {})
			a.sigmask(linux.SIG_BLOCK, linux.SignalSetOf(linux.SIGFPE))
			a.fault(&linux.SignalInfo{Signo: int32(linux.SIGFPE), Code: linux.FPE_INTDIV})
		}, uint32(linux.SIGFPE)},
		{"fault-ignored", func(a *app) {
			a.setAction(linux.SIGILL, linux.SigAction{Handler: linux.SIG_IGN})
			a.fault(&linux.SignalInfo{Signo: int32(linux.SIGILL), Code: linux.ILL_ILLOPN})
		}, uint32(linux.SIGILL)},
		{"segv-unmapped", func(a *app) {
			info := &linux.SignalInfo{Signo: int32(linux.SIGSEGV), Code: linux.SEGV_MAPERR}
			info.SetAddr(0x5000_0000)
			a.fault(info)
		}, uint32(linux.SIGSEGV)},
		{"bad-frame", func(a *app) {
			a.sigaction(linux.SIGUSR1, 0, 0, func(*app, int, linux.SignalInfo) {})
			a.ac.SetStack(0x100)
			a.kill(1, linux.SIGUSR1)
		}, uint32(linux.SIGSEGV)},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := run(t, test.program); got != test.status {
				t.Errorf("status %#x, want %#x", got, test.status)
			}
		})
	}
}

// Signals that the platform reports and that are not the thread's own change
// nothing.
func TestForeignSignals(t *testing.T) {
	check(t, func(a *app) {
		for _, sig := range []linux.Signal{linux.SIGCHLD, linux.SIGTERM, linux.SIGINT, linux.SIGURG} {
			a.fault(&linux.SignalInfo{Signo: int32(sig)})
		}
	})
}

func TestHandler(t *testing.T) {
	var got []linux.SignalInfo
	var masks []linux.SignalSet
	check(t, func(a *app) {
		record := func(a *app, sig int, info linux.SignalInfo) {
			got = append(got, info)
			masks = append(masks, a.sigmask(linux.SIG_BLOCK, 0))
		}
		a.sigaction(linux.SIGUSR1, 0, linux.SignalSetOf(linux.SIGUSR2), record)
		a.kill(1, linux.SIGUSR1)
		a.sigaction(linux.SIGUSR1, linux.SA_NODEFER, 0, record)
		a.must(unix.SYS_TGKILL, 1, 1, uintptr(linux.SIGUSR1))
		masks = append(masks, a.sigmask(linux.SIG_BLOCK, 0))
	})
	want := []linux.SignalSet{linux.MakeSignalSet(linux.SIGUSR1, linux.SIGUSR2), 0, 0}
	if !slices.Equal(masks, want) {
		t.Errorf("masks %x, want %x", masks, want)
	}
	if len(got) != 2 || got[0].Code != linux.SI_USER || got[0].PID() != 1 || got[1].Code != linux.SI_TKILL {
		t.Errorf("infos %v", got)
	}
}

func TestFaultHandler(t *testing.T) {
	var info linux.SignalInfo
	check(t, func(a *app) {
		a.sigaction(linux.SIGSEGV, 0, 0, func(_ *app, _ int, i linux.SignalInfo) { info = i })
		i := &linux.SignalInfo{Signo: int32(linux.SIGSEGV), Code: linux.SEGV_ACCERR}
		i.SetAddr(0x5000_0010)
		a.yield(event{info: i, at: hostarch.Write, err: platform.ErrContextSignal})
	})
	if info.Code != linux.SEGV_MAPERR || info.Addr() != 0x5000_0010 {
		t.Errorf("info %v, want SEGV_MAPERR at 0x50000010: what is mapped counts, not what the host says", &info)
	}
}

func TestResetHand(t *testing.T) {
	n := 0
	status := run(t, func(a *app) {
		a.sigaction(linux.SIGUSR1, linux.SA_RESETHAND, 0, func(*app, int, linux.SignalInfo) { n++ })
		a.kill(1, linux.SIGUSR1)
		a.kill(1, linux.SIGUSR1)
	})
	if n != 1 || status != uint32(linux.SIGUSR1) {
		t.Errorf("%d handlers, status %#x; want 1, %#x", n, status, linux.SIGUSR1)
	}
}

// Standard signals are merged, real-time signals queue, the lowest goes first
// and faults before all.
func TestQueue(t *testing.T) {
	type sigval struct{ sig, val int }
	var got []sigval
	check(t, func(a *app) {
		for _, sig := range []linux.Signal{linux.SIGUSR1, linux.SIGUSR2, linux.SIGSEGV, 34, 35} {
			a.sigaction(sig, 0, ^linux.SignalSet(0), func(_ *app, sig int, info linux.SignalInfo) {
				got = append(got, sigval{sig, int(info.Sigval())})
			})
		}
		queue := func(sig linux.Signal, val uint64) {
			info := linux.SignalInfo{Signo: int32(sig), Code: linux.SI_QUEUE}
			info.SetPID(1)
			info.SetSigval(val)
			a.write(scratch, info.Bytes())
			a.must(unix.SYS_RT_SIGQUEUEINFO, 1, uintptr(sig), uintptr(scratch))
		}
		old := a.sigmask(linux.SIG_SETMASK, ^linux.SignalSet(0))
		queue(35, 1)
		queue(34, 2)
		queue(34, 3)
		queue(linux.SIGUSR2, 4)
		queue(linux.SIGUSR2, 5)
		queue(linux.SIGUSR1, 6)
		queue(linux.SIGSEGV, 7)
		queue(35, 8)
		a.must(unix.SYS_RT_SIGPENDING, uintptr(scratch), 8)
		if p := linux.SignalSet(a.load64(scratch)); p != linux.MakeSignalSet(linux.SIGUSR1, linux.SIGUSR2, linux.SIGSEGV, 34, 35) {
			t.Errorf("pending %x", p)
		}
		a.sigmask(linux.SIG_SETMASK, old)
	})
	want := []sigval{{11, 7}, {10, 6}, {12, 4}, {34, 2}, {34, 3}, {35, 1}, {35, 8}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestQueueLimit(t *testing.T) {
	check(t, func(a *app) {
		a.store64(scratch, 3, 3)
		a.must(unix.SYS_SETRLIMIT, unix.RLIMIT_NOFILE, uintptr(scratch))
		a.must(unix.SYS_SETRLIMIT, linux.RLIMIT_SIGPENDING, uintptr(scratch))
		a.sigmask(linux.SIG_SETMASK, ^linux.SignalSet(0))
		info := linux.SignalInfo{Code: linux.SI_QUEUE}
		a.write(scratch, info.Bytes())
		for i := range 5 {
			_, errno := a.syscall(unix.SYS_RT_SIGQUEUEINFO, 1, 40, uintptr(scratch))
			if want := i >= 3; (errno == unix.EAGAIN) != want {
				t.Errorf("signal %d: %v", i, errno)
			}
		}
		// kill never fails for want of memory.
		if errno := a.kill(1, 40); errno != 0 {
			t.Errorf("kill: %v", errno)
		}
		if errno := a.kill(1, 41); errno != 0 {
			t.Errorf("kill: %v", errno)
		}
	})
}

// restartTest interrupts a call that waits by a signal with the given flags, and
// by one without a handler before.
func restartTest(t *testing.T, flags uint64, nr uintptr, args func(*app) []uintptr) (errno unix.Errno, handled int) {
	t.Helper()
	var waiting atomic.Bool
	check(t, func(a *app) {
		a.sigaction(linux.SIGUSR1, flags, 0, func(*app, int, linux.SignalInfo) { handled++ })
		pid := a.fork(func(a *app) {
			for !waiting.Load() {
				a.sleep(time.Millisecond)
			}
			a.asleep(1)
			a.kill(1, linux.SIGURG)  // no effect
			a.kill(1, linux.SIGCONT) // likewise
			a.sleep(10 * time.Millisecond)
			a.asleep(1)
			a.kill(1, linux.SIGUSR1)
			a.sleep(10 * time.Millisecond)
			a.asleep(1) // in the call that was restarted, or in wait4
			a.kill(1, linux.SIGUSR2)
		})
		last := linux.Signal(0)
		a.sigaction(linux.SIGUSR2, 0, 0, func(_ *app, sig int, _ linux.SignalInfo) { last = linux.Signal(sig) })
		v := args(a)
		waiting.Store(true)
		_, errno = a.syscall(nr, v...)
		if handled == 1 && last == linux.SIGUSR2 {
			handled = 2 // it was restarted after the first handler
		}
		a.kill(pid, linux.SIGKILL)
		for {
			if _, _, e := a.wait4(-1, 0); e == 0 {
				break
			}
		}
	})
	return errno, handled
}

func TestRestart(t *testing.T) {
	pipe := func(a *app) []uintptr {
		a.must(unix.SYS_PIPE2, uintptr(scratch), 0)
		return []uintptr{uintptr(a.load32(scratch)), uintptr(scratch2), 1}
	}
	sleep := func(a *app) []uintptr {
		a.store64(scratch2, 100, 0)
		return []uintptr{uintptr(scratch2), 0}
	}
	for _, test := range []struct {
		name     string
		flags    uint64
		nr       uintptr
		args     func(*app) []uintptr
		restarts bool
	}{
		{"read", 0, unix.SYS_READ, pipe, false},
		{"read-restart", linux.SA_RESTART, unix.SYS_READ, pipe, true},
		{"nanosleep", 0, unix.SYS_NANOSLEEP, sleep, false},
		{"nanosleep-restart", linux.SA_RESTART, unix.SYS_NANOSLEEP, sleep, false},
		{"sigsuspend-restart", linux.SA_RESTART, unix.SYS_RT_SIGSUSPEND, func(a *app) []uintptr {
			a.store64(scratch2, 0)
			return []uintptr{uintptr(scratch2), 8}
		}, false},
		{"ppoll-restart", linux.SA_RESTART, unix.SYS_PPOLL, func(a *app) []uintptr { return []uintptr{0, 0, 0, 0, 0} }, false},
		{"futex", 0, unix.SYS_FUTEX, func(a *app) []uintptr {
			a.store32(shared, 0)
			return []uintptr{uintptr(shared), linux.FUTEX_WAIT, 0, 0}
		}, false},
		{"futex-restart", linux.SA_RESTART, unix.SYS_FUTEX, func(a *app) []uintptr {
			a.store32(shared, 0)
			return []uintptr{uintptr(shared), linux.FUTEX_WAIT, 0, 0}
		}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			errno, handled := restartTest(t, test.flags, test.nr, test.args)
			want := 1
			if test.restarts {
				want = 2
			}
			if errno != unix.EINTR || handled != want {
				t.Errorf("%v after %d handlers, want EINTR after %d", errno, handled, want)
			}
		})
	}
}

// A sleep that a stop interrupts lasts as long as it should, not longer.
func TestRestartBlock(t *testing.T) {
	check(t, func(a *app) {
		pid := a.fork(func(a *app) {
			if errno := a.sleep(60 * time.Millisecond); errno != 0 {
				a.exit(1)
			}
		})
		a.asleep(pid)
		a.kill(pid, linux.SIGSTOP)
		a.kill(pid, linux.SIGCONT)
		if _, status, errno := a.wait4(pid, 0); status != 0 || errno != 0 {
			t.Errorf("status %#x, %v", status, errno)
		}
	})
}

func TestSigsuspendMask(t *testing.T) {
	var during, after linux.SignalSet
	check(t, func(a *app) {
		blocked := linux.MakeSignalSet(linux.SIGUSR1, linux.SIGUSR2)
		a.sigmask(linux.SIG_SETMASK, blocked)
		a.sigaction(linux.SIGUSR1, 0, 0, func(a *app, _ int, _ linux.SignalInfo) { during = a.sigmask(linux.SIG_BLOCK, 0) })
		a.kill(1, linux.SIGUSR1)
		a.store64(scratch3, uint64(linux.SignalSetOf(linux.SIGUSR2)))
		if _, errno := a.syscall(unix.SYS_RT_SIGSUSPEND, uintptr(scratch3), 8); errno != unix.EINTR {
			t.Errorf("sigsuspend: %v", errno)
		}
		after = a.sigmask(linux.SIG_BLOCK, 0)
	})
	if during != linux.MakeSignalSet(linux.SIGUSR1, linux.SIGUSR2) || after != linux.MakeSignalSet(linux.SIGUSR1, linux.SIGUSR2) {
		t.Errorf("mask %x in the handler, %x after", during, after)
	}
}

// A mask for the time of a call does not outlast it.
func TestTemporaryMask(t *testing.T) {
	handled := 0
	check(t, func(a *app) {
		a.sigaction(linux.SIGUSR1, 0, 0, func(*app, int, linux.SignalInfo) { handled++ })
		a.sigmask(linux.SIG_SETMASK, linux.SignalSetOf(linux.SIGUSR1))
		a.kill(1, linux.SIGUSR1)
		a.store64(scratch2, 0, 0) // no time
		a.store64(scratch3, 0)    // no signals
		a.must(unix.SYS_PPOLL, 0, 0, uintptr(scratch2), uintptr(scratch3), 8)
		if handled != 0 {
			t.Errorf("a call that did not wait let a signal in")
		}
		if m := a.sigmask(linux.SIG_BLOCK, 0); m != linux.SignalSetOf(linux.SIGUSR1) {
			t.Errorf("mask %x after the call", m)
		}
	})
}

func TestSigtimedwait(t *testing.T) {
	check(t, func(a *app) {
		set := linux.MakeSignalSet(linux.SIGUSR1, 40)
		a.sigmask(linux.SIG_BLOCK, set)
		wait := func(d time.Duration) (uintptr, unix.Errno) {
			a.store64(scratch, uint64(set))
			a.store64(scratch2, uint64(d/time.Second), uint64(d%time.Second))
			return a.syscall(unix.SYS_RT_SIGTIMEDWAIT, uintptr(scratch), uintptr(scratch3), uintptr(scratch2), 8)
		}
		if _, errno := wait(0); errno != unix.EAGAIN {
			t.Errorf("nothing pending: %v", errno)
		}
		if _, errno := wait(time.Millisecond); errno != unix.EAGAIN {
			t.Errorf("nothing in time: %v", errno)
		}
		a.kill(1, 40)
		a.kill(1, linux.SIGUSR1)
		for _, want := range []uintptr{uintptr(linux.SIGUSR1), 40} {
			if sig, errno := wait(time.Second); sig != want || errno != 0 {
				t.Errorf("got %d, %v; want %d", sig, errno, want)
			}
		}
		pid := a.fork(func(a *app) { a.sleep(10 * time.Millisecond); a.kill(1, 40) })
		if sig, errno := wait(20 * time.Second); sig != 40 || errno != 0 {
			t.Errorf("got %d, %v; want 40", sig, errno)
		}
		a.wait4(pid, 0)
		// SIGCHLD is ignored by default, and does not interrupt; a handler does.
		a.sigaction(linux.SIGUSR2, linux.SA_RESTART, 0, func(*app, int, linux.SignalInfo) {})
		pid = a.fork(func(a *app) { a.sleep(10 * time.Millisecond); a.kill(1, linux.SIGUSR2) })
		if _, errno := wait(20 * time.Second); errno != unix.EINTR {
			t.Errorf("with a handler: %v", errno)
		}
		a.wait4(pid, 0)
		if m := a.sigmask(linux.SIG_BLOCK, 0); m != set {
			t.Errorf("mask %x, want %x", m, set)
		}
	})
}

func TestAltStack(t *testing.T) {
	const stack, size = memory + 65536, 16384
	check(t, func(a *app) {
		set := func(s linux.SignalStack) unix.Errno {
			b := make([]byte, s.SizeBytes())
			s.MarshalBytes(b)
			a.write(scratch, b)
			_, errno := a.syscall(unix.SYS_SIGALTSTACK, uintptr(scratch), 0)
			return errno
		}
		get := func() (s linux.SignalStack) {
			a.must(unix.SYS_SIGALTSTACK, 0, uintptr(scratch))
			s.UnmarshalBytes(a.read(scratch, s.SizeBytes()))
			return s
		}
		if f := get().Flags; f != linux.SS_DISABLE {
			t.Errorf("flags %#x at first", f)
		}
		if errno := set(linux.SignalStack{Addr: uint64(stack), Size: 100}); errno != unix.ENOMEM {
			t.Errorf("a small stack: %v", errno)
		}
		if errno := set(linux.SignalStack{Addr: uint64(stack), Size: size, Flags: 8}); errno != unix.EINVAL {
			t.Errorf("bad flags: %v", errno)
		}
		for _, flags := range []uint32{0, linux.SS_AUTODISARM} {
			if errno := set(linux.SignalStack{Addr: uint64(stack), Size: size, Flags: flags}); errno != 0 {
				t.Fatal(errno)
			}
			ran := false
			a.sigaction(linux.SIGUSR1, linux.SA_ONSTACK, 0, func(a *app, _ int, _ linux.SignalInfo) {
				ran = true
				if sp := hostarch.Addr(a.ac.Stack()); sp < stack || sp > stack+size {
					t.Errorf("stack pointer %v", sp)
				}
				errno := set(linux.SignalStack{Flags: linux.SS_DISABLE})
				if flags == 0 && (errno != unix.EPERM || get().Flags != linux.SS_ONSTACK) {
					t.Errorf("in use: %v, flags %#x", errno, get().Flags)
				}
				if flags != 0 && errno != 0 {
					t.Errorf("disarmed: %v", errno)
				}
			})
			a.kill(1, linux.SIGUSR1)
			if s := get(); !ran || s.Addr != uint64(stack) || s.Flags != flags {
				t.Errorf("after the handler (%v): %+v", ran, s)
			}
		}
	})
}

func TestStopContinue(t *testing.T) {
	var infos []linux.SignalInfo
	check(t, func(a *app) {
		a.sigaction(linux.SIGCHLD, linux.SA_RESTART, 0, func(_ *app, _ int, i linux.SignalInfo) { infos = append(infos, i) })
		pid := a.fork(func(a *app) { a.spin(func() bool { return false }) })
		wait := func(want uint32, what string) {
			for {
				p, status, errno := a.wait4(-1, linux.WUNTRACED|linux.WCONTINUED)
				if errno == unix.EINTR {
					continue
				}
				if p != pid || status != want || errno != 0 {
					t.Errorf("%s: pid %d, status %#x, %v; want %d, %#x", what, p, status, errno, pid, want)
				}
				return
			}
		}
		a.kill(pid, linux.SIGSTOP)
		wait(linux.WaitStatusStopped(linux.SIGSTOP), "stopped")
		if p, _, errno := a.wait4(-1, linux.WUNTRACED|linux.WNOHANG); p != 0 || errno != 0 {
			t.Errorf("reported twice: %d, %v", p, errno)
		}
		a.kill(pid, linux.SIGTERM) // has to wait
		a.sleep(10 * time.Millisecond)
		if p, _, _ := a.wait4(-1, linux.WNOHANG); p != 0 {
			t.Errorf("a stopped process ended")
		}
		a.kill(pid, linux.SIGCONT)
		// Continued and killed follow each other; the first may be missed.
		a.sleep(20 * time.Millisecond)
		wait(uint32(linux.SIGTERM), "terminated")

		pid = a.fork(func(a *app) { a.spin(func() bool { return false }) })
		a.kill(pid, linux.SIGTSTP) // in a group that nobody could continue: no effect
		a.must(unix.SYS_SETPGID, uintptr(pid), 0)
		a.sleep(10 * time.Millisecond)
		a.kill(pid, linux.SIGTSTP)
		wait(linux.WaitStatusStopped(linux.SIGTSTP), "stopped by SIGTSTP")
		a.kill(pid, linux.SIGCONT)
		wait(linux.WaitStatusContinued, "continued")
		a.kill(pid, linux.SIGSTOP)
		wait(linux.WaitStatusStopped(linux.SIGSTOP), "stopped again")
		a.kill(pid, linux.SIGKILL)
		wait(uint32(linux.SIGKILL), "killed while stopped")
	})
	codes := map[int32]bool{}
	for _, i := range infos {
		codes[i.Code] = true
	}
	for _, c := range []int32{linux.CLD_STOPPED, linux.CLD_CONTINUED, linux.CLD_KILLED} {
		if !codes[c] {
			t.Errorf("no SIGCHLD with code %d", c)
		}
	}
}

// A process that does not let itself be interrupted ends when it is killed, but not while
// another one needs its memory.
func TestKillDeaf(t *testing.T) {
	old := kernel.SetKillDelay(10 * time.Millisecond)
	defer kernel.SetKillDelay(old)
	status := run(t, func(a *app) {
		for _, f := range []func(*app){
			(*app).block,
			func(a *app) { a.thread((*app).block); a.thread((*app).block); a.block() },
			func(a *app) { a.thread((*app).block); a.sleep(time.Hour) },
			func(a *app) { a.deaf = true; a.sleep(time.Hour) },
		} {
			pid := a.fork(f)
			a.sleep(10 * time.Millisecond)
			a.kill(pid, linux.SIGKILL)
			if p, status, errno := a.wait4(pid, 0); p != pid || status != uint32(linux.SIGKILL) || errno != 0 {
				t.Errorf("killed: pid %d, status %#x, %v; want %d", p, status, errno, pid)
			}
		}
		// Threads end as well, one of which makes the others end.
		pid := a.fork(func(a *app) { a.thread((*app).block); a.sleep(10 * time.Millisecond); a.exit(5) })
		if p, status, errno := a.wait4(pid, 0); p != pid || status != 5<<8 || errno != 0 {
			t.Errorf("exit_group: pid %d, status %#x, %v; want %d", p, status, errno, pid)
		}

		pid = a.clone(linux.CLONE_VM|uintptr(linux.SIGCHLD), (*app).block)
		a.sleep(10 * time.Millisecond)
		a.kill(pid, linux.SIGKILL)
		a.sleep(100 * time.Millisecond)
		if p, _, errno := a.wait4(pid, linux.WNOHANG); p != 0 || errno != 0 {
			t.Errorf("memory that is needed: pid %d, %v", p, errno)
		}
		a.exit(6) // and so does the other user
	})
	if status != 6<<8 {
		t.Errorf("status %#x", status)
	}
}

// A signal to a process goes to a thread that does not block it, also when that
// changes later.
func TestProcessSignal(t *testing.T) {
	var by atomic.Int32
	check(t, func(a *app) {
		a.sigaction(linux.SIGUSR1, 0, 0, func(a *app, _ int, _ linux.SignalInfo) { by.Store(a.task.TID()) })
		var ready atomic.Bool
		tid := a.thread(func(a *app) {
			ready.Store(true)
			a.spin(func() bool { return by.Load() != 0 })
		})
		a.sigmask(linux.SIG_BLOCK, linux.SignalSetOf(linux.SIGUSR1))
		for !ready.Load() {
			a.must(unix.SYS_SCHED_YIELD)
		}
		a.kill(1, linux.SIGUSR1)
		for by.Load() == 0 {
			a.sleep(time.Millisecond)
		}
		if by.Load() != int32(tid) {
			t.Errorf("thread %d took it, want %d", by.Load(), tid)
		}
	})
}

func TestKillPermission(t *testing.T) {
	check(t, func(a *app) {
		if errno := a.kill(99, 0); errno != unix.ESRCH {
			t.Errorf("no such process: %v", errno)
		}
		if errno := a.kill(1, 65); errno != unix.EINVAL {
			t.Errorf("no such signal: %v", errno)
		}
		if errno := a.kill(-99, 0); errno != unix.ESRCH {
			t.Errorf("no such group: %v", errno)
		}
		if errno := a.kill(0, 0); errno != 0 {
			t.Errorf("own group: %v", errno)
		}
		if errno := a.kill(-1, 0); errno != unix.ESRCH {
			t.Errorf("all others, but there are none: %v", errno)
		}
		if a.task.Creds().EUID != 0 {
			return
		}
		pid := a.fork(func(a *app) {
			a.must(unix.SYS_SETRESUID, 1000, 1000, 1000)
			if errno := a.kill(1, linux.SIGTERM); errno != unix.EPERM {
				a.exit(1)
			}
			if errno := a.kill(1, linux.SIGCONT); errno != 0 { // in the same session
				a.exit(2)
			}
		})
		if _, status, _ := a.wait4(pid, 0); status != 0 {
			t.Errorf("child: %#x", status)
		}
	})
}
