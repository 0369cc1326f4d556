package systrap

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/cpuid"
	"github.com/ringfence/ringfence/pkg/freestanding"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/sysmsg"
)

const auditArch = unix.AUDIT_ARCH_X86_64

// The states of a slot, for the assembler.
const (
	//lint:ignore U1000 text_amd64.s uses it
	stateSentry = sysmsg.Sentry
	//lint:ignore U1000 text_amd64.s uses it
	stateSentryStubWaits = sysmsg.SentryStubWaits
	//lint:ignore U1000 text_amd64.s uses it
	stateStubSentryWaits = sysmsg.StubSentryWaits
	//lint:ignore U1000 text_amd64.s uses it
	stateErrand = sysmsg.Errand

	// xfeatures are the state components that XSAVE and XRSTOR see to: all that there
	// are but one of 8 KiB, which no stub asks the kernel for.
	//
	//lint:ignore U1000 text_amd64.s uses it
	xfeatures = 1<<32 - 1 - cpuid.XFeatureTileData

	//lint:ignore U1000 text_amd64.s uses it
	sigInterrupt = platform.SignalInterrupt
)

// textAddresses are where this program's linker has put the stubs' text.
type textAddresses struct {
	start, handler, give, goOnEnd, call, callArgs, callState, makeCall, callEnd, end uintptr
}

func textSymbols() (s textAddresses)

// stubText is the text for stubs, with offsets in it.
type stubText struct {
	text                                                  []byte
	handler, call, callArgs, callState, makeCall, callEnd uintptr
}

var textOf = sync.OnceValues(func() (stubText, error) {
	s := textSymbols()
	if order := []uintptr{s.start, s.handler, s.give, s.goOnEnd, s.call, s.callArgs, s.callState, s.makeCall, s.callEnd, s.end}; !slices.IsSorted(order) {
		return stubText{}, fmt.Errorf("stub text: the linker has put its parts out of order: %#x", order)
	}
	return stubText{freestanding.Text(s.start, s.end), s.handler - s.start, s.call - s.start, s.callArgs - s.start, s.callState - s.start, s.makeCall - s.start, s.callEnd - s.start}, nil
})

// The signal frame (arch/x86/include/asm/sigframe.h, uapi/asm/sigcontext.h).
const (
	frameUC   = 8
	frameInfo = frameUC + ucMask + 8
	frameSize = frameInfo + linux.SignalInfoSize

	ucFlags   = 0
	ucStack   = 16
	ucContext = 40
	ucMask    = ucContext + 256

	scRegs    = 0
	scRsp     = scRegs + 15*8
	scRip     = scRegs + 16*8
	scEflags  = scRegs + 17*8
	scCS      = 144
	scSS      = 150
	scErr     = 152
	scTrapNo  = 160
	scCR2     = 176
	scFPState = 184
	scSize    = 192 // as far as it is used

	// uc_flags: UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS.
	ucFlagsValue = 7

	// The part of the XSAVE area that is software's: struct _fpx_sw_bytes.
	fpSoftware   = 464
	fpHeader     = 512
	fpExtended   = 576
	fpMagic1     = 0x46505853
	fpMagic2     = 0x46505845
	fpMagic2Size = 4
	fpAlign      = 64
)

// frame is where in a slot the kernel puts a signal frame, and its parts.
type frame struct {
	sp, sc, info, fp, fpSize int
}

// theFrame is the same for all threads: the kernel puts it at the top of the
// signal stack (arch/x86/kernel/signal.c, get_sigframe).
var theFrame = func() (f frame) {
	fs := cpuid.Native()
	f.fpSize = fs.XSaveSizeOf(fs.UserXFeatures())
	f.fp = (stackSize - f.fpSize - fpMagic2Size) &^ (fpAlign - 1)
	f.sp = (f.fp-frameSize)&^15 - 8
	f.sc = f.sp + frameUC + ucContext
	f.info = f.sp + frameInfo
	return f
}()

