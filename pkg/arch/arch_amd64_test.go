package arch

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/cpuid"
)

// handlerReturns does what a handler's RET and its restorer do.
func handlerReturns(c *Context64) {
	c.Regs.Rsp += 8
	c.Regs.Orig_rax = 15
}

func randomThread(rng *rand.Rand) *Context64 {
	c := New()
	flags := c.Regs.Eflags
	for _, r := range c.Regs.scRegisters() {
		*r = rng.Uint64()
	}
	c.Regs.Eflags = flags
	copy(c.fpu, randomFPState(rng))
	return c
}

// checkPrivileges fails if after holds what only the kernel may set.
func checkPrivileges(tb testing.TB, before, after *Context64) {
	tb.Helper()
	r := &after.Regs
	if r.Cs != userCS || r.Ss != userDS {
		tb.Fatalf("CS %#x, SS %#x", r.Cs, r.Ss)
	}
	if v := (r.Eflags ^ before.Regs.Eflags) &^ eflagsSigreturn; v != 0 {
		tb.Fatalf("bits %#x of EFLAGS changed", v)
	}
	if r.Fs_base != before.Regs.Fs_base || r.Gs_base != before.Regs.Gs_base || r.Ds != before.Regs.Ds {
		tb.Fatal("segments changed")
	}
}

func TestNewRegisters(t *testing.T) {
	c := New()
	if r := c.Regs; r.Cs != 0x33 || r.Ss != 0x2b || r.Eflags != 0x202 || r.Orig_rax != ^uint64(0) {
		t.Errorf("registers of a new program: %+x", r)
	}
	f := c.FloatingPointData()
	if fcw := binary.LittleEndian.Uint16(f); fcw != 0x37f || f.mxcsr() != 0x1f80 || f.xstateBV()&3 != 3 {
		t.Errorf("FCW %#x, MXCSR %#x, XSTATE_BV %#x", fcw, f.mxcsr(), f.xstateBV())
	}
	if len(f) != cpuid.Native().XSaveSize() {
		t.Errorf("%d bytes, want %d", len(f), cpuid.Native().XSaveSize())
	}
}

func TestSyscallRegisters(t *testing.T) {
	c := New()
	c.Regs = Registers{Orig_rax: 39, Rax: 1, Rdi: 2, Rsi: 3, Rdx: 4, R10: 5, R8: 6, R9: 7, Rip: 0x1002}
	if c.SyscallNo() != 39 || !c.InSyscall() {
		t.Errorf("SyscallNo = %d, in syscall %v", c.SyscallNo(), c.InSyscall())
	}
	for i, a := range c.SyscallArgs() {
		if a.Value != uintptr(i+2) {
			t.Errorf("argument %d = %d", i, a.Value)
		}
	}
	c.RestartSyscall()
	if c.Regs.Rip != 0x1000 || c.Regs.Rax != 39 {
		t.Errorf("restart: RIP %#x, RAX %d", c.Regs.Rip, c.Regs.Rax)
	}
	c.Regs.Rip += 2
	c.RestartSyscallWithRestartBlock()
	if c.Regs.Rip != 0x1000 || c.Regs.Rax != 219 {
		t.Errorf("restart_syscall: RIP %#x, RAX %d", c.Regs.Rip, c.Regs.Rax)
	}
}

func TestSetTLS(t *testing.T) {
	c := New()
	for v, want := range map[uintptr]bool{0: true, 0x7fffffffefff: true, 0x7ffffffff000: false, 0xffff800000000000: false, 1 << 63: false} {
		if c.SetTLS(v) != want {
			t.Errorf("SetTLS(%#x) = %v", v, !want)
		}
	}
}

