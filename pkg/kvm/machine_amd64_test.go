package kvm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/cpuid"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
)

const page = hostarch.PageSize

// newTestPlatform returns a platform of its own.
func newTestPlatform(t *testing.T, vcpus int) *kvm {
	t.Helper()
	return newTestPlatformOf(t, constructor{options{vcpus: vcpus}})
}

func newTestPlatformOf(t *testing.T, c constructor) *kvm {
	t.Helper()
	dev, err := c.OpenDevice("")
	if err != nil {
		t.Fatal(err)
	}
	p, err := c.New(dev)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.(*kvm).m.close)
	return p.(*kvm)
}

// testFile is a memmap.File.
type testFile struct{ *os.File }

func (testFile) IncRef(memmap.FileRange) {}
func (testFile) DecRef(memmap.FileRange) {}
func (testFile) MapInternal(memmap.FileRange, hostarch.AccessType) ([][]byte, error) {
	return nil, unix.ENOSYS
}
func (f testFile) FD() int { return int(f.Fd()) }

// newTestFile returns a file whose words at the beginning of pages are their numbers
// plus tag.
func newTestFile(t *testing.T, pages int64, tag uint64) testFile {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(pages * page); err != nil {
		t.Fatal(err)
	}
	for i := range pages {
		if _, err := f.WriteAt(binary.LittleEndian.AppendUint64(nil, tag+uint64(i)), i*page); err != nil {
			t.Fatal(err)
		}
	}
	return testFile{f}
}

// guest is a thread that loads words.
type guest struct {
	t  *testing.T
	as *addressSpace
	c  platform.Context
	ac *arch.Context64
}

const codeAddr = 0x40_0000

// codeLoad is mov (%rdi), %rsi; syscall; jmp to the start.
var codeLoad = []byte{0x48, 0x8b, 0x37, 0x0f, 0x05, 0xeb, 0xf9}

// newGuest returns a guest with its code in an AddressSpace of its own.
func newGuest(t *testing.T, p *kvm) *guest {
	t.Helper()
	return newGuestOf(t, p, codeLoad)
}

func newGuestOf(t *testing.T, p *kvm, program []byte) *guest {
	t.Helper()
	as, _, err := p.NewAddressSpace(nil)
	if err != nil {
		t.Fatal(err)
	}
	code := newTestFile(t, 1, 0)
	if _, err := code.WriteAt(program, 0); err != nil {
		t.Fatal(err)
	}
	g := &guest{t: t, as: as.(*addressSpace), c: p.NewContext(context.Background()), ac: arch.New()}
	g.ac.SetIP(codeAddr)
	g.mapPages(codeAddr, code, 0, 1, hostarch.ReadExec)
	t.Cleanup(g.c.Release)
	t.Cleanup(g.as.Release)
	return g
}

func (g *guest) mapPages(addr hostarch.Addr, f memmap.File, first, n uint64, at hostarch.AccessType) {
	g.t.Helper()
	if err := g.as.MapFile(addr, f, memmap.FileRange{Start: first * page, End: (first + n) * page}, at, false); err != nil {
		g.t.Fatal(err)
	}
}

// load returns the word at addr, or false if the thread faults.
func (g *guest) load(addr hostarch.Addr) (uint64, bool) {
	g.t.Helper()
	g.ac.SetIP(codeAddr)
	g.ac.Regs.Rdi = uint64(addr)
	info, _, err := g.c.Switch(context.Background(), probeMemory{as: g.as}, g.ac, -1)
	switch err {
	case nil:
		return g.ac.Regs.Rsi, true
	case platform.ErrContextSignal:
		if info.Addr() != uint64(addr) {
			g.t.Fatalf("load from %v: %v", addr, info)
		}
		return 0, false
	}
	g.t.Fatalf("load from %v: %v", addr, err)
	return 0, false
}

