package arch

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch/internal/hostframe"
	"github.com/ringfence/ringfence/pkg/cpuid"
)

// randomFPState returns a state with random contents in every component that an
// application can use, aligned to 64 bytes.
func randomFPState(rng *rand.Rand) FPState {
	init := NewFPState()
	b := make([]byte, len(init)+64)
	f := FPState(b[-uintptr(unsafe.Pointer(&b[0]))&63:][:len(init)])
	copy(f, init)
	random := func(b []byte) {
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
	}
	le := binary.LittleEndian
	le.PutUint16(f[fpFCW:], 0x27f)    // double precision
	le.PutUint16(f[2:], 0x3800)       // top of stack is 7
	f[4] = 0xff                       // all registers in use
	le.PutUint32(f[fpMXCSR:], 0x3fa0) // round up, all exceptions masked, precision flag
	for i := range 8 {
		random(f[fpST0+16*i:][:10])
	}
	random(f[fpXMM0:fpXMMEnd])
	fs := cpuid.Native()
	for i := 2; i < 63; i++ {
		off, size := fs.XFeatureLayout(i)
		if fs.UserXFeatures()&(1<<i) == 0 || i == pkruFeature || 1<<i == cpuid.XFeatureTileCfg {
			continue // a random one has effects
		}
		f.setXStateBV(f.xstateBV() | 1<<i)
		random(f[off : off+size])
	}
	return f
}

