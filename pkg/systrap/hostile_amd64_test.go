package systrap

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/bpf"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
	"github.com/ringfence/ringfence/pkg/sysmsg"
)

// bounded is Switch that is interrupted all the time. It fails the test if Switch
// returns what it must not.
func bounded(t *testing.T, c *threadContext, m *manager, ac *arch.Context64) error {
	t.Helper()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				c.Interrupt()
			}
		}
	}()
	_, _, err := c.Switch(context.Background(), m, ac, -1)
	close(stop)
	<-done
	if ce := new(platform.ContextError); err != nil && err != platform.ErrContextInterrupt && err != platform.ErrContextSignal && !errors.As(err, &ce) {
		t.Fatalf("Switch: %v", err)
	}
	return err
}

func isContextError(err error) bool { return errors.As(err, new(*platform.ContextError)) }

// witness is a Context in an AddressSpace of its own that must go on.
func witness(t *testing.T) (check func()) {
	m := newManager(t, syscallLoop)
	c, ac := &threadContext{}, arch.New()
	ac.SetIP(codeAddr)
	t.Cleanup(c.Release)
	return func() {
		t.Helper()
		for range 10 {
			_, _, err := c.Switch(context.Background(), m, ac, -1)
			if err == nil {
				return
			}
			if err != platform.ErrContextInterrupt {
				t.Fatalf("the witness gets %v", err)
			}
		}
		t.Fatal("the witness gets nothing but interrupts")
	}
}