// hwcap2FSGSBase says in AT_HWCAP2 that the kernel lets us have RDFSBASE
// (uapi/asm/hwcap2.h).
const hwcap2FSGSBase = 1 << 1

// checkCPU returns an error unless this CPU and the kernel have what the text
// uses.
func checkCPU() error {
	fs := cpuid.Native()
	if !fs.Has(cpuid.FeatureXSAVE) {
		return fmt.Errorf("the CPU has no XSAVE: %w", platform.ErrNotSupported)
	}
	if fs.AuxHWCap().HWCap2&hwcap2FSGSBase == 0 {
		return fmt.Errorf("no FSGSBASE: %w: needs Linux 5.9 or newer, a CPU of the last ten years, and no nofsgsbase on the kernel's command line", platform.ErrNotSupported)
	}
	// Two frames have room on a signal stack (goOn in text_amd64.s), or one and the
	// state of a call.
	const redZone = 128
	if size := stackSize - theFrame.sp; 2*(size+redZone) > stackSize {
		return fmt.Errorf("a signal frame of %d bytes is too large: %w", size, platform.ErrNotSupported)
	}
	return nil
}

// header returns a word of the header.
func (t *thread) header(off int) uint64 { return binary.LittleEndian.Uint64(t.slot[stackSize+off:]) }

// frameAddr is the stack pointer at the handler's entry.
func (t *thread) frameAddr() uint64 { return t.addr + uint64(theFrame.sp) }

// scRegisters are the registers in the order of struct sigcontext_64.
func scRegisters(r *arch.Registers) [18]*uint64 {
	return [18]*uint64{
		&r.R8, &r.R9, &r.R10, &r.R11, &r.R12, &r.R13, &r.R14, &r.R15, &r.Rdi, &r.Rsi,
		&r.Rbp, &r.Rbx, &r.Rdx, &r.Rax, &r.Rcx, &r.Rsp, &r.Rip, &r.Eflags,
	}
}

// Selectors of 64-bit user code and data (asm/segment.h).
const (
	userCS = 0x33
	userDS = 0x2b
)

// noSyscall is Orig_rax of a thread that is not in a system call.
const noSyscall = ^uint64(0)

// Exceptions (Intel SDM vol. 3, 6.15), and bits of a page fault's error code
// (4.7).
const (
	vectorGP = 13
	vectorPF = 14

	pfWrite = 1 << 1
	pfFetch = 1 << 4
)

// event reads the signal that the thread got, and its general registers. An error
// says that the application has tampered with the slot.
func (t *thread) event(c *threadContext, r *arch.Registers) (event, error) {
	f := &theFrame
	if sp := t.header(headerSP); sp != t.frameAddr() {
		return event{}, fmt.Errorf("stub process %d has a signal frame at %#x instead of %#x: %w", t.as.pid, sp, t.frameAddr(), unix.EPROTO)
	}
	// Everything is read once: it may change.
	var e event
	copy(e.info[:], t.slot[f.info:])
	var sc [scSize]byte
	copy(sc[:], t.slot[f.sc:])
	le := binary.LittleEndian
	e.signo, e.code = int32(le.Uint32(e.info[0:])), int32(le.Uint32(e.info[8:]))
	e.fault = arch.FaultInfo{TrapNo: le.Uint64(sc[scTrapNo:]), ErrorCode: le.Uint64(sc[scErr:]), Addr: le.Uint64(sc[scCR2:])}
	for i, r := range scRegisters(r) {
		*r = le.Uint64(sc[scRegs+8*i:])
	}
	r.Cs, r.Ss = uint64(le.Uint16(sc[scCS:])), uint64(le.Uint16(sc[scSS:]))
	r.Ds, r.Es, r.Fs, r.Gs = 0, 0, 0, 0
	r.Fs_base, r.Gs_base = t.header(headerFS), t.header(headerGS)
	if r.Gs_base == t.headerAddr() {
		r.Gs_base = 0
	}
	r.Orig_rax = noSyscall
	answered := c.known
	c.known = *r
	t.settle(&e, r, &answered)
	return e, nil
}

