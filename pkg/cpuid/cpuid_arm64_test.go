package cpuid

import (
	"testing"
)

func TestHWCap(t *testing.T) {
	host, fs := hostHWCap(), Native()
	if host.HWCap&3 != 3 {
		t.Fatalf("AT_HWCAP = %#x: no FP and ASIMD", host.HWCap)
	}
	got := fs.AuxHWCap()
	if got.HWCap&^host.HWCap != 0 || got.HWCap2&^host.HWCap2 != 0 {
		t.Errorf("AuxHWCap = %#x, beyond the host's %#x", got, host)
	}
	for _, f := range []Feature{FeatureSME, FeatureSME2, FeatureMTE, FeatureMTE3, FeatureGCS, FeaturePOE, FeatureFPMR} {
		if fs.Has(f) {
			t.Errorf("feature %d shows, though its state is not carried", f)
		}
	}
	for _, f := range []Feature{FeatureFP, FeatureASIMD, FeatureATOMICS, FeatureSVE, FeatureSVE2, FeaturePACA, FeatureBTI} {
		bits, n := host.HWCap, f
		if f >= 64 {
			bits, n = host.HWCap2, f-64
		}
		if fs.Has(f) != (bits&(1<<n) != 0) {
			t.Errorf("feature %d: Has = %v, host %#x", f, fs.Has(f), host)
		}
	}
	vl := fs.SVEVectorLength()
	if fs.Has(FeatureSVE) != (vl != 0) || vl%16 != 0 || vl > 256 {
		t.Errorf("SVE: %v, vector length %d", fs.Has(FeatureSVE), vl)
	}
}

func TestHide(t *testing.T) {
	fs := &FeatureSet{AuxHWCap{^uint64(0), ^uint64(0)}}
	fs.hide([]Feature{FeatureSVE, FeatureBTI, 200})
	for _, f := range []Feature{FeatureSVE, FeatureSVE2, FeatureBTI, 37, 64 + 36} {
		if fs.Has(f) {
			t.Errorf("feature %d is not hidden", f)
		}
	}
	if !fs.Has(FeatureFP) || !fs.Has(FeatureASIMD) || !fs.Has(FeatureATOMICS) || fs.Has(200) {
		t.Errorf("wrong features left: %#x", fs.AuxHWCap())
	}
}
