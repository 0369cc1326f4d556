package arch

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/cpuid"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// The signal frame: struct rt_sigframe (arch/arm64/kernel/signal.c), with struct
// ucontext and struct sigcontext (uapi/asm/ucontext.h, sigcontext.h). The last
// member holds records, each with a header; what does not fit there follows in
// extra space. Above lies a frame record for unwinders.
const (
	frameInfo       = 0
	frameUC         = linux.SignalInfoSize
	frameRecords    = frameUC + ucContext + scRecords
	frameSize       = frameRecords + recordsSize
	frameRecord     = 16
	maxFrameSize    = 64 << 10 // SIGFRAME_MAXSZ
	frameStackAlign = 16

	ucStack   = 16
	ucMask    = 40
	ucContext = 176

	scFault     = 0
	scRegs      = 8 // X0-X30, SP, PC, PSTATE
	scRecords   = 288
	recordsSize = 4096
)

// Records of struct sigcontext.
const (
	recordHeader   = 8 // magic, size
	terminatorSize = 16

	fpsimdMagic      = 0x46508001
	fpsimdRecordSize = recordHeader + fpStatusBytes + vregsSize

	esrMagic      = 0x45535201
	esrRecordSize = recordHeader + 8

	extraMagic      = 0x45585401
	extraRecordSize = 32 // header, address, size, reserved

	sveMagic      = 0x53564501
	sveRecordRegs = 16 // header, vector length, flags, reserved
)

// sveRecordSize is the size of an SVE record: the registers are left out of it
// when the thread has none of its own.
func sveRecordSize(vl int, regs bool) int {
	if !regs {
		return sveRecordRegs
	}
	return align16(sveRecordRegs + sveRegsSize(vl))
}

// frameLayout places records in a frame.
type frameLayout struct {
	size  int // so far
	limit int
	extra int // offset of the extra record, or 0
}

func newFrameLayout() frameLayout {
	return frameLayout{size: frameRecords, limit: frameSize - terminatorSize - extraRecordSize}
}

// add returns the offset of a record of n bytes. A record that does not fit into
// the sigcontext goes, like all after it, into extra space behind a terminator.
func (l *frameLayout) add(n int) (int, error) {
	n = align16(n)
	if l.size+n > l.limit && l.extra == 0 {
		l.extra = l.size
		l.size += extraRecordSize + terminatorSize
		l.limit = maxFrameSize - terminatorSize
	}
	if l.size+n > l.limit {
		return 0, errors.New("the records do not fit")
	}
	off := l.size
	l.size += n
	return off, nil
}

func putHeader(b []byte, magic, size int) {
	binary.LittleEndian.PutUint32(b, uint32(magic))
	binary.LittleEndian.PutUint32(b[4:], uint32(size))
}

