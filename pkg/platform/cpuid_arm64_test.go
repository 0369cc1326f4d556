package platform

import (
	"context"
	"testing"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
)

func TestTryCPUIDEmulate(t *testing.T) {
	mm := &pages{mem: map[hostarch.Addr][]byte{0: append([]byte{0x0f, 0xa2}, make([]byte, hostarch.PageSize)...)}}
	ac := arch.New()
	want := ac.Regs
	if TryCPUIDEmulate(context.Background(), mm, ac) || ac.Regs != want {
		t.Error("arm64 has a CPUID instruction")
	}
}
