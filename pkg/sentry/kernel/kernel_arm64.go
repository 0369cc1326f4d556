package kernel

import (
	"github.com/ringfence/ringfence/pkg/cpuid"
	"github.com/ringfence/ringfence/pkg/platform"
)

// minSigStackSize is MINSIGSTKSZ (asm/signal.h), in bytes.
const minSigStackSize = 5120

// restorerCode is what a signal handler returns to if its action names nothing
// (SA_RESTORER), as in Linux's vDSO.
var restorerCode = []byte{
	0x68, 0x11, 0x80, 0xd2, // mov x8, #139: rt_sigreturn
	0x01, 0x00, 0x00, 0xd4, // svc #0
}

// features returns what programs are told of the CPU: all.
func features(platform.Platform) *cpuid.FeatureSet { return nil }