// A page table is used for another part of memory once what it was for is unmapped:
// a vCPU that has walked it before must not find the new pages at the old place.
func TestTableReuse(t *testing.T) {
	p := newTestPlatform(t, 1)
	g := newGuest(t, p)
	f := newTestFile(t, 2, 100)
	// So that the file stays in guest memory: the end of a slot flushes too.
	g.mapPages(0x1000_0000, f, 0, 1, hostarch.Read)
	for i := range hostarch.Addr(50) {
		// Each in tables of its own.
		old, new := 0x100_0000_0000+i<<39, 0x100_4000_0000+i<<39
		g.mapPages(old, f, 0, 1, hostarch.Read)
		if v, ok := g.load(old); v != 100 || !ok {
			t.Fatalf("round %d: %d, %v", i, v, ok)
		}
		length := uint64(page) // the table stays
		if i%2 == 1 {
			length = hostarch.HugePageSize
		}
		g.as.Unmap(old, length)
		g.mapPages(new, f, 1, 1, hostarch.Read)
		if v, ok := g.load(old); ok {
			t.Fatalf("round %d: after it was unmapped, %v holds %d", i, old, v)
		}
		if v, ok := g.load(new); v != 101 || !ok {
			t.Fatalf("round %d: %d, %v", i, v, ok)
		}
		g.as.Unmap(new, length)
	}
}

// Pages are flushed one by one where that can be, and all at once otherwise; in both
// cases what was unmapped, replaced or forbidden is so.
func TestFlushPages(t *testing.T) {
	p := newTestPlatform(t, 1)
	p.m.walked = false // then there is one way only
	g := newGuest(t, p)
	const n = 2 * maxStalePages
	f := newTestFile(t, n, 600)
	const addr = 0x1000_0000
	flushes := func(want bool, change func()) {
		t.Helper()
		before := p.m.dummyGPA
		change()
		if got := p.m.dummyGPA != before; got != want {
			t.Errorf("everything was flushed: %v, want %v", got, want)
		}
	}
	for _, c := range []struct {
		n   uint64
		all bool
	}{{1, false}, {maxStalePages, false}, {maxStalePages + 1, true}} {
		touch := func(first uint64, mapped bool) {
			t.Helper()
			for i := range c.n {
				v, ok := g.load(hostarch.Addr(addr + i*page))
				if ok != mapped || ok && v != 600+first+i {
					t.Fatalf("page %d of %d: %d, %v; want %d, %v", i, c.n, v, ok, 600+first+i, mapped)
				}
			}
		}
		g.mapPages(addr, f, 0, c.n, hostarch.ReadWrite)
		touch(0, true)
		flushes(c.all, func() { g.mapPages(addr, f, n-c.n, c.n, hostarch.ReadWrite) })
		touch(n-c.n, true)
		flushes(c.all, func() { g.mapPages(addr, f, n-c.n, c.n, hostarch.Read) })
		touch(n-c.n, true)
		flushes(c.all, func() { g.as.Unmap(addr, c.n*page) })
		touch(0, false)
	}
	// Not in the order of the file.
	for i := range uint64(maxStaleRuns + 1) {
		g.mapPages(hostarch.Addr(addr+i*page), f, 2*(maxStaleRuns-i), 1, hostarch.Read)
		g.load(hostarch.Addr(addr + i*page))
	}
	flushes(true, func() { g.as.Unmap(addr, (maxStaleRuns+1)*page) })
	if _, ok := g.load(addr); ok {
		t.Error("a page is still mapped")
	}
	// With somebody in the AddressSpace.
	g.mapPages(addr, f, 0, 1, hostarch.Read)
	g.load(addr)
	other := newContext(p.m)
	other.busy.Lock() // as in a Switch
	if err := g.as.enter(other); err != nil {
		t.Fatal(err)
	}
	flushes(true, func() { g.as.Unmap(addr, page) })
	g.as.leave(other)
	other.busy.Unlock()
}

