package arch

import (
	"context"
	"encoding/binary"
	"errors"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/cpuid"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// The signal frame: struct rt_sigframe (arch/x86/include/asm/sigframe.h), with
// struct ucontext and struct sigcontext_64 (uapi/asm/ucontext.h, sigcontext.h).
// Above it, aligned to 64 bytes, lies the XSAVE area.
const (
	frameRestorer = 0
	frameUC       = 8
	frameInfo     = frameUC + ucSize
	frameSize     = frameInfo + linux.SignalInfoSize

	ucFlags   = 0
	ucStack   = 16
	ucContext = 40
	ucMask    = ucContext + scSize
	ucSize    = ucMask + linux.SignalSetSize

	scRegs    = 0 // 18 registers, see scRegisters
	scCS      = 144
	scSS      = 150
	scErr     = 152
	scTrapNo  = 160
	scOldMask = 168
	scCR2     = 176
	scFPState = 184
	scSize    = 256

	redZone      = 128 // System V ABI, AMD64 supplement, 3.2.2
	fpStateAlign = 64
)

// Values of uc_flags.
const (
	ucFPXState        = 1 << 0
	ucSigcontextSS    = 1 << 1
	ucStrictRestoreSS = 1 << 2
)

// struct _fpx_sw_bytes, in the part of the XSAVE area that is software's.
const (
	swMagic1       = fpSoftware + 0
	swExtendedSize = fpSoftware + 4
	swXFeatures    = fpSoftware + 8
	swXStateSize   = fpSoftware + 16

	fpMagic1     = 0x46505853
	fpMagic2     = 0x46505845 // follows the XSAVE area
	fpMagic2Size = 4
)

// scRegisters are the registers in the order of struct sigcontext_64.
func (r *Registers) scRegisters() [18]*uint64 {
	return [18]*uint64{
		&r.R8, &r.R9, &r.R10, &r.R11, &r.R12, &r.R13, &r.R14, &r.R15, &r.Rdi, &r.Rsi,
		&r.Rbp, &r.Rbx, &r.Rdx, &r.Rax, &r.Rcx, &r.Rsp, &r.Rip, &r.Eflags,
	}
}

// SignalSetup makes c enter a signal handler; see signal.go.
func (c *Context64) SignalSetup(ctx context.Context, io usermem.IO, act *linux.SigAction, info *linux.SignalInfo, alt *linux.SignalStack, mask linux.SignalSet, restorer uint64) error {
	ret, err := restorerOf(act, restorer)
	if err != nil {
		return err
	}
	fs := cpuid.Native()
	xfeatures := fs.UserXFeatures()
	xsaveSize := uint64(fs.XSaveSizeOf(xfeatures))

	sp := c.Regs.Rsp - redZone
	onAlt := onSignalStack(alt, c.Regs.Rsp)
	if entersSignalStack(act, alt, sp) {
		sp = alt.Addr + alt.Size
		onAlt = true
	}
	fpAddr := (sp - xsaveSize - fpMagic2Size) &^ (fpStateAlign - 1)
	// At the handler's entry the return address has just been pushed.
	sp = (fpAddr-frameSize)&^15 - 8
	if onAlt && !alt.Contains(sp) {
		return badFrame(sp, "beyond the alternate signal stack")
	}

	le := binary.LittleEndian
	b := c.frameBuffer(fpAddr + xsaveSize + fpMagic2Size - sp)
	clear(b)
	le.PutUint64(b[frameRestorer:], ret)
	uc := b[frameUC:]
	flags := uint64(ucSigcontextSS | ucStrictRestoreSS)
	if fs.Has(cpuid.FeatureXSAVE) {
		flags |= ucFPXState
	}
	le.PutUint64(uc[ucFlags:], flags)
	alt.MarshalBytes(uc[ucStack:])
	le.PutUint64(uc[ucMask:], uint64(mask))
	sc := uc[ucContext:]
	for i, r := range c.Regs.scRegisters() {
		le.PutUint64(sc[scRegs+8*i:], *r)
	}
	le.PutUint16(sc[scCS:], uint16(c.Regs.Cs))
	le.PutUint16(sc[scSS:], uint16(c.Regs.Ss))
	le.PutUint64(sc[scErr:], c.Fault.ErrorCode)
	le.PutUint64(sc[scTrapNo:], c.Fault.TrapNo)
	le.PutUint64(sc[scOldMask:], uint64(mask))
	le.PutUint64(sc[scCR2:], c.Fault.Addr)
	le.PutUint64(sc[scFPState:], fpAddr)
	info.MarshalBytes(b[frameInfo:])

	fp := FPState(b[fpAddr-sp:])
	copy(fp[:xsaveSize], c.fpu)
	clear(fp[fpSoftware:fpXStateBV])
	if fs.Has(cpuid.FeatureXSAVE) {
		le.PutUint32(fp[swMagic1:], fpMagic1)
		le.PutUint32(fp[swExtendedSize:], uint32(xsaveSize+fpMagic2Size))
		le.PutUint64(fp[swXFeatures:], xfeatures)
		le.PutUint32(fp[swXStateSize:], uint32(xsaveSize))
		// Programs that know only FXSAVE change x87 and SSE state without
		// touching the header.
		fp.setXStateBV(fp.xstateBV()&xfeatures | legacyXBV)
		le.PutUint32(fp[xsaveSize:], fpMagic2)
	}
	if _, err := io.CopyOut(ctx, hostarch.Addr(sp), b, usermem.IOOpts{}); err != nil {
		return badFrame(sp, err)
	}

	disarm(alt)
	r := &c.Regs
	r.Rdi = uint64(uint32(info.Signo))
	r.Rsi = sp + frameInfo
	r.Rdx = sp + frameUC
	r.Rax = 0
	r.Rsp = sp
	r.Rip = act.Handler
	r.Cs, r.Ss = userCS, userDS
	r.Eflags &^= eflagsDF | eflagsRF | eflagsTF
	r.Orig_rax = noSyscall
	c.fpu.Reset()
	return nil
}

// SignalRestore undoes SignalSetup; see signal.go.
func (c *Context64) SignalRestore(ctx context.Context, io usermem.IO) (mask linux.SignalSet, alt linux.SignalStack, err error) {
	// The handler's return took the first word off the frame.
	addr := c.Regs.Rsp - frameUC
	b := c.frameBuffer(ucSize + fpXStateBV + uint64(len(c.fpu)) + fpMagic2Size)
	uc := b[:ucSize]
	if _, err := io.CopyIn(ctx, hostarch.Addr(c.Regs.Rsp), uc, usermem.IOOpts{}); err != nil {
		return 0, alt, badFrame(addr, err)
	}
	le := binary.LittleEndian
	sc := uc[ucContext:]
	regs := c.Regs
	eflags := regs.Eflags
	for i, r := range regs.scRegisters() {
		*r = le.Uint64(sc[scRegs+8*i:])
	}
	regs.Eflags = eflags&^eflagsSigreturn | regs.Eflags&eflagsSigreturn
	regs.Cs = uint64(le.Uint16(sc[scCS:])) | 3
	regs.Ss = uint64(le.Uint16(sc[scSS:])) | 3
	if le.Uint64(uc[ucFlags:])&ucStrictRestoreSS == 0 {
		regs.Ss = userDS
	}
	// Linux takes any selector and faults on its way to user mode.
	if regs.Cs != userCS || regs.Ss != userDS {
		return 0, alt, badFrame(addr, "not the selectors of 64-bit user code")
	}
	regs.Orig_rax = noSyscall

	fpu, err := readFPState(ctx, io, le.Uint64(sc[scFPState:]), b[ucSize:])
	if err != nil {
		return 0, alt, badFrame(addr, err)
	}
	alt.UnmarshalBytes(uc[ucStack:])
	c.Regs = regs
	copy(c.fpu, fpu)
	return linux.SignalSet(le.Uint64(uc[ucMask:])) &^ linux.UnblockableSignals, alt, nil
}

// readFPState reads the floating point state of a frame at addr, or returns the
// initial state if addr is 0. It is in buf, which has room for the first part, the
// whole, and what follows it.
func readFPState(ctx context.Context, io usermem.IO, addr uint64, buf []byte) (FPState, error) {
	fs := cpuid.Native()
	legacy, whole := buf[:fpXStateBV], buf[fpXStateBV:]
	f := FPState(whole[:fs.XSaveSize()])
	f.Reset()
	if addr == 0 {
		return f, nil
	}
	le := binary.LittleEndian
	// The first part says how large the whole is. No byte is read twice.
	if _, err := io.CopyIn(ctx, hostarch.Addr(addr), legacy, usermem.IOOpts{}); err != nil {
		return nil, err
	}
	size := uint64(le.Uint32(legacy[swXStateSize:]))
	extended := fs.Has(cpuid.FeatureXSAVE) &&
		le.Uint32(legacy[swMagic1:]) == fpMagic1 &&
		size >= fpExtended && size <= uint64(fs.XSaveSizeOf(fs.UserXFeatures())) &&
		size <= uint64(le.Uint32(legacy[swExtendedSize:]))
	if extended {
		rest := whole[fpXStateBV : size+fpMagic2Size]
		if _, err := io.CopyIn(ctx, hostarch.Addr(addr+fpXStateBV), rest, usermem.IOOpts{}); err != nil {
			return nil, err
		}
		extended = le.Uint32(rest[size-fpXStateBV:]) == fpMagic2
	}
	if !extended {
		// A program that knows only FXSAVE made the frame: everything else is in
		// its initial state.
		f.Reset()
		copy(f, legacy[:fpSoftware])
		return f, f.Validate()
	}
	if addr%fpStateAlign != 0 {
		return nil, errMisalignedFPState
	}
	clear(f[size:])
	copy(f, legacy[:fpSoftware])
	clear(f[fpSoftware:fpXStateBV])
	if v := f.xstateBV() &^ fs.XCR0(); v != 0 {
		return nil, f.Validate()
	}
	// Components that the frame does not offer, or is too small for, are in
	// their initial state.
	xbv := f.xstateBV() & le.Uint64(legacy[swXFeatures:]) & fs.UserXFeatures()
	for _, c := range fpComponents() {
		if uint64(c.end) > size {
			xbv &^= c.feature
		}
	}
	f.setXStateBV(xbv)
	return f, f.Validate()
}

var errMisalignedFPState = errors.New("floating point state is not aligned to 64 bytes")
