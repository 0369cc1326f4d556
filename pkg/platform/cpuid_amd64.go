package platform

import (
	"context"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/cpuid"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// cpuidOpcode is the instruction CPUID.
var cpuidOpcode = [2]byte{0x0f, 0xa2}

// TryCPUIDEmulate emulates CPUID if that is the instruction at ac's IP: it sets
// the registers to what ctx's cpuid.FeatureSet says, skips the instruction and
// returns true. Otherwise, and when the instruction cannot be read, it changes
// nothing and returns false. A Sentry calls it when the host makes CPUID fault:
// for SIGSEGV with SI_KERNEL, which a general protection fault gives.
//
// Preconditions: ac holds the full state (Context.PullFullState). After true the
// caller says so with Context.FullStateChanged.
func TryCPUIDEmulate(ctx context.Context, mm MemoryManager, ac *arch.Context64) bool {
	var insn [len(cpuidOpcode)]byte
	// The page is executable, but a protection key may deny reading.
	opts := usermem.IOOpts{IgnorePermissions: true}
	if n, err := mm.CopyIn(ctx, hostarch.Addr(ac.IP()), insn[:], opts); n != len(insn) || err != nil || insn != cpuidOpcode {
		return false
	}
	r := &ac.Regs
	eax, ebx, ecx, edx := cpuid.FromContext(ctx).Emulate(uint32(r.Rax), uint32(r.Rcx))
	r.Rax, r.Rbx, r.Rcx, r.Rdx = uint64(eax), uint64(ebx), uint64(ecx), uint64(edx)
	ac.SetIP(ac.IP() + uintptr(len(insn)))
	return true
}
