package systrap

import (
	"encoding/binary"
	"testing"
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
	benchCalls(b, patchedManager(b, callLoop))
}
