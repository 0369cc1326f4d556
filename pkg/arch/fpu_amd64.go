package arch

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/ringfence/ringfence/pkg/cpuid"
)

// Offsets in an XSAVE area (Intel SDM vol. 1, 13.4).
const (
	fpFCW       = 0
	fpMXCSR     = 24
	fpMXCSRMask = 28
	fpST0       = 32
	fpXMM0      = 160
	fpXMMEnd    = 416
	fpSoftware  = 464 // up to the header: not the CPU's
	fpXStateBV  = 512
	fpXCompBV   = 520
	fpReserved  = 528
	fpExtended  = 576
)

// What the x87 control word and MXCSR are in a new program (Intel SDM vol. 1,
// 8.1.5 and 10.2.3).
const (
	initFCW   = 0x37f
	initMXCSR = 0x1f80

	// initPKRU denies access by every protection key but 0
	// (arch/x86/include/asm/pkru.h, init_pkru_value).
	initPKRU = 0x55555554

	pkruFeature = 9
	legacyXBV   = cpuid.XFeatureX87 | cpuid.XFeatureSSE
)

// NewFPState returns the state of a new program, in an XSAVE area of the size
// that the host's XCR0 asks for.
func NewFPState() FPState {
	f := make(FPState, cpuid.Native().XSaveSize())
	f.Reset()
	return f
}

// Reset makes f the state of a new program.
func (f FPState) Reset() {
	clear(f)
	binary.LittleEndian.PutUint16(f[fpFCW:], initFCW)
	binary.LittleEndian.PutUint32(f[fpMXCSR:], initMXCSR)
	fs := cpuid.Native()
	binary.LittleEndian.PutUint32(f[fpMXCSRMask:], fs.MXCSRMask())
	xbv := uint64(legacyXBV)
	if off, size := fs.XFeatureLayout(pkruFeature); size != 0 {
		binary.LittleEndian.PutUint32(f[off:], initPKRU)
		xbv |= cpuid.XFeaturePKRU
	}
	f.setXStateBV(xbv)
}

func (f FPState) xstateBV() uint64     { return binary.LittleEndian.Uint64(f[fpXStateBV:]) }
func (f FPState) setXStateBV(v uint64) { binary.LittleEndian.PutUint64(f[fpXStateBV:], v) }
func (f FPState) mxcsr() uint32        { return binary.LittleEndian.Uint32(f[fpMXCSR:]) }

// Validate reports why XRSTOR, or PTRACE_SETREGSET, would refuse f: a wrong size,
// reserved bits of MXCSR, state components that an application cannot use, a
// compacted area, reserved bytes in the header (Intel SDM vol. 1, 13.8).
func (f FPState) Validate() error {
	fs := cpuid.Native()
	if len(f) != fs.XSaveSize() {
		return fmt.Errorf("floating point state of %d bytes: this CPU's has %d", len(f), fs.XSaveSize())
	}
	if v := f.mxcsr() &^ fs.MXCSRMask(); v != 0 {
		return fmt.Errorf("floating point state: reserved bits %#x of MXCSR are set", v)
	}
	if v := f.xstateBV() &^ fs.UserXFeatures(); v != 0 {
		return fmt.Errorf("floating point state: state components %#x are not available", v)
	}
	if !allZero(f[fpXCompBV:fpExtended]) {
		return fmt.Errorf("floating point state: reserved bytes of the XSAVE header are set")
	}
	return nil
}

// Sanitize clears what Validate complains about. f must have the right size.
func (f FPState) Sanitize() {
	fs := cpuid.Native()
	binary.LittleEndian.PutUint32(f[fpMXCSR:], f.mxcsr()&fs.MXCSRMask())
	f.setXStateBV(f.xstateBV() & fs.UserXFeatures())
	clear(f[fpXCompBV:fpExtended])
}

// fpComponents are the state components that have a place of their own in an area.
var fpComponents = sync.OnceValue(func() (cs []fpComponent) {
	fs := cpuid.Native()
	for i := 2; i < 63; i++ {
		if off, size := fs.XFeatureLayout(i); size != 0 && off+size <= fs.XSaveSize() {
			cs = append(cs, fpComponent{1 << i, off, off + size})
		}
	}
	return cs
})

type fpComponent struct {
	feature  uint64
	off, end int
}

// CopyExtended copies what follows the header from src, which is at least as large as f
// and may be shared: the state components that f's header, which is there and has been
// checked, says are in use. It clears the others.
func (f FPState) CopyExtended(src []byte) {
	xbv := f.xstateBV()
	for _, c := range fpComponents() {
		if xbv&c.feature != 0 {
			copy(f[c.off:c.end], src[c.off:c.end])
		} else {
			clear(f[c.off:c.end])
		}
	}
}

// CopyExtendedTo is the reverse of CopyExtended. What is in dst of components that are
// not in use stays: XRSTOR does not read it (Intel SDM vol. 1, 13.6).
func (f FPState) CopyExtendedTo(dst []byte) {
	xbv := f.xstateBV()
	for _, c := range fpComponents() {
		if xbv&c.feature != 0 {
			copy(dst[c.off:c.end], f[c.off:c.end])
		}
	}
}

// Equal reports whether f and g are the same state to an application. A state
// component in its initial configuration may be marked so (XSTATE_BV) or
// spelt out, and bytes that are not the CPU's do not count.
func (f FPState) Equal(g FPState) bool {
	return len(f) == len(g) && bytes.Equal(f.normal(), g.normal())
}

// normal returns a copy of f with every component spelt out and the rest zero.
func (f FPState) normal() FPState {
	n := append(FPState(nil), f...)
	xbv := f.xstateBV()
	if xbv&cpuid.XFeatureX87 == 0 {
		clear(n[:fpMXCSR])
		clear(n[fpST0:fpXMM0])
		binary.LittleEndian.PutUint16(n[fpFCW:], initFCW)
	}
	if xbv&cpuid.XFeatureSSE == 0 {
		clear(n[fpXMM0:fpXMMEnd])
	}
	clear(n[fpMXCSRMask:fpST0])
	clear(n[fpXMMEnd:fpExtended])
	end := fpExtended
	for _, c := range fpComponents() {
		if xbv&c.feature == 0 {
			clear(n[c.off:c.end])
		}
		end = max(end, c.end)
	}
	clear(n[end:])
	return n
}

func allZero(b []byte) bool {
	for _, v := range b {
		if v != 0 {
			return false
		}
	}
	return true
}
