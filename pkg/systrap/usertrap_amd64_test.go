package systrap

import (
	"context"
	"encoding/binary"
	"testing"
	"time"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/usertrap"
)

// callLoop is code that makes calls as patched code does: of getpid(2), for ever.
func callLoop(as *addressSpace) []byte {
	b := []byte{0xb8, 39, 0, 0, 0, // mov $39, %eax
		0x48, 0x8d, 0x0d, 9, 0, 0, 0, // lea 9(%rip), %rcx
		0x49, 0x89, 0xcb, // mov %rcx, %r11
		0xff, 0x25, 2, 0, 0, 0, // jmp *2(%rip)
		0xeb, 0xe9, // jmp
	}
	return binary.LittleEndian.AppendUint64(b, uint64(as.at.call))
}

// BenchmarkCall measures a system call of patched code, like BenchmarkSyscall.
func BenchmarkCall(b *testing.B) {
	m := newManager(b, nil)
	m = newManager(b, callLoop(m.as))
	m.as.table.Store(usertrap.NewTable(uint64(m.as.at.call), &usertrap.Stats{}))
	c := &threadContext{}
	defer c.Release()
	ac := arch.New()
	ac.SetIP(codeAddr)
	call := func() {
		for {
			_, _, err := c.Switch(context.Background(), m, ac, -1)
			if err == nil {
				break
			}
			if err != platform.ErrContextInterrupt {
				b.Fatal(err)
			}
		}
		ac.SetReturn(1)
	}
	native, ours := nativeCall(), float64(time.Hour)
	for b.Loop() {
		ours = min(ours, best(10, 20, call))
	}
	native = min(native, nativeCall())
	b.ReportMetric(ours, "ns/call")
	b.ReportMetric(native, "ns/getpid")
	b.ReportMetric(ours/native, "x-getpid")
}
