package arch

import (
	"bytes"
	"context"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// memory is application memory from address base on. reads counts how
// often each byte was read.
type memory struct {
	usermem.IO
	base  uint64
	b     []byte
	reads []uint8
}

func newMemory(base uint64, size int) *memory {
	return &memory{base: base, b: make([]byte, size), reads: make([]uint8, size)}
}

func (m *memory) CopyOut(_ context.Context, addr hostarch.Addr, src []byte, _ usermem.IOOpts) (int, error) {
	off := uint64(addr) - m.base
	if off > uint64(len(m.b)) || uint64(len(src)) > uint64(len(m.b))-off {
		return 0, unix.EFAULT
	}
	return copy(m.b[off:], src), nil
}

func (m *memory) CopyIn(_ context.Context, addr hostarch.Addr, dst []byte, _ usermem.IOOpts) (int, error) {
	off := uint64(addr) - m.base
	if off > uint64(len(m.b)) || uint64(len(dst)) > uint64(len(m.b))-off {
		return 0, unix.EFAULT
	}
	for i := range dst {
		m.reads[off+uint64(i)]++
	}
	return copy(dst, m.b[off:]), nil
}

// at returns the memory from addr on.
func (m *memory) at(addr uint64) []byte { return m.b[addr-m.base:] }

// diff reports where two frames differ.
func diff(t *testing.T, got, want []byte) {
	t.Helper()
	got = got[:len(want)]
	if bytes.Equal(got, want) {
		return
	}
	n := 0
	for i := 0; i < len(want); i += 8 {
		j := min(i+8, len(want))
		if !bytes.Equal(got[i:j], want[i:j]) {
			t.Errorf("frame+%d: % x, the kernel has % x", i, got[i:j], want[i:j])
			if n++; n == 20 {
				t.Fatal("and more")
			}
		}
	}
}