// The root of an AddressSpace that is gone becomes that of the next one.
func TestRootReuse(t *testing.T) {
	p := newTestPlatform(t, 1)
	f := newTestFile(t, 50, 0)
	const addr = 0x1000_0000
	for i := range uint64(50) {
		g := newGuest(t, p)
		if v, ok := g.load(addr); ok {
			t.Fatalf("round %d: a new AddressSpace has %d", i, v)
		}
		g.mapPages(addr, f, i, 1, hostarch.Read)
		if v, ok := g.load(addr); v != i || !ok {
			t.Fatalf("round %d: %d, %v", i, v, ok)
		}
		g.c.Release()
		g.as.Release()
	}
}

// Slots and the host's mappings of files go with the last page that is mapped, and
// their places are used again.
func TestRegions(t *testing.T) {
	p := newTestPlatform(t, 1)
	a, b := newGuest(t, p), newGuest(t, p)
	f := newTestFile(t, 4, 200)
	before := len(p.m.regions.byKey)
	count := func(want int) {
		t.Helper()
		if got := len(p.m.regions.byKey) - before; got != want {
			t.Errorf("%d regions, want %d", got, want)
		}
	}
	const addr = 0x1000_0000
	for range 100 {
		a.mapPages(addr, f, 0, 4, hostarch.Read)
		a.mapPages(addr+page, f, 0, 1, hostarch.Read) // replaces, and is mapped twice
		b.mapPages(addr, f, 3, 1, hostarch.Read)
		count(1)
		a.as.Unmap(addr, 3*page)
		a.as.Unmap(addr+3*page, page)
		count(1)
		if v, ok := b.load(addr); v != 203 || !ok {
			t.Fatalf("%d, %v", v, ok)
		}
		b.as.Unmap(addr, page)
		count(0)
	}
	if n := len(p.m.regions.byPart); n > windowRegions {
		t.Errorf("%d places for regions were used for %d", n, before+1)
	}
	if n := p.m.slots.next; n > 16 {
		t.Errorf("%d slots were used", n)
	}
	a.mapPages(addr, f, 0, 4, hostarch.Read)
	a.c.Release()
	a.as.Release()
	count(-1) // its code went as well
}

// A file that is not open for writing can be mapped for reading.
func TestReadOnlyFile(t *testing.T) {
	p := newTestPlatform(t, 1)
	g := newGuest(t, p)
	ro, err := os.Open(newTestFile(t, 2, 300).Name())
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	f := testFile{ro}
	const addr = 0x1000_0000
	fr := memmap.FileRange{End: page}
	for range 2 {
		if err := g.as.MapFile(addr, f, fr, hostarch.ReadWrite, false); !errors.Is(err, unix.EACCES) {
			t.Errorf("mapped for writing: %v, want EACCES", err)
		}
		g.mapPages(addr, f, 0, 1, hostarch.Read)
	}
	if v, ok := g.load(addr); v != 300 || !ok {
		t.Errorf("%d, %v", v, ok)
	}
}

// Without slots or guest-physical addresses for more files, mapping is an error, and
// the rest goes on.
func TestNoSlots(t *testing.T) {
	p := newTestPlatform(t, 1)
	g := newGuest(t, p)
	const addr = 0x1000_0000
	f := newTestFile(t, 1, 400)
	rs := &p.m.regions
	free := rs.free
	for _, limit := range []struct{ slots, regions int }{
		{int(p.m.slots.next), rs.max}, {int(p.m.slots.max), len(rs.byPart)},
	} {
		slots, regions := p.m.slots.max, rs.max
		p.m.slots.max, rs.max, rs.free = uint32(limit.slots), limit.regions, nil
		err := g.as.MapFile(addr, f, memmap.FileRange{End: page}, hostarch.Read, false)
		if !errors.Is(err, unix.ENOSPC) {
			t.Errorf("MapFile with limits %+v: %v, want ENOSPC", limit, err)
		}
		if _, ok := g.load(addr); ok {
			t.Error("it is mapped")
		}
		p.m.slots.max, rs.max = slots, regions
	}
	g.mapPages(addr, f, 0, 1, hostarch.Read) // in a window of its own
	if v, ok := g.load(addr); v != 400 || !ok {
		t.Errorf("%d, %v", v, ok)
	}
	rs.free = append(rs.free, free...)
}

