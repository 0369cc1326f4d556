package platform

import (
	"context"
	"testing"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/cpuid"
	"github.com/ringfence/ringfence/pkg/hostarch"
)

func TestTryCPUIDEmulate(t *testing.T) {
	const base = 0x10000
	page := func(at int, b ...byte) []byte {
		p := make([]byte, hostarch.PageSize)
		copy(p[at:], b)
		return p
	}
	last := hostarch.PageSize - 1
	for _, test := range []struct {
		name string
		mem  map[hostarch.Addr][]byte
		ip   uintptr
		want bool
	}{
		{"CPUID", map[hostarch.Addr][]byte{base: page(16, 0x0f, 0xa2)}, base + 16, true},
		{"at the end of a page", map[hostarch.Addr][]byte{base: page(last-1, 0x0f, 0xa2)}, base + uintptr(last) - 1, true},
		{"across pages", map[hostarch.Addr][]byte{base: page(last, 0x0f), base + hostarch.PageSize: page(0, 0xa2)}, base + uintptr(last), true},
		{"second page missing", map[hostarch.Addr][]byte{base: page(last, 0x0f)}, base + uintptr(last), false},
		{"another instruction", map[hostarch.Addr][]byte{base: page(0, 0x0f, 0x05)}, base, false},
		{"half of it", map[hostarch.Addr][]byte{base: page(0, 0xa2, 0x0f)}, base, false},
		{"nothing mapped", nil, base, false},
		{"not canonical", nil, 0x8000000000000000, false},
		{"the last byte", nil, ^uintptr(0), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			mm := &pages{mem: test.mem}
			ac := arch.New()
			ac.Regs.Rax, ac.Regs.Rcx = 0xffffffff00000007, 0xffffffff00000000 // the upper halves are ignored
			ac.Regs.Rbx, ac.Regs.Rdx, ac.Regs.Rsi = 1, 2, 3
			ac.SetIP(test.ip)
			want := *ac.Fork()
			if got := TryCPUIDEmulate(context.Background(), mm, ac); got != test.want {
				t.Fatalf("TryCPUIDEmulate = %v, want %v", got, test.want)
			}
			if mm.read > 2 {
				t.Errorf("%d bytes read", mm.read)
			}
			if test.want {
				a, b, c, d := cpuid.Native().Emulate(7, 0)
				want.Regs.Rax, want.Regs.Rbx, want.Regs.Rcx, want.Regs.Rdx = uint64(a), uint64(b), uint64(c), uint64(d)
				want.Regs.Rip += 2
			}
			if ac.Regs != want.Regs {
				t.Errorf("registers %+x, want %+x", ac.Regs, want.Regs)
			}
		})
	}
}

func TestTryCPUIDEmulateUsesThePolicy(t *testing.T) {
	ctx := context.WithValue(context.Background(), cpuid.CtxFeatureSet, cpuid.New(cpuid.Policy{Hide: []cpuid.Feature{cpuid.FeatureAVX}}))
	mm := &pages{mem: map[hostarch.Addr][]byte{0: append([]byte{0x0f, 0xa2}, make([]byte, hostarch.PageSize)...)}}
	ac := arch.New()
	ac.Regs.Rax = 1
	if !TryCPUIDEmulate(ctx, mm, ac) {
		t.Fatal("not emulated")
	}
	if ac.Regs.Rcx&(1<<28) != 0 {
		t.Error("AVX shows though the policy hides it")
	}
}
