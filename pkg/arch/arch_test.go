package arch

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
)

func TestSyscallArgument(t *testing.T) {
	a := SyscallArgument{Value: 0xfedcba9876543210}
	if a.Pointer() != 0xfedcba9876543210 || a.Int() != 0x76543210 || a.Uint() != 0x76543210 ||
		a.Int64() != -0x123456789abcdf0 || a.Uint64() != 0xfedcba9876543210 || a.SizeT() != 0xfedcba9876543210 || a.ModeT() != 0x3210 {
		t.Errorf("SyscallArgument %#x is read wrong", a.Value)
	}
	if v := (SyscallArgument{Value: math.MaxUint32}).Int(); v != -1 {
		t.Errorf("Int of 0xffffffff = %d, want -1", v)
	}
}

func TestAccessors(t *testing.T) {
	c := New()
	c.SetIP(0x1000)
	c.SetStack(0x2000)
	c.SetReturn(0x3000)
	if c.IP() != 0x1000 || c.Stack() != 0x2000 || c.Return() != 0x3000 {
		t.Errorf("IP %#x, stack %#x, return %#x", c.IP(), c.Stack(), c.Return())
	}
	if !c.SetTLS(0x4000) || c.TLS() != 0x4000 {
		t.Errorf("TLS = %#x", c.TLS())
	}
	if c.SingleStep() {
		t.Error("a new thread is single-stepped")
	}
	c.SetSingleStep()
	if !c.SingleStep() {
		t.Error("SetSingleStep has no effect")
	}
	c.ClearSingleStep()
	if c.SingleStep() {
		t.Error("ClearSingleStep has no effect")
	}
	if c.InSyscall() {
		t.Error("a new thread is in a system call")
	}
	if !c.SanitizeRegs() {
		t.Error("a new thread's registers are refused")
	}
}

func TestForkCopies(t *testing.T) {
	c := New()
	c.SetIP(1)
	n := c.Fork()
	if n.Regs != c.Regs || !n.fpu.Equal(c.fpu) {
		t.Error("Fork makes another state")
	}
	for i := range n.fpu {
		n.fpu[i] = 0xff
	}
	n.SetIP(2)
	if !c.fpu.Equal(NewFPState()) || c.IP() != 1 {
		t.Error("Fork shares state")
	}
}

func TestNewFPState(t *testing.T) {
	f := NewFPState()
	if err := f.Validate(); err != nil {
		t.Error(err)
	}
	if err := f[:len(f)-1].Validate(); err == nil {
		t.Error("a state that is too short is valid")
	}
	g := append(FPState(nil), f...)
	for i := range g {
		g[i] ^= 0x55
	}
	if f.Equal(g) || f.Equal(f[:len(f)-16]) {
		t.Error("different states are equal")
	}
	g.Sanitize()
	if err := g.Validate(); err != nil {
		t.Errorf("after Sanitize: %v", err)
	}
	copy(g, f)
	g.Reset()
	if !g.Equal(f) {
		t.Error("Reset gives another state than NewFPState")
	}
}

// Whatever bytes a state holds, it is valid once sanitized, and that changes
// nothing in a valid one.
func TestSanitizeRandom(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for range 2000 {
		f := NewFPState()
		for range rng.IntN(64) {
			f[rng.IntN(len(f))] = byte(rng.Uint32())
		}
		valid := f.Validate() == nil
		g := append(FPState(nil), f...)
		g.Sanitize()
		if err := g.Validate(); err != nil {
			t.Fatalf("after Sanitize: %v", err)
		}
		if valid && !g.Equal(f) {
			t.Fatal("Sanitize changes a valid state")
		}
	}
}

const (
	testStackBase = 0x7f0000000000
	testStackSize = 64 << 10
	testStackTop  = testStackBase + testStackSize
)

func sigUSR1() *linux.SignalInfo { return &linux.SignalInfo{Signo: int32(linux.SIGUSR1)} }