// SignalSetup makes c enter a signal handler; see signal.go.
func (c *Context64) SignalSetup(ctx context.Context, io usermem.IO, act *linux.SigAction, info *linux.SignalInfo, alt *linux.SignalStack, mask linux.SignalSet, restorer uint64) error {
	ret, err := restorerOf(act, restorer)
	if err != nil {
		return err
	}
	// Lay out the records.
	l := newFrameLayout()
	fpsimd, err := l.add(fpsimdRecordSize)
	if err != nil {
		return badFrame(c.Regs.Sp, err)
	}
	var esr, sve int
	if c.Fault.ErrorCode != 0 {
		if esr, err = l.add(esrRecordSize); err != nil {
			return badFrame(c.Regs.Sp, err)
		}
	}
	vl := c.fpu.vl()
	if vl != 0 {
		if sve, err = l.add(sveRecordSize(vl, c.fpu.HasSVE())); err != nil {
			return badFrame(c.Regs.Sp, err)
		}
	}
	end := l.size // the terminator stays zero

	sp := c.Regs.Sp
	if entersSignalStack(act, alt, sp) {
		sp = alt.Addr + alt.Size
	}
	record := (sp - frameRecord) &^ (frameStackAlign - 1)
	size := align16(max(end+terminatorSize, frameSize))
	sp = record - uint64(size)

	le := binary.LittleEndian
	b := c.frameBuffer(uint64(size + frameRecord))
	clear(b)
	info.MarshalBytes(b[frameInfo:])
	uc := b[frameUC:]
	alt.MarshalBytes(uc[ucStack:])
	le.PutUint64(uc[ucMask:], uint64(mask))
	sc := uc[ucContext:]
	le.PutUint64(sc[scFault:], c.Fault.Addr)
	for i, r := range c.Regs.scRegisters() {
		le.PutUint64(sc[scRegs+8*i:], *r)
	}
	le.PutUint64(sc[scPstate:], c.Regs.Pstate&^pstateSS)

	r := b[fpsimd:]
	putHeader(r, fpsimdMagic, fpsimdRecordSize)
	copy(r[recordHeader:], c.fpu.status())
	for i := range numVRegs {
		copy(r[recordHeader+fpStatusBytes+16*i:], c.fpu.vreg(i))
	}
	if esr != 0 {
		putHeader(b[esr:], esrMagic, esrRecordSize)
		le.PutUint64(b[esr+recordHeader:], c.Fault.ErrorCode)
	}
	if sve != 0 {
		putHeader(b[sve:], sveMagic, sveRecordSize(vl, c.fpu.HasSVE()))
		le.PutUint16(b[sve+recordHeader:], uint16(vl))
		if c.fpu.HasSVE() {
			copy(b[sve+sveRecordRegs:], c.fpu.sveRegs())
		}
	}
	if l.extra != 0 {
		data := l.extra + extraRecordSize + terminatorSize
		putHeader(b[l.extra:], extraMagic, extraRecordSize)
		le.PutUint64(b[l.extra+recordHeader:], sp+uint64(data))
		le.PutUint32(b[l.extra+recordHeader+8:], uint32(end+terminatorSize-data))
	}
	le.PutUint64(b[size:], c.Regs.Regs[29])
	le.PutUint64(b[size+8:], c.Regs.Regs[30])
	if _, err := io.CopyOut(ctx, hostarch.Addr(sp), b, usermem.IOOpts{}); err != nil {
		return badFrame(sp, err)
	}

	disarm(alt)
	regs := &c.Regs
	regs.Regs[0] = uint64(uint32(info.Signo))
	if act.Flags&linux.SA_SIGINFO != 0 {
		regs.Regs[1] = sp + frameInfo
		regs.Regs[2] = sp + frameUC
	}
	regs.Regs[29] = record
	regs.Regs[30] = ret
	regs.Sp = sp
	regs.Pc = act.Handler
	regs.Pstate &^= pstateTCO
	if cpuid.Native().Has(cpuid.FeatureBTI) {
		regs.Pstate = regs.Pstate&^pstateBTypeMask | pstateBTypeC
	}
	regs.SyscallNo = noSyscall
	return nil
}

// scPstate is where PSTATE lies in a sigcontext.
const scPstate = scRegs + 33*8

// scRegisters are the registers in the order of struct sigcontext.
func (r *Registers) scRegisters() (regs [34]*uint64) {
	for i := range r.Regs {
		regs[i] = &r.Regs[i]
	}
	regs[31], regs[32], regs[33] = &r.Sp, &r.Pc, &r.Pstate
	return regs
}

// SignalRestore undoes SignalSetup; see signal.go.
func (c *Context64) SignalRestore(ctx context.Context, io usermem.IO) (mask linux.SignalSet, alt linux.SignalStack, err error) {
	addr := c.Regs.Sp
	if addr%frameStackAlign != 0 {
		return 0, alt, badFrame(addr, "not aligned to 16 bytes")
	}
	b := c.frameBuffer(frameSize)
	if _, err := io.CopyIn(ctx, hostarch.Addr(addr), b, usermem.IOOpts{}); err != nil {
		return 0, alt, badFrame(addr, err)
	}
	uc := b[frameUC:]
	sc := uc[ucContext:]
	n := Context64{Regs: c.Regs, fpu: newFPState(c.fpu.vl())}
	for i, r := range n.Regs.scRegisters() {
		*r = binary.LittleEndian.Uint64(sc[scRegs+8*i:])
	}
	n.Regs.Pstate = n.Regs.Pstate&^pstateSS | c.Regs.Pstate&pstateSS
	if !n.SanitizeRegs() {
		return 0, alt, badFrame(addr, "PSTATE is not user mode's")
	}
	n.Regs.SyscallNo = noSyscall

	records, err := readRecords(ctx, io, addr, b)
	if err != nil {
		return 0, alt, badFrame(addr, err)
	}
	if err := n.fpu.setRecords(records); err != nil {
		return 0, alt, badFrame(addr, err)
	}
	alt.UnmarshalBytes(uc[ucStack:])
	c.Regs = n.Regs
	copy(c.fpu, n.fpu)
	return linux.SignalSet(binary.LittleEndian.Uint64(uc[ucMask:])) &^ linux.UnblockableSignals, alt, nil
}

