package systrap

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/cpuid"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
	"github.com/ringfence/ringfence/pkg/usermem"
	"github.com/ringfence/ringfence/pkg/usertrap"
)

// callChecker makes calls as patched code does, for ever. RBX counts them; it is in the
// first three arguments, and the last result must be RBX ^ R15. XMM0 is the same count,
// and flags must be as they were. It executes HLT when something is wrong.
func callChecker(as *addressSpace) []byte {
	b := []byte{
		0x48, 0xff, 0xc3, // 0: inc %rbx
		0x48, 0x89, 0xdf, // 3: mov %rbx, %rdi
		0x48, 0x89, 0xde, // 6: mov %rbx, %rsi
		0x66, 0x48, 0x0f, 0x6e, 0xc3, // 9: movq %rbx, %xmm0
		0x49, 0x89, 0xd8, // 14: mov %rbx, %r8
		0x48, 0x89, 0xda, // 17: mov %rbx, %rdx
		0xf9,                // 20: stc
		0xb8, 0x27, 0, 0, 0, // 21: mov $39, %eax
		0x48, 0x8d, 0x0d, 55, 0, 0, 0, // 26: lea 88(%rip), %rcx, as if behind a system call
		0x4c, 0x8d, 0x1d, 6, 0, 0, 0, // 33: lea 46(%rip), %r11
		0xff, 0x25, 44, 0, 0, 0, // 40: jmp *const(%rip)
		0x73, 0x28, // 46: jnc bad
		0x48, 0x89, 0xda, // 48: mov %rbx, %rdx
		0x4c, 0x31, 0xfa, // 51: xor %r15, %rdx
		0x48, 0x39, 0xd0, // 54: cmp %rdx, %rax
		0x75, 0x1d, // 57: jne bad
		0x66, 0x48, 0x0f, 0x7e, 0xc2, // 59: movq %xmm0, %rdx
		0x48, 0x39, 0xda, // 64: cmp %rbx, %rdx
		0x75, 0x13, // 67: jne bad
		0x48, 0x39, 0xdf, // 69: cmp %rbx, %rdi
		0x75, 0x0e, // 72: jne bad
		0x48, 0x39, 0xde, // 74: cmp %rbx, %rsi
		0x75, 0x09, // 77: jne bad
		0x49, 0x39, 0xd8, // 79: cmp %rbx, %r8
		0x75, 0x04, // 82: jne bad
		0xeb, 0xaa, // 84: jmp 0
		0xeb, 0xbd, // 86: jmp 21, which stands for the system call instruction
		0xf4, 0x90, // 88: bad: hlt
	}
	return binary.LittleEndian.AppendUint64(b, uint64(as.at.call)) // 90
}

// plainChecker is callChecker with a system call instruction.
func plainChecker(as *addressSpace) []byte {
	b := callChecker(as)
	copy(b[checkerSyscall-checkerStart:checkerNext-checkerStart], []byte{
		0x0f, 0x05, // 26: syscall
		0xeb, 0x10, // 28: jmp 46
	})
	return b
}

// checkers are both.
var checkers = map[string]func(*addressSpace) []byte{"call": callChecker, "syscall": plainChecker}

const (
	checkerSyscall = codeAddr + 26

	checkerStart = codeAddr
	checkerNext  = codeAddr + 46 // where it goes on
	checkerIP    = codeAddr + 88 // what it says is behind the system call
)

// patchedManager is newManager for an AddressSpace that may run patched code.
func patchedManager(tb testing.TB, code func(as *addressSpace) []byte) *manager {
	tb.Helper()
	m := newManager(tb, nil)
	m = newManager(tb, code(m.as))
	m.as.table.Store(usertrap.NewTable(uint64(m.as.at.call), &usertrap.Stats{}))
	return m
}

// A thread makes calls while it is interrupted all the time, and the Sentry asks for all
// of its state, replaces it, or moves it to another thread of the stub. No call is lost or
// made twice, no register changes, and there is an interrupt for each that was sent.
func TestCallStorm(t *testing.T) { testStorm(t, false) }