// When the flush fails nothing is reused, and the AddressSpace is given up.
func TestFlushFails(t *testing.T) {
	p := newTestPlatform(t, 1)
	g := newGuest(t, p)
	const addr = 0x1000_0000
	g.mapPages(addr, newTestFile(t, 1, 500), 0, 1, hostarch.Read)
	g.load(addr)
	p.m.walked = false // it is the slot's move that can fail
	regions, slot := len(p.m.regions.byKey), p.m.dummySlot
	p.m.dummySlot = ^uint32(0)
	g.as.Unmap(addr, hostarch.HugePageSize) // takes a page table with it
	if got := len(p.m.regions.byKey); got != regions {
		t.Errorf("%d regions after a failed flush, want %d still", got, regions)
	}
	_, _, err := g.c.Switch(context.Background(), probeMemory{as: g.as}, g.ac, -1)
	var ce *platform.ContextError
	if !errors.As(err, &ce) || ce.Errno == 0 {
		t.Errorf("Switch gives %v, want a ContextError", err)
	}
	if err := g.as.MapFile(addr, newTestFile(t, 1, 0), memmap.FileRange{End: page}, hostarch.Read, false); err == nil {
		t.Error("MapFile succeeds")
	}
	p.m.dummySlot = slot
	other := newGuest(t, p)
	if _, ok := other.load(addr); ok {
		t.Error("mapped in another AddressSpace")
	}
}

// What the CPU and the emulator refuse is the Context's error, and the vCPU is fit
// for others afterwards.
func TestFailure(t *testing.T) {
	p := newTestPlatform(t, 1)
	g := newGuest(t, p)
	v := p.m.pool.all[0]
	good := v.sregs
	for _, spoil := range []func(s *sregs){
		func(s *sregs) { s.idt.limit = 0 },      // no exception can be delivered
		func(s *sregs) { s.tr.base = 0x123000 }, // no stack
		func(s *sregs) { s.cr4 = ^uint64(0) },   // no such state
	} {
		spoil(&v.sregs)
		_, _, err := g.c.Switch(context.Background(), probeMemory{as: g.as}, g.ac, -1)
		var ce *platform.ContextError
		if !errors.As(err, &ce) || ce.Errno == 0 {
			t.Errorf("Switch gives %v, want a ContextError", err)
		}
		t.Log(err)
		v.sregs = good
		if _, ok := newGuest(t, p).load(codeAddr); !ok {
			t.Error("a new Context faults")
		}
	}
}

// A kick that comes just before KVM_RUN is not lost.
func TestKickBeforeRun(t *testing.T) {
	p := newTestPlatform(t, 1)
	g := newGuest(t, p)
	code := newTestFile(t, 1, 0)
	if _, err := code.WriteAt([]byte{0xeb, 0xfe}, 0); err != nil { // jmp .
		t.Fatal(err)
	}
	g.mapPages(codeAddr, code, 0, 1, hostarch.ReadExec)
	g.ac.SetIP(codeAddr)
	c := g.c.(*vcpuContext)
	done := make(chan bool)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		v, _, err := c.take(g.ac)
		if err != nil {
			t.Error(err)
			done <- false
			return
		}
		defer c.give(v)
		v.load(&g.ac.Regs, g.as.root)
		v.kick()
		if _, err := c.exit(g.as, v, false); err != nil {
			t.Error(err)
		}
		done <- v.interrupted
	}()
	select {
	case interrupted := <-done:
		if !interrupted {
			t.Error("not interrupted")
		}
	case <-time.After(20 * time.Second):
		p.m.pool.all[0].kick()
		<-done
		t.Fatal("the kick was lost")
	}
}