// fpRecords are the records of a frame that hold registers; nil where the frame
// has none.
type fpRecords struct {
	fpsimd, sve []byte
}

// readRecords finds the records in frame b at addr, and reads those in the extra
// space.
func readRecords(ctx context.Context, io usermem.IO, addr uint64, b []byte) (fpRecords, error) {
	var recs fpRecords
	le := binary.LittleEndian
	rest := b[frameRecords:]
	inExtra := false
	// Each round takes at least a header off rest, which is replaced once.
	for {
		if len(rest) < recordHeader {
			return recs, errors.New("records without a terminator")
		}
		magic, size := le.Uint32(rest), int(le.Uint32(rest[4:]))
		if magic == 0 {
			if size != 0 {
				return recs, errors.New("a terminator with a size")
			}
			return recs, nil
		}
		if size < recordHeader || size%16 != 0 || size > len(rest) {
			return recs, fmt.Errorf("record %#x of %d bytes", magic, size)
		}
		rec := rest[:size]
		rest = rest[size:]
		switch magic {
		case fpsimdMagic:
			if recs.fpsimd != nil {
				return recs, errors.New("two FPSIMD records")
			}
			recs.fpsimd = rec
		case sveMagic:
			if recs.sve != nil {
				return recs, errors.New("two SVE records")
			}
			recs.sve = rec
		case esrMagic: // for the handler's information
		case extraMagic:
			if inExtra || size != extraRecordSize || len(rest) < terminatorSize {
				return recs, errors.New("an extra record out of place")
			}
			if le.Uint64(rest) != 0 {
				return recs, errors.New("an extra record without a terminator")
			}
			inExtra = true
			// The extra space follows at once.
			data := uint64(len(b) - len(rest) + terminatorSize)
			n := uint64(le.Uint32(rec[recordHeader+8:]))
			if le.Uint64(rec[recordHeader:]) != addr+data || n%16 != 0 || data+n > maxFrameSize {
				return recs, errors.New("extra space out of place")
			}
			// A part of it has been read with the frame.
			extra := make([]byte, n)
			have := copy(extra, b[data:])
			if _, err := io.CopyIn(ctx, hostarch.Addr(addr+data+uint64(have)), extra[have:], usermem.IOOpts{}); err != nil {
				return recs, err
			}
			rest = extra
		default:
			return recs, fmt.Errorf("unknown record %#x", magic)
		}
	}
}

// setRecords makes f, which is in its initial state, what records say.
func (f FPState) setRecords(recs fpRecords) error {
	if len(recs.fpsimd) != fpsimdRecordSize {
		return errors.New("no FPSIMD record, or one of a wrong size")
	}
	if recs.sve != nil {
		vl := int(binary.LittleEndian.Uint16(recs.sve[recordHeader:]))
		flags := binary.LittleEndian.Uint16(recs.sve[recordHeader+2:])
		switch {
		case f.vl() == 0 || vl != f.vl() || flags != 0:
			return fmt.Errorf("SVE record with vector length %d and flags %#x: this thread's length is %d", vl, flags, f.vl())
		case len(recs.sve) == sveRecordRegs:
		case len(recs.sve) < sveRecordSize(vl, true):
			return errors.New("SVE record too small for its registers")
		default:
			f.setHeader(vl, true)
			copy(f.sveRegs(), recs.sve[sveRecordRegs:])
		}
	}
	// FPSIMD's record has the last word on what both hold.
	copy(f.status(), recs.fpsimd[recordHeader:])
	for i := range numVRegs {
		copy(f.vreg(i), recs.fpsimd[recordHeader+fpStatusBytes+16*i:][:16])
	}
	return nil
}