// The same with calls that are signals.
func TestSyscallStorm(t *testing.T) { testStorm(t, true) }

func testStorm(t *testing.T, plain bool) {
	for _, storm := range []bool{false, true} {
		for _, mode := range []string{"call", "pull", "replace", "rebind", "mixed"} {
			name := mode
			if storm {
				name += "/storm"
			}
			t.Run(name, func(t *testing.T) { testCallStorm(t, plain, mode, storm) })
		}
	}
}

func testCallStorm(t *testing.T, plain bool, mode string, storm bool) {
	code, behind := callChecker, uintptr(checkerIP)
	if plain {
		code, behind = plainChecker, checkerSyscall+syscallSize
	}
	m := patchedManager(t, code)
	other := patchedManager(t, code)
	rnd := rand.New(rand.NewPCG(7, 8))
	c := &threadContext{}
	defer c.Release()
	ac := arch.New()
	ac.SetIP(checkerStart)
	const key, stack = 0x123456789, 0x7654321
	ac.Regs.R15, ac.Regs.Rsp = key, stack

	var sent, seen atomic.Int64
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for n := int64(0); storm; n++ {
			select {
			case <-stop:
				return
			default:
			}
			// One at a time, so that they can be counted.
			if seen.Load() >= sent.Load() {
				sent.Add(1)
				c.Interrupt()
			}
			if n%16 == 0 {
				time.Sleep(time.Microsecond)
			}
		}
	}()
	defer func() { close(stop); <-done }()

	call := uint64(0)
	deadline := time.Now().Add(700 * time.Millisecond)
	lastSeen, stalled := int64(0), 0
	for n := 0; time.Now().Before(deadline); n++ {
		info, _, err := c.Switch(context.Background(), m, ac, -1)
		switch err {
		case platform.ErrContextInterrupt:
			seen.Add(1)
			if ac.IP() < checkerStart || ac.IP() >= checkerStart+98 {
				t.Fatalf("after %d calls an interrupt at %#x", call, ac.IP())
			}
			if ac.IP() == checkerIP {
				ac.SetIP(checkerNext)
			}
			continue
		case nil:
		default:
			t.Fatalf("after %d calls: %v, %v, at %#x, regs %+v", call, info, err, ac.IP(), ac.Regs)
		}
		call++
		args := ac.SyscallArgs()
		if ac.SyscallNo() != 39 || args[0].Uint64() != call || args[1].Uint64() != call || args[2].Uint64() != call || ac.Regs.Rsp != stack || ac.IP() != behind {
			t.Fatalf("call %d is %d%v at %#x, RSP %#x", call, ac.SyscallNo(), args, ac.IP(), ac.Regs.Rsp)
		}
		ac.SetReturn(uintptr(call ^ key))
		if storm {
			if s := seen.Load(); s != lastSeen || sent.Load() == s {
				lastSeen, stalled = s, 0
			} else if stalled++; stalled > 100000 {
				t.Fatalf("%d interrupts were sent and %d seen", sent.Load(), seen.Load())
			}
		}
		what := mode
		if mode == "mixed" {
			what = []string{"call", "call", "call", "pull", "replace", "rebind"}[rnd.IntN(6)]
		}
		switch what {
		case "pull", "replace", "rebind":
			if what == "rebind" {
				// To the other AddressSpace and back: all must have been saved.
				if err := c.bind(other.as); err != nil {
					t.Fatal(err)
				}
			} else if err := c.PullFullState(m.as, ac); err != nil {
				t.Fatal(err)
			}
			if ac.Regs.Rbx != call || ac.Regs.R15 != key || ac.Regs.Eflags&1 == 0 || ac.IP() != behind {
				t.Fatalf("call %d: the full state is %+v", call, ac.Regs)
			}
			// The platform goes on where the trampoline would, not at IP.
			ac.SetIP(checkerNext)
			if what == "replace" {
				ac = ac.Fork()
				c.FullStateChanged()
			}
		}
	}
	if storm && seen.Load() == 0 {
		t.Error("there was no interrupt")
	}
	t.Logf("%d calls, %d interrupts", call, seen.Load())
}

