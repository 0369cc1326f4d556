package arch

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/ringfence/ringfence/pkg/cpuid"
)

// An FPState is laid out as the register set NT_ARM_SVE (struct user_sve_header
// in asm/ptrace.h): a header, and either struct user_fpsimd_state or, with the
// flag fpFlagSVE, the SVE registers. Without SVE the vector length in the header
// is 0 and the register set NT_PRFPREG is FPSIMD's bytes.
const (
	fpSize     = 0  // uint32: bytes in use
	fpMaxSize  = 4  // uint32
	fpVL       = 8  // uint16: vector length in bytes
	fpMaxVL    = 10 // uint16
	fpFlags    = 12 // uint16
	fpReserved = 14 // uint16
	fpRegs     = 16

	fpFlagSVE = 1

	numVRegs      = 32
	vregsSize     = numVRegs * 16
	fpsimdSize    = vregsSize + 16 // with FPSR, FPCR and padding
	fpsimdEnd     = fpRegs + fpsimdSize
	fpStatusBytes = 8 // FPSR and FPCR
)

func align16(n int) int { return (n + 15) &^ 15 }

// sveRegsSize is the size of Z0-Z31, P0-P15 and FFR for a vector length.
func sveRegsSize(vl int) int { return numVRegs*vl + 17*(vl/8) }

// sveStatus is the offset of FPSR in a state with SVE registers.
func sveStatus(vl int) int { return fpRegs + align16(sveRegsSize(vl)) }

// fpStateSize is the size of an FPState for a vector length, 0 without SVE.
func fpStateSize(vl int) int {
	if vl == 0 {
		return fpsimdEnd
	}
	return max(fpsimdEnd, align16(sveStatus(vl)+fpStatusBytes))
}

// NewFPState returns the state of a new program, large enough for the host's
// SVE vectors.
func NewFPState() FPState { return newFPState(cpuid.Native().SVEVectorLength()) }

func newFPState(vl int) FPState {
	f := make(FPState, fpStateSize(vl))
	f.setHeader(vl, false)
	return f
}

// Reset makes f the state of a new program.
func (f FPState) Reset() {
	vl := f.vl()
	clear(f)
	f.setHeader(vl, false)
}

func (f FPState) setHeader(vl int, sve bool) {
	size, flags := fpsimdEnd, 0
	if sve {
		size, flags = align16(sveStatus(vl)+fpStatusBytes), fpFlagSVE
	}
	le := binary.LittleEndian
	le.PutUint32(f[fpSize:], uint32(size))
	le.PutUint32(f[fpMaxSize:], uint32(len(f)))
	le.PutUint16(f[fpVL:], uint16(vl))
	le.PutUint16(f[fpMaxVL:], uint16(vl))
	le.PutUint16(f[fpFlags:], uint16(flags))
	le.PutUint16(f[fpReserved:], 0)
}

func (f FPState) vl() int { return int(binary.LittleEndian.Uint16(f[fpVL:])) }

// HasSVE reports whether f holds SVE registers rather than FPSIMD's alone: the
// kernel drops what is beyond FPSIMD at every system call.
func (f FPState) HasSVE() bool { return binary.LittleEndian.Uint16(f[fpFlags:])&fpFlagSVE != 0 }

// FPSIMD returns the register set NT_PRFPREG in place. f must not hold SVE
// registers.
func (f FPState) FPSIMD() []byte { return f[fpRegs:fpsimdEnd] }

// sveRegs returns Z0-Z31, P0-P15 and FFR in place; f holds them.
func (f FPState) sveRegs() []byte { return f[fpRegs:][:sveRegsSize(f.vl())] }

// vreg returns V0 and so on in place: the low half of a Z register with SVE.
func (f FPState) vreg(i int) []byte {
	stride := 16
	if f.HasSVE() {
		stride = f.vl()
	}
	return f[fpRegs+i*stride:][:16]
}

// status returns FPSR and FPCR in place.
func (f FPState) status() []byte {
	off := fpRegs + vregsSize
	if f.HasSVE() {
		off = sveStatus(f.vl())
	}
	return f[off:][:fpStatusBytes]
}

// Validate reports why PTRACE_SETREGSET would refuse f, or change the vector
// length: a wrong size or a header that is not one.
func (f FPState) Validate() error {
	vl := cpuid.Native().SVEVectorLength()
	if len(f) != fpStateSize(vl) {
		return fmt.Errorf("floating point state of %d bytes: this CPU's has %d", len(f), fpStateSize(vl))
	}
	want := make(FPState, len(f))
	want.setHeader(vl, f.HasSVE() && vl != 0)
	if !bytes.Equal(f[:fpRegs], want[:fpRegs]) {
		return fmt.Errorf("floating point state: header % x, want % x", f[:fpRegs], want[:fpRegs])
	}
	return nil
}

// Sanitize replaces a header that Validate complains about. f must have the
// right size.
func (f FPState) Sanitize() {
	vl := cpuid.Native().SVEVectorLength()
	f.setHeader(vl, f.HasSVE() && vl != 0)
}

// Equal reports whether f and g are the same state to an application: SVE
// registers that are zero beyond FPSIMD's may be left out.
func (f FPState) Equal(g FPState) bool {
	if len(f) != len(g) || f.vl() != g.vl() {
		return false
	}
	return bytes.Equal(f.normal(), g.normal())
}

// normal returns a copy of f with SVE registers if the host has them, and with
// nothing but registers.
func (f FPState) normal() FPState {
	n := newFPState(f.vl())
	n.setHeader(f.vl(), f.vl() != 0)
	switch {
	case f.HasSVE():
		copy(n.sveRegs(), f.sveRegs())
	default:
		for i := range numVRegs {
			copy(n.vreg(i), f.vreg(i))
		}
	}
	copy(n.status(), f.status())
	return n
}