// A vCPU is asked for only when the Context that has it came to run it, a slice ago
// at least; and no more than are waited for.
func TestAskFor(t *testing.T) {
	p := newTestPlatform(t, 3)
	pool := &p.m.pool
	for range 3 {
		pool.take(nil, nil)
	}
	for i, v := range pool.all {
		v.since = uint64(i + 1)
	}
	pool.waiters = make([]chan *vcpu, 1)
	pool.timer = time.AfterFunc(time.Hour, func() {})
	defer pool.timer.Stop()
	asked := func() (n int) {
		pool.askFor()
		for _, v := range pool.all {
			if v.yield.Load() {
				n++
			}
		}
		return n
	}
	for range 3 {
		if n := asked(); n != 0 {
			t.Fatalf("%d asked for that nobody runs", n)
		}
	}
	pool.all[1].entered.Store(true)
	pool.all[2].entered.Store(true)
	if n := asked(); n != 0 {
		t.Fatalf("%d asked for that just came to run", n)
	}
	if n := asked(); n != 1 || !pool.all[1].yield.Load() {
		t.Fatalf("%d asked for, want the one that was taken first", n)
	}
	// Who got nowhere in that time has longer.
	pool.tookLocked(pool.all[1])
	pool.all[1].slices.Store(4)
	pool.all[1].entered.Store(true)
	pool.all[2].entered.Store(false)
	for range 4 {
		if n := asked(); n != 0 {
			t.Fatalf("%d asked for that can run for 4 slices", n)
		}
	}
	if n := asked(); n != 1 {
		t.Fatalf("%d asked for, want 1", n)
	}
	pool.all[1].slices.Store(1)
	// Who takes it next has as long.
	pool.tookLocked(pool.all[1])
	pool.all[1].entered.Store(true)
	pool.all[2].entered.Store(false)
	if n := asked(); n != 0 {
		t.Fatalf("%d asked for that just came to run", n)
	}
	if n := asked(); n != 1 {
		t.Fatalf("%d asked for, want 1", n)
	}
	pool.waiters = nil
	for _, v := range pool.all {
		v.run.clearImmediateExit()
		pool.put(v)
	}
}

// A flush where the CPU walks the tables itself gets vCPUs out of the guest, and makes
// each begin anew: the one that runs, and those that will.
func TestFlushKicks(t *testing.T) {
	p := newTestPlatform(t, 2)
	p.m.walked = true // of no effect on the CPU if it is not
	g := newGuest(t, p)
	code := newTestFile(t, 1, 0)
	if _, err := code.WriteAt([]byte{0xeb, 0xfe}, 0); err != nil { // jmp .
		t.Fatal(err)
	}
	g.mapPages(codeAddr, code, 0, 1, hostarch.ReadExec)
	g.ac.SetIP(codeAddr)
	done := make(chan error)
	go func() {
		_, _, err := g.c.Switch(context.Background(), probeMemory{as: g.as}, g.ac, -1)
		done <- err
	}()
	var v *vcpu
	for v == nil {
		for _, u := range p.m.pool.all {
			if u.runs.Load()%2 != 0 {
				v = u
			}
		}
		time.Sleep(time.Millisecond)
	}
	for range 20 {
		before := v.runs.Load()
		if err := p.m.flush(); err != nil {
			t.Fatal(err)
		}
		if before%2 != 0 && v.runs.Load() == before {
			t.Fatal("flush returned, and the vCPU is in the guest still")
		}
		for v.runs.Load()%2 == 0 || v.runs.Load() == before {
			time.Sleep(time.Millisecond) // it goes on by itself
		}
	}
	g.c.Interrupt()
	if err := <-done; err != platform.ErrContextInterrupt {
		t.Errorf("Switch gives %v", err)
	}
	cr4 := v.run.sregs.cr4
	if v.flushed != p.m.flushes.Load() {
		t.Errorf("the vCPU began with flush %d, want %d", v.flushed, p.m.flushes.Load())
	}
	if err := p.m.flush(); err != nil {
		t.Fatal(err)
	}
	other := newGuest(t, p)
	for range 2 {
		if _, ok := other.load(codeAddr); !ok {
			t.Error("a page that is mapped faults")
		}
	}
	if u := other.c.(*vcpuContext).home; u.flushed != p.m.flushes.Load() {
		t.Error("a vCPU ran without the flush")
	} else if u == v && v.run.sregs.cr4 == cr4 {
		t.Error("a vCPU ran without another CR4 after a flush")
	}
}