// The frames that SignalSetup writes are those of the running kernel, byte for
// byte, for a thread in the same state.
func TestFrameIsTheKernels(t *testing.T) {
	for _, test := range []struct {
		name string
		req  hostframe.Request
	}{
		{"on the stack", hostframe.Request{}},
		{"fault", hostframe.Request{Fault: true}},
		{"alternate stack", hostframe.Request{AltStack: true}},
		{"SS_AUTODISARM", hostframe.Request{AltStack: true, AltFlags: linux.SS_AUTODISARM}},
	} {
		t.Run(test.name, func(t *testing.T) {
			fp := randomFPState(rand.New(rand.NewPCG(1, 2)))
			test.req.FP, test.req.XFeatures = fp, cpuid.Native().UserXFeatures()
			f, err := hostframe.Capture(test.req)
			if err != nil {
				t.Fatal(err)
			}
			host := f.Bytes

			// The thread as it was. What the frame alone can tell is taken from it:
			// registers that the trigger needs for itself.
			c := New()
			copy(c.fpu, fp)
			le := binary.LittleEndian
			for i, r := range c.Regs.scRegisters() {
				*r = le.Uint64(host[frameUC+ucContext+scRegs+8*i:])
			}
			r := &c.Regs
			for i, v := range map[int]uint64{3: r.Rbx, 5: r.Rbp, 8: r.R8, 9: r.R9, 10: r.R10, 12: r.R12, 13: r.R13, 14: r.R14, 15: r.R15} {
				if v != hostframe.GPR(i) {
					t.Errorf("register %d = %#x in the kernel's frame, want %#x", i, v, hostframe.GPR(i))
				}
			}
			if r.Rsp != f.SP {
				t.Errorf("RSP = %#x in the kernel's frame, want %#x", r.Rsp, f.SP)
			}
			if r.Eflags&eflagsDF == 0 {
				t.Errorf("EFLAGS = %#x in the kernel's frame, want DF", r.Eflags)
			}
			info := linux.SignalInfo{Signo: int32(linux.SIGUSR2), Code: linux.SI_TKILL}
			info.SetPID(int32(os.Getpid()))
			info.SetUID(int32(os.Getuid()))
			if test.req.Fault {
				info = linux.SignalInfo{Signo: int32(linux.SIGSEGV), Code: linux.SEGV_MAPERR}
				info.SetAddr(hostframe.FaultAddr)
				// A write from user mode to a page that is not there.
				c.Fault = FaultInfo{TrapNo: 14, ErrorCode: 6, Addr: hostframe.FaultAddr}
				// The handler changes the kernel's frame after it was captured.
			} else {
				// Whatever fault this thread had last.
				sc := host[frameUC+ucContext:]
				c.Fault = FaultInfo{TrapNo: le.Uint64(sc[scTrapNo:]), ErrorCode: le.Uint64(sc[scErr:]), Addr: le.Uint64(sc[scCR2:])}
			}
			act := linux.SigAction{Handler: f.Handler, Flags: linux.SA_SIGINFO | linux.SA_RESTORER, Restorer: f.Restorer}
			alt := linux.SignalStack{Flags: linux.SS_DISABLE}
			if test.req.AltStack {
				act.Flags |= linux.SA_ONSTACK
				alt = linux.SignalStack{Addr: f.AltAddr, Size: f.AltSize, Flags: test.req.AltFlags}
			} else {
				// What the Go runtime set up for its own handlers.
				alt.UnmarshalBytes(host[frameUC+ucStack:])
			}
			top := f.Addr + uint64(len(host))
			m := newMemory(top-64<<10, 64<<10)
			before := *c.Fork()
			if err := c.SignalSetup(context.Background(), m, &act, &info, &alt, linux.SignalSet(f.Mask), 0); err != nil {
				t.Fatal(err)
			}
			if c.Regs.Rsp != f.Addr {
				t.Fatalf("our frame is at %#x, the kernel's at %#x, for a stack that ends at %#x", c.Regs.Rsp, f.Addr, top)
			}
			diff(t, m.at(f.Addr), host)

			// The handler's registers.
			want := f.Entry
			got := hostframe.Entry{RDI: c.Regs.Rdi, RSI: c.Regs.Rsi, RDX: c.Regs.Rdx, RAX: c.Regs.Rax, RFLAGS: c.Regs.Eflags,
				FCW: uint64(le.Uint16(c.fpu[fpFCW:])), MXCSR: uint64(c.fpu.mxcsr())}
			if got != want {
				t.Errorf("the handler's registers are %+x, the kernel gives %+x", got, want)
			}
			if !c.fpu.Equal(NewFPState()) {
				t.Error("the handler's floating point state is not the initial one")
			}
			if test.req.AltFlags&linux.SS_AUTODISARM != 0 && alt != (linux.SignalStack{Flags: linux.SS_DISABLE}) {
				t.Errorf("alternate stack after SS_AUTODISARM: %+v", alt)
			}

			// rt_sigreturn from the kernel's frame.
			copy(m.at(f.Addr), host)
			c.Regs.Rsp += 8
			mask, _, err := c.SignalRestore(context.Background(), m)
			if err != nil {
				t.Fatal(err)
			}
			if mask != linux.SignalSet(f.Mask) {
				t.Errorf("mask = %#x, want %#x", mask, f.Mask)
			}
			before.Regs.Orig_rax = noSyscall
			if c.Regs != before.Regs {
				t.Errorf("restored registers %+x, want %+x", c.Regs, before.Regs)
			}
			if !c.fpu.Equal(before.fpu) {
				t.Error("floating point state not restored")
			}
		})
	}
}

func TestPRStatusLayout(t *testing.T) {
	var r Registers
	b := r.PRStatus()
	if len(b) != int(unsafe.Sizeof(unix.PtraceRegs{})) || len(b) != int(unsafe.Sizeof(r)) {
		t.Fatalf("NT_PRSTATUS is %d bytes, want %d", len(b), unsafe.Sizeof(unix.PtraceRegs{}))
	}
	for i := range len(b) / 8 {
		binary.LittleEndian.PutUint64(b[8*i:], uint64(i+1))
	}
	p := *(*unix.PtraceRegs)(unsafe.Pointer(&r))
	if uint64(p.R15) != r.R15 || p.Rax != r.Rax || p.Orig_rax != r.Orig_rax || p.Rip != r.Rip || p.Cs != r.Cs ||
		p.Eflags != r.Eflags || p.Rsp != r.Rsp || p.Ss != r.Ss || p.Fs_base != r.Fs_base || p.Gs_base != r.Gs_base ||
		p.Ds != r.Ds || p.Gs != r.Gs || p.R8 != r.R8 || p.Rdi != r.Rdi {
		t.Errorf("registers %+v, want %+v", r, p)
	}
}