// setNT sets a flag with which there is no IRETQ, and another. RSP is the address of
// memory.
var setNT = []byte{
	0x68, 0x02, 0x46, 0x00, 0x00, // push $0x4602: NT, DF, IF
	0x9d, // popf
}

// A thread that has made a call, by a signal or without, goes on with any state that there
// is, and has all of it, even if it is interrupted on the way.
func TestAnyState(t *testing.T) {
	for name, code := range checkers {
		t.Run(name, func(t *testing.T) { testAnyState(t, code, name == "call", false) })
		t.Run(name+"/storm", func(t *testing.T) { testAnyState(t, code, name == "call", true) })
	}
}

func testAnyState(t *testing.T, code func(*addressSpace) []byte, calls, storm bool) {
	m := patchedManager(t, func(as *addressSpace) []byte { return append(slices.Clone(setNT), code(as)...) })
	rnd := rand.New(rand.NewPCG(9, 10))
	c := &threadContext{}
	defer c.Release()
	interrupts := 0
	// next returns the next stop that is not an interrupt, and calls interrupted at
	// those.
	next := func(ac *arch.Context64, interrupted func()) (*linux.SignalInfo, error) {
		for {
			info, _, err := c.Switch(context.Background(), m, ac, -1)
			if err != platform.ErrContextInterrupt {
				return info, err
			}
			interrupts++
			interrupted()
		}
	}
	// fill gives ac a state that goes on to HLT.
	fill := func(ac *arch.Context64) {
		for _, r := range scRegisters(&ac.Regs) {
			*r = rnd.Uint64()
		}
		const single = 1 << 8
		ac.Regs.Eflags &^= single
		ac.Regs.Fs_base = rnd.Uint64() >> 20
		ac.SetIP(codeAddr + uintptr(len(setNT)) + 88)
		if !ac.SanitizeRegs() {
			t.Fatal("SanitizeRegs")
		}
	}
	fillFP := func(ac *arch.Context64) {
		fp := ac.FloatingPointData()
		for i := 160; i < 416; i++ { // XMM registers
			fp[i] = byte(rnd.Uint32())
		}
		binary.LittleEndian.PutUint16(fp, 0x37f&^uint16(rnd.Uint32()&0x3f)) // FCW
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		rnd := rand.New(rand.NewPCG(11, 12))
		for storm {
			select {
			case <-stop:
				return
			default:
			}
			for range rnd.IntN(5000) {
				runtime.KeepAlive(rnd) // takes a moment
			}
			c.Interrupt()
		}
	}()
	defer func() {
		close(stop)
		<-done
		t.Logf("%d interrupts", interrupts)
		if storm && interrupts == 0 {
			t.Error("there was no interrupt")
		}
	}()
	rounds := 2000
	if storm {
		rounds = 4000 // few interrupts come when it matters
	}
	for n := range rounds {
		caller := arch.New()
		caller.SetIP(codeAddr)
		if n%2 == 1 {
			caller.SetIP(codeAddr + uintptr(len(setNT)))
		}
		caller.Regs.Rsp = uint64(m.as.at.hint) + pageSize
		c.FullStateChanged()
		if info, err := next(caller, func() {}); err != nil || c.thread.called != calls {
			t.Fatalf("%v, %+v; the code does not make its call: %+v", err, info, caller.Regs)
		}
		if n%3 == 0 {
			if err := c.PullFullState(m.as, caller); err != nil {
				t.Fatal(err)
			}
			const set = 1<<10 | 1<<14
			if got := caller.Regs.Eflags & set; (got == set) != (n%2 == 0) {
				t.Fatalf("flags are %#x", caller.Regs.Eflags)
			}
		}

		ac := arch.New()
		fill(ac)
		fillFP(ac)
		want := ac.Fork()
		c.FullStateChanged()
		if info, err := next(ac, func() {
			// Another one, or other general registers alone.
			fill(ac)
			if rnd.IntN(2) == 0 {
				if err := c.PullFullState(m.as, ac); err != nil {
					t.Fatal(err)
				}
				fillFP(ac)
				c.FullStateChanged()
				want = ac.Fork()
			}
			want.Regs = ac.Regs
		}); err != platform.ErrContextSignal || info.Signo != int32(linux.SIGSEGV) {
			t.Fatalf("%v, %+v, want SIGSEGV", err, info)
		}
		if err := c.PullFullState(m.as, ac); err != nil {
			t.Fatal(err)
		}
		const rf = 1 << 16 // a fault sets it
		want.Regs.Eflags |= rf
		if storm || !calls { // rt_sigreturn(2) does not change NT and ID
			const others = 1<<14 | 1<<21
			want.Regs.Eflags &^= others
			ac.Regs.Eflags &^= others
		}
		want.Regs.Orig_rax = noSyscall
		if diff := cmp.Diff(want.Regs, ac.Regs); diff != "" {
			t.Fatalf("registers (-want +got):\n%s", diff)
		}
		if !want.FloatingPointData().Equal(ac.FloatingPointData()) {
			t.Fatal("the floating point state is another")
		}
	}
}

