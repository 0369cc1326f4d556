package arch

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch/internal/hostframe"
	"github.com/ringfence/ringfence/pkg/cpuid"
)

// randomFPState returns a state with random registers: SVE's with sve.
func randomFPState(rng *rand.Rand, vl int, sve bool) FPState {
	f := newFPState(vl)
	f.setHeader(vl, sve)
	regs := f[fpRegs:][:vregsSize]
	if sve {
		regs = f.sveRegs()
	}
	for i := range regs {
		regs[i] = byte(rng.Uint32())
	}
	if sve {
		// FFR is a prefix of ones: other values are not architectural.
		ffr := regs[len(regs)-vl/8:]
		clear(ffr)
		ffr[0] = 0x7
	}
	binary.LittleEndian.PutUint32(f.status(), 1<<27|1<<4)      // FPSR: QC, IXC
	binary.LittleEndian.PutUint32(f.status()[4:], 1<<22|1<<25) // FPCR: round up, default NaN
	return f
}

const vlEnv = "RINGFENCE_TEST_VL"

// The frames that SignalSetup writes are those of the running kernel, byte for
// byte, for a thread in the same state, with every vector length of the host.
func TestFrameIsTheKernels(t *testing.T) {
	if os.Getenv(vlEnv) == "" && cpuid.Native().SVEVectorLength() != 0 {
		runtime.LockOSThread() // and never unlocked: the vector length is the thread's
		for vl := 16; vl <= 256; vl *= 2 {
			got, err := unix.PrctlRetInt(unix.PR_SVE_SET_VL, uintptr(vl|unix.PR_SVE_VL_INHERIT), 0, 0, 0)
			if err != nil {
				t.Fatalf("prctl(PR_SVE_SET_VL, %d): %v", vl, err)
			}
			if got&unix.PR_SVE_VL_LEN_MASK != vl {
				continue // not a length of this CPU
			}
			cmd := exec.Command("/proc/self/exe", "-test.run=^TestFrameIsTheKernels$", "-test.v")
			cmd.Env = append(os.Environ(), vlEnv+"="+strconv.Itoa(vl))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("vectors of %d bytes: %v\n%s", vl, err, out)
			}
		}
		return
	}
	vl := cpuid.Native().SVEVectorLength()
	if want := os.Getenv(vlEnv); want != "" && want != strconv.Itoa(vl) {
		t.Fatalf("vectors of %d bytes, want %s", vl, want)
	}
	for _, test := range []struct {
		name string
		req  hostframe.Request
	}{
		{"on the stack", hostframe.Request{}},
		{"fault", hostframe.Request{Fault: true}},
		{"fault with SVE registers", hostframe.Request{Fault: true, SVE: true}},
		{"alternate stack", hostframe.Request{AltStack: true}},
		{"SS_AUTODISARM", hostframe.Request{AltStack: true, AltFlags: linux.SS_AUTODISARM}},
	} {
		if test.req.SVE && vl == 0 {
			continue
		}
		t.Run(test.name, func(t *testing.T) { compareFrame(t, test.req, vl) })
	}
}