// The application jumps to every byte of our text, with random registers and with
// some that make sense there. It gets signals, or ends itself.
func TestJumpIntoText(t *testing.T) {
	shorten(t)
	check := witness(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	var m *manager
	died := 0
	for round := range 3 {
		for off := 0; ; off++ {
			if m == nil {
				m = newManager(t, syscallLoop)
			}
			ip := m.as.at.text + uintptr(off)
			if ip >= m.as.at.textEnd {
				break
			}
			c, ac := &threadContext{}, arch.New()
			for _, r := range scRegisters(&ac.Regs) {
				switch rnd.IntN(4) {
				case 0:
					*r = rnd.Uint64()
				case 1:
					*r = uint64(m.as.at.slots) + rnd.Uint64N(chunkSize)&^7
				case 2:
					*r = uint64(rnd.UintN(512))
				case 3:
					*r = m.as.ro(int(rnd.UintN(roSize)))
				}
			}
			ac.Regs.Eflags = 0x202
			if round > 0 {
				// As in the middle of a request.
				ac.Regs.R13, ac.Regs.Rax = uint64(m.as.at.ro), []uint64{unix.SYS_MUNMAP, unix.SYS_MMAP, unix.SYS_CLONE}[rnd.IntN(3)]
			}
			if round > 1 {
				ac.Regs.Rbx = uint64(m.as.at.slots) + slotSize - headerSize
				ac.Regs.Rsp = uint64(m.as.at.slots) + uint64(theFrame.sp)
			}
			ac.SetIP(ip)
			var err error
			for range 3 {
				if err = bounded(t, c, m, ac); isContextError(err) {
					break
				}
			}
			c.Release()
			if isContextError(err) {
				m.as.Release()
				m = nil
				died++
			}
			check()
		}
	}
	t.Logf("%d stubs died", died)
}

// shorten makes the time short after which a thread that blocks the interrupt is
// given up.
func shorten(t *testing.T) {
	old := patience
	patience = 2
	t.Cleanup(func() { patience = old })
}

// scribbler is code that writes RAX, which it counts up, to every 8 bytes from RDI
// to RSI, again and again.
var scribbler = []byte{
	0x48, 0x89, 0xf9, // mov %rdi, %rcx
	0x48, 0x89, 0x01, // mov %rax, (%rcx)
	0x48, 0xff, 0xc0, // inc %rax
	0x48, 0x83, 0xe0, 0x07, // and $7, %rax
	0x48, 0x83, 0xc1, 0x08, // add $8, %rcx
	0x48, 0x39, 0xf1, // cmp %rsi, %rcx
	0x72, 0xed, // jb mov
	0xeb, 0xe8, // jmp
}

// One thread overwrites the slots, or only the headers or the hint page, while
// others make system calls and the Sentry maps and unmaps.
func TestScribble(t *testing.T) {
	shorten(t)
	check := witness(t)
	for _, test := range []struct {
		name       string
		start, end func(at layout) uintptr
	}{
		{"a header", func(at layout) uintptr { return at.slots + stackSize }, func(at layout) uintptr { return at.slots + slotSize }},
		{"a frame", func(at layout) uintptr { return at.slots + uintptr(theFrame.sp) }, func(at layout) uintptr { return at.slots + stackSize }},
		{"the hint page", func(at layout) uintptr { return at.hint }, func(at layout) uintptr { return at.hint + 8 }},
		{"all slots", func(at layout) uintptr { return at.slots }, func(at layout) uintptr { return at.slots + 2*slotSize }},
	} {
		t.Run(test.name, func(t *testing.T) {
			died := 0
			for range 8 {
				m := newManager(t, append(append([]byte{}, syscallLoop...), scribbler...))
				f := platformtest.NewMemFile(t, hostarch.PageSize)
				stop, done := make(chan struct{}), make(chan struct{})
				victim := &threadContext{}
				if err := victim.bind(m.as); err != nil { // the first slot
					t.Fatal(err)
				}
				go func() {
					defer close(done)
					c, ac := &threadContext{}, arch.New()
					defer c.Release()
					ac.SetIP(codeAddr + uintptr(len(syscallLoop)))
					ac.Regs.Rdi, ac.Regs.Rsi = uint64(test.start(m.as.at)), uint64(test.end(m.as.at))
					for {
						select {
						case <-stop:
							return
						default:
						}
						if isContextError(bounded(t, c, m, ac)) {
							return
						}
					}
				}()
				ac := arch.New()
				ac.SetIP(codeAddr)
				deadline := time.Now().Add(50 * time.Millisecond)
				for time.Now().Before(deadline) {
					if isContextError(bounded(t, victim, m, ac)) {
						died++
						break
					}
					if m.as.MapFile(0x10000000, f, memmap.FileRange{End: hostarch.PageSize}, hostarch.ReadWrite, false) == nil {
						m.as.Unmap(0x10000000, hostarch.PageSize)
					}
					ac = arch.New()
					ac.SetIP(codeAddr)
					check()
				}
				close(stop)
				<-done
				victim.Release()
				m.as.Release()
			}
			t.Logf("%d of 8 stubs died", died)
		})
	}
}

// A thread that returns from a signal of its own making, with all signals blocked,
// cannot be interrupted: its stub is given up after a time.
func TestInterruptBlocked(t *testing.T) { testInterruptBlocked(t, []byte{0xeb, 0xfe}) } // jmp .

// And if it wakes the Sentry all the time.
func TestInterruptBlockedAwake(t *testing.T) {
	testInterruptBlocked(t, []byte{
		0xb8, unix.SYS_FUTEX, 0, 0, 0, // mov $SYS_futex, %eax
		0x4c, 0x89, 0xf7, // mov %r14, %rdi
		0xbe, futexWake, 0, 0, 0, // mov $FUTEX_WAKE, %esi
		0xba, 0xff, 0xff, 0xff, 0x7f, // mov $0x7fffffff, %edx
		0x41, 0xff, 0xe7, // jmp *%r15
	})
}

func testInterruptBlocked(t *testing.T, code []byte) {
	shorten(t)
	// rt_sigreturn is let through from our text only: the frame is on the
	// application's stack, and says that all signals are blocked.
	m := newManager(t, code)
	f := platformtest.NewMemFile(t, hostarch.PageSize)
	const stack = 0x20000000
	if err := m.as.MapFile(stack, f, memmap.FileRange{End: hostarch.PageSize}, hostarch.ReadWrite, false); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1024)
	le := binary.LittleEndian
	uc := b
	sc := uc[ucContext:]
	var regs arch.Registers
	regs.Rip, regs.Rsp, regs.Eflags = codeAddr, stack+2048, 0x202
	// Where the text wakes the Sentry, and goes on at R12 if the word at RBX is 0.
	regs.R14 = uint64(m.as.at.slots) + stackSize + headerState
	regs.R15 = uint64(m.as.at.text + wakeOffset(t))
	regs.Rbx, regs.R12 = stack+3072, codeAddr
	for i, r := range scRegisters(&regs) {
		le.PutUint64(sc[8*i:], *r)
	}
	le.PutUint16(sc[scCS:], userCS)
	le.PutUint16(sc[scSS:], userDS)
	le.PutUint64(uc[ucMask:], ^uint64(0))
	le.PutUint64(uc[ucFlags:], 6)
	if _, err := unix.Pwrite(f.FD(), b, 0); err != nil {
		t.Fatal(err)
	}
	c, ac := &threadContext{}, arch.New()
	defer c.Release()
	ac.Regs.Rax, ac.Regs.Rsp = unix.SYS_RT_SIGRETURN, stack
	ac.SetIP(m.as.at.text + lastSyscall(t))
	start := time.Now()
	var err error
	for range 20 {
		if err = bounded(t, c, m, ac); isContextError(err) {
			break
		}
	}
	if !errors.Is(err, unix.ETIMEDOUT) {
		t.Fatalf("after %v: %v", time.Since(start), err)
	}
}