func TestSanitizeRegs(t *testing.T) {
	for _, test := range []struct {
		name      string
		in, want  func(r *Registers)
		canResume bool
	}{
		{"nothing", func(r *Registers) {}, func(r *Registers) {}, true},
		{"flags that user code sets", func(r *Registers) { r.Eflags |= 0x254dd5 }, func(r *Registers) { r.Eflags |= 0x254dd5 }, true},
		{"all flags", func(r *Registers) { r.Eflags = ^uint64(0) }, func(r *Registers) { r.Eflags = 0x254fd7 }, true},
		{"no flags", func(r *Registers) { r.Eflags = 0 }, func(r *Registers) { r.Eflags = 0x202 }, true},
		{"user data selectors", func(r *Registers) { r.Ds, r.Es, r.Fs, r.Gs = 0x2b, 0x2b, 0x2b, 3 }, func(r *Registers) { r.Ds, r.Es, r.Fs, r.Gs = 0x2b, 0x2b, 0x2b, 3 }, true},
		{"kernel selectors", func(r *Registers) { r.Ds, r.Es, r.Fs, r.Gs, r.Ss = 0x18, 0x10, 0x4b, 0xffff002b, 0x18 }, func(r *Registers) {}, true},
		{"kernel code", func(r *Registers) { r.Cs = 0x10 }, func(r *Registers) {}, false},
		{"32-bit code", func(r *Registers) { r.Cs = 0x23 }, func(r *Registers) {}, false},
		{"segment bases", func(r *Registers) { r.Fs_base, r.Gs_base = 0xffff800000000000, 1<<47 }, func(r *Registers) {}, true},
		{"user segment bases", func(r *Registers) { r.Fs_base, r.Gs_base = 0x7fffffffe000, 8 }, func(r *Registers) { r.Fs_base, r.Gs_base = 0x7fffffffe000, 8 }, true},
		{"RIP that is not canonical", func(r *Registers) { r.Rip = 1 << 47 }, func(r *Registers) { r.Rip = 1 << 47 }, false},
		{"RIP in the kernel", func(r *Registers) { r.Rip = 0xffffffff81000000 }, func(r *Registers) { r.Rip = 0xffffffff81000000 }, true},
	} {
		c, want := New(), New()
		test.in(&c.Regs)
		test.want(&want.Regs)
		if ok := c.SanitizeRegs(); ok != test.canResume || c.Regs != want.Regs {
			t.Errorf("%s: %v, %+x; want %v, %+x", test.name, ok, c.Regs, test.canResume, want.Regs)
		}
	}
}

func TestValidateFPState(t *testing.T) {
	put := func(off int, v uint64) func(FPState) {
		return func(f FPState) { binary.LittleEndian.PutUint64(f[off:], v) }
	}
	for _, test := range []struct {
		name string
		edit func(FPState)
		want string
	}{
		{"reserved MXCSR bits", func(f FPState) { binary.LittleEndian.PutUint32(f[24:], 1<<31) }, "MXCSR"},
		{"unknown components", put(512, 1<<62), "state components"},
		{"supervisor components", put(512, 1<<8|3), "state components"},
		{"AMX tiles", put(512, 1<<18|3), "state components"},
		{"compacted", put(520, 1<<63), "header"},
		{"compacted components", put(520, 1), "header"},
		{"reserved header bytes", put(568, 1), "header"},
	} {
		f := NewFPState()
		test.edit(f)
		err := f.Validate()
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want an error about %s", test.name, err, test.want)
		}
		f.Sanitize()
		if err := f.Validate(); err != nil {
			t.Errorf("%s, sanitized: %v", test.name, err)
		}
	}
}

// Components in their initial state are equal however they are written down.
func TestEqualFPState(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	f := randomFPState(rng)
	g := append(FPState(nil), f...)
	for i := range 48 {
		g[fpSoftware+i] = 0xaa // not the CPU's
	}
	if !f.Equal(g) {
		t.Error("software's bytes make a difference")
	}
	// Contents of components that are in their initial state do not count.
	for _, x := range []struct {
		bit      uint64
		off, len int
	}{{1, fpST0, 128}, {2, fpXMM0, 256}} {
		a, b := NewFPState(), append(FPState(nil), f...)
		copy(b, a)
		for i := range x.len {
			b[x.off+i] = 0x77
		}
		if a.Equal(b) {
			t.Errorf("component %#x: contents make no difference", x.bit)
		}
		b.setXStateBV(b.xstateBV() &^ x.bit)
		if !a.Equal(b) {
			t.Errorf("component %#x: contents of an initial state make a difference", x.bit)
		}
	}
	for _, off := range []int{0, fpMXCSR, fpXMM0 + 17, fpST0 + 3} {
		g := append(FPState(nil), f...)
		g[off] ^= 1
		if f.Equal(g) {
			t.Errorf("byte %d makes no difference", off)
		}
	}
	if off, size := cpuid.Native().XFeatureLayout(2); size != 0 {
		g := append(FPState(nil), f...)
		g[off+size-1] ^= 1
		if f.Equal(g) {
			t.Error("AVX state makes no difference")
		}
	}
}

