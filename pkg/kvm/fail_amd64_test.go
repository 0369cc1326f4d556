package kvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
)

// failing makes requests fail while f runs.
func (p *kvm) failing(f func(), errno unix.Errno, requests ...uintptr) {
	p.m.fail = func(req uintptr) unix.Errno {
		for _, r := range requests {
			if r == req {
				return errno
			}
		}
		return 0
	}
	f()
	p.m.fail = nil
}

// wantContextError checks that an error of Switch is that of one Context, with an errno.
func wantContextError(t *testing.T, err error, errno unix.Errno) {
	t.Helper()
	var ce *platform.ContextError
	if !errors.As(err, &ce) || ce.Errno != errno || !errors.Is(err, errno) {
		t.Errorf("Switch gives %v, want a ContextError with %v", err, errno)
	}
}

// inUse is what a machine has given away.
type inUse struct{ vcpus, runners, regions, tables, descriptors int }

func (p *kvm) inUse(t *testing.T) inUse {
	t.Helper()
	m := p.m
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return inUse{
		vcpus:       len(m.pool.all) - len(m.pool.idle),
		runners:     m.runners.n - len(m.runners.idle),
		regions:     len(m.regions.byKey),
		tables:      m.tables.used*tablesPerChunk - len(m.tables.free) - len(m.tables.limbo),
		descriptors: len(fds),
	}
}

// The errors that a full host gives for KVM_RUN and for what moves the floating point
// state: one Switch has an error, with the errno. The Context goes on when there is room
// again; others do all the time; nothing is kept.
func TestRunFails(t *testing.T) {
	for name, bound := range map[string]bool{"unbound": false, "bound": true} {
		t.Run(name, func(t *testing.T) {
			p := withShims(t, 2)
			g, other := newGuestOf(t, p, codeCount), newGuest(t, p)
			test := func() {
				calls := uint64(0)
				for _, errno := range []unix.Errno{unix.ENOMEM, unix.ENOSPC, unix.EFAULT, unix.EIO, unix.EBADF} {
					for range 20 { // some calls wait in the shim after
						if err := g.run(); err != nil {
							t.Fatal(err)
						}
						if calls++; g.ac.Regs.Rdi != calls {
							t.Fatalf("call %d says it is %d", calls, g.ac.Regs.Rdi)
						}
					}
					g.c.PrepareSleep() // so that KVM_RUN is needed
					before := p.inUse(t)
					for range 3 {
						p.failing(func() { wantContextError(t, g.run(), errno) }, errno, kvmRun)
					}
					if after := p.inUse(t); after != before {
						t.Errorf("after %v: in use %+v, before %+v", errno, after, before)
					}
					if _, ok := other.load(codeAddr); !ok {
						t.Errorf("after %v another thread faults", errno)
					}
				}
			}
			if bound {
				g.onThread(test)
			} else {
				test()
			}
		})
	}
}

// A few faults of the host in a row are nothing: the file has grown again meanwhile.
func TestRunFaultsOnce(t *testing.T) {
	p := newTestPlatform(t, 1)
	g := newGuest(t, p)
	left := 0
	p.m.fail = func(req uintptr) unix.Errno {
		if req == kvmRun && left > 0 {
			left--
			return unix.EFAULT
		}
		return 0
	}
	defer func() { p.m.fail = nil }()
	for _, n := range []int{1, maxHostFaults} {
		left = n
		if _, ok := g.load(codeAddr); !ok || left != 0 {
			t.Errorf("%d faults of the host: runs %v, %d left", n, ok, left)
		}
	}
	left = maxHostFaults + 1
	wantContextError(t, g.run(), unix.EFAULT)
}

// The floating point state cannot be moved: an error, and it is not lost.
func TestFloatingPointFails(t *testing.T) {
	p := newTestPlatform(t, 1)
	// movq %xmm3, %rsi; syscall; jmp to the start
	code := []byte{0x66, 0x48, 0x0f, 0x7e, 0xde, 0x0f, 0x05, 0xeb, 0xf7}
	g, other := newGuestOf(t, p, code), newGuestOf(t, p, code)
	const xmm3 = 160 + 3*16 // Intel SDM vol. 1, 10.5.1
	want := map[*guest]uint64{g: 0x1122, other: 0x3344}
	for who, v := range want {
		copy(who.ac.FloatingPointData()[xmm3:], []byte{byte(v), byte(v >> 8)})
		who.c.FullStateChanged()
	}
	check := func(who *guest) {
		t.Helper()
		if err := who.run(); err != nil || who.ac.Regs.Rsi != want[who] {
			t.Fatalf("%v, xmm3 %#x, want %#x", err, who.ac.Regs.Rsi, want[who])
		}
	}
	check(g)
	for range 3 {
		p.failing(func() { wantContextError(t, other.run(), unix.ENOMEM) }, unix.ENOMEM, kvmSetXSave)
	}
	check(other)
	check(g)
	p.failing(func() {
		if err := g.c.PullFullState(g.as, g.ac); !errors.Is(err, unix.ENOMEM) {
			t.Errorf("PullFullState gives %v, want ENOMEM", err)
		}
	}, unix.ENOMEM, kvmGetXSave, kvmGetXSave2)
	check(g)
	check(other)
	// What the last user of the vCPU had there could not be saved: it cannot go on, others
	// can.
	p.failing(func() { check(g) }, unix.ENOMEM, kvmGetXSave, kvmGetXSave2)
	wantContextError(t, other.run(), unix.ENOMEM)
	check(g)
}