// A frame that does not fit is an error and changes nothing.
func TestSignalSetupErrors(t *testing.T) {
	ctx := context.Background()
	const restorer = 0x5000
	handler := linux.SigAction{Handler: 0x4000}
	onStack := linux.SigAction{Handler: 0x4000, Flags: linux.SA_ONSTACK}
	disabled := linux.SignalStack{Flags: linux.SS_DISABLE}
	for _, test := range []struct {
		name     string
		sp       uint64
		act      linux.SigAction
		alt      linux.SignalStack
		restorer uint64
	}{
		{"no stack", 0, handler, disabled, restorer},
		{"a stack that is too small", testStackBase + 100, handler, disabled, restorer},
		{"a kernel address", 0xffff800000001000, handler, disabled, restorer},
		{"an address that is not canonical", 0x8000000000000000, handler, disabled, restorer},
		{"no restorer", testStackTop, handler, disabled, 0},
		{"an alternate stack that is not mapped", testStackTop, onStack, linux.SignalStack{Addr: 0x10000, Size: 1 << 16}, restorer},
		{"an alternate stack at the end of memory", testStackTop, onStack, linux.SignalStack{Addr: math.MaxUint64 - 0xffff, Size: 0xffff}, restorer},
		{"an alternate stack that wraps", testStackTop, onStack, linux.SignalStack{Addr: math.MaxUint64 - 0xff, Size: 0xffff}, restorer},
	} {
		c := New()
		c.SetStack(uintptr(test.sp))
		want := c.Fork()
		alt := test.alt
		m := newMemory(testStackBase, testStackSize)
		err := c.SignalSetup(ctx, m, &test.act, sigUSR1(), &alt, 0, test.restorer)
		if !errors.Is(err, unix.EFAULT) {
			t.Errorf("%s: %v, want EFAULT", test.name, err)
		}
		if c.Regs != want.Regs || !c.fpu.Equal(want.fpu) || alt != test.alt {
			t.Errorf("%s: the thread has changed", test.name)
		}
		if !isZero(m.b) {
			t.Errorf("%s: memory was written", test.name)
		}
	}
}

func isZero(b []byte) bool {
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return true
}

// Handlers nest: on the stack, on the alternate stack, and back in order.
func TestNestedSignals(t *testing.T) {
	ctx := context.Background()
	m := newMemory(testStackBase, testStackSize)
	alt := linux.SignalStack{Addr: testStackBase, Size: testStackSize / 2}
	act := linux.SigAction{Handler: 0x4000, Flags: linux.SA_ONSTACK | linux.SA_SIGINFO}
	c := New()
	c.SetStack(testStackTop - 64)
	c.SetIP(0x1234)
	var states []*Context64
	for i := range linux.SignalSet(4) {
		states = append(states, c.Fork())
		if err := c.SignalSetup(ctx, m, &act, sigUSR1(), &alt, i, 0x5000); err != nil {
			t.Fatal(err)
		}
		if sp := uint64(c.Stack()); !alt.Contains(sp) {
			t.Errorf("handler %d runs at %#x, not on the alternate stack", i, sp)
		}
		if sp := uint64(c.Stack()); i > 0 && sp >= uint64(states[i].Stack()) {
			t.Errorf("handler %d runs at %#x, above the one it interrupts", i, sp)
		}
	}
	for i := linux.SignalSet(3); i < 4; i-- {
		handlerReturns(c)
		mask, gotAlt, err := c.SignalRestore(ctx, m)
		if err != nil {
			t.Fatal(err)
		}
		if c.Regs != states[i].Regs || !c.fpu.Equal(states[i].fpu) || mask != i || gotAlt != alt {
			t.Errorf("handler %d returns to %+x, mask %d, want %+x", i, c.Regs, mask, states[i].Regs)
		}
	}
}