// An interrupt is never lost: a thread that makes a call and then none any more stops for
// the one that is sent while it goes on.
func TestInterruptOnTheWay(t *testing.T) {
	for name, code := range checkers {
		t.Run(name, func(t *testing.T) {
			m := patchedManager(t, func(as *addressSpace) []byte {
				b := code(as)
				copy(b[checkerNext-checkerStart:], []byte{0xeb, 0xfe}) // jmp .
				return b
			})
			c := &threadContext{}
			defer c.Release()
			rnd := rand.New(rand.NewPCG(13, 14))
			for n := range 3000 {
				ac := arch.New()
				ac.SetIP(checkerStart)
				c.FullStateChanged()
				if _, _, err := c.Switch(context.Background(), m, ac, -1); err != nil {
					t.Fatal(err)
				}
				ac.SetReturn(1)
				done, wait := make(chan struct{}), rnd.IntN(3000)
				go func() {
					defer close(done)
					for range wait {
						runtime.KeepAlive(rnd) // takes a moment
					}
					c.Interrupt()
				}()
				watchdog := time.AfterFunc(time.Minute, func() { panic(fmt.Sprintf("interrupt %d was lost", n)) })
				_, _, err := c.Switch(context.Background(), m, ac, -1)
				watchdog.Stop()
				<-done
				if err != platform.ErrContextInterrupt {
					t.Fatal(err)
				}
			}
		})
	}
}

// Signals of which the Context knows nothing, such as an interrupt that comes late, change
// nothing: no call is lost.
func TestSignalsOfNobody(t *testing.T) {
	for _, whole := range []bool{false, true} {
		t.Run(fmt.Sprintf("whole=%t", whole), func(t *testing.T) {
			m := patchedManager(t, callChecker)
			c := &threadContext{}
			defer c.Release()
			ac := arch.New()
			ac.SetIP(checkerStart)
			const key = 0x123456789
			ac.Regs.R15 = key
			stop, done := make(chan struct{}), make(chan struct{})
			defer func() { close(stop); <-done }()
			call := uint64(0)
			for deadline := time.Now().Add(4 * time.Second); time.Now().Before(deadline); {
				if whole {
					c.saves = savesAhead
				}
				if info, _, err := c.Switch(context.Background(), m, ac, -1); err != nil {
					t.Fatalf("after %d calls: %v, %+v, at %#x, regs %+v", call, err, info, ac.IP(), ac.Regs)
				}
				call++
				if got := ac.SyscallArgs()[0].Uint64(); got != call {
					t.Fatalf("call %d is %d", call, got)
				}
				ac.SetReturn(uintptr(call ^ key))
				if call > 1 {
					continue
				}
				pid, tid := c.thread.as.pid, c.thread.tid
				go func() {
					defer close(done)
					rnd := rand.New(rand.NewPCG(15, 16))
					for {
						select {
						case <-stop:
							return
						default:
						}
						unix.Tgkill(pid, tid, unix.Signal(platform.SignalInterrupt))
						pause := time.Duration(1000 + rnd.IntN(7000))
						for start := time.Now(); time.Since(start) < pause; {
						}
					}
				}()
			}
			t.Logf("%d calls", call)
		})
	}
}