// BenchmarkGetpid is the time of a system call that the Sentry answers at once: on
// this thread alone, and through the shim if there is one.
func BenchmarkGetpid(b *testing.B) {
	for _, bound := range []bool{false, true} {
		b.Run(fmt.Sprintf("bound=%v", bound), func(b *testing.B) {
			c := constructor{}
			dev, err := c.OpenDevice("")
			if err != nil {
				b.Fatal(err)
			}
			p, err := c.New(dev)
			if err != nil {
				b.Fatal(err)
			}
			m := p.(*kvm).m
			defer m.close()
			b.Log(p.(*kvm).Describe())
			th, err := m.newProbeThread()
			if err != nil {
				b.Fatal(err)
			}
			defer th.release()
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if bound {
				th.c.BindThread()
			}
			for b.Loop() {
				if err := th.run(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// Memory that is mapped as it is used is made present; small ranges, huge ones, what
// cannot be written, and files of disks are not.
func TestPopulate(t *testing.T) {
	p := newTestPlatform(t, 1)
	g := newGuest(t, p)
	const size = 4 << 20
	newFile := func() testFile {
		fd, err := unix.MemfdCreate("populate", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		f := testFile{os.NewFile(uintptr(fd), "populate")}
		t.Cleanup(func() { f.Close() })
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		return f
	}
	disk := newTestFile(t, size/page, 0)
	if err := disk.Truncate(0); err != nil {
		t.Fatal(err)
	}
	if err := disk.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		f      testFile
		length int64
		at     hostarch.AccessType
		want   int64
	}{
		{"small", newFile(), minPopulate - page, hostarch.ReadWrite, 0},
		{"read-only", newFile(), minPopulate, hostarch.Read, 0},
		{"block", newFile(), minPopulate, hostarch.ReadWrite, minPopulate},
		{"large block", newFile(), maxPopulate, hostarch.ReadWrite, maxPopulate},
		{"huge", newFile(), maxPopulate + page, hostarch.ReadWrite, 0},
		{"disk", disk, minPopulate, hostarch.ReadWrite, 0},
	} {
		g.mapPages(0x1000_0000, c.f, 0, uint64(c.length/page), c.at)
		var st unix.Stat_t
		if err := unix.Fstat(c.f.FD(), &st); err != nil {
			t.Fatal(err)
		}
		// The temporary directory may be memory as well.
		if got := st.Blocks * 512; got != c.want && (c.name != "disk" || !p.m.regions.byKey[regionKey{c.f, 0}].ram) {
			t.Errorf("%s: %d bytes are present, want %d", c.name, got, c.want)
		}
	}
}

// The guest's CPU has no feature that the application is not told of, and no leaves
// of a hypervisor.
func TestRestrictCPUID(t *testing.T) {
	p := newTestPlatform(t, 1)
	fs := cpuid.New(cpuid.Policy{Hide: []cpuid.Feature{cpuid.FeatureAVX, cpuid.FeatureAVX2}})
	table := *p.m.cpuid
	table.entries[table.n] = cpuidEntry{function: 0x40000000, eax: 1}
	table.n++
	table.restrict(fs)
	seen := 0
	for _, e := range table.entries[:table.n] {
		switch {
		case e.function == 1 && e.ecx&(1<<28) != 0, e.function == 7 && e.index == 0 && e.ebx&(1<<5) != 0:
			t.Errorf("leaf %d has a hidden feature: %+v", e.function, e)
		case e.function == 1 && e.edx&1 == 0:
			t.Error("the x87 FPU is gone")
		case e.function>>28 == 4:
			t.Errorf("leaf %#x of a hypervisor", e.function)
		}
		if e.function == 1 {
			seen++
		}
	}
	if seen != 1 || table.n != p.m.cpuid.n {
		t.Errorf("%d leaves instead of %d, of which %d number 1", table.n, p.m.cpuid.n, seen)
	}
}