// addressSpaceSize returns how much of the process's addresses is mapped, in bytes.
func addressSpaceSize(t *testing.T) int64 {
	t.Helper()
	b, err := os.ReadFile("/proc/self/statm")
	var pages int64
	if err == nil {
		_, err = fmt.Sscan(string(b), &pages)
	}
	if err != nil {
		t.Fatal(err)
	}
	return pages * page
}

// Memory slots cannot be made: no file can be mapped that needs one, no AddressSpace made
// that needs more tables. What is there goes on; nothing is kept.
func TestSlotsFail(t *testing.T) {
	p := newTestPlatform(t, 1)
	g := newGuest(t, p)
	const addr = 0x1000_0000
	f := newTestFile(t, 1, 700)
	rs, ts := &p.m.regions, &p.m.tables
	addresses := addressSpaceSize(t)
	for _, errno := range []unix.Errno{unix.ENOMEM, unix.ENOSPC, unix.EINVAL} {
		places, tables := rs.free, ts.free
		windows, slots, chunks := len(rs.windows), p.m.slots.next-uint32(len(p.m.slots.free)), ts.used
		rs.free = nil
		before := p.inUse(t)
		p.failing(func() {
			err := g.as.MapFile(addr, f, memmap.FileRange{End: page}, hostarch.Read, false)
			if !errors.Is(err, errno) {
				t.Errorf("MapFile gives %v, want %v", err, errno)
			}
		}, errno, kvmSetUserMemoryRegion)
		if after := p.inUse(t); after != before {
			t.Errorf("after %v: in use %+v, before %+v", errno, after, before)
		}
		ts.free = nil
		p.failing(func() {
			if as, _, err := p.NewAddressSpace(nil); !errors.Is(err, errno) {
				t.Errorf("NewAddressSpace gives %v, %v, want %v", as, err, errno)
			}
			// More tables for what is mapped far away.
			err := g.as.MapFile(0x7000_0000_0000, f, memmap.FileRange{End: page}, hostarch.Read, false)
			if !errors.Is(err, errno) {
				t.Errorf("MapFile gives %v, want %v", err, errno)
			}
		}, errno, kvmSetUserMemoryRegion)
		rs.free, ts.free = append(places, rs.free...), append(tables, ts.free...)
		if got := p.m.slots.next - uint32(len(p.m.slots.free)); len(rs.windows) != windows || got != slots || ts.used != chunks {
			t.Errorf("after %v: %d windows, %d slots, %d chunks; before %d, %d, %d", errno, len(rs.windows), got, ts.used, windows, slots, chunks)
		}
		if _, ok := g.load(addr); ok {
			t.Error("it is mapped")
		}
	}
	if got := addressSpaceSize(t) - addresses; got >= windowRegions*regionSize {
		t.Errorf("%d MiB of our addresses are used more than before", got>>20)
	}
	g.mapPages(addr, f, 0, 1, hostarch.Read)
	if v, ok := g.load(addr); v != 700 || !ok {
		t.Errorf("%d, %v", v, ok)
	}
}

// A flush fails: one AddressSpace is given up, with the errno. Others go on, and what it
// had comes back with its Release and the next flush.
func TestFlushFailsOnce(t *testing.T) {
	p := newTestPlatform(t, 1)
	p.m.walked = false // it is the slot's move that can fail
	other := newGuest(t, p)
	const addr = 0x1000_0000
	f := newTestFile(t, 1, 800)
	for name, change := range map[string]func(as *addressSpace){
		"Unmap": func(as *addressSpace) { as.Unmap(addr, hostarch.HugePageSize) },
		"MapFile": func(as *addressSpace) {
			err := as.MapFile(addr, f, memmap.FileRange{End: page}, hostarch.Read, false)
			if !errors.Is(err, unix.ENOMEM) {
				t.Errorf("MapFile gives %v, want ENOMEM", err)
			}
		},
	} {
		before := p.inUse(t)
		as, _, err := p.NewAddressSpace(nil)
		if err != nil {
			t.Fatal(err)
		}
		g := &guest{t: t, as: as.(*addressSpace), c: p.NewContext(context.Background()), ac: other.ac}
		g.mapPages(addr, f, 0, 1, hostarch.ReadWrite)
		g.as.stalePages = maxStalePages + 1 // not page by page
		p.failing(func() { change(g.as) }, unix.ENOMEM, kvmSetUserMemoryRegion)
		wantContextError(t, g.run(), unix.ENOMEM)
		if _, ok := other.load(codeAddr); !ok {
			t.Errorf("%s: another thread faults", name)
		}
		g.c.Release()
		g.as.Release()
		if err := p.m.flush(); err != nil {
			t.Fatal(err)
		}
		if after := p.inUse(t); after != before {
			t.Errorf("%s: in use %+v, before %+v", name, after, before)
		}
		if len(p.m.tables.limbo) != 0 {
			t.Errorf("%s: %d tables wait for a flush after one", name, len(p.m.tables.limbo))
		}
	}
}