// A thread that only says that it has made a call is given up when its state is asked
// for.
func TestPullOfForgedCall(t *testing.T) {
	shorten(t)
	m := patchedManager(t, func(*addressSpace) []byte {
		return []byte{
			0xc7, 0x43, headerKind, kindCall, 0, 0, 0, // movl $kindCall, headerKind(%rbx)
			0xb8, stateSentry, 0, 0, 0, // mov $stateSentry, %eax
			0x87, 0x03, // xchg %eax, headerState(%rbx)
			0xeb, 0xfe, // jmp .
		}
	})
	c, ac := &threadContext{}, arch.New()
	defer c.Release()
	ac.SetIP(codeAddr)
	ac.Regs.Rbx = uint64(m.as.at.slots) + stackSize // the first slot's header
	if _, _, err := c.Switch(context.Background(), m, ac, -1); err != nil || !c.thread.called {
		t.Fatalf("%v, or no call", err)
	}
	if err := c.PullFullState(m.as, ac); !errors.Is(err, unix.ETIMEDOUT) {
		t.Errorf("%v, want ETIMEDOUT", err)
	}
}

// 32-bit code that faults goes on as 32-bit code.
func TestFaultIn32BitCode(t *testing.T) {
	code := []byte{
		0xb8, userDS, 0, 0, 0, // mov $userDS, %eax
		0x8e, 0xd8, // mov %eax, %ds
		0x6a, 0x23, // push $0x23
		0x68, 0, 0, 0, 0, // push $target
		0x48, 0xcb, // lretq
		0xa1, 0x00, 0x00, 0x00, 0x30, // target: mov 0x30000000, %eax; there is nothing
		0x90, 0x90, 0x90, 0x90, // of the address, in 64-bit code
	}
	binary.LittleEndian.PutUint32(code[10:], codeAddr+16)
	m := newManager(t, code)
	c, ac := &threadContext{}, arch.New()
	defer c.Release()
	ac.SetIP(codeAddr)
	ac.Regs.Rsp = uint64(m.as.at.hint) + pageSize
	for range 3 {
		_, at, err := c.Switch(context.Background(), m, ac, -1)
		if err != platform.ErrContextSignal || ac.Regs.Cs != 0x23 || ac.Fault.Addr != 0x30000000 || at != hostarch.Read {
			t.Fatalf("%v, access %v at %#x, CS %#x", err, at, ac.Fault.Addr, ac.Regs.Cs)
		}
	}
}

// Registers in their initial configuration are that in the full state, too, whatever was
// there before.
func TestFPStateNotInUse(t *testing.T) {
	off, size := cpuid.Native().XFeatureLayout(2) // AVX
	if size == 0 {
		t.Log("the CPU has no AVX, nor anything else that could be left")
		return
	}
	m := newManager(t, []byte{0xc5, 0xf8, 0x77, 0x0f, 0x05}) // vzeroupper; syscall
	c, ac := &threadContext{}, arch.New()
	defer c.Release()
	ac.SetIP(codeAddr)
	fp := ac.FloatingPointData()
	fp[fpHeader] |= 1 << 2
	copy(fp[off:], bytes.Repeat([]byte{0xaa}, size))
	c.FullStateChanged()
	if _, _, err := c.Switch(context.Background(), m, ac, -1); err != nil {
		t.Fatal(err)
	}
	if err := c.PullFullState(m.as, ac); err != nil {
		t.Fatal(err)
	}
	if got := fp[off : off+size]; !bytes.Equal(got, make([]byte, size)) {
		t.Errorf("%x", got)
	}
}