// Offsets in siginfo_t of SIGSYS (asm-generic/siginfo.h).
const siArch = 28

// syscall turns a SIGSYS into a system call.
func (t *thread) syscall(ac *arch.Context64, e *event) (*linux.SignalInfo, hostarch.AccessType, error) {
	ac.Fault = arch.FaultInfo{}
	if e.code != linux.SYS_SECCOMP && e.code != sysUserDispatch {
		return e.signalInfo(), hostarch.NoAccess, platform.ErrContextSignal
	}
	if binary.LittleEndian.Uint32(e.info[siArch:]) != auditArch {
		// int $0x80, sysenter or 32-bit code: what a kernel without these makes of
		// the instruction.
		const instruction = 2 // bytes
		ac.Regs.Rip -= instruction
		return protectionFault(ac), hostarch.NoAccess, platform.ErrContextSignal
	}
	// The kernel has put the number back into RAX.
	ac.Regs.Orig_rax = ac.Regs.Rax
	ac.Regs.Rax = resultNone
	return nil, hostarch.NoAccess, nil
}

const sysUserDispatch = 2 // SYS_USER_DISPATCH (asm-generic/siginfo.h)

// resultNone is what the kernel has in RAX before a system call is made: -ENOSYS.
const resultNone = ^uint64(unix.ENOSYS - 1)

// protectionFault returns the signal for a general protection fault.
func protectionFault(ac *arch.Context64) *linux.SignalInfo {
	ac.Fault = arch.FaultInfo{TrapNo: vectorGP}
	return &linux.SignalInfo{Signo: int32(linux.SIGSEGV), Code: linux.SI_KERNEL}
}

// fault completes ac after an exception, and returns the kind of access.
func (t *thread) fault(ac *arch.Context64, e *event) hostarch.AccessType {
	ac.Fault = e.fault
	f := &ac.Fault
	if f.TrapNo != vectorPF {
		f.Addr = 0
		return hostarch.NoAccess
	}
	switch {
	case f.ErrorCode&pfFetch != 0:
		return hostarch.Execute
	case f.ErrorCode&pfWrite != 0:
		return hostarch.Write
	}
	return hostarch.Read
}

// putChangedRegs writes the general registers that are not as in known.
func (t *thread) putChangedRegs(known, regs *arch.Registers) {
	if *known == *regs {
		return
	}
	sc := t.slot[theFrame.sc:]
	le := binary.LittleEndian
	old := scRegisters(known)
	for i, r := range scRegisters(regs) {
		if *r != *old[i] {
			le.PutUint64(sc[scRegs+8*i:], *r)
		}
	}
	if known.Cs != userCS || known.Ss != userDS {
		le.PutUint16(sc[scCS:], userCS)
		le.PutUint16(sc[scSS:], userDS)
	}
	if known.Fs_base != regs.Fs_base {
		t.setHeader(headerFS, regs.Fs_base)
	}
	if known.Gs_base != regs.Gs_base {
		t.setHeader(headerGS, t.gsBase(regs.Gs_base))
	}
	*known = *regs
}

// putFrame writes a frame, but for the floating point state.
func (t *thread) putFrame(regs *arch.Registers) {
	f := &theFrame
	le := binary.LittleEndian
	b := t.slot[f.sp:][:frameSize]
	clear(b[:frameInfo])
	uc := b[frameUC:]
	le.PutUint64(uc[ucFlags:], ucFlagsValue)
	le.PutUint64(uc[ucStack:], t.addr)
	le.PutUint64(uc[ucStack+16:], stackSize)
	sc := uc[ucContext:]
	for i, r := range scRegisters(regs) {
		le.PutUint64(sc[scRegs+8*i:], *r)
	}
	le.PutUint16(sc[scCS:], userCS)
	le.PutUint16(sc[scSS:], userDS)
	le.PutUint64(sc[scFPState:], t.addr+uint64(f.fp))
	t.setHeader(headerFS, regs.Fs_base)
	t.setHeader(headerGS, t.gsBase(regs.Gs_base))
}

