package systrap

import (
	"context"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// opPUSHFQ is the instruction that would push the flag of single-stepping.
const opPUSHFQ = 0x9c

// step has the thread tid of a stub execute one instruction after the other until stop is
// called. before is called before each, and not while the thread goes on.
func step(t *testing.T, tid int, before func(rip uint64)) (stop func()) {
	quit, ended, ready := make(chan struct{}), make(chan struct{}), make(chan error)
	request := func(request int, sig unix.Signal) error {
		_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), 0, uintptr(sig), 0, 0)
		if errno != 0 {
			return errno
		}
		return nil
	}
	go func() {
		defer close(ended)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := unix.PtraceSeize(tid)
		if err == nil {
			err = unix.PtraceInterrupt(tid)
		}
		ready <- err
		if err != nil {
			return
		}
		pushed := false
		for {
			var status unix.WaitStatus
			if _, err := unix.Wait4(tid, &status, unix.WALL, nil); err == unix.EINTR {
				continue
			} else if err != nil || !status.Stopped() {
				t.Errorf("wait4: status %#x, %v", status, err)
				return
			}
			sig := unix.Signal(0)
			if status>>16 == 0 && status.StopSignal() != unix.SIGTRAP {
				sig = status.StopSignal()
			}
			select {
			case <-quit:
				if err := request(unix.PTRACE_DETACH, sig); err != nil {
					t.Errorf("PTRACE_DETACH: %v", err)
				}
				return
			default:
			}
			var regs unix.PtraceRegs
			if err := unix.PtraceGetRegs(tid, &regs); err != nil {
				t.Errorf("PTRACE_GETREGS: %v", err)
				return
			}
			var b [8]byte
			if pushed {
				unix.PtracePeekData(tid, uintptr(regs.Rsp), b[:])
				b[1] &^= 1
				unix.PtracePokeData(tid, uintptr(regs.Rsp), b[:])
			}
			unix.PtracePeekText(tid, uintptr(regs.Rip), b[:])
			// With a signal the handler comes first.
			if pushed = sig == 0 && b[0] == opPUSHFQ; sig == 0 && !pushed {
				before(regs.Rip)
			}
			if err := request(unix.PTRACE_SINGLESTEP, sig); err != nil {
				t.Errorf("PTRACE_SINGLESTEP: %v", err)
				return
			}
		}
	}()
	if err := <-ready; err != nil {
		t.Fatalf("ptrace of a thread of a stub: %v", err)
	}
	return func() { close(quit); <-ended }
}

// A thread that makes calls, by signals or without, is interrupted at every instruction of
// our text that it executes, by us or by somebody. No call is lost or made twice, no
// register changes, and there is an interrupt for each that was sent.
func TestSteps(t *testing.T) {
	for name, code := range checkers {
		t.Run(name+"/sent", func(t *testing.T) { testSteps(t, code, name == "call", true) })
		t.Run(name+"/stray", func(t *testing.T) { testSteps(t, code, name == "call", false) })
	}
}

func testSteps(t *testing.T, code func(*addressSpace) []byte, call, sending bool) {
	m := patchedManager(t, code)
	c := &threadContext{}
	defer c.Release()
	ac := arch.New()
	ac.SetIP(checkerStart)
	const key, stack, fs = 0x123456789, 0x7654321, 0x5000
	ac.Regs.R15, ac.Regs.Rsp, ac.Regs.Fs_base = key, stack, fs
	if _, _, err := c.Switch(context.Background(), m, ac, -1); err != nil {
		t.Fatal(err)
	}
	n := uint64(1)
	ac.SetReturn(uintptr(n ^ key))
	behind := uintptr(checkerIP)
	if !call {
		behind = checkerSyscall + syscallSize
	}

	// A thread that looks at its slot executes the same few instructions for long.
	old := maxSpins
	maxSpins = func() uint32 { return 4 }
	defer func() { maxSpins = old }()

	const gap = 25 // instructions from one interrupt to the next, at least
	var sent, seen atomic.Int64
	var over atomic.Bool
	rnd := rand.New(rand.NewPCG(1, 2))
	times, since := make(map[uint64]int), gap
	th := c.thread
	stop := step(t, th.tid, func(rip uint64) {
		since++
		if rip < uint64(m.as.at.text) || rip >= uint64(m.as.at.textEnd) || since < gap || rnd.IntN(1+4*times[rip]) > 0 {
			return
		}
		if sending && (over.Load() || seen.Load() < sent.Load()) {
			return // one at a time, so that they can be counted
		}
		times[rip]++
		since = 0
		if sending {
			sent.Add(1)
			c.Interrupt()
		} else {
			unix.Tgkill(m.as.pid, th.tid, unix.Signal(platform.SignalInterrupt))
		}
	})
	defer func() {
		stop()
		t.Logf("%d calls, interrupts at %d instructions, %d seen", n, len(times), seen.Load())
		if len(times) < 50 {
			t.Errorf("interrupts at no more than %d instructions", len(times))
		}
	}()

	random := rand.New(rand.NewPCG(3, 4))
	for deadline := time.Now().Add(4 * time.Second); !over.Load() || seen.Load() < sent.Load(); {
		if time.Now().After(deadline) {
			over.Store(true)
			if time.Now().After(deadline.Add(time.Minute)) {
				t.Fatalf("%d interrupts were sent and %d seen", sent.Load(), seen.Load())
			}
		}
		info, _, err := c.Switch(context.Background(), m, ac, -1)
		what := random.IntN(6)
		switch err {
		case platform.ErrContextInterrupt:
			seen.Add(1)
			if ac.IP() < checkerStart || ac.IP() >= checkerStart+98 {
				t.Fatalf("after %d calls an interrupt at %#x", n, ac.IP())
			}
		case nil:
			n++
			args := ac.SyscallArgs()
			if ac.SyscallNo() != 39 || args[0].Uint64() != n || args[1].Uint64() != n || args[2].Uint64() != n || ac.Regs.Rsp != stack || ac.IP() != behind {
				t.Fatalf("call %d is %d%v at %#x, RSP %#x", n, ac.SyscallNo(), args, ac.IP(), ac.Regs.Rsp)
			}
			ac.SetReturn(uintptr(n ^ key))
			if what == 0 {
				c.PrepareSleep()
			}
		default:
			t.Fatalf("after %d calls: %v, %v, at %#x, regs %+v", n, info, err, ac.IP(), ac.Regs)
		}
		if what < 3 {
			if err := c.PullFullState(m.as, ac); err != nil {
				t.Fatal(err)
			}
			r := &ac.Regs
			if r.R15 != key || r.Rsp != stack || r.Fs_base != fs || r.Gs_base != 0 || err == nil && (r.Rbx != n || r.Eflags&1 == 0) {
				t.Fatalf("after %d calls, %v: the full state is %+v", n, err, r)
			}
			r.Eflags &^= 1 << 8 // we have set it, by stepping
		}
		if call && ac.IP() == checkerIP && (err != nil || what < 3) {
			ac.SetIP(checkerNext) // where the trampoline would go on
		}
		if what == 1 {
			ac = ac.Fork()
			c.FullStateChanged()
		}
	}
}