// wakeOffset is where the text makes a FUTEX_WAKE, and goes on in ·await.
func wakeOffset(t *testing.T) uintptr {
	text, err := textOf()
	if err != nil {
		t.Fatal(err)
	}
	i := bytes.Index(text.text, []byte{0x0f, 0x05, 0x31, 0xc9}) // syscall; xor %ecx, %ecx
	if i < 0 {
		t.Fatal("there is none")
	}
	return uintptr(i)
}

// A request that is not answered is given up, also if the application wakes the Sentry
// all the time.
func TestRequestAwake(t *testing.T) {
	m := newManager(t, nil)
	as := m.as
	as.reqMu.Lock()
	defer as.reqMu.Unlock()
	as.lastSeq, as.seq = as.seq, as.seq+1 // the one before again, but the thread cannot see that
	given, woken := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(woken)
		for {
			select {
			case <-given:
				return
			default:
				sysmsg.FutexWake(as.hintWord())
			}
		}
	}()
	if _, err := as.finish(2 * pollPeriod); !errors.Is(err, unix.ETIMEDOUT) {
		t.Errorf("finish: %v", err)
	}
	close(given)
	<-woken
	seq := word32(as.mem.region, requestSeq)
	seq.Store(as.seq)
	sysmsg.FutexWake(seq)
	if _, err := as.finish(0); err != nil {
		t.Errorf("finish, after the thread was told: %v", err)
	}
}

// lastSyscall is where the text's last system call instruction is. It makes any call.
func lastSyscall(t *testing.T) uintptr {
	text, err := textOf()
	if err != nil {
		t.Fatal(err)
	}
	for i := len(text.text) - 2; i >= 0; i-- {
		if text.text[i] == 0x0f && text.text[i+1] == 0x05 {
			return uintptr(i)
		}
	}
	t.Fatal("no system call in the text")
	return 0
}

// The filters let through what they must, from the text alone.
func TestFilters(t *testing.T) {
	const text, end = 0x7fff_fff0_0000, 0x7fff_fff0_0200
	app, err := buildFilter(applicationRules(), auditArch, text, end)
	if err != nil {
		t.Fatal(err)
	}
	caller, err := buildFilter(syscallThreadRules(), auditArch, text, end)
	if err != nil {
		t.Fatal(err)
	}
	for nr := range uint32(600) {
		for _, ip := range []uint64{text - 1, text, end - 1, end, text + 1<<32, 0x400000} {
			for _, a := range []uint32{auditArch, unix.AUDIT_ARCH_I386} {
				for _, args := range [][6]uint64{{}, {0, 1}, {0, 2}, {0, 128}, {cloneThread}, {cloneThread | 1<<32}, {unix.PR_SET_SYSCALL_USER_DISPATCH}} {
					inside := ip >= text && ip < end && a == auditArch
					wantApp := inside && (nr == unix.SYS_RT_SIGRETURN || nr == unix.SYS_FUTEX && args[1] <= 1)
					wantCaller := wantApp
					switch nr {
					case unix.SYS_MMAP, unix.SYS_MPROTECT, unix.SYS_MUNMAP, unix.SYS_LSEEK, unix.SYS_SIGALTSTACK, unix.SYS_SECCOMP, unix.SYS_EXIT_GROUP:
						wantCaller = inside
					case unix.SYS_CLONE:
						wantCaller = inside && args[0] == cloneThread
					case unix.SYS_PRCTL:
						wantCaller = inside && args[0] == unix.PR_SET_SYSCALL_USER_DISPATCH
					}
					d := &bpf.Data{Nr: nr, Arch: a, IP: ip, Args: args}
					for i, want := range []bool{wantApp, wantCaller} {
						r, err := []bpf.Program{app, caller}[i].Run(d)
						if err != nil {
							t.Fatal(err)
						}
						got := r.Action
						if (got == unix.SECCOMP_RET_ALLOW) != want || got != unix.SECCOMP_RET_ALLOW && got != unix.SECCOMP_RET_TRAP {
							t.Errorf("program %d gives %#x for %+v", i, got, d)
						}
					}
				}
			}
		}
	}
}

// A SIGSYS that does not say which system call was not made is an error, and no call that
// is left out.
func TestSIGSYSWithoutCause(t *testing.T) {
	m := newManager(t, []byte{0xeb, 0xfe}) // jmp .
	c, ac := &threadContext{}, arch.New()
	defer c.Release()
	ac.SetIP(codeAddr)
	if err := c.bind(m.as); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(20*time.Millisecond, func() { unix.Tgkill(m.as.pid, c.thread.tid, unix.SIGSYS) })
	_, _, err := c.Switch(context.Background(), m, ac, -1)
	if !isContextError(err) || !errors.Is(err, unix.ENOMEM) {
		t.Errorf("Switch: %v", err)
	}
}

