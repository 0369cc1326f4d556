package ptrace

import (
	"context"
	"testing"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
)

// syscallLoop is: 1: mov $39, %eax; syscall; jmp 1b.
var syscallLoop = []byte{0xb8, 39, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7}

// instructions access memory at RDI or RSP.
var instructions = []struct{ name, code string }{
	{"mov %al,(%rdi)", "\x88\x07"},
	{"mov %eax,(%rdi)", "\x89\x07"},
	{"mov %r9,(%rdi)", "\x4c\x89\x0f"},
	{"mov %ax,0x10(%rdi)", "\x66\x89\x47\x10"},
	{"mov %eax,0x12345(%rdi)", "\x89\x87\x45\x23\x01\x00"},
	{"mov (%rdi),%al", "\x8a\x07"},
	{"mov (%rdi),%r10", "\x4c\x8b\x17"},
	{"movb $1,(%rdi)", "\xc6\x07\x01"},
	{"movl $1,(%rdi)", "\xc7\x07\x01\x00\x00\x00"},
	{"movq $1,8(%rdi)", "\x48\xc7\x47\x08\x01\x00\x00\x00"},
	{"movslq (%rdi),%rax", "\x48\x63\x07"},
	{"add %eax,(%rdi)", "\x01\x07"},
	{"add (%rdi),%eax", "\x03\x07"},
	{"lock add %rax,(%rdi)", "\xf0\x48\x01\x07"},
	{"cmp %eax,(%rdi)", "\x39\x07"},
	{"cmp (%rdi),%eax", "\x3b\x07"},
	{"addl $1,(%rdi)", "\x83\x07\x01"},
	{"cmpl $1,(%rdi)", "\x83\x3f\x01"},
	{"cmpl $1000,(%rdi)", "\x81\x3f\xe8\x03\x00\x00"},
	{"orb $1,(%rdi)", "\x80\x0f\x01"},
	{"test %eax,(%rdi)", "\x85\x07"},
	{"testl $1,(%rdi)", "\xf7\x07\x01\x00\x00\x00"},
	{"notl (%rdi)", "\xf7\x17"},
	{"negl (%rdi)", "\xf7\x1f"},
	{"mull (%rdi)", "\xf7\x27"},
	{"incl (%rdi)", "\xff\x07"},
	{"decq (%rdi)", "\x48\xff\x0f"},
	{"call *(%rdi)", "\xff\x17"},
	{"push (%rdi)", "\xff\x37"},
	{"shll $2,(%rdi)", "\xc1\x27\x02"},
	{"sarl %cl,(%rdi)", "\xd3\x3f"},
	{"xchg %eax,(%rdi)", "\x87\x07"},
	{"lock xadd %eax,(%rdi)", "\xf0\x0f\xc1\x07"},
	{"lock cmpxchg %edx,(%rdi)", "\xf0\x0f\xb1\x17"},
	{"lock cmpxchg16b (%rdi)", "\xf0\x48\x0f\xc7\x0f"},
	{"movzbl (%rdi),%eax", "\x0f\xb6\x07"},
	{"movsbl (%rdi),%eax", "\x0f\xbe\x07"},
	{"movzwl (%rdi),%eax", "\x0f\xb7\x07"},
	{"imul (%rdi),%eax", "\x0f\xaf\x07"},
	{"cmove (%rdi),%eax", "\x0f\x44\x07"},
	{"setc (%rdi)", "\x0f\x92\x07"},
	{"btl $1,(%rdi)", "\x0f\xba\x27\x01"},
	{"btsl $1,(%rdi)", "\x0f\xba\x2f\x01"},
	{"bts %rax,(%rdi)", "\x48\x0f\xab\x07"},
	{"movnti %eax,(%rdi)", "\x0f\xc3\x07"},
	{"shld $3,%eax,(%rdi)", "\x0f\xa4\x07\x03"},
	{"stosb", "\xaa"},
	{"stosq", "\x48\xab"},
	{"rep stosq", "\xf3\x48\xab"},
	{"scasb", "\xae"},
	{"push %rax", "\x50"},
	{"pop %rax", "\x58"},
	{"movups (%rdi),%xmm0", "\x0f\x10\x07"},
	{"movups %xmm0,(%rdi)", "\x0f\x11\x07"},
	{"movaps %xmm0,(%rdi)", "\x0f\x29\x07"},
	{"movdqu (%rdi),%xmm0", "\xf3\x0f\x6f\x07"},
	{"movdqu %xmm0,(%rdi)", "\xf3\x0f\x7f\x07"},
	{"movdqa %xmm9,(%rdi)", "\x66\x44\x0f\x7f\x0f"},
	{"movss (%rdi),%xmm0", "\xf3\x0f\x10\x07"},
	{"movss %xmm0,(%rdi)", "\xf3\x0f\x11\x07"},
	{"movsd %xmm0,(%rdi)", "\xf2\x0f\x11\x07"},
	{"movq (%rdi),%xmm0", "\xf3\x0f\x7e\x07"},
	{"movq %xmm0,(%rdi)", "\x66\x0f\xd6\x07"},
	{"movd %xmm0,(%rdi)", "\x66\x0f\x7e\x07"},
	{"movd (%rdi),%xmm0", "\x66\x0f\x6e\x07"},
	{"movhps %xmm0,(%rdi)", "\x0f\x17\x07"},
	{"movhps (%rdi),%xmm0", "\x0f\x16\x07"},
	{"movlpd %xmm0,(%rdi)", "\x66\x0f\x13\x07"},
	{"movntdq %xmm0,(%rdi)", "\x66\x0f\xe7\x07"},
	{"addps (%rdi),%xmm0", "\x0f\x58\x07"},
	{"pxor (%rdi),%xmm0", "\x66\x0f\xef\x07"},
	{"pcmpeqb (%rdi),%xmm0", "\x66\x0f\x74\x07"},
	{"cvttsd2si (%rdi),%rax", "\xf2\x48\x0f\x2c\x07"},
	{"cvtsi2sd (%rdi),%xmm0", "\xf2\x0f\x2a\x07"},
	{"vmovdqu (%rdi),%ymm0", "\xc5\xfe\x6f\x07"},
	{"vmovdqu %ymm0,(%rdi)", "\xc5\xfe\x7f\x07"},
	{"vmovdqa %ymm9,(%rdi)", "\xc5\x7d\x7f\x0f"},
	{"vmovups %ymm0,(%rdi)", "\xc5\xfc\x11\x07"},
	{"vmovq %xmm0,(%rdi)", "\xc5\xf9\xd6\x07"},
	{"vmovq (%rdi),%xmm0", "\xc5\xfa\x7e\x07"},
	{"vpcmpeqb (%rdi),%ymm0,%ymm1", "\xc5\xfd\x74\x0f"},
	{"vaddps (%rdi),%ymm0,%ymm1", "\xc5\xfc\x58\x0f"},
	{"vpbroadcastb (%rdi),%ymm0", "\xc4\xe2\x7d\x78\x07"},
	{"vextracti128 $1,%ymm0,(%rdi)", "\xc4\xe3\x7d\x39\x07\x01"},
	{"pextrq $1,%xmm0,(%rdi)", "\x66\x48\x0f\x3a\x16\x07\x01"},
	{"fldl (%rdi)", "\xdd\x07"},
	{"fstpl (%rdi)", "\xdd\x1f"},
	{"movbe %eax,(%rdi)", "\x0f\x38\xf1\x07"},
	{"movbe (%rdi),%eax", "\x0f\x38\xf0\x07"},
	{"xsave (%rdi)", "\x0f\xae\x27"},
	{"fxrstor (%rdi)", "\x0f\xae\x0f"},
	{"vmovdqu64 (%rdi),%zmm0", "\x62\xf1\xfe\x48\x6f\x07"},
	{"vmovdqu8 %zmm0,(%rdi)", "\x62\xf1\x7f\x48\x7f\x07"},
	{"vmovaps %zmm17,(%rdi)", "\x62\xe1\x7c\x48\x29\x0f"},
	{"vpxorq (%rdi),%zmm0,%zmm1", "\x62\xf1\xfd\x48\xef\x0f"},
	{"vpcompressd %zmm0,(%rdi)", "\x62\xf2\x7d\x48\x8b\x07"},
}