// A call that the stub says it has made, in a state where it cannot have, or with
// nonsense in its registers, harms nobody else; nor does one with another GS base.
func TestForgedCalls(t *testing.T) {
	shorten(t)
	check := witness(t)
	rnd := rand.New(rand.NewPCG(3, 4))
	m := patchedManager(t, callChecker)
	for range effort(300) {
		c, ac := &threadContext{}, arch.New()
		for _, r := range scRegisters(&ac.Regs) {
			*r = rnd.Uint64()
		}
		ac.Regs.Eflags = 0x202
		ac.Regs.Rcx = []uint64{0, codeAddr, 1 << 63, rnd.Uint64(), uint64(m.as.at.makeCall)}[rnd.IntN(5)]
		ac.Regs.R11 = []uint64{0, codeAddr, 1 << 63, rnd.Uint64(), uint64(m.as.at.makeCall), uint64(m.as.at.call)}[rnd.IntN(6)]
		ac.SetIP(m.as.at.call + uintptr(rnd.IntN(int(m.as.at.callEnd-m.as.at.call))))
		for range 3 {
			err := bounded(t, c, m, ac)
			if isContextError(err) {
				break
			}
			if rnd.IntN(2) == 0 {
				if err := c.PullFullState(m.as, ac); err != nil {
					break
				}
			}
			ac.SetReturn(uintptr(rnd.Uint64()))
		}
		c.Release()
		if m.as.check() != nil {
			m = patchedManager(t, callChecker)
		}
		check()
	}
}

// A thread that has made a call and is never answered uses no CPU, and goes when
// its AddressSpace does.
func TestUnansweredCall(t *testing.T) {
	m := patchedManager(t, callChecker)
	c, ac := &threadContext{}, arch.New()
	ac.SetIP(checkerStart)
	if _, _, err := c.Switch(context.Background(), m, ac, -1); err != nil {
		t.Fatal(err)
	}
	unix.Tgkill(m.as.pid, c.thread.tid, unix.Signal(linux.SIGCHLD)) // it has to wait
	time.Sleep(20 * time.Millisecond)
	ac.SetReturn(uintptr(1))
	if _, _, err := c.Switch(context.Background(), m, ac, -1); err != nil {
		t.Fatal(err)
	}
	c.Release()
	// Another Context gets the thread.
	c, ac = &threadContext{}, arch.New()
	ac.SetIP(checkerStart)
	if _, _, err := c.Switch(context.Background(), m, ac, -1); err != nil || ac.SyscallArgs()[0].Uint64() != 1 {
		t.Fatalf("%v, %+v", err, ac.Regs)
	}
	m.as.Release()
	if err := c.PullFullState(m.as, ac); err == nil {
		t.Error("PullFullState of a thread that is gone")
	}
	c.Release()
}

// textManager is a MemoryManager whose code can be patched. It has one file for code and
// trampolines.
type textManager struct {
	platform.MemoryManager
	as      *addressSpace
	f       platformtest.MemFile
	size    uint64 // of what is used of the file
	maps    []platform.FileMapping
	patches map[hostarch.Addr][]byte // what was there
	state   platform.TextState
}