// SIGKILL and SIGSTOP cannot be blocked by a forged frame.
func TestSignalRestoreMask(t *testing.T) {
	ctx := context.Background()
	m := newMemory(testStackBase, testStackSize)
	c := New()
	c.SetStack(testStackTop)
	act := linux.SigAction{Handler: 0x4000}
	alt := linux.SignalStack{Flags: linux.SS_DISABLE}
	if err := c.SignalSetup(ctx, m, &act, sigUSR1(), &alt, ^linux.SignalSet(0), 0x5000); err != nil {
		t.Fatal(err)
	}
	handlerReturns(c)
	mask, _, err := c.SignalRestore(ctx, m)
	if err != nil || mask != ^linux.UnblockableSignals {
		t.Errorf("mask = %#x, %v", uint64(mask), err)
	}
}

// frameBytes returns memory with a frame of a thread with random state, and the
// thread as it is when its handler has returned.
func frameBytes(tb testing.TB, seed uint64) (*Context64, *memory) {
	tb.Helper()
	m := newMemory(testStackBase, testStackSize)
	c := randomThread(rand.New(rand.NewPCG(seed, 0)))
	c.SetStack(testStackTop - 1000)
	act := linux.SigAction{Handler: 0x4000, Flags: linux.SA_SIGINFO}
	alt := linux.SignalStack{Flags: linux.SS_DISABLE}
	if err := c.SignalSetup(context.Background(), m, &act, sigUSR1(), &alt, 0, 0x5000); err != nil {
		tb.Fatal(err)
	}
	handlerReturns(c)
	return c, m
}

// checkRestore calls SignalRestore on memory that the application wrote, and
// checks that nothing comes out of it that the application must not have.
func checkRestore(tb testing.TB, c *Context64, m *memory) error {
	tb.Helper()
	clear(m.reads)
	before := c.Fork()
	mask, _, err := c.SignalRestore(context.Background(), m)
	for i, n := range m.reads {
		if n > 1 {
			tb.Fatalf("byte %d was read %d times", i, n)
		}
	}
	if err != nil {
		if !errors.Is(err, unix.EFAULT) {
			tb.Fatalf("error %v, want EFAULT", err)
		}
		if c.Regs != before.Regs || !c.fpu.Equal(before.fpu) {
			tb.Fatal("a frame that was refused changed the thread")
		}
		return err
	}
	if mask&linux.UnblockableSignals != 0 {
		tb.Fatalf("mask %#x", uint64(mask))
	}
	if err := c.fpu.Validate(); err != nil {
		tb.Fatal(err)
	}
	if c.InSyscall() {
		tb.Fatal("in a system call after rt_sigreturn")
	}
	checkPrivileges(tb, before, c)
	return nil
}

// Single bytes and words of a frame, changed at random.
func TestHostileFrames(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	good := 0
	orig, origMem := frameBytes(t, 1)
	size := testStackSize - int(uint64(orig.Stack())-testStackBase)
	for range 4000 {
		c, m := orig.Fork(), newMemory(testStackBase, testStackSize)
		copy(m.b, origMem.b)
		for range 1 + rng.IntN(4) {
			i := testStackSize - size + rng.IntN(size-8)
			switch rng.IntN(3) {
			case 0:
				m.b[i] = byte(rng.Uint32())
			case 1:
				copy(m.b[i&^7:], []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
			case 2:
				clear(m.b[i&^7:][:8])
			}
		}
		if checkRestore(t, c, m) == nil {
			good++
		}
	}
	if good == 0 || good == 4000 {
		t.Errorf("%d of 4000 frames are accepted: the test does not test", good)
	}
}

func FuzzSignalRestore(f *testing.F) {
	c, m := frameBytes(f, 2)
	start := int(uint64(c.Stack()) - testStackBase)
	f.Add(uint64(c.Stack()), m.b[start:])
	f.Add(uint64(testStackTop-16), []byte{})
	f.Add(uint64(0), []byte{1})
	f.Add(uint64(math.MaxUint64-7), []byte{1})
	f.Fuzz(func(t *testing.T, sp uint64, frame []byte) {
		c := New()
		c.SetStack(uintptr(sp))
		m := newMemory(testStackBase, testStackSize)
		copy(m.b[start:], frame)
		_ = checkRestore(t, c, m)
	})
}
