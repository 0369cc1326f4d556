package kvm

import (
	"context"
	"encoding/binary"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// What goes wrong when a protecting step is left out: every run shows that it does not
// with the step, and that it does without, where KVM shadows page tables. Where the CPU
// walks them itself that is a matter of chance: its TLB may have forgotten already. But a
// vCPU that stays in the guest meanwhile has not, and takes no more than some tries.
func TestHazards(t *testing.T) {
	flush := func(m *machine) { m.omit.flush = true }
	settle := func(m *machine) { m.omit.settle = true }
	for _, h := range []struct {
		name string
		// shown reports whether the hazard shows.
		shown func(t *testing.T, p *kvm) bool
		omit  func(m *machine)
	}{
		{"TableReuse", hazardTableReuse, flush},
		{"Unmap", hazardUnmap, flush},
		{"Downgrade", hazardDowngrade, flush},
		{"OtherVCPU", hazardOtherVCPU, flush},
		{"HalfASyscall", hazardHalfASyscall, settle},
	} {
		t.Run(h.name, func(t *testing.T) {
			if h.shown(t, newTestPlatform(t, 2)) {
				t.Error("shows although nothing is left out")
			}
			p := newTestPlatform(t, 2)
			stays := h.name == "OtherVCPU" && runtime.NumCPU() > 1
			shown := false
			// On a busy host something else may flush in time, again and again.
			for start := time.Now(); !shown && time.Since(start) < time.Minute; {
				h.omit(p.m)
				shown = h.shown(t, p)
				p.m.omit.flush, p.m.omit.settle = false, false
				if p.probe.shadow || !stays {
					break
				}
			}
			t.Logf("without the step it shows: %v", shown)
			if !shown && (p.probe.shadow || stays) {
				t.Error("does not show without the step that protects from it: is it another one that does?")
			}
		})
	}
}

// hazardTableReuse has a page table used for another address.
func hazardTableReuse(t *testing.T, p *kvm) bool {
	g := newGuest(t, p)
	f := newTestFile(t, 2, 100)
	g.mapPages(0x1000_0000, f, 0, 1, hostarch.Read) // the end of the file's slot would flush
	const old, new = 0x100_0000_0000, 0x180_4000_0000
	g.mapPages(old, f, 0, 1, hostarch.Read)
	if v, ok := g.load(old); v != 100 || !ok {
		t.Fatalf("%d, %v", v, ok)
	}
	tables := len(p.m.tables.free)
	g.as.Unmap(old, hostarch.HugePageSize)
	if p.m.omit.flush {
		g.as.pt.Flushed()
	}
	if got := len(p.m.tables.free); got <= tables {
		t.Fatalf("%d tables are free, %d before", got, tables)
	}
	g.mapPages(new, f, 1, 1, hostarch.Read)
	_, ok := g.load(old)
	return ok
}

// hazardUnmap unmaps a page that was used.
func hazardUnmap(t *testing.T, p *kvm) bool {
	g := newGuest(t, p)
	f := newTestFile(t, 2, 100)
	const addr = 0x1000_0000
	g.mapPages(addr, f, 0, 2, hostarch.Read)
	g.load(addr)
	g.as.Unmap(addr, page)
	_, ok := g.load(addr)
	return ok
}

// hazardDowngrade takes the right to write away.
func hazardDowngrade(t *testing.T, p *kvm) bool {
	// mov %rsi, (%rdi); syscall; jmp to the start
	g := newGuestOf(t, p, []byte{0x48, 0x89, 0x37, 0x0f, 0x05, 0xeb, 0xf9})
	f := newTestFile(t, 1, 100)
	const addr = 0x1000_0000
	g.mapPages(addr, f, 0, 1, hostarch.ReadWrite)
	if _, ok := g.load(addr); !ok {
		t.Fatal("cannot write")
	}
	g.mapPages(addr, f, 0, 1, hostarch.Read)
	_, ok := g.load(addr)
	return ok
}

// hazardOtherVCPU unmaps a page on which another vCPU runs.
func hazardOtherVCPU(t *testing.T, p *kvm) bool {
	g := newGuestOf(t, p, []byte{0x48, 0xff, 0x07, 0xeb, 0xfb}) // incq (%rdi); jmp to it
	f := newTestFile(t, 2, 0)
	word := func() uint64 {
		var b [8]byte
		if _, err := f.ReadAt(b[:], 0); err != nil {
			t.Fatal(err)
		}
		return binary.LittleEndian.Uint64(b[:])
	}
	const addr = 0x1000_0000
	g.mapPages(addr, f, 0, 2, hostarch.ReadWrite)
	g.ac.Regs.Rdi = addr
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _, err := g.c.Switch(context.Background(), probeMemory{as: g.as}, g.ac, -1)
		if err != platform.ErrContextSignal && err != platform.ErrContextInterrupt {
			t.Error(err)
		}
	})
	for deadline := time.Now().Add(20 * time.Second); word() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Error("does not run")
			break
		}
	}
	g.as.Unmap(addr, page)
	before := word()
	shown := false
	for range 20 {
		time.Sleep(time.Millisecond)
		shown = shown || word() != before
	}
	g.c.Interrupt()
	wg.Wait()
	return shown
}

// hazardHalfASyscall interrupts a thread that makes system calls all the time.
func hazardHalfASyscall(t *testing.T, p *kvm) bool {
	// inc %rbx; syscall; jmp to the start
	g := newGuestOf(t, p, []byte{0x48, 0xff, 0xc3, 0x0f, 0x05, 0xeb, 0xf9})
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				g.c.Interrupt()
				time.Sleep(time.Duration(i%50) * time.Microsecond)
			}
		}
	}()
	shown, calls, interrupts := false, uint64(0), 0
	for deadline := time.Now().Add(20 * time.Second); interrupts < 1500 && !shown && time.Now().Before(deadline); {
		_, _, err := g.c.Switch(context.Background(), probeMemory{as: g.as}, g.ac, -1)
		switch err {
		case nil:
			calls++
		case platform.ErrContextInterrupt:
			interrupts++
		default:
			shown = true
		}
		// It is in its code, and no call is lost or made twice.
		ip, done := uint64(g.ac.IP()), g.ac.Regs.Rbx-calls
		shown = shown || ip < codeAddr || ip > codeAddr+7 || done > 1
	}
	close(stop)
	<-stopped
	t.Logf("%d calls, %d interrupts", calls, interrupts)
	return shown
}
