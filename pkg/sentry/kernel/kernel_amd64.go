package kernel

import (
	"github.com/ringfence/ringfence/pkg/cpuid"
	"github.com/ringfence/ringfence/pkg/platform"
)

// minSigStackSize is MINSIGSTKSZ (asm/signal.h), in bytes.
const minSigStackSize = 2048

// restorerCode is what a signal handler returns to if its action names nothing
// (SA_RESTORER): Linux has no such code on amd64.
var restorerCode []byte

// features returns what programs are told of the CPU. They must not set GS by
// themselves where the platform needs it in patched code.
func features(p platform.Platform) *cpuid.FeatureSet {
	if t, ok := p.(platform.TextPatching); ok && t.PatchesText() {
		return cpuid.New(cpuid.Policy{Hide: []cpuid.Feature{cpuid.FeatureFSGSBASE}})
	}
	return nil
}