// sentryCPU fails the test if this process, the Sentry, takes more than a part of the CPU
// time there is while attackers run, who give it nothing to do, and meanwhile does.
func sentryCPU(t *testing.T, attackers []*attacker, meanwhile func(until time.Time)) {
	t.Helper()
	cpu := func() time.Duration {
		var ru unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
			t.Fatal(err)
		}
		return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	}
	var wg sync.WaitGroup
	for _, a := range attackers {
		wg.Go(func() { a.c.Switch(context.Background(), a.m, a.ac, -1) })
	}
	start, begin := cpu(), time.Now()
	end := begin.Add(time.Second)
	meanwhile(end)
	time.Sleep(time.Until(end))
	used, period := cpu()-start, time.Since(begin)
	t.Logf("%v of CPU time in %v", used, period)
	if used > period/4 {
		t.Errorf("the Sentry takes %v of CPU time in %v while it only waits", used, period)
	}
	for _, a := range attackers {
		a.c.Interrupt()
	}
	wg.Wait()
}

// undo writes to the hint word, at RDI, what it was before the request under way, whose
// number is at RSI: as if none were ever done.
var undo = []byte{
	0x8b, 0x06, // mov (%rsi), %eax
	0xff, 0xc8, // dec %eax
	0x89, 0x07, // mov %eax, (%rdi)
	0xeb, 0xf8, // jmp
}

// While the application forges the hint word, requests take long or fail, and the Sentry
// takes next to no CPU time.
func TestSentryDoesNotSpinForRequests(t *testing.T) {
	for name, value := range map[string]uint64{"as before": 0, "0": 0, "the last number": maxSeq} {
		t.Run(name, func(t *testing.T) {
			m := newManager(t, slices.Concat(undo, poke))
			a := newAttacker(m)
			defer a.c.Release()
			a.ac.Regs.Rdi, a.ac.Regs.Rsi, a.ac.Regs.Rax = uint64(m.as.at.hint), m.as.ro(requestSeq), value
			if name != "as before" {
				a.ac.SetIP(codeAddr + uintptr(len(undo)))
			}
			f := platformtest.NewMemFile(t, hostarch.PageSize)
			sentryCPU(t, []*attacker{a}, func(until time.Time) {
				n := 0
				var err error
				for ; err == nil && time.Now().Before(until); n++ {
					time.Sleep(5 * time.Millisecond) // real requests take CPU time, too
					err = m.as.MapFile(0x10000000, f, memmap.FileRange{End: hostarch.PageSize}, hostarch.ReadWrite, false)
				}
				t.Logf("%d requests: %v", n, err)
			})
		})
	}
}

// While the application says that the slot of a thread in a patched call is the stub's, or
// nobody's, the Sentry, which asks for the thread's state or answers it, takes next to no
// CPU time.
func TestSentryDoesNotSpinForCalls(t *testing.T) {
	shorten(t)
	for _, state := range []uint64{sysmsg.Stub, sysmsg.StubSentryWaits, sysmsg.Errand + 1} {
		for _, pull := range []bool{true, false} {
			t.Run(fmt.Sprintf("state=%d/pull=%t", state, pull), func(t *testing.T) {
				var forge int
				m := patchedManager(t, func(as *addressSpace) []byte {
					b := callChecker(as)
					copy(b[checkerNext-checkerStart:], []byte{0xeb, 0xfe}) // jmp .
					forge = len(b)
					return append(b, poke...)
				})
				victim, forger := newAttacker(m), newAttacker(m)
				defer victim.c.Release()
				defer forger.c.Release()
				if victim.step(t); !victim.c.thread.called {
					t.Fatal("no call")
				}
				forger.ac.SetIP(codeAddr + uintptr(forge))
				forger.ac.Regs.Rdi, forger.ac.Regs.Rax = victim.c.thread.headerAddr()+headerState, state
				attackers := []*attacker{forger}
				if !pull {
					attackers = append(attackers, victim)
				}
				sentryCPU(t, attackers, func(until time.Time) {
					n := 0
					var err error
					for ; pull && err == nil && time.Now().Before(until); n++ {
						time.Sleep(5 * time.Millisecond) // each takes CPU time, too
						victim.c.partial, victim.c.thread.saved = true, false
						err = victim.c.PullFullState(m.as, victim.ac)
					}
					t.Logf("asked %d times: %v", n, err)
				})
			})
		}
	}
}
