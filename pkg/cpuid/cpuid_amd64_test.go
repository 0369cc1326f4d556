package cpuid

import (
	"bytes"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// cpuinfo returns the first line of /proc/cpuinfo that starts with key.
func cpuinfo(t *testing.T, key string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		if name, value, ok := strings.Cut(string(line), ":"); ok && strings.TrimSpace(name) == key {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("/proc/cpuinfo has no %q", key)
	return ""
}

// Names of features in /proc/cpuinfo, which shows what CPUID has unless the
// kernel turned it off: so what it shows must be there.
var names = map[string]Feature{
	"fpu": FeatureFPU, "tsc": FeatureTSC, "mmx": FeatureMMX, "fxsr": FeatureFXSR, "sse": FeatureSSE, "sse2": FeatureSSE2,
	"pclmulqdq": FeaturePCLMULQDQ, "monitor": FeatureMONITOR, "vmx": FeatureVMX, "fma": FeatureFMA, "pcid": FeaturePCID,
	"aes": FeatureAES, "xsave": FeatureXSAVE, "avx": FeatureAVX, "f16c": FeatureF16C, "rdrand": FeatureRDRAND,
	"hypervisor": FeatureHypervisor, "fsgsbase": FeatureFSGSBASE, "hle": FeatureHLE, "avx2": FeatureAVX2, "erms": FeatureERMS,
	"rtm": FeatureRTM, "avx512f": FeatureAVX512F, "avx512dq": FeatureAVX512DQ, "rdseed": FeatureRDSEED,
	"avx512ifma": FeatureAVX512IFMA, "avx512cd": FeatureAVX512CD, "sha_ni": FeatureSHANI, "avx512bw": FeatureAVX512BW,
	"avx512vl": FeatureAVX512VL, "avx512vbmi": FeatureAVX512VBMI, "pku": FeaturePKU, "ospke": FeatureOSPKE,
	"waitpkg": FeatureWAITPKG, "avx512_vbmi2": FeatureAVX512VBMI2, "vaes": FeatureVAES, "vpclmulqdq": FeatureVPCLMULQDQ,
	"avx512_vnni": FeatureAVX512VNNI, "avx512_bitalg": FeatureAVX512BITALG, "avx512_vpopcntdq": FeatureAVX512VPOPCNTDQ,
	"la57": FeatureLA57, "rdpid": FeatureRDPID, "fsrm": FeatureFSRM, "avx512_vp2intersect": FeatureAVX512VP2INTERSECT,
	"ibt": FeatureIBT, "amx_bf16": FeatureAMXBF16, "avx512_fp16": FeatureAVX512FP16, "amx_tile": FeatureAMXTile,
	"amx_int8": FeatureAMXInt8, "avx_vnni": FeatureAVXVNNI, "avx512_bf16": FeatureAVX512BF16, "amx_fp16": FeatureAMXFP16,
	"avx_ifma": FeatureAVXIFMA, "syscall": FeatureSyscall, "nx": FeatureNX, "pdpe1gb": FeatureGBPages, "rdtscp": FeatureRDTSCP,
	"lm": FeatureLM, "svm": FeatureSVM, "sse4a": FeatureSSE4A, "xop": FeatureXOP, "fma4": FeatureFMA4, "mwaitx": FeatureMWAITX,
	"avx512_4vnniw": FeatureAVX5124VNNIW, "avx512_4fmaps": FeatureAVX5124FMAPS,
}

// Features that no kernel hides from /proc/cpuinfo by itself.
var certain = []string{"fpu", "tsc", "mmx", "fxsr", "sse", "sse2", "aes", "avx", "avx2", "avx512f", "rdrand", "xsave", "syscall", "nx", "lm", "hypervisor", "sha_ni"}

func TestNativeMatchesCPUInfo(t *testing.T) {
	fs := Native()
	if v := cpuinfo(t, "vendor_id"); fs.VendorID() != v {
		t.Errorf("VendorID = %q, want %q", fs.VendorID(), v)
	}
	shown := make(map[string]bool)
	for f := range strings.FieldsSeq(cpuinfo(t, "flags")) {
		shown[f] = true
	}
	for name, f := range names {
		if shown[name] && !fs.Has(f) {
			t.Errorf("%s is in /proc/cpuinfo but not in the feature set", name)
		}
	}
	for _, name := range certain {
		if fs.Has(names[name]) != shown[name] {
			t.Errorf("Has(%s) = %v, /proc/cpuinfo says %v", name, !shown[name], shown[name])
		}
	}
	if HasCPUIDFaulting() != shown["cpuid_fault"] {
		t.Errorf("HasCPUIDFaulting = %v, /proc/cpuinfo says %v", HasCPUIDFaulting(), shown["cpuid_fault"])
	}
}

func TestXSave(t *testing.T) {
	fs := Native()
	if !fs.Has(FeatureOSXSAVE) {
		if fs.XSaveSize() != 576 || fs.XCR0() != 3 {
			t.Fatalf("without XSAVE: size %d, XCR0 %#x", fs.XSaveSize(), fs.XCR0())
		}
		return
	}
	lo, _, _, hi := fs.Emulate(leafXSave, 0)
	if supported := uint64(hi)<<32 | uint64(lo); fs.XCR0()&^supported != 0 || fs.XCR0()&3 != 3 {
		t.Errorf("XCR0 = %#x, CPUID supports %#x", fs.XCR0(), supported)
	}
	if fs.Has(FeatureAVX) != (fs.XCR0()&XFeatureAVX != 0) {
		t.Errorf("AVX: %v, but XCR0 = %#x", fs.Has(FeatureAVX), fs.XCR0())
	}
	if n := fs.XSaveSizeOf(fs.XCR0()); n != fs.XSaveSize() {
		t.Errorf("the state components take %d bytes, CPUID says %d", n, fs.XSaveSize())
	}
	if n := fs.XSaveSizeOf(3); n != 576 {
		t.Errorf("XSaveSizeOf(x87, SSE) = %d, want 576", n)
	}
	if fs.XCR0()&XFeatureAVX != 0 {
		if off, size := fs.XFeatureLayout(2); off != 576 || size != 256 {
			t.Errorf("AVX state at %d, %d bytes", off, size)
		}
	}
	if fs.UserXFeatures()&XFeatureTileData != 0 {
		t.Error("UserXFeatures has AMX's tiles, which need permission")
	}
	if m := fs.MXCSRMask(); m&0xffbf != 0xffbf || m>>18 != 0 {
		t.Errorf("MXCSRMask = %#x", m)
	}
}

func TestHide(t *testing.T) {
	fs := New(Policy{Hide: []Feature{FeatureAVX, FeatureRDRAND}})
	for _, f := range []Feature{FeatureAVX, FeatureAVX2, FeatureFMA, FeatureAVX512F, FeatureAVX512BF16, FeatureAVX512VNNI, FeatureRDRAND} {
		if fs.Has(f) {
			t.Errorf("feature %d.%d is not hidden", f/32, f%32)
		}
	}
	if Native().Has(FeatureOSXSAVE) {
		if !fs.Has(FeatureXSAVE) || !fs.Has(FeatureOSXSAVE) {
			t.Error("XSAVE is hidden with AVX")
		}
		lo, _, _, _ := fs.Emulate(leafXSave, 0)
		if lo&(XFeatureAVX|xfeaturesAVX512) != 0 || lo&3 != 3 {
			t.Errorf("state components without AVX: %#x", lo)
		}
		if a, b, c, d := fs.Emulate(leafXSave, 2); a|b|c|d != 0 {
			t.Errorf("CPUID(0xd, 2) without AVX = %#x %#x %#x %#x", a, b, c, d)
		}
	}
	// What was not named stays.
	for name, f := range map[string]Feature{"SSE2": FeatureSSE2, "syscall": FeatureSyscall, "LM": FeatureLM} {
		if !fs.Has(f) {
			t.Errorf("%s is hidden", name)
		}
	}
	for i := range uint32(3) {
		a, b, c, d := fs.Emulate(2+i, 0)
		na, nb, nc, nd := Native().Emulate(2+i, 0)
		if a != na || b != nb || c != nc || d != nd {
			t.Errorf("leaf %d changed", 2+i)
		}
	}
	// The extended leaf ignores the subleaf, so does hiding.
	fs = New(Policy{Hide: []Feature{FeatureRDTSCP, FeatureXSAVE, FeatureFSGSBASE}})
	if _, _, _, d := fs.Emulate(leafExtended, 7); d&(1<<27) != 0 {
		t.Error("RDTSCP shows with ECX = 7")
	}
	if a, b, c, d := fs.Emulate(leafXSave, 0); a|b|c|d != 0 {
		t.Error("leaf 0xd shows without XSAVE")
	}
	if fs.Has(FeatureOSXSAVE) || fs.AuxHWCap().HWCap2&hwcap2FSGSBase != 0 {
		t.Error("OSXSAVE or AT_HWCAP2's FSGSBASE show")
	}
	if fs.XSaveSize() != Native().XSaveSize() {
		t.Error("hiding changes the size of the area that the host saves")
	}
}

func TestAuxHWCap(t *testing.T) {
	h := Native().AuxHWCap()
	if want := hostHWCap(); h != want {
		t.Errorf("AuxHWCap = %#x, the kernel gave %#x", h, want)
	}
}

// lock binds the calling goroutine to cpu. Its thread ends with it.
func lock(t *testing.T, cpu int) {
	t.Helper()
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		t.Errorf("sched_setaffinity(%d): %v", cpu, err)
	}
}

// The answers are the same on every CPU, and to every goroutine.
func TestSameOnAllCPUs(t *testing.T) {
	var old unix.CPUSet
	if err := unix.SchedGetaffinity(0, &old); err != nil {
		t.Fatal(err)
	}
	var leaves []in
	max, _, _, _ := Native().Emulate(0, 0)
	for l := range min(max, 64) + 1 {
		leaves = append(leaves, in{l, 0}, in{l, 1})
	}
	maxExt, _, _, _ := Native().Emulate(0x80000000, 0)
	for l := uint32(0x80000000); l <= min(maxExt, 0x80000040); l++ {
		leaves = append(leaves, in{l, 0})
	}
	for cpu := range 1024 {
		if !old.IsSet(cpu) {
			continue
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			lock(t, cpu)
			fs := newNative()
			for _, l := range leaves {
				a, b, c, d := fs.Emulate(l.leaf, l.subleaf)
				na, nb, nc, nd := Native().Emulate(l.leaf, l.subleaf)
				if a != na || b != nb || c != nc || d != nd {
					t.Errorf("CPU %d: CPUID(%#x, %d) = %#x %#x %#x %#x, want %#x %#x %#x %#x", cpu, l.leaf, l.subleaf, a, b, c, d, na, nb, nc, nd)
				}
			}
		}()
		<-done
	}
}

// A hostile application cannot fill the cache without bound.
func TestCacheIsBounded(t *testing.T) {
	fs := New(Policy{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range maxCached {
				fs.Emulate(rand.Uint32(), rand.Uint32())
			}
		})
	}
	wg.Wait()
	if len(fs.cache) > maxCached {
		t.Errorf("%d answers kept", len(fs.cache))
	}
	a, _, _, _ := fs.Emulate(0, 0)
	if na, _, _, _ := Native().Emulate(0, 0); a != na {
		t.Errorf("leaf 0 with a full cache = %d, want %d", a, na)
	}
}