// What decoding an instruction says of its fault is what the CPU says.
func TestDecodeFault(t *testing.T) {
	const data = 0x10_0000_0000
	f := platformtest.NewMemFile(t, hostarch.PageSize)
	decoded := 0
	for _, ins := range instructions {
		m := newManager(t, []byte(ins.code))
		for _, mapped := range []bool{false, true} {
			if mapped {
				if err := m.as.MapFile(data, f, memmap.FileRange{End: hostarch.PageSize}, hostarch.Read, false); err != nil {
					t.Fatal(err)
				}
			}
			// run returns what the instruction faults with.
			run := func() (*linux.SignalInfo, hostarch.AccessType, arch.FaultInfo) {
				c := &threadContext{}
				defer c.Release()
				ac := arch.New()
				ac.SetIP(codeAddr)
				ac.Regs.Rdi, ac.Regs.Rsp, ac.Regs.Rcx = data+64, data+64, 1
				for {
					info, at, err := c.Switch(context.Background(), m, ac, -1)
					if err == platform.ErrContextSignal {
						return info, at, ac.Fault
					}
					if err != platform.ErrContextInterrupt {
						t.Fatalf("%s: %v", ins.name, err)
					}
				}
			}
			decoding = false
			info, want, wantFault := run()
			decoding = true
			_, got, gotFault := run()
			if linux.Signal(info.Signo) != linux.SIGSEGV || info.Addr() < data || info.Addr() > data+hostarch.PageSize {
				continue // It did not fault there, or the CPU does not have it.
			}
			if got != want {
				t.Errorf("%s, mapped %v: access %v, and the CPU says %v", ins.name, mapped, got, want)
			}
			// Whether a page is present is more than can be known.
			wantFault.ErrorCode |= pfPresent
			gotFault.ErrorCode |= pfPresent
			if got == want && gotFault != wantFault {
				t.Errorf("%s, mapped %v: fault %+v, and the CPU says %+v", ins.name, mapped, gotFault, wantFault)
			}
			if _, known := writes([]byte(ins.code+"\x90\x90\x90\x90\x90\x90\x90\x90\x90\x90"), &arch.Registers{Rdi: data}, data); known {
				decoded++
			}
		}
	}
	if decoded < len(instructions) {
		t.Errorf("%d faults were decoded: too few", decoded)
	}
}

// Bytes of every kind are decoded without harm.
func FuzzDecode(f *testing.F) {
	for _, ins := range instructions {
		f.Add([]byte(ins.code), uint64(0))
	}
	f.Fuzz(func(t *testing.T, code []byte, addr uint64) {
		writes(code, &arch.Registers{}, addr)
	})
}