func compareFrame(t *testing.T, req hostframe.Request, vl int) {
	c := New()
	c.fpu = randomFPState(rand.New(rand.NewPCG(1, 2)), vl, req.SVE)
	req.FP, req.Status, req.VL = c.fpu[fpRegs:], c.fpu.status(), vl
	f, err := hostframe.Capture(req)
	if err != nil {
		t.Fatal(err)
	}
	host := f.Bytes
	sc := host[frameUC+ucContext:]
	le := binary.LittleEndian

	// The thread as it was. What the frame alone can tell is taken from it:
	// registers that the trigger needs for itself.
	for i, r := range c.Regs.scRegisters() {
		*r = le.Uint64(sc[scRegs+8*i:])
	}
	for _, i := range []int{3, 4, 5, 6, 7, 9, 17, 19, 26, 29, 30} {
		if c.Regs.Regs[i] != hostframe.GPR(i) {
			t.Errorf("X%d = %#x in the kernel's frame, want %#x", i, c.Regs.Regs[i], hostframe.GPR(i))
		}
	}
	if c.Regs.Sp != f.SP {
		t.Errorf("SP = %#x in the kernel's frame, want %#x", c.Regs.Sp, f.SP)
	}
	info := linux.SignalInfo{Signo: int32(linux.SIGUSR2), Code: linux.SI_TKILL}
	info.SetPID(int32(os.Getpid()))
	info.SetUID(int32(os.Getuid()))
	// What is left of the last fault of this thread, if any, shows in the frame.
	esr := esrOf(host)
	c.Fault = FaultInfo{ErrorCode: esr, Addr: le.Uint64(sc[scFault:])}
	if req.Fault {
		info = linux.SignalInfo{Signo: int32(linux.SIGSEGV), Code: linux.SEGV_MAPERR}
		info.SetAddr(hostframe.FaultAddr)
		// A data abort from EL0 by a write, translation fault at some level
		// (Arm ARM, D17.2.37).
		if esr>>26 != 0x24 || esr&(1<<6) == 0 || esr&0x3c != 4 || c.Fault.Addr != hostframe.FaultAddr {
			t.Errorf("ESR = %#x, fault address %#x in the kernel's frame", esr, c.Fault.Addr)
		}
	}
	act := linux.SigAction{Handler: f.Handler, Flags: linux.SA_SIGINFO | linux.SA_RESTORER, Restorer: f.Restorer}
	alt := linux.SignalStack{Flags: linux.SS_DISABLE}
	if req.AltStack {
		act.Flags |= linux.SA_ONSTACK
		alt = linux.SignalStack{Addr: f.AltAddr, Size: f.AltSize, Flags: req.AltFlags}
	} else {
		// What the Go runtime set up for its own handlers.
		alt.UnmarshalBytes(host[frameUC+ucStack:])
	}
	top := f.Addr + uint64(len(host))
	m := newMemory(top-128<<10, 128<<10)
	before := *c.Fork()
	if err := c.SignalSetup(context.Background(), m, &act, &info, &alt, linux.SignalSet(f.Mask), 0); err != nil {
		t.Fatal(err)
	}
	if c.Regs.Sp != f.Addr {
		t.Fatalf("our frame is at %#x, the kernel's at %#x, for a stack that ends at %#x", c.Regs.Sp, f.Addr, top)
	}
	diff(t, m.at(f.Addr), host)

	r := &c.Regs
	got := hostframe.Entry{X0: r.Regs[0], X1: r.Regs[1], X2: r.Regs[2], X29: r.Regs[29], X30: r.Regs[30]}
	if got != f.Entry {
		t.Errorf("the handler's registers are %+x, the kernel gives %+x", got, f.Entry)
	}

	// rt_sigreturn from the kernel's frame.
	copy(m.at(f.Addr), host)
	mask, _, err := c.SignalRestore(context.Background(), m)
	if err != nil {
		t.Fatal(err)
	}
	if mask != linux.SignalSet(f.Mask) {
		t.Errorf("mask = %#x, want %#x", mask, f.Mask)
	}
	if c.Regs != before.Regs {
		t.Errorf("restored registers %+x, want %+x", c.Regs, before.Regs)
	}
	if !c.fpu.Equal(before.fpu) {
		t.Error("floating point state not restored")
	}
}

// esrOf returns the value in frame's ESR record, 0 if it has none.
func esrOf(frame []byte) uint64 {
	le := binary.LittleEndian
	for off := frameRecords; le.Uint32(frame[off:]) != 0; off += int(le.Uint32(frame[off+4:])) {
		if le.Uint32(frame[off:]) == esrMagic {
			return le.Uint64(frame[off+recordHeader:])
		}
	}
	return 0
}

func TestPRStatusLayout(t *testing.T) {
	var r Registers
	b := r.PRStatus()
	if len(b) != int(unsafe.Sizeof(unix.PtraceRegs{})) {
		t.Fatalf("NT_PRSTATUS is %d bytes, want %d", len(b), unsafe.Sizeof(unix.PtraceRegs{}))
	}
	for i := range len(b) / 8 {
		binary.LittleEndian.PutUint64(b[8*i:], uint64(i+1))
	}
	p := *(*unix.PtraceRegs)(unsafe.Pointer(&r))
	if p.Regs != r.Regs || p.Sp != r.Sp || p.Pc != r.Pc || p.Pstate != r.Pstate || r.SyscallNo != 0 {
		t.Errorf("registers %+v, want %+v", r, p)
	}
}
