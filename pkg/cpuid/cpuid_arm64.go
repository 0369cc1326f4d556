package cpuid

import (
	"sync"

	"golang.org/x/sys/unix"
)

// Feature is one hardware capability: the number of its bit in AT_HWCAP, or 64
// plus the number of its bit in AT_HWCAP2 (asm/hwcap.h).
type Feature uint32

// The features that Ringfence asks for, or that a policy may want to hide.
const (
	FeatureFP      Feature = 0
	FeatureASIMD   Feature = 1
	FeatureAES     Feature = 3
	FeatureCRC32   Feature = 7
	FeatureATOMICS Feature = 8
	FeatureCPUID   Feature = 11
	FeatureSVE     Feature = 22
	FeatureSSBS    Feature = 28
	FeaturePACA    Feature = 30
	FeaturePACG    Feature = 31
	FeatureGCS     Feature = 32

	FeatureSVE2 Feature = 64 + 1
	FeatureBTI  Feature = 64 + 17
	FeatureMTE  Feature = 64 + 18
	FeatureMTE3 Feature = 64 + 22
	FeatureSME  Feature = 64 + 23
	FeatureSME2 Feature = 64 + 37
	FeatureFPMR Feature = 64 + 48
	FeaturePOE  Feature = 64 + 63
)

// FeatureSet is what the auxiliary vector tells an application.
type FeatureSet struct {
	hwcap AuxHWCap
}

// Capabilities that come with registers that arch.FPState does not hold: the
// scalable matrix extension (ZA, ZT0, TPIDR2), floating point mode, guarded
// control stacks, memory tags and permission overlays.
const (
	uncarriedHWCap = 1<<FeatureGCS |
		0x3f<<42 | // SME2p2 to SME_SMOP4
		3<<35 // F8MM8, F8MM4
	uncarriedHWCap2 = 1<<(FeatureMTE-64) | 1<<(FeatureMTE3-64) |
		0xff<<23 | // SME to SME_FA64
		0x3f<<37 | // SME2 to SME_F16F16
		1<<(FeatureFPMR-64) |
		0x1fff<<51 // F8CVT to POE
)

func newNative() *FeatureSet {
	h := hostHWCap()
	return &FeatureSet{AuxHWCap{h.HWCap &^ uncarriedHWCap, h.HWCap2 &^ uncarriedHWCap2}}
}

func (fs *FeatureSet) clone() *FeatureSet { return &FeatureSet{fs.hwcap} }

func (fs *FeatureSet) hide(features []Feature) {
	for _, f := range features {
		switch {
		case f < 64:
			fs.hwcap.HWCap &^= 1 << f
		case f < 128:
			fs.hwcap.HWCap2 &^= 1 << (f - 64)
		}
		if f == FeatureSVE {
			fs.hwcap.HWCap &^= sveHWCap
			fs.hwcap.HWCap2 &^= sveHWCap2
		}
	}
}

// What cannot work without SVE.
const (
	sveHWCap  = 0x1f << 37                               // SVE_F16MM to SVE2P2
	sveHWCap2 = 0x3f<<1 | 0xf<<9 | 1<<33 | 1<<36 | 1<<45 // SVE2 to SVESM4, SVEI8MM to SVEBF16, SVE_EBF16, SVE2P1, SVE_B16B16
)

// Has reports whether applications are shown f.
func (fs *FeatureSet) Has(f Feature) bool {
	if f < 64 {
		return fs.hwcap.HWCap&(1<<f) != 0
	}
	return f < 128 && fs.hwcap.HWCap2&(1<<(f-64)) != 0
}

// AuxHWCap returns AT_HWCAP and AT_HWCAP2.
func (fs *FeatureSet) AuxHWCap() AuxHWCap { return fs.hwcap }

// SVEVectorLength returns the length in bytes of the host's SVE vectors, as this
// process and its children have them, or 0 without SVE. Hiding SVE does not
// change it: the state is there all the same.
func (fs *FeatureSet) SVEVectorLength() int { return sveVectorLength() }

var sveVectorLength = sync.OnceValue(func() int {
	if hostHWCap().HWCap&(1<<FeatureSVE) == 0 {
		return 0
	}
	vl, err := unix.PrctlRetInt(unix.PR_SVE_GET_VL, 0, 0, 0, 0)
	if err != nil {
		return 0
	}
	return vl & unix.PR_SVE_VL_LEN_MASK
})

// HasCPUIDFaulting returns false: arm64 has no such instruction.
func HasCPUIDFaulting() bool { return false }
