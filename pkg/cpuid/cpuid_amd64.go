package cpuid

import (
	"encoding/binary"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// query executes CPUID.
func query(leaf, subleaf uint32) (eax, ebx, ecx, edx uint32)

// xgetbv returns XCR0. It faults unless CR4.OSXSAVE is set.
func xgetbv() uint64

// mxcsrMask returns the MXCSR_MASK that FXSAVE writes.
func mxcsrMask() uint32

// FeatureSet is what CPUID tells an application. It is safe for concurrent use.
type FeatureSet struct {
	// ask answers what is not in cache: the CPU, or the set that this one differs from
	// by hidden.
	ask func(leaf, subleaf uint32) (eax, ebx, ecx, edx uint32)

	vendor string
	hwcap2 uint64
	hidden [numWords]uint32

	// The XSAVE area: what XCR0 enables and where its parts lie.
	xcr0      uint64
	xsaveSize int
	xfeatures [64]xfeature

	// cache holds the answers that were given: CPUID costs microseconds in a
	// virtual machine, and an answer must not change with the CPU that runs the
	// Sentry. maxCached bounds what a hostile application can fill it with.
	mu    sync.RWMutex
	cache map[in]out
}

const maxCached = 1024

type in struct{ leaf, subleaf uint32 }
type out struct{ eax, ebx, ecx, edx uint32 }

// xfeature is where a state component lies in an XSAVE area that is not
// compacted (Intel SDM vol. 1, 13.4).
type xfeature struct{ offset, size int }

// Leaves of CPUID (Intel SDM vol. 2, AMD APM vol. 3 appendix E).
const (
	leafVendor      = 0
	leafFeatures    = 1
	leafExtFeatures = 7
	leafTopology    = 0xb
	leafXSave       = 0xd
	leafTopologyV2  = 0x1f
	leafExtended    = 0x80000001
	leafAMDTopology = 0x8000001e
	leafAMDTopo26   = 0x80000026
)

// State components of XCR0 (Intel SDM vol. 1, 13.1).
const (
	XFeatureX87      = 1 << 0
	XFeatureSSE      = 1 << 1
	XFeatureAVX      = 1 << 2
	XFeatureOpmask   = 1 << 5
	XFeatureZMMHi256 = 1 << 6
	XFeatureHi16ZMM  = 1 << 7
	XFeaturePKRU     = 1 << 9
	XFeatureTileCfg  = 1 << 17
	XFeatureTileData = 1 << 18
	xfeaturesAVX512  = XFeatureOpmask | XFeatureZMMHi256 | XFeatureHi16ZMM
	xfeaturesAMX     = XFeatureTileCfg | XFeatureTileData
	xfeaturesDynamic = XFeatureTileData
	legacyXSaveSize  = 512 + 64
	legacyXFeatures  = XFeatureX87 | XFeatureSSE
	hwcap2FSGSBase   = 1 << 1
	archSetCPUID     = 0x1012
	enableCPUID      = 1
)

func newNative() *FeatureSet {
	fs := &FeatureSet{
		ask:       query,
		hwcap2:    hostHWCap().HWCap2,
		xcr0:      legacyXFeatures,
		xsaveSize: legacyXSaveSize,
		cache:     make(map[in]out),
	}
	maxLeaf, b, c, d := fs.Emulate(leafVendor, 0)
	v := binary.LittleEndian.AppendUint32(nil, b)
	v = binary.LittleEndian.AppendUint32(v, d)
	fs.vendor = string(binary.LittleEndian.AppendUint32(v, c))

	if fs.Has(FeatureOSXSAVE) && maxLeaf >= leafXSave {
		fs.xcr0 = xgetbv()
		_, size, _, _ := query(leafXSave, 0)
		fs.xsaveSize = int(size)
		for i := 2; i < 63; i++ {
			if fs.xcr0&(1<<i) != 0 {
				size, offset, _, _ := query(leafXSave, uint32(i))
				fs.xfeatures[i] = xfeature{int(offset), int(size)}
			}
		}
	}
	return fs
}

// clone returns a set that is the same as fs, which hides nothing, and asks fs instead
// of the CPU.
func (fs *FeatureSet) clone() *FeatureSet {
	return &FeatureSet{
		ask: fs.Emulate, vendor: fs.vendor, hwcap2: fs.hwcap2,
		xcr0: fs.xcr0, xsaveSize: fs.xsaveSize, xfeatures: fs.xfeatures,
		cache: make(map[in]out),
	}
}

// hide removes the features and those that need them. Nobody has asked fs before.
func (fs *FeatureSet) hide(features []Feature) {
	for todo := slices.Clone(features); len(todo) > 0; {
		f := todo[0]
		todo = todo[1:]
		if !fs.isHidden(f) {
			fs.hidden[f/32] |= 1 << (f % 32)
			todo = append(todo, needs[f]...)
		}
	}
	if fs.isHidden(FeatureFSGSBASE) {
		fs.hwcap2 &^= hwcap2FSGSBase
	}
}

func (fs *FeatureSet) isHidden(f Feature) bool { return fs.hidden[f/32]&(1<<(f%32)) != 0 }

// VendorID returns the CPU's vendor as CPUID spells it: "GenuineIntel",
// "AuthenticAMD".
func (fs *FeatureSet) VendorID() string { return fs.vendor }

// XCR0 returns the state components that the host kernel enabled.
func (fs *FeatureSet) XCR0() uint64 { return fs.xcr0 }

// UserXFeatures returns the state components that an application can use: XCR0
// without those that a process must ask for first (arch_prctl(2),
// ARCH_REQ_XCOMP_PERM).
func (fs *FeatureSet) UserXFeatures() uint64 { return fs.xcr0 &^ xfeaturesDynamic }

// XSaveSize returns the size in bytes of an uncompacted XSAVE area for XCR0. It
// is what PTRACE_SETREGSET wants of NT_X86_XSTATE.
func (fs *FeatureSet) XSaveSize() int { return fs.xsaveSize }

// XSaveSizeOf returns the size in bytes of an uncompacted XSAVE area that holds
// the given state components.
func (fs *FeatureSet) XSaveSizeOf(xfeatures uint64) int {
	size := legacyXSaveSize
	for i, f := range fs.xfeatures {
		if xfeatures&(1<<i) != 0 {
			size = max(size, f.offset+f.size)
		}
	}
	return size
}

// XFeatureLayout returns where state component i, from 2 on, lies in an
// uncompacted XSAVE area, in bytes; the size is 0 for what XCR0 does not enable.
func (fs *FeatureSet) XFeatureLayout(i int) (offset, size int) {
	f := fs.xfeatures[i]
	return f.offset, f.size
}

// MXCSRMask returns the bits of MXCSR that may be set (Intel SDM vol. 1, 11.6.6).
func (fs *FeatureSet) MXCSRMask() uint32 { return hostMXCSRMask() }

var hostMXCSRMask = sync.OnceValue(func() uint32 {
	if m := mxcsrMask(); m != 0 {
		return m
	}
	return 0xffbf // CPUs that do not report it lack denormals-are-zeros
})

// Has reports whether applications are shown f.
func (fs *FeatureSet) Has(f Feature) bool {
	w := words[f/32]
	a, b, c, d := fs.Emulate(w.leaf, w.subleaf)
	return [...]uint32{a, b, c, d}[w.reg]&(1<<(f%32)) != 0
}

// AuxHWCap returns AT_HWCAP and AT_HWCAP2 (arch/x86/include/asm/elf.h).
func (fs *FeatureSet) AuxHWCap() AuxHWCap {
	_, _, _, d := fs.Emulate(leafFeatures, 0)
	return AuxHWCap{HWCap: uint64(d), HWCap2: fs.hwcap2}
}

// Emulate returns what the instruction CPUID answers for EAX = leaf and ECX =
// subleaf: the host's answer without hidden features. What differs between the
// CPUs of the host, as the APIC ID, is 0.
func (fs *FeatureSet) Emulate(leaf, subleaf uint32) (eax, ebx, ecx, edx uint32) {
	key := in{leaf, subleaf}
	fs.mu.RLock()
	o, ok := fs.cache[key]
	fs.mu.RUnlock()
	if !ok {
		o.eax, o.ebx, o.ecx, o.edx = fs.ask(leaf, subleaf)
		fs.adjust(key, &o)
		fs.mu.Lock()
		if first, ok := fs.cache[key]; ok {
			o = first
		} else if len(fs.cache) < maxCached {
			fs.cache[key] = o
		}
		fs.mu.Unlock()
	}
	return o.eax, o.ebx, o.ecx, o.edx
}

func (fs *FeatureSet) adjust(i in, o *out) {
	for n, w := range words {
		// Leaf 1 and the extended ones have no subleaves: ECX is ignored.
		if w.leaf == i.leaf && (w.subleaf == i.subleaf || !w.indexed) {
			*[...]*uint32{&o.eax, &o.ebx, &o.ecx, &o.edx}[w.reg] &^= fs.hidden[n]
		}
	}
	switch i.leaf {
	case leafFeatures:
		o.ebx &= 0x00ffffff // initial APIC ID
	case leafTopology, leafTopologyV2, leafAMDTopo26:
		o.edx = 0 // x2APIC ID
	case leafAMDTopology:
		o.eax = 0      // extended APIC ID
		o.ebx &^= 0xff // core ID
		o.ecx &^= 0xff // node ID
	case leafXSave:
		fs.adjustXSave(i.subleaf, o)
	}
}

// adjustXSave hides the state components of hidden features. Sizes stay: the
// area that XSAVE writes is the host's.
func (fs *FeatureSet) adjustXSave(subleaf uint32, o *out) {
	var hide uint64
	if fs.isHidden(FeatureAVX) {
		hide |= XFeatureAVX
	}
	if fs.isHidden(FeatureAVX512F) {
		hide |= xfeaturesAVX512
	}
	if fs.isHidden(FeatureAMXTile) {
		hide |= xfeaturesAMX
	}
	if fs.isHidden(FeaturePKU) {
		hide |= XFeaturePKRU
	}
	switch {
	case fs.isHidden(FeatureXSAVE):
		*o = out{}
	case subleaf == 0:
		o.eax &^= uint32(hide)
		o.edx &^= uint32(hide >> 32)
	case subleaf >= 2 && subleaf < 64 && hide&(1<<subleaf) != 0:
		*o = out{}
	}
}

// HasCPUIDFaulting reports whether the host can make CPUID fault in user mode
// (arch_prctl(2), ARCH_SET_CPUID), so that it can be emulated. It asks for what
// is the default anyway, and so changes nothing.
var HasCPUIDFaulting = sync.OnceValue(func() bool {
	_, _, errno := unix.RawSyscall(unix.SYS_ARCH_PRCTL, archSetCPUID, enableCPUID, 0)
	return errno == 0
})