// newTextManager returns one of a new AddressSpace of p, with code at codeAddr.
func newTextManager(t *testing.T, p platform.Platform, code []byte) *textManager {
	t.Helper()
	as, _, err := p.NewAddressSpace(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(as.Release)
	m := &textManager{as: as.(*addressSpace), f: platformtest.NewMemFile(t, 1<<20), patches: map[hostarch.Addr][]byte{}}
	if _, err := m.MMap(t.Context(), memmap.MMapOpts{Addr: codeAddr, Length: hostarch.PageSize, Perms: hostarch.ReadExec}); err != nil {
		t.Fatal(err)
	}
	m.CopyOut(t.Context(), codeAddr, code, usermem.IOOpts{})
	return m
}

func (m *textManager) AddressSpace() platform.AddressSpace { return m.as }

func (m *textManager) MMap(_ context.Context, o memmap.MMapOpts) (hostarch.Addr, error) {
	fm := platform.FileMapping{Addr: o.Addr, File: m.f, Range: memmap.FileRange{Start: m.size, End: m.size + o.Length}, Access: o.Perms}
	m.size += o.Length
	m.maps = append(m.maps, fm)
	return o.Addr, m.as.MapFiles([]platform.FileMapping{fm})
}

// access calls f with the file, if all of b is in one mapping.
func (m *textManager) access(addr hostarch.Addr, b []byte, f func(fd int, b []byte, off int64) (int, error)) (int, error) {
	for _, fm := range m.maps {
		if addr >= fm.Addr && addr+hostarch.Addr(len(b)) <= fm.Addr+hostarch.Addr(fm.Range.Length()) {
			return f(m.f.FD(), b, int64(fm.Range.Start)+int64(addr-fm.Addr))
		}
	}
	return 0, unix.EFAULT
}

func (m *textManager) CopyIn(_ context.Context, addr hostarch.Addr, dst []byte, _ usermem.IOOpts) (int, error) {
	return m.access(addr, dst, unix.Pread)
}

func (m *textManager) CopyOut(_ context.Context, addr hostarch.Addr, src []byte, _ usermem.IOOpts) (int, error) {
	return m.access(addr, src, unix.Pwrite)
}

var _ platform.TextPatcher = (*textManager)(nil)

// PatchText implements platform.TextPatcher.PatchText: nothing runs meanwhile.
func (m *textManager) PatchText(ctx context.Context, addr hostarch.Addr, new []byte, start hostarch.Addr, code []byte) error {
	m.patches[addr] = code[addr-start:][:len(new)]
	_, err := m.CopyOut(ctx, addr, new, usermem.IOOpts{})
	return err
}

func (m *textManager) UnpatchText(ctx context.Context, addr hostarch.Addr) error {
	_, err := m.CopyOut(ctx, addr, m.patches[addr], usermem.IOOpts{})
	return err
}

func (m *textManager) RestoreText(ctx context.Context) error {
	for addr := range m.patches {
		if err := m.UnpatchText(ctx, addr); err != nil {
			return err
		}
	}
	return nil
}

func (m *textManager) TextState(create func() platform.TextState) platform.TextState {
	if m.state == nil {
		m.state = create()
	}
	return m.state
}

// hotCode makes system calls for ever; at hotGS, with the GS base RBX. What is before mov
// must be in the same page.
var hotCode = []byte{
	0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90,
	0xb8, 0x27, 0, 0, 0, // mov $39, %eax
	0x0f, 0x05, // syscall
	0xeb, 0xf7, // jmp
	0xf3, 0x48, 0x0f, 0xae, 0xdb, // wrgsbase %rbx
	0xeb, 0xf0, // jmp
}

const (
	hotNext = codeAddr + 23 // behind syscall
	hotGS   = codeAddr + 25
)

// heat lets c make calls until their instruction would have been patched, and reports
// whether the last one was made by a patch. Single steps do not count.
func (m *textManager) heat(t *testing.T, c *threadContext, ac *arch.Context64) bool {
	t.Helper()
	for call := 0; call < 200; {
		info, _, err := c.Switch(t.Context(), m, ac, -1)
		switch {
		case err == platform.ErrContextSignal && info.Signo == int32(linux.SIGTRAP):
			ac.ClearSingleStep()
			continue
		case err != nil || ac.SyscallNo() != 39 || ac.IP() != hotNext:
			t.Fatalf("call %d: %v, %+v, number %d at %#x", call, err, info, ac.SyscallNo(), ac.IP())
		}
		ac.SetReturn(uintptr(call))
		call++
	}
	return c.thread.called
}

// check checks what the code is like, and what was counted.
func (m *textManager) check(t *testing.T, p platform.Platform, patched bool, want platform.TextPatches) {
	t.Helper()
	code := make([]byte, len(hotCode))
	if _, err := m.CopyIn(t.Context(), codeAddr, code, usermem.IOOpts{}); err != nil || bytes.Equal(code, hotCode) == patched {
		t.Errorf("the code is % x, %v; patched: want %t", code, err, patched)
	}
	if diff := cmp.Diff(want, p.(platform.TextPatching).TextPatches()); diff != "" {
		t.Errorf("what was patched (-want +got):\n%s", diff)
	}
}

// Code is patched if that is allowed, and not otherwise.
func TestTextPatching(t *testing.T) {
	for name, allow := range map[string][]bool{"at first": nil, "allowed": {true}, "forbidden": {false}, "forbidden again": {true, false}} {
		t.Run(name, func(t *testing.T) {
			p, err := constructor{}.New(nil)
			if err != nil {
				t.Fatal(err)
			}
			var want platform.TextPatches
			on := false
			for _, on = range allow {
				p.(platform.TextPatching).SetTextPatching(on)
			}
			if on {
				want.Patched = 1
			}
			m, c, ac := newTextManager(t, p, hotCode), &threadContext{}, arch.New()
			defer c.Release()
			ac.SetIP(codeAddr)
			if got := m.heat(t, c, ac); got != on {
				t.Errorf("a call is made by a patch: %t", got)
			}
			m.check(t, p, on, want)
		})
	}
}

// Whatever makes patches impossible undoes those that there are, for all threads, is
// counted by its reason, and there are none any more.
func TestPatchesStop(t *testing.T) {
	for name, test := range map[string]struct {
		why  platform.TextRefusal
		stop func(m *textManager, c *threadContext, ac *arch.Context64)
	}{
		"asked for": {usertrap.Asked, func(_ *textManager, c *threadContext, _ *arch.Context64) { c.StopTextPatches() }},
		"GS set by the Sentry": {usertrap.SegmentGS, func(_ *textManager, _ *threadContext, ac *arch.Context64) {
			ac.Regs.Gs_base = codeAddr
		}},
		// It leads to memory that cannot be written.
		"GS set by the program": {usertrap.Trapped, func(_ *textManager, _ *threadContext, ac *arch.Context64) {
			ac.SetIP(hotGS)
			ac.Regs.Rbx = codeAddr
		}},
		"single step": {usertrap.SingleStep, func(_ *textManager, _ *threadContext, ac *arch.Context64) { ac.SetSingleStep() }},
		// As after fork, in a stub of a new zygote.
		"another stub": {usertrap.Moved, func(m *textManager, _ *threadContext, _ *arch.Context64) {
			m.state = usertrap.NewTable(uint64(m.as.at.call)+8, m.as.stats)
			m.as.table.Store(nil)
		}},
	} {
		for _, hot := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/hot=%t", name, hot), func(t *testing.T) {
				p, err := constructor{}.New(nil)
				if err != nil {
					t.Fatal(err)
				}
				p.(platform.TextPatching).SetTextPatching(true)
				m, c, ac := newTextManager(t, p, hotCode), &threadContext{}, arch.New()
				defer c.Release()
				ac.SetIP(codeAddr)
				var want platform.TextPatches
				if hot || test.why == usertrap.Trapped { // by a patch
					if !m.heat(t, c, ac) {
						t.Fatal("nothing is patched")
					}
					want.Patched = 1
					if err := c.PullFullState(m.as, ac); err != nil {
						t.Fatal(err)
					}
				}
				test.stop(m, c, ac)
				want.Stopped = map[platform.TextRefusal]uint64{test.why: 1}
				other, otherAC := &threadContext{}, arch.New()
				defer other.Release()
				otherAC.SetIP(codeAddr)
				if m.heat(t, c, ac) || m.heat(t, other, otherAC) {
					t.Error("afterwards calls are made by patches")
				}
				m.check(t, p, false, want)
			})
		}
	}
}