// The ways in which a frame describes its floating point state.
func TestRestoreFPState(t *testing.T) {
	le := binary.LittleEndian
	fs := cpuid.Native()
	if !fs.Has(cpuid.FeatureXSAVE) {
		t.Fatal("this test needs a CPU with XSAVE")
	}
	size := fs.XSaveSizeOf(fs.UserXFeatures())
	// edit gets the ucontext, and the floating point state above it.
	for _, test := range []struct {
		name string
		edit func(uc []byte, fp FPState)
		// want is the state expected, given the one saved; nil if the frame is
		// refused.
		want func(saved FPState) FPState
	}{
		{"unchanged", func(uc []byte, fp FPState) {}, func(s FPState) FPState { return s }},
		{"no pointer", func(uc []byte, fp FPState) { le.PutUint64(uc[ucContext+scFPState:], 0) },
			func(FPState) FPState { return NewFPState() }},
		{"no first magic: FXSAVE alone", func(uc []byte, fp FPState) { fp[swMagic1] ^= 1 }, legacyOnly},
		{"no second magic", func(uc []byte, fp FPState) { fp[size] ^= 1 }, legacyOnly},
		{"size beyond the CPU's", func(uc []byte, fp FPState) {
			le.PutUint32(fp[swXStateSize:], uint32(size+8))
			le.PutUint32(fp[swExtendedSize:], uint32(size+12))
			le.PutUint32(fp[size+8:], fpMagic2)
		}, legacyOnly},
		{"size below the header", func(uc []byte, fp FPState) { le.PutUint32(fp[swXStateSize:], 575) }, legacyOnly},
		{"size beyond the extended size", func(uc []byte, fp FPState) { le.PutUint32(fp[swExtendedSize:], uint32(size-1)) }, legacyOnly},
		{"only x87 and SSE offered", func(uc []byte, fp FPState) { le.PutUint64(fp[swXFeatures:], 3) },
			func(s FPState) FPState { s.setXStateBV(3); return s }},
		{"a small area", func(uc []byte, fp FPState) {
			le.PutUint32(fp[swXStateSize:], fpExtended)
			le.PutUint32(fp[fpExtended:], fpMagic2)
		}, func(s FPState) FPState { s.setXStateBV(3); return s }},
		{"reserved MXCSR bits", func(uc []byte, fp FPState) { fp[fpMXCSR+3] = 0x80 }, nil},
		{"reserved MXCSR bits, FXSAVE alone", func(uc []byte, fp FPState) { fp[swMagic1] ^= 1; fp[fpMXCSR+3] = 0x80 }, nil},
		{"unknown components", func(uc []byte, fp FPState) { fp[fpXStateBV+7] = 0x40 }, nil},
		{"compacted", func(uc []byte, fp FPState) { fp[fpXCompBV+7] = 0x80 }, nil},
		{"reserved bytes", func(uc []byte, fp FPState) { fp[fpReserved+9] = 1 }, nil},
		{"not aligned", func(uc []byte, fp FPState) {
			copy(fp[16:], append([]byte(nil), fp[:size+4]...))
			le.PutUint64(uc[ucContext+scFPState:], le.Uint64(uc[ucContext+scFPState:])+16)
		}, nil},
		{"not mapped", func(uc []byte, fp FPState) { le.PutUint64(uc[ucContext+scFPState:], 0x1000) }, nil},
		{"cut off", func(uc []byte, fp FPState) {
			copy(fp[len(fp)-640:], fp[:512])
			le.PutUint64(uc[ucContext+scFPState:], testStackTop-640)
		}, nil},
		{"kernel code", func(uc []byte, fp FPState) { le.PutUint16(uc[ucContext+scCS:], 0x10) }, nil},
		{"32-bit code", func(uc []byte, fp FPState) { le.PutUint16(uc[ucContext+scCS:], 0x23) }, nil},
		{"CS without privilege level", func(uc []byte, fp FPState) { le.PutUint16(uc[ucContext+scCS:], 0x30) }, func(s FPState) FPState { return s }},
		{"SS of an old frame", func(uc []byte, fp FPState) { le.PutUint16(uc[ucContext+scSS:], 0); uc[ucFlags] = 1 }, func(s FPState) FPState { return s }},
		{"strict SS", func(uc []byte, fp FPState) { le.PutUint16(uc[ucContext+scSS:], 0x18) }, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, m := frameBytes(t, 9)
			saved := append(FPState(nil), randomThread(rand.New(rand.NewPCG(9, 0))).fpu...)
			uc := m.at(c.Regs.Rsp)
			fp := FPState(m.at(le.Uint64(uc[ucContext+scFPState:])))
			test.edit(uc, fp)
			err := checkRestore(t, c, m)
			if test.want == nil {
				if err == nil {
					t.Error("the frame is accepted")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if want := test.want(saved); !c.fpu.Equal(want) {
				t.Error("another state is restored")
			}
		})
	}
}

// legacyOnly is what is left of a state when only its FXSAVE part is restored.
func legacyOnly(s FPState) FPState {
	f := NewFPState()
	copy(f[:fpSoftware], s)
	return f
}

// What a frame says of the state's size decides how much is read, never more.
func TestRestoreReadsNoMore(t *testing.T) {
	c, m := frameBytes(t, 10)
	if err := checkRestore(t, c, m); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, r := range m.reads {
		n += int(r)
	}
	fs := cpuid.Native()
	if want := ucSize + fs.XSaveSizeOf(fs.UserXFeatures()) + fpMagic2Size; n != want {
		t.Errorf("%d bytes read, want %d", n, want)
	}
}

// A thread on its alternate stack stays there and must not run over its end. One
// that armed SS_AUTODISARM while it was on the stack starts over.
func TestSignalOnAlternateStack(t *testing.T) {
	ctx := context.Background()
	m := newMemory(testStackBase, testStackSize)
	act := linux.SigAction{Handler: 0x4000, Flags: linux.SA_ONSTACK}
	alt := linux.SignalStack{Addr: testStackBase + 4096, Size: 32 << 10}
	top := alt.Addr + alt.Size
	for _, test := range []struct {
		sp      uint64
		flags   uint32
		onStack bool // SA_ONSTACK
		below   uint64
	}{
		{testStackTop, 0, true, top},
		{testStackTop, 0, false, testStackTop},
		{top, 0, true, top},
		{top - 16<<10, 0, true, top - 16<<10},
		{top - 16<<10, 0, false, top - 16<<10},
		{top - 16<<10, linux.SS_AUTODISARM, true, top},
		{top - 16<<10, linux.SS_AUTODISARM, false, top - 16<<10},
		{top - 16<<10, linux.SS_DISABLE, true, top - 16<<10},
		{alt.Addr + 1024, 0, true, 0}, // does not fit
		{alt.Addr + 1024, 0, false, 0},
		{alt.Addr, 0, true, top}, // not on it: the stack grows down
	} {
		c := New()
		c.Regs.Rsp = test.sp
		a, s := act, alt
		s.Flags = test.flags
		if !test.onStack {
			a.Flags = 0
		}
		err := c.SignalSetup(ctx, m, &a, sigUSR1(), &s, 0, 0x5000)
		if (err == nil) != (test.below != 0) {
			t.Errorf("%+v: %v", test, err)
			continue
		}
		if sp := c.Regs.Rsp; err == nil && (sp >= test.below || test.below-sp > 12<<10) {
			t.Errorf("%+v: frame at %#x", test, sp)
		}
		if disarmed := s.Flags == linux.SS_DISABLE && s.Size == 0; disarmed != (test.flags == linux.SS_AUTODISARM) {
			t.Errorf("%+v: alternate stack is now %+v", test, s)
		}
	}
}
