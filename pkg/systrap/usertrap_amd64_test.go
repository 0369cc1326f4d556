package systrap

import (
	"bytes"
	"context"
	"encoding/binary"
	"testing"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
	"github.com/ringfence/ringfence/pkg/usermem"
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
	benchCalls(b, patchedManager(b, callLoop))
}

// An AddressSpace that must have no patches, since that was said after its parent got
// some, has none.
func TestForkWithoutPatching(t *testing.T) {
	p, err := constructor{}.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	m := newTextManager(t, p, nil)
	m.CopyOut(t.Context(), codeAddr, callLoop(m.as), usermem.IOOpts{})
	m.patches[codeAddr] = syscallLoop
	m.state = usertrap.NewTable(uint64(m.as.at.call), m.as.stats)
	c, ac := &threadContext{}, arch.New()
	defer c.Release()
	ac.SetIP(codeAddr)
	for range 100 {
		if _, _, err := c.Switch(t.Context(), m, ac, -1); err != nil {
			t.Fatal(err)
		}
		if c.thread.called {
			t.Fatal("a patched call")
		}
	}
	if got := p.(platform.TextPatching).TextPatches().Stopped; got[usertrap.Asked] != 1 || len(got) != 1 {
		t.Errorf("patches were undone because of %v", got)
	}

	// Without patches before there is nothing to undo.
	m = newTextManager(t, p, syscallLoop)
	if _, _, err := c.Switch(t.Context(), m, ac, -1); err != nil {
		t.Fatal(err)
	}
	if m.state != nil {
		t.Error("there are trampolines")
	}
}

// After a fault in 32-bit code a call without a signal comes from 64-bit code again.
func TestCallAfter32BitCode(t *testing.T) {
	const there = 0x30000000
	m := patchedManager(t, func(as *addressSpace) []byte {
		pad := func(b []byte, n int) []byte { return append(b, bytes.Repeat([]byte{0x90}, n-len(b))...) }
		le := binary.LittleEndian
		b := pad([]byte{0xff, 0x2d, 26, 0, 0, 0}, 32) // ljmp *26(%rip)
		b = append(le.AppendUint32(b, codeAddr+64), 0x23, 0)
		b = append(pad(b, 64), 0x2e, 0xa1)          // mov %cs:there, %eax
		b = append(le.AppendUint32(b, there), 0xea) // ljmp
		b = append(le.AppendUint32(b, codeAddr+128), userCS, 0)
		return append(pad(b, 128), callLoop(as)...)
	})
	f := platformtest.NewMemFile(t, hostarch.PageSize)
	c, ac := &threadContext{}, arch.New()
	defer c.Release()
	ac.SetIP(codeAddr)
	for calls := 0; calls < 10; {
		_, _, err := c.Switch(context.Background(), m, ac, -1)
		switch {
		case err == platform.ErrContextSignal && calls == 0 && ac.Fault.Addr == there:
			if err := m.as.MapFile(there, f, memmap.FileRange{End: hostarch.PageSize}, hostarch.Read, false); err != nil {
				t.Fatal(err)
			}
			continue
		case err != nil:
			t.Fatalf("call %d: %v at %#x, fault at %#x", calls, err, ac.IP(), ac.Fault.Addr)
		}
		// The thread goes on with another state than it had.
		if err := c.PullFullState(m.as, ac); err != nil {
			t.Fatal(err)
		}
		ac.SetReturn(7)
		c.FullStateChanged()
		calls++
	}
}