// putFP writes the floating point state with which the thread goes on. It returns false
// if no thread can have it.
func (t *thread) putFP(fp arch.FPState) bool {
	if fp.Validate() != nil {
		return false
	}
	f := &theFrame
	le := binary.LittleEndian
	b := t.slot[t.fpOffset():]
	copy(b[:fpSoftware], fp)
	sw := b[fpSoftware:fpHeader]
	clear(sw)
	le.PutUint32(sw, fpMagic1)
	le.PutUint32(sw[4:], uint32(f.fpSize+fpMagic2Size))
	le.PutUint64(sw[8:], cpuid.Native().UserXFeatures())
	le.PutUint32(sw[16:], uint32(f.fpSize))
	copy(b[fpHeader:fpExtended], fp[fpHeader:])
	fp.CopyExtendedTo(b[:f.fpSize])
	le.PutUint32(b[f.fpSize:], fpMagic2)
	return true
}

// getFP reads the floating point state, as the frame has it or the thread has written it
// in a call.
func (t *thread) getFP(fp arch.FPState) {
	f := &theFrame
	b := t.slot[t.fpOffset():]
	copy(fp[:fpSoftware], b)
	clear(fp[fpSoftware:fpHeader])
	copy(fp[fpHeader:fpExtended], b[fpHeader:])
	fp.Sanitize()
	fp.CopyExtended(b[:f.fpSize])
}

// checkFrame returns an error unless the frame that the kernel has written is as
// we expect it.
func (t *thread) checkFrame() error {
	f := &theFrame
	le := binary.LittleEndian
	uc := t.slot[f.sp+frameUC:]
	sw := t.slot[f.fp+fpSoftware:]
	got := [...]uint64{
		le.Uint64(uc[ucFlags:]), le.Uint64(uc[ucStack:]), le.Uint64(uc[ucContext+scFPState:]),
		uint64(le.Uint32(sw)), uint64(le.Uint32(sw[16:])), uint64(le.Uint32(t.slot[f.fp+f.fpSize:])),
	}
	want := [...]uint64{ucFlagsValue, t.addr, t.addr + uint64(f.fp), fpMagic1, uint64(f.fpSize), fpMagic2}
	if got != want {
		return fmt.Errorf("the kernel's signal frame is not as expected: %#x instead of %#x: %w", got, want, platform.ErrNotSupported)
	}
	return nil
}

// putActions writes the struct sigaction of interrupts, and of the other signals that
// have a handler (asm/signal.h). In that of an interrupt all signals are blocked. The
// others block none, so that the thread can go on without rt_sigreturn(2).
func (as *addressSpace) putActions(b []byte) {
	const saSigInfo, saRestorer, saOnStack, saNoDefer = 0x4, 0x04000000, 0x08000000, 0x40000000
	le := binary.LittleEndian
	for _, a := range [...]struct{ flags, mask uint64 }{{0, ^uint64(0)}, {saNoDefer, 0}} {
		le.PutUint64(b, uint64(as.at.handler))
		le.PutUint64(b[8:], saSigInfo|saRestorer|saOnStack|a.flags)
		le.PutUint64(b[16:], uint64(as.at.handler)) // never used, but there must be one
		le.PutUint64(b[24:], a.mask)
		b = b[actionSize:]
	}
}

// nested reports whether the thread was interrupted before it went on after a signal.
// Its state is what it was to go on with.
func (t *thread) nested() bool { return t.header32(headerKind) == kindNested }
