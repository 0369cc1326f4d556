package mm

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/sentry/pgalloc"
	"github.com/ringfence/ringfence/pkg/usermem"
)

const page = hostarch.PageSize

var ctx = context.Background()

// anon returns options for private anonymous memory.
func anon(pages uint64) memmap.MMapOpts {
	return memmap.MMapOpts{Length: pages * page, Perms: hostarch.ReadWrite, MaxPerms: hostarch.AnyAccess, Private: true}
}

func at(opts memmap.MMapOpts, addr hostarch.Addr) memmap.MMapOpts {
	opts.Addr, opts.Fixed, opts.Unmap = addr, true, true
	return opts
}

func of(opts memmap.MMapOpts, f *testFile, private bool) memmap.MMapOpts {
	opts.Mappable, opts.MappingIdentity, opts.Private = f, f, private
	return opts
}

func mmap(t testing.TB, mm *MemoryManager, opts memmap.MMapOpts) hostarch.Addr {
	t.Helper()
	addr, err := mm.MMap(ctx, opts)
	if err != nil {
		t.Fatalf("MMap(%+v): %v", opts, err)
	}
	return addr
}

func write(t testing.TB, mm *MemoryManager, addr hostarch.Addr, v byte) {
	t.Helper()
	if _, err := touch(mm, addr, hostarch.Write, v); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, mm *MemoryManager, addr hostarch.Addr) byte {
	t.Helper()
	v, err := touch(mm, addr, hostarch.Read, 0)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func expect(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) || (err == nil) != (want == nil) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

func TestMMapErrors(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	f := e.newFile(1)
	fixed := at(anon(1), 0x100000)
	mmap(t, mm, fixed)
	noReplace := fixed
	noReplace.Unmap = false
	with := func(o memmap.MMapOpts, change func(o *memmap.MMapOpts)) memmap.MMapOpts { change(&o); return o }
	for name, test := range map[string]struct {
		opts memmap.MMapOpts
		want error
	}{
		"length 0":           {anon(0), unix.EINVAL},
		"length wraps":       {with(anon(1), func(o *memmap.MMapOpts) { o.Length = math.MaxUint64 }), unix.ENOMEM},
		"larger than memory": {with(anon(1), func(o *memmap.MMapOpts) { o.Length = 1 << 47 }), unix.ENOMEM},
		"unaligned":          {at(anon(1), 0x100001), unix.EINVAL},
		"below the minimum":  {at(anon(1), 0x1000), unix.EPERM},
		"null":               {at(anon(1), 0), unix.EPERM},
		"beyond the end":     {at(anon(1), 1<<47-page), unix.ENOMEM},
		"kernel":             {at(anon(1), 0xffff800000000000), unix.ENOMEM},
		"end wraps":          {at(anon(2), math.MaxUint64-page+1), unix.ENOMEM},
		"no replace":         {noReplace, unix.EEXIST},
		"permissions":        {with(anon(1), func(o *memmap.MMapOpts) { o.MaxPerms = hostarch.Read }), unix.EACCES},
		"file offset":        {with(of(anon(1), f, true), func(o *memmap.MMapOpts) { o.Offset = 1 }), unix.EINVAL},
		"file offset wraps":  {with(of(anon(1), f, true), func(o *memmap.MMapOpts) { o.Offset = math.MaxUint64 &^ hostarch.PageMask }), unix.EOVERFLOW},
		"file offset signed": {with(of(anon(1), f, true), func(o *memmap.MMapOpts) { o.Offset = 1<<63 - page }), unix.EOVERFLOW},
		"file grows down":    {with(of(anon(1), f, true), func(o *memmap.MMapOpts) { o.GrowsDown = true }), unix.EINVAL},
		"shared grows down":  {with(anon(1), func(o *memmap.MMapOpts) { o.GrowsDown, o.Private = true, false }), unix.EINVAL},
	} {
		addr, err := mm.MMap(ctx, test.opts)
		if err == nil {
			t.Errorf("%s: mapped at %v", name, addr)
		}
		expect(t, name, err, test.want)
	}
	check(t, mm)
	if n := mm.VirtualMemorySize(); n != page {
		t.Errorf("%#x bytes mapped", n)
	}
}

func TestMMapPlacement(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	hint := anon(2)
	hint.Addr = 0x20000123
	if a := mmap(t, mm, hint); a != 0x20000000 {
		t.Errorf("hint gave %v", a)
	}
	if a := mmap(t, mm, hint); a == 0x20000000 || a%page != 0 {
		t.Errorf("taken hint gave %v", a)
	}
	top := mmap(t, mm, anon(4))
	if next := mmap(t, mm, anon(4)); next != top-4*page {
		t.Errorf("mappings at %v and %v", top, next)
	}
	if top >= mm.StackTop()-8<<20 {
		t.Errorf("mapping at %v, stack ends at %v", top, mm.StackTop())
	}
	low := anon(16)
	low.Map32Bit = true
	if a := mmap(t, mm, low); a < 0x40000000 || a >= 0x80000000 {
		t.Errorf("MAP_32BIT gave %v", a)
	}
	low.Length = 0x40000000
	_, err := mm.MMap(ctx, low)
	expect(t, "MAP_32BIT without room", err, unix.ENOMEM)
	check(t, mm)

	// ASLR: not the same place every time.
	seen := make(map[hostarch.Addr]bool)
	for range 4 {
		mm := e.newMM()
		seen[mm.StackTop()], seen[mm.PIEBase()], seen[mmap(t, mm, anon(1))] = true, true, true
	}
	if len(seen) < 12 {
		t.Errorf("12 random addresses are %d", len(seen))
	}
	for range 2 {
		mm, err := New(e.p, e.mf, Options{NoRandomize: true})
		if err != nil {
			t.Fatal(err)
		}
		seen[mm.StackTop()], seen[mm.PIEBase()], seen[mmap(t, mm, anon(1))] = true, true, true
		mm.DecUsers(ctx)
	}
	if len(seen) > 15 {
		t.Errorf("addresses differ without randomization")
	}
}

func TestLimits(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	mm.SetLimits(Limits{AS: 8 * page, Data: 4 * page, Stack: math.MaxUint64})
	a := mmap(t, mm, anon(4))
	_, err := mm.MMap(ctx, anon(1))
	expect(t, "beyond RLIMIT_DATA", err, unix.ENOMEM)
	ro := anon(5)
	ro.Perms = hostarch.Read
	_, err = mm.MMap(ctx, ro)
	expect(t, "beyond RLIMIT_AS", err, unix.ENOMEM)
	ro.Length = 4 * page
	b := mmap(t, mm, ro)
	expect(t, "mprotect beyond RLIMIT_DATA", mm.MProtect(ctx, b, page, hostarch.ReadWrite, false), unix.ENOMEM)
	mmap(t, mm, at(anon(4), a)) // replaces as much
	_, err = mm.MRemap(ctx, a, 4*page, 5*page, MRemapOpts{Move: MRemapMayMove})
	expect(t, "mremap beyond RLIMIT_AS", err, unix.ENOMEM)
	expect(t, "mprotect", mm.MProtect(ctx, a, page, hostarch.Read, false), nil)
	expect(t, "mprotect", mm.MProtect(ctx, b, page, hostarch.ReadWrite, false), nil)
	expect(t, "mlock", mm.MLock(ctx, a, page, memmap.MLockEager), unix.EPERM)
	check(t, mm)
}

func TestMUnmap(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	a := mmap(t, mm, anon(8))
	for i := range hostarch.Addr(8) {
		write(t, mm, a+i*page, byte(i))
	}
	expect(t, "length 0", mm.MUnmap(ctx, a, 0), unix.EINVAL)
	expect(t, "unaligned", mm.MUnmap(ctx, a+1, page), unix.EINVAL)
	expect(t, "wraps", mm.MUnmap(ctx, a, math.MaxUint64), unix.EINVAL)
	expect(t, "wraps", mm.MUnmap(ctx, a, math.MaxUint64-page), unix.EINVAL)
	expect(t, "kernel", mm.MUnmap(ctx, 1<<63, page), unix.EINVAL)
	expect(t, "nothing there", mm.MUnmap(ctx, 0x30000000, page), nil)
	expect(t, "the middle", mm.MUnmap(ctx, a+2*page, 3*page-5), nil)
	check(t, mm)
	for i := range hostarch.Addr(8) {
		v, err := touch(mm, a+i*page, hostarch.Read, 0)
		if i >= 2 && i < 5 {
			expect(t, "unmapped", err, unix.EFAULT)
		} else if err != nil || v != byte(i) {
			t.Errorf("page %d: %d, %v", i, v, err)
		}
	}
}

func TestMProtect(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	f := e.newFile(4)
	a := mmap(t, mm, at(anon(4), 0x10000000))
	write(t, mm, a, 7)
	as := fake(mm)
	as.counts()
	// What a program with a handler for its faults does: one call each.
	expect(t, "mprotect", mm.MProtect(ctx, a, 4*page, hostarch.Read, false), nil)
	_, err := touch(mm, a, hostarch.Write, 1)
	var fault *FaultError
	if !errors.As(err, &fault) || !fault.Mapped {
		t.Errorf("write to read-only memory: %v", err)
	}
	expect(t, "mprotect", mm.MProtect(ctx, a, 4*page, hostarch.ReadWrite, false), nil)
	write(t, mm, a, 8)
	if maps, unmaps := as.counts(); maps != 2 || unmaps != 0 {
		t.Errorf("%d MapFile, %d Unmap", maps, unmaps)
	}
	if mm.vmas.count != 1 || mm.pmas.count != 1 {
		t.Errorf("%d vmas, %d pmas", mm.vmas.count, mm.pmas.count)
	}

	expect(t, "unaligned", mm.MProtect(ctx, a+1, page, hostarch.Read, false), unix.EINVAL)
	expect(t, "length 0", mm.MProtect(ctx, a, 0, hostarch.Read, false), nil)
	expect(t, "wraps", mm.MProtect(ctx, a, math.MaxUint64-5*page, hostarch.Read, false), unix.ENOMEM)
	expect(t, "nothing there", mm.MProtect(ctx, 0x50000000, page, hostarch.Read, false), unix.ENOMEM)
	expect(t, "not a stack", mm.MProtect(ctx, a, page, hostarch.Read, true), unix.EINVAL)
	ro := of(at(anon(4), 0x10008000), f, false)
	ro.Perms, ro.MaxPerms = hostarch.Read, hostarch.ReadExec
	b := mmap(t, mm, ro)
	expect(t, "file is read-only", mm.MProtect(ctx, b, page, hostarch.ReadWrite, false), unix.EACCES)
	// What precedes the hole is changed.
	expect(t, "hole", mm.MProtect(ctx, a, 0x10000, hostarch.NoAccess, false), unix.ENOMEM)
	if _, err := touch(mm, a, hostarch.Read, 0); err == nil {
		t.Error("memory before the hole can be read")
	}
	if read(t, mm, b) != 0 {
		t.Error("memory behind the hole")
	}
	check(t, mm)
}

// A fork shares pages until they are written; the last one that has a page
// writes it in place.
func TestFork(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	shared := anon(4)
	shared.Private = false
	s := mmap(t, mm, shared)
	a := mmap(t, mm, anon(64))
	for i := range hostarch.Addr(64) {
		write(t, mm, a+i*page, byte(i))
	}
	write(t, mm, s, 1)
	used := e.mf.UsedBytes()
	as := fake(mm)
	as.counts()
	child, err := mm.Fork(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if maps, unmaps := as.counts(); maps > 5 || unmaps > 0 {
		t.Errorf("fork took %d MapFile and %d Unmap", maps, unmaps)
	}
	if n := e.mf.UsedBytes() - used; n > maxForkCopy {
		t.Errorf("fork takes %d bytes", n)
	}
	check(t, mm)
	check(t, child)
	used = e.mf.UsedBytes()

	write(t, mm, a, 100)
	write(t, child, a+page, 101)
	write(t, child, s, 102)
	if v := read(t, child, a); v != 0 {
		t.Errorf("child sees %d", v)
	}
	if v := read(t, mm, a+page); v != 1 {
		t.Errorf("parent sees %d", v)
	}
	if v := read(t, mm, s); v != 102 {
		t.Errorf("parent sees %d in shared memory", v)
	}
	if n := e.mf.UsedBytes() - used; n > 2*minCopy {
		t.Errorf("two writes copied %d bytes", n)
	}
	// The Sentry's own writes are copies as well, and seen by the application.
	if _, err := child.CopyOut(ctx, a+63*page, []byte{103}, usermem.IOOpts{}); err != nil {
		t.Fatal(err)
	}
	if v := read(t, child, a+63*page); v != 103 {
		t.Errorf("child sees %d after CopyOut", v)
	}
	if v := read(t, mm, a+63*page); v != 63 {
		t.Errorf("parent sees %d after CopyOut", v)
	}
	read(t, mm, a+62*page)
	if _, err := mm.CopyOut(ctx, a+62*page, []byte{104}, usermem.IOOpts{}); err != nil {
		t.Fatal(err)
	}
	if v := read(t, mm, a+62*page); v != 104 {
		t.Errorf("parent sees %d after its CopyOut", v)
	}
	check(t, mm)
	check(t, child)
	// Copies in sequence grow.
	fake(child).counts()
	for i := range hostarch.Addr(60) {
		write(t, child, a+i*page, 1)
	}
	if maps, _ := fake(child).counts(); maps > 12 {
		t.Errorf("copying 60 pages took %d MapFile", maps)
	}
	check(t, child)
	child.DecUsers(ctx)

	used = e.mf.UsedBytes()
	as.counts()
	for i := range hostarch.Addr(64) {
		write(t, mm, a+i*page, byte(i))
	}
	if n := e.mf.UsedBytes(); n != used {
		t.Errorf("writes without a child copied %d bytes", n-used)
	}
	if maps, _ := as.counts(); maps > 8 {
		t.Errorf("writing again took %d MapFile", maps)
	}
	check(t, mm)
}

// Where a process forks again and again, neither it nor its children fault for what
// the others have used before them, and each takes one request at most.
func TestForkLoop(t *testing.T) {
	e := newEnv(t)
	e.p.batch = true
	mm := e.newMM()
	f := e.newFile(8)
	f.perms = hostarch.ReadExec
	text := mmap(t, mm, of(anon(4), f, true))
	data := of(anon(4), f, true)
	data.Offset = 4 * page
	d := mmap(t, mm, data)
	stack := mmap(t, mm, at(anon(32), 0x10000000))
	heap := mmap(t, mm, at(anon(200), 0x20000000))
	as := fake(mm)
	for i := range byte(4) {
		used := e.mf.UsedBytes()
		as.counts()
		mm.Expect(stack+20*page, hostarch.Write)
		child, err := mm.Fork(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if n := e.mf.UsedBytes() - used; n > maxForkCopy {
			t.Errorf("fork %d takes %#x bytes", i, n)
		}
		cas := fake(child)
		child.Prefault(ctx, stack+20*page, hostarch.Write)
		for _, m := range []*MemoryManager{child, mm} {
			v := i
			if m == child {
				v += 100
			}
			if got := read(t, m, text+page); got != f.bytes()[page] {
				t.Errorf("text holds %d", got)
			}
			if got := read(t, m, heap+3*page); i > 0 && got != i-1 {
				t.Errorf("fork %d: heap holds %d", i, got)
			}
			for _, a := range []hostarch.Addr{stack + 20*page, heap + 3*page, d + page} {
				write(t, m, a, v)
			}
		}
		check(t, mm)
		check(t, child)
		if i > 0 {
			// At the second fork the parent still loses what lies around.
			if maps, unmaps := as.counts(); maps > 1 || i > 1 && maps > 0 || unmaps > 0 {
				t.Errorf("fork %d took %d MapFile and %d Unmap in the parent", i, maps, unmaps)
			}
			if maps, unmaps := cas.counts(); maps > 1 || unmaps > 0 {
				t.Errorf("fork %d took %d MapFile and %d Unmap in the child", i, maps, unmaps)
			}
		}
		child.DecUsers(ctx)
	}

	// What another thread may write meanwhile is not copied, nor is what was written
	// longer ago than there is room for.
	mm.IncUsers()
	used := e.mf.UsedBytes()
	child, err := mm.Fork(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if n := e.mf.UsedBytes() - used; n > minCopy { // of what the parent shares already
		t.Errorf("fork of a process with two threads takes %#x bytes", n)
	}
	child.DecUsers(ctx)
	mm.DecUsers(ctx)
	check(t, mm)
}

// Children that use many pages soon find them all, unless there is more than is ever
// copied; what they do not use any more is forgotten.
func TestForkManyPages(t *testing.T) {
	e := newEnv(t)
	e.p.batch = true
	mm := e.newMM()
	heap := mmap(t, mm, at(anon(4096), 0x20000000))
	for i := range hostarch.Addr(4096) {
		write(t, mm, heap+i*page, byte(i))
	}
	const step = minCopy / page
	// forks forks n times; each child writes the first page of so many blocks. It
	// returns the requests of the last one, and the memory that the fork took.
	forks := func(n, blocks int) (requests int, copied uint64) {
		for range n {
			used := e.mf.UsedBytes()
			child, err := mm.Fork(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if copied = e.mf.UsedBytes() - used; copied > maxForkCopy {
				t.Fatalf("fork takes %#x bytes", copied)
			}
			child.Prefault(ctx, heap, hostarch.Write)
			for i := range hostarch.Addr(blocks) {
				a := heap + i*step*page
				if v := read(t, child, a+page); v != byte(i*step+1) {
					t.Fatalf("page %d of the child holds %d", i*step+1, v)
				}
				write(t, child, a, 99)
			}
			check(t, mm)
			check(t, child)
			requests, _ = fake(child).counts()
			child.DecUsers(ctx)
		}
		return requests, copied
	}
	if n, _ := forks(6, 100); n > 3 {
		t.Errorf("a child that uses 100 blocks took %d requests", n)
	}
	_, before := forks(1, 1)
	if _, after := forks(60*forgetForks, 1); after > before-20*minCopy {
		t.Errorf("a child that uses one block gets %#x bytes, before it was %#x", after, before)
	}
	if n, copied := forks(20, 200); copied < maxForkCopy-minCopy {
		t.Errorf("a child that uses 200 blocks got %#x bytes and took %d requests", copied, n)
	}
}

// A page of a file that others may change stays that of the file in the child until
// it is written there.
func TestForkFile(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	f := e.newFile(4)
	a := mmap(t, mm, of(anon(4), f, true))
	mm.Expect(a, hostarch.Write)
	read(t, mm, a)
	child, err := mm.Fork(ctx)
	if err != nil {
		t.Fatal(err)
	}
	child.Prefault(ctx, a, hostarch.Read)
	f.bytes()[0] = 99
	if v := read(t, child, a); v != 99 {
		t.Errorf("child sees %d", v)
	}
	check(t, child)
	child.DecUsers(ctx)
}

// shortFile gives no more than a page at a time.
type shortFile struct{ *pgalloc.MemoryFile }

func (f shortFile) MapInternal(fr memmap.FileRange, at hostarch.AccessType) ([][]byte, error) {
	fr.End = min(fr.End, fr.Start+page)
	return f.MemoryFile.MapInternal(fr, at)
}

// shortMappable is a testFile that gives a shortFile.
type shortMappable struct{ *testFile }

func (m shortMappable) Translate(ctx context.Context, required, optional memmap.MappableRange, at hostarch.AccessType) ([]memmap.Translation, error) {
	ts, err := m.testFile.Translate(ctx, required, optional, at)
	for i := range ts {
		ts[i].File = shortFile{m.mf}
	}
	return ts, err
}

// Memory that was used before never shows through a copy that is not complete.
func TestIncompleteCopy(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	f := e.newFile(4)
	f.perms = hostarch.ReadExec
	dirty, err := e.mf.AllocateDirty(64*page, pgalloc.NoHint)
	if err != nil {
		t.Fatal(err)
	}
	b, err := e.mf.Bytes(dirty)
	if err != nil {
		t.Fatal(err)
	}
	for i := range b {
		b[i] = 0xee
	}
	e.mf.DecRef(dirty)
	opts := anon(4)
	opts.Mappable, opts.MappingIdentity = shortMappable{f}, f
	a := mmap(t, mm, opts)
	write(t, mm, a+2*page, 1)
	child, err := mm.Fork(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for i := range hostarch.Addr(4) {
		for _, m := range []*MemoryManager{mm, child} {
			if v := read(t, m, a+i*page); v != 0 && i != 2 {
				t.Errorf("page %d holds %#x", i, v)
			}
		}
	}
	check(t, mm)
	check(t, child)
	child.DecUsers(ctx)
}

// Files that were mapped since the last fault are mapped with the next one.
func TestExpectedFiles(t *testing.T) {
	e := newEnv(t)
	e.p.batch = true
	mm := e.newMM()
	f := e.newFile(8)
	var addrs []hostarch.Addr
	for i := range 3 {
		opts := of(anon(2), f, true)
		opts.Offset = uint64(i) * 2 * page
		opts.Perms = hostarch.ReadExec
		addrs = append(addrs, mmap(t, mm, opts))
	}
	gone := mmap(t, mm, of(anon(2), f, true))
	expect(t, "munmap", mm.MUnmap(ctx, gone, 2*page), nil)
	none := of(anon(2), f, true)
	none.Perms = hostarch.NoAccess
	mmap(t, mm, none)
	as := fake(mm)
	as.counts()
	for _, a := range addrs {
		read(t, mm, a+page)
	}
	if maps, unmaps := as.counts(); maps != 1 || unmaps != 0 {
		t.Errorf("%d MapFile and %d Unmap", maps, unmaps)
	}
	check(t, mm)
	// A host that refuses what is expected still gets what is needed.
	for range 3 {
		addrs = append(addrs, mmap(t, mm, of(anon(8), f, true)))
	}
	e.p.max = len(as.pages) + 8
	read(t, mm, addrs[5])
	check(t, mm)
}

// A program finds what its loader has mapped with one request, the part that it
// writes included.
func TestExpectedProgram(t *testing.T) {
	e := newEnv(t)
	e.p.batch = true
	mm := e.newMM()
	f := e.newFile(8)
	f.perms = hostarch.ReadExec
	for i := range 8 {
		f.bytes()[i*page] = byte(i + 1)
	}
	code, data := of(anon(4), f, true), of(anon(4), f, true)
	code.Perms = hostarch.ReadExec
	data.Offset = 4 * page
	c, d, bss := mmap(t, mm, code), mmap(t, mm, data), mmap(t, mm, anon(3))
	opts := anon(32)
	opts.GrowsDown = true
	sp := mmap(t, mm, opts) + 31*page
	if _, err := mm.CopyOut(ctx, sp, []byte{1}, usermem.IOOpts{}); err != nil {
		t.Fatal(err)
	}
	as := fake(mm)
	as.counts()
	mm.Expect(sp, hostarch.Write)
	mm.Prefault(ctx, c, hostarch.Execute)
	if v := read(t, mm, d+2*page); v != 7 {
		t.Errorf("data holds %d", v)
	}
	for i := range hostarch.Addr(3) {
		write(t, mm, d+i*page, 1)
		write(t, mm, bss+i*page, 1)
		write(t, mm, sp-i*page, 1)
	}
	if maps, unmaps := as.counts(); maps > 1 || unmaps != 0 {
		t.Errorf("%d MapFile and %d Unmap", maps, unmaps)
	}
	// From then on what is small is mapped when it is made.
	a := mmap(t, mm, data)
	as.counts()
	write(t, mm, a+page, 1)
	if maps, _ := as.counts(); maps != 0 {
		t.Errorf("a small mapping of a file took %d MapFile when it was written", maps)
	}
	if f.bytes()[5*page] != 6 {
		t.Error("a private write reached the file")
	}
	check(t, mm)
}

// Memory whose access is taken away and given back is there without a fault, with no
// more than it had.
func TestRevoked(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	a := mmap(t, mm, anon(40))
	for i := range hostarch.Addr(8) {
		write(t, mm, a+i*page, byte(i))
	}
	as := fake(mm)
	for range 2 {
		expect(t, "mprotect", mm.MProtect(ctx, a, 40*page, hostarch.NoAccess, false), nil)
		check(t, mm)
		if len(as.pages) != 0 {
			t.Errorf("%d pages can be accessed", len(as.pages))
		}
		expect(t, "mprotect", mm.MProtect(ctx, a+page, 39*page, hostarch.Read, false), nil)
		check(t, mm)
		as.counts()
		for i := range hostarch.Addr(7) {
			if v := read(t, mm, a+(i+1)*page); v != byte(i+1) {
				t.Errorf("page %d holds %d", i+1, v)
			}
		}
		if maps, _ := as.counts(); maps != 0 {
			t.Errorf("reading took %d MapFile", maps)
		}
		if _, err := touch(mm, a+page, hostarch.Write, 1); err == nil {
			t.Error("read-only memory can be written")
		}
		expect(t, "mprotect", mm.MProtect(ctx, a, 40*page, hostarch.ReadWrite, false), nil)
		check(t, mm)
	}
	// A child has nothing mapped that could be revoked.
	expect(t, "mprotect", mm.MProtect(ctx, a, 40*page, hostarch.NoAccess, false), nil)
	child, err := mm.Fork(ctx)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "mprotect", child.MProtect(ctx, a, 40*page, hostarch.ReadWrite, false), nil)
	check(t, child)
	write(t, child, a, 99)
	child.DecUsers(ctx)
	expect(t, "mprotect", mm.MProtect(ctx, a, 40*page, hostarch.Read, false), nil)
	if v := read(t, mm, a); v != 0 {
		t.Errorf("parent sees %d", v)
	}
	check(t, mm)
}

// A grandchild keeps what it was given.
func TestForkChain(t *testing.T) {
	e := newEnv(t)
	mms := []*MemoryManager{e.newMM()}
	a := mmap(t, mms[0], anon(1))
	for i := range 20 {
		write(t, mms[i], a, byte(i))
		child, err := mms[i].Fork(ctx)
		if err != nil {
			t.Fatal(err)
		}
		mms = append(mms, child)
		defer child.DecUsers(ctx)
	}
	for i, mm := range mms {
		if v := read(t, mm, a); v != byte(min(i, 19)) {
			t.Errorf("process %d reads %d", i, v)
		}
	}
}

func TestForkAdvice(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	a := mmap(t, mm, anon(4))
	for i := range hostarch.Addr(4) {
		write(t, mm, a+i*page, 1)
	}
	expect(t, "MADV_DONTFORK", mm.Madvise(ctx, a, page, linux.MADV_DONTFORK), nil)
	expect(t, "MADV_WIPEONFORK", mm.Madvise(ctx, a+page, page, linux.MADV_WIPEONFORK), nil)
	child, err := mm.Fork(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer child.DecUsers(ctx)
	_, err = touch(child, a, hostarch.Read, 0)
	expect(t, "not forked", err, unix.EFAULT)
	if v, w := read(t, child, a+page), read(t, child, a+2*page); v != 0 || w != 1 {
		t.Errorf("child reads %d and %d", v, w)
	}
	write(t, mm, a, 2)
	check(t, mm)
	check(t, child)
}

// First touches of memory in sequence take few calls, and no more memory than
// twice what is touched.
func TestFaultBatches(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	a := mmap(t, mm, at(anon(16<<20/page), 0x40000000))
	as := fake(mm)
	write(t, mm, a, 1)
	if n := e.mf.UsedBytes(); n > minBlock {
		t.Errorf("one page takes %#x bytes", n)
	}
	for i := range hostarch.Addr(4 << 20 / page) {
		write(t, mm, a+i*page, 1)
		if n := e.mf.UsedBytes(); n > max(minBlock, 2*uint64(i+1)*page) {
			t.Fatalf("%d pages take %#x bytes", i+1, n)
		}
	}
	if maps, _ := as.counts(); maps > 12 {
		t.Errorf("4 MiB in sequence took %d MapFile", maps)
	}
	check(t, mm)
	if mm.pmas.count > 2 {
		t.Errorf("%d pmas", mm.pmas.count)
	}
	// Downwards as well.
	b := a + 16<<20
	for i := range hostarch.Addr(4 << 20 / page) {
		write(t, mm, b-(i+1)*page, 1)
	}
	if maps, _ := as.counts(); maps > 12 {
		t.Errorf("4 MiB downwards took %d MapFile", maps)
	}
	check(t, mm)
	expect(t, "munmap", mm.MUnmap(ctx, a, 16<<20), nil)
	if _, unmaps := as.counts(); unmaps != 1 {
		t.Errorf("munmap took %d Unmap", unmaps)
	}
	// Memory that was never touched takes none.
	a = mmap(t, mm, anon(32))
	expect(t, "munmap", mm.MUnmap(ctx, a, 32*page), nil)
	if maps, unmaps := as.counts(); maps+unmaps != 0 {
		t.Errorf("untouched memory took %d MapFile and %d Unmap", maps, unmaps)
	}
}

// A small mapping costs one call to map and one to unmap, and is zero although its
// memory was used before.
func TestSmallMappings(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	as := fake(mm)
	for range 3 {
		a := mmap(t, mm, anon(16))
		for i := range hostarch.Addr(16) {
			if v := read(t, mm, a+i*page); v != 0 {
				t.Errorf("page %d holds %d", i, v)
			}
			write(t, mm, a+i*page, 1)
		}
		check(t, mm)
		expect(t, "munmap", mm.MUnmap(ctx, a, 16*page), nil)
		if maps, unmaps := as.counts(); maps != 1 || unmaps != 1 {
			t.Errorf("%d MapFile and %d Unmap", maps, unmaps)
		}
	}
	if n := e.mf.UsedBytes(); n != 0 {
		t.Errorf("%#x bytes are left", n)
	}
}

func TestPrivateFile(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	f := e.newFile(8)
	for i := range 8 {
		f.bytes()[i*page] = byte(i + 1)
	}
	a := mmap(t, mm, of(anon(8), f, true))
	used := e.mf.UsedBytes()
	as := fake(mm)
	for i := range hostarch.Addr(8) {
		if v := read(t, mm, a+i*page); v != byte(i+1) {
			t.Errorf("page %d holds %d", i, v)
		}
	}
	if maps, _ := as.counts(); maps != 1 || e.mf.UsedBytes() != used {
		t.Errorf("reading a file took %d MapFile and %#x bytes", maps, e.mf.UsedBytes()-used)
	}
	write(t, mm, a+2*page, 77)
	if f.bytes()[2*page] != 3 {
		t.Error("a private write reached the file")
	}
	f.bytes()[3*page] = 88
	if v := read(t, mm, a+3*page); v != 88 {
		t.Errorf("change of the file is not seen: %d", v)
	}
	expect(t, "MADV_DONTNEED", mm.Madvise(ctx, a, 8*page, linux.MADV_DONTNEED), nil)
	if v := read(t, mm, a+2*page); v != 3 {
		t.Errorf("%d after MADV_DONTNEED", v)
	}
	expect(t, "MADV_FREE of a file", mm.Madvise(ctx, a, 8*page, linux.MADV_FREE), unix.EINVAL)
	check(t, mm)

	// Where no write to the file is possible, copies are made in blocks.
	f.perms = hostarch.ReadExec
	expect(t, "MADV_DONTNEED", mm.Madvise(ctx, a, 8*page, linux.MADV_DONTNEED), nil)
	read(t, mm, a)
	as.counts()
	for i := range hostarch.Addr(8) {
		write(t, mm, a+i*page, 1)
	}
	if maps, _ := as.counts(); maps > 8*page/minCopy+1 {
		t.Errorf("writing 8 pages took %d MapFile", maps)
	}
	check(t, mm)
}

func TestSharedFile(t *testing.T) {
	e := newEnv(t)
	mm, other := e.newMM(), e.newMM()
	f := e.newFile(8)
	opts := of(anon(8), f, false)
	opts.Precommit = true
	a := mmap(t, mm, opts)
	opts.Offset, opts.Length = 4*page, 4*page
	b := mmap(t, other, opts)
	write(t, mm, a+5*page, 9)
	if v := read(t, other, b+page); v != 9 || f.bytes()[5*page] != 9 {
		t.Errorf("another process reads %d, the file has %d", v, f.bytes()[5*page])
	}
	// The Sentry reads and writes the file.
	buf := make([]byte, 4*page)
	if _, err := other.CopyIn(ctx, b, buf, usermem.IOOpts{}); err != nil || buf[page] != 9 {
		t.Errorf("CopyIn: %d, %v", buf[page], err)
	}
	ro := opts
	ro.Perms, ro.MaxPerms = hostarch.Read, hostarch.Read
	c := mmap(t, mm, ro)
	_, err := mm.CopyOut(ctx, c, buf, usermem.IOOpts{IgnorePermissions: true})
	expect(t, "write to a file that is not writable", err, unix.EFAULT)
	check(t, mm)
}

func TestTruncate(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	f := e.newFile(8)
	a := mmap(t, mm, of(anon(8), f, false))
	p := mmap(t, mm, of(anon(8), f, true))
	for i := range hostarch.Addr(8) {
		write(t, mm, a+i*page, 5)
		read(t, mm, p+i*page)
	}
	f.truncate(3*page + 1)
	for _, addr := range []hostarch.Addr{a, p} {
		for i := range hostarch.Addr(8) {
			_, err := touch(mm, addr+i*page, hostarch.Read, 0)
			var bus *memmap.BusError
			if errors.As(err, &bus) != (i >= 4) || i < 4 && err != nil {
				t.Errorf("page %d: %v", i, err)
			}
		}
		buf := make([]byte, 8*page)
		n, err := mm.CopyIn(ctx, addr, buf, usermem.IOOpts{})
		var bus *memmap.BusError
		if n != 4*page || !errors.As(err, &bus) {
			t.Errorf("CopyIn = %d, %v", n, err)
		}
		n, err = mm.CopyOut(ctx, addr+page, buf[:4*page], usermem.IOOpts{})
		if n != 3*page || !errors.As(err, &bus) {
			t.Errorf("CopyOut = %d, %v", n, err)
		}
	}
	check(t, mm)
	f.truncate(8 * page)
	read(t, mm, a+7*page)
}

// A file may give less than a mapping asks for; that is a fault, not a loop.
func TestFileWithoutExecute(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	f := e.newFile(1)
	f.perms = hostarch.Read
	opts := of(anon(1), f, true)
	opts.Perms = hostarch.AnyAccess
	a := mmap(t, mm, opts)
	read(t, mm, a)
	_, err := touch(mm, a, hostarch.Execute, 0)
	expect(t, "execute", err, unix.EFAULT)
	opts.Private = false
	b := mmap(t, mm, opts)
	if _, err := touch(mm, b, hostarch.Write, 0); err == nil {
		t.Error("write to a file that gives no write access")
	}
	check(t, mm)
}

func TestSharedAnon(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	opts := anon(3 * sharedBlock / page / 2)
	opts.Private = false
	a := mmap(t, mm, opts)
	write(t, mm, a, 1)
	write(t, mm, a+hostarch.Addr(opts.Length)-1, 2)
	child, err := mm.Fork(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer child.DecUsers(ctx)
	write(t, child, a+page, 3)
	if v, w := read(t, mm, a+page), read(t, child, a+hostarch.Addr(opts.Length)-1); v != 3 || w != 2 {
		t.Errorf("shared memory holds %d and %d", v, w)
	}
	// MADV_DONTNEED keeps the contents, MADV_REMOVE does not.
	expect(t, "MADV_DONTNEED", mm.Madvise(ctx, a, opts.Length, linux.MADV_DONTNEED), nil)
	if v := read(t, mm, a); v != 1 {
		t.Errorf("%d after MADV_DONTNEED", v)
	}
	expect(t, "MADV_REMOVE", mm.Madvise(ctx, a, page, linux.MADV_REMOVE), nil)
	if v, w := read(t, child, a), read(t, child, a+page); v != 0 || w != 3 {
		t.Errorf("%d and %d after MADV_REMOVE", v, w)
	}
	// A second mapping of the same pages, and growing beyond the end.
	b, err := mm.MRemap(ctx, a, 0, 2*page, MRemapOpts{Move: MRemapMayMove})
	if err != nil || read(t, mm, b+page) != 3 {
		t.Errorf("copying mremap: %v", err)
	}
	b, err = mm.MRemap(ctx, a, opts.Length, opts.Length+page, MRemapOpts{Move: MRemapMayMove})
	if err != nil {
		t.Fatal(err)
	}
	_, err = touch(mm, b+hostarch.Addr(opts.Length), hostarch.Read, 0)
	var bus *memmap.BusError
	if !errors.As(err, &bus) {
		t.Errorf("beyond the end of shared memory: %v", err)
	}
	check(t, mm)
	check(t, child)
}

func TestStack(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	mm.SetLimits(Limits{AS: math.MaxUint64, Data: math.MaxUint64, Stack: 1 << 20})
	opts := at(anon(4), 0x20000000)
	opts.GrowsDown, opts.Stack = true, true
	a := mmap(t, mm, opts)
	end := a + 4*page
	write(t, mm, a-3*page, 1)
	if _, err := mm.CopyOut(ctx, a-40*page, []byte("stack"), usermem.IOOpts{}); err != nil {
		t.Errorf("CopyOut below the stack: %v", err)
	}
	write(t, mm, end-1<<20, 1)
	_, err := touch(mm, end-1<<20-1, hostarch.Write, 1)
	var fault *FaultError
	if !errors.As(err, &fault) || fault.Mapped {
		t.Errorf("beyond RLIMIT_STACK: %v", err)
	}
	// mprotect with PROT_GROWSDOWN starts where the stack does.
	expect(t, "mprotect", mm.MProtect(ctx, end-page, page, hostarch.Read, true), nil)
	if _, err := touch(mm, a, hostarch.Write, 1); err == nil {
		t.Error("PROT_GROWSDOWN left the stack writable")
	}
	check(t, mm)

	// The guard below another stack: not near a mapping, but up to PROT_NONE.
	b := mmap(t, mm, at(opts, 0x30000000))
	mmap(t, mm, at(anon(1), b-stackGuardGap-2*page))
	write(t, mm, b-page, 1)
	_, err = touch(mm, b-2*page, hostarch.Write, 1)
	expect(t, "near a mapping", err, unix.EFAULT)
	c := mmap(t, mm, at(opts, 0x40000000))
	none := at(anon(1), c-2*page)
	none.Perms = hostarch.NoAccess
	mmap(t, mm, none)
	write(t, mm, c-page, 1)
	_, err = touch(mm, c-2*page, hostarch.Write, 1)
	if !errors.As(err, &fault) || !fault.Mapped {
		t.Errorf("PROT_NONE below the stack: %v", err)
	}
	check(t, mm)
}

func TestBrk(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	if err := mm.BrkSetup(ctx, 0x500001); err != nil {
		t.Fatal(err)
	}
	start, _ := mm.Brk(ctx, 0)
	if start < 0x501000 || start > 0x501000+maxHeapRandom || start%page != 0 {
		t.Errorf("heap at %v", start)
	}
	for _, test := range []struct {
		to   hostarch.Addr
		ok   bool
		size uint64
	}{
		{start + 1, true, page}, {start + page, true, page}, {start + 10*page + 1, true, 11 * page},
		{start - 1, false, 11 * page}, {math.MaxUint64, false, 11 * page}, {1 << 47, false, 11 * page},
		{start + 2*page, true, 2 * page}, {start, true, 0}, {start + 3*page, true, 3 * page},
	} {
		before, _ := mm.Brk(ctx, 0)
		end, err := mm.Brk(ctx, test.to)
		if (err == nil) != test.ok || test.ok && end != test.to || !test.ok && end != before {
			t.Errorf("Brk(%v) = %v, %v", test.to, end, err)
		}
		if n := mm.VirtualMemorySize(); n != test.size {
			t.Errorf("after Brk(%v) %#x bytes are mapped, want %#x", test.to, n, test.size)
		}
	}
	write(t, mm, start+2*page, 1)
	if !strings.Contains(mm.ReadMaps(), "[heap]") {
		t.Error("no heap in maps")
	}
	mmap(t, mm, at(anon(1), start+8*page))
	if _, err := mm.Brk(ctx, start+8*page); err == nil {
		t.Error("heap touches a mapping")
	}
	mm.SetLimits(Limits{AS: math.MaxUint64, Data: 6 * page})
	if _, err := mm.Brk(ctx, start+7*page); err == nil {
		t.Error("heap beyond RLIMIT_DATA")
	}
	check(t, mm)
}

func TestMRemapErrors(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	a := mmap(t, mm, at(anon(4), 0x10000000))
	mmap(t, mm, at(anon(1), a+4*page)) // merges with it
	ro := at(anon(1), a+5*page)
	ro.Perms = hostarch.Read
	mmap(t, mm, ro)
	for name, test := range map[string]struct {
		addr     hostarch.Addr
		old, new uint64
		opts     MRemapOpts
		want     error
	}{
		"unaligned":           {a + 1, page, page, MRemapOpts{}, unix.EINVAL},
		"new size 0":          {a, page, 0, MRemapOpts{}, unix.EINVAL},
		"new size wraps":      {a, page, math.MaxUint64, MRemapOpts{}, unix.EINVAL},
		"old size wraps":      {a, math.MaxUint64, page, MRemapOpts{Move: MRemapMayMove}, unix.EINVAL},
		"old size too large":  {a, math.MaxUint64 - 2*page, page, MRemapOpts{Move: MRemapMayMove}, unix.EINVAL},
		"both too large":      {a, math.MaxUint64 - 2*page, 1 << 46, MRemapOpts{Move: MRemapFixed, NewAddr: 0x30000000}, unix.EINVAL},
		"too large":           {a, page, 1<<47 - 2*page, MRemapOpts{Move: MRemapMayMove}, unix.ENOMEM},
		"much too large":      {a, page, 1 << 63, MRemapOpts{Move: MRemapMayMove}, unix.EINVAL},
		"nothing there":       {0x20000000, page, 2 * page, MRemapOpts{Move: MRemapMayMove}, unix.EFAULT},
		"two mappings":        {a, 6 * page, 7 * page, MRemapOpts{Move: MRemapMayMove}, unix.EFAULT},
		"no room":             {a, 5 * page, 6 * page, MRemapOpts{}, unix.ENOMEM},
		"in the middle":       {a, page, 2 * page, MRemapOpts{}, unix.ENOMEM},
		"copy of private":     {a, 0, page, MRemapOpts{Move: MRemapMayMove}, unix.EINVAL},
		"onto itself":         {a, 2 * page, 2 * page, MRemapOpts{Move: MRemapFixed, NewAddr: a + page}, unix.EINVAL},
		"fixed unaligned":     {a, page, page, MRemapOpts{Move: MRemapFixed, NewAddr: 0x30000001}, unix.EINVAL},
		"fixed beyond":        {a, page, page, MRemapOpts{Move: MRemapFixed, NewAddr: 1 << 47}, unix.EINVAL},
		"fixed wraps":         {a, page, page, MRemapOpts{Move: MRemapFixed, NewAddr: math.MaxUint64 - page + 1}, unix.EINVAL},
		"fixed low":           {a, page, page, MRemapOpts{Move: MRemapFixed, NewAddr: 0}, unix.EPERM},
		"DONTUNMAP resizes":   {a, page, 2 * page, MRemapOpts{Move: MRemapMayMove, DontUnmap: true}, unix.EINVAL},
		"DONTUNMAP stays put": {a, page, page, MRemapOpts{DontUnmap: true}, unix.EINVAL},
	} {
		_, err := mm.MRemap(ctx, test.addr, test.old, test.new, test.opts)
		expect(t, name, err, test.want)
	}
	check(t, mm)
	if n := mm.VirtualMemorySize(); n != 6*page {
		t.Errorf("%#x bytes mapped", n)
	}
}

func TestMRemapDontUnmap(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	a := mmap(t, mm, anon(4))
	write(t, mm, a+page, 6)
	b, err := mm.MRemap(ctx, a, 4*page, 4*page, MRemapOpts{Move: MRemapMayMove, DontUnmap: true})
	if err != nil {
		t.Fatal(err)
	}
	if v, w := read(t, mm, a+page), read(t, mm, b+page); v != 0 || w != 6 {
		t.Errorf("old %d, new %d", v, w)
	}
	// Growing in place does not move.
	c := mmap(t, mm, at(anon(1), 0x10000000))
	write(t, mm, c, 7)
	if d, err := mm.MRemap(ctx, c, page, 10*page, MRemapOpts{}); err != nil || d != c || read(t, mm, c) != 7 || read(t, mm, c+9*page) != 0 {
		t.Errorf("growing mremap: %v, %v", d, err)
	}
	check(t, mm)
}

func TestMadviseErrors(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	a := mmap(t, mm, at(anon(2), 0x10000000))
	mmap(t, mm, at(anon(1), 0x10004000))
	write(t, mm, a, 1)
	write(t, mm, 0x10004000, 1)
	expect(t, "unknown advice", mm.Madvise(ctx, a, page, 12345), unix.EINVAL)
	expect(t, "unaligned", mm.Madvise(ctx, a+1, page, linux.MADV_NORMAL), unix.EINVAL)
	expect(t, "wraps", mm.Madvise(ctx, a, math.MaxUint64, linux.MADV_NORMAL), unix.EINVAL)
	expect(t, "length 0", mm.Madvise(ctx, 0x70000000, 0, linux.MADV_DONTNEED), nil)
	expect(t, "MADV_REMOVE of private memory", mm.Madvise(ctx, a, page, linux.MADV_REMOVE), unix.EINVAL)
	// A hole does not keep what follows from being done.
	expect(t, "hole", mm.Madvise(ctx, a, 5*page, linux.MADV_DONTNEED), unix.ENOMEM)
	if v, w := read(t, mm, a), read(t, mm, 0x10004000); v != 0 || w != 0 {
		t.Errorf("%d and %d after MADV_DONTNEED", v, w)
	}
	expect(t, "MADV_POPULATE_WRITE", mm.Madvise(ctx, a, 2*page, linux.MADV_POPULATE_WRITE), nil)
	expect(t, "mprotect", mm.MProtect(ctx, a, page, hostarch.Read, false), nil)
	expect(t, "MADV_POPULATE_WRITE of read-only memory", mm.Madvise(ctx, a, 2*page, linux.MADV_POPULATE_WRITE), unix.EINVAL)
	check(t, mm)
}

func TestChecks(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	f := e.newFile(2)
	a := mmap(t, mm, at(of(anon(2), f, false), 0x10000000))
	for _, flags := range []int32{linux.MS_SYNC, linux.MS_ASYNC, linux.MS_SYNC | linux.MS_INVALIDATE, 0} {
		expect(t, "msync", mm.MSync(ctx, a, 2*page, flags), nil)
	}
	expect(t, "msync flags", mm.MSync(ctx, a, page, linux.MS_SYNC|linux.MS_ASYNC), unix.EINVAL)
	expect(t, "msync flags", mm.MSync(ctx, a, page, 8), unix.EINVAL)
	expect(t, "msync unaligned", mm.MSync(ctx, a+1, page, linux.MS_SYNC), unix.EINVAL)
	expect(t, "msync hole", mm.MSync(ctx, a, 3*page, linux.MS_SYNC), unix.ENOMEM)
	expect(t, "msync wraps", mm.MSync(ctx, a, math.MaxUint64-2*page, linux.MS_SYNC), unix.ENOMEM)

	b := mmap(t, mm, at(anon(32), 0x20000000))
	write(t, mm, b+20*page, 1)
	vec, err := mm.Mincore(ctx, b, 32*page)
	if err != nil || len(vec) != 32 || vec[20] != 1 || vec[0] != 0 {
		t.Errorf("Mincore = %v, %v", vec, err)
	}
	_, err = mm.Mincore(ctx, b, 33*page)
	expect(t, "mincore hole", err, unix.ENOMEM)
	_, err = mm.Mincore(ctx, b+1, page)
	expect(t, "mincore unaligned", err, unix.EINVAL)

	expect(t, "mlock", mm.MLock(ctx, b+5, page, memmap.MLockEager), nil)
	expect(t, "mlock hole", mm.MLock(ctx, b, 33*page, memmap.MLockEager), unix.ENOMEM)
	expect(t, "mlock wraps", mm.MLock(ctx, b, math.MaxUint64-page, memmap.MLockNone), unix.EINVAL)
	expect(t, "munlock", mm.MLock(ctx, b, page, memmap.MLockNone), nil)

	start, off, err := mm.FindVMAByName(hostarch.AddrRange{Start: 0x10000, End: 1 << 40}, "/a/file")
	if err != nil || start != a || off != 0 {
		t.Errorf("FindVMAByName = %v, %v, %v", start, off, err)
	}
	_, _, err = mm.FindVMAByName(hostarch.AddrRange{Start: 0x10000, End: 1 << 40}, "nothing")
	expect(t, "FindVMAByName", err, unix.ENOENT)
}

func TestFutexKey(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	f := e.newFile(2)
	key := func(mm *MemoryManager, addr hostarch.Addr, private bool) Key {
		t.Helper()
		k, err := mm.FutexKey(ctx, addr, private)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	a := mmap(t, mm, anon(2))
	opts := of(anon(2), f, false)
	s1 := mmap(t, mm, opts)
	opts.Length, opts.Offset = page, page
	s2 := mmap(t, mm, opts)
	shared := anon(2)
	shared.Private = false
	s3 := mmap(t, mm, shared)
	child, err := mm.Fork(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer child.DecUsers(ctx)
	if key(mm, a, true) != key(mm, a, true) || key(mm, a, true) == key(mm, a+4, true) {
		t.Error("private keys of one process")
	}
	if key(mm, a, true) == key(child, a, true) || key(mm, a, false) == key(child, a, false) {
		t.Error("private memory has one key in two processes")
	}
	if key(mm, s1+page+8, false) != key(mm, s2+8, false) || key(mm, s1, false) == key(mm, s2, false) {
		t.Error("keys of a file mapped twice")
	}
	if key(mm, s3, false) != key(child, s3, false) || key(mm, s3, true) == key(child, s3, true) {
		t.Error("keys of shared memory")
	}
	for addr, want := range map[hostarch.Addr]error{a + 1: unix.EINVAL, 0x7000: unix.EFAULT, 1 << 47: unix.EFAULT, math.MaxUint64 - 3: unix.EFAULT} {
		_, err := mm.FutexKey(ctx, addr, false)
		expect(t, "FutexKey of "+addr.String(), err, want)
	}
}

func TestReadMaps(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	f := e.newFile(4)
	opts := of(at(anon(2), 0x10000), f, true)
	opts.Perms, opts.Offset = hostarch.ReadExec, 2*page
	mmap(t, mm, opts)
	mmap(t, mm, at(of(anon(1), f, false), 0x12000))
	stack := at(anon(1), 0x7fff00000000)
	stack.GrowsDown, stack.Stack = true, true
	mmap(t, mm, stack)
	mmap(t, mm, at(anon(1), 0x555500000000))
	want := "" +
		"00010000-00012000 r-xp 00002000 08:01 42                                 /a/file\n" +
		"00012000-00013000 rw-s 00000000 08:01 42                                 /a/file\n" +
		"555500000000-555500001000 rw-p 00000000 00:00 0\n" +
		"7fff00000000-7fff00001000 rw-p 00000000 00:00 0                          [stack]\n"
	if got := mm.ReadMaps(); got != want {
		t.Errorf("maps:\n%swant:\n%s", got, want)
	}
}

func TestIO(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	a := mmap(t, mm, at(anon(1<<20/page), 0x10000000))
	buf := make([]byte, 1<<20-100)
	r := rand.New(rand.NewPCG(3, 4))
	for i := range buf {
		buf[i] = byte(r.Uint32())
	}
	if n, err := mm.CopyOut(ctx, a+50, buf, usermem.IOOpts{}); n != len(buf) || err != nil {
		t.Fatalf("CopyOut = %d, %v", n, err)
	}
	got := make([]byte, len(buf))
	if n, err := mm.CopyIn(ctx, a+50, got, usermem.IOOpts{}); n != len(buf) || err != nil || string(got) != string(buf) {
		t.Errorf("CopyIn = %d, %v", n, err)
	}
	if n, err := mm.ZeroOut(ctx, a+60, 3*page, usermem.IOOpts{}); n != 3*page || err != nil {
		t.Errorf("ZeroOut = %d, %v", n, err)
	}
	clear(buf[10 : 10+3*page])
	mm.CopyIn(ctx, a+50, got, usermem.IOOpts{})
	if string(got) != string(buf) {
		t.Error("ZeroOut cleared something else")
	}
	_, err := mm.ZeroOut(ctx, a, -1, usermem.IOOpts{})
	expect(t, "ZeroOut", err, unix.EINVAL)

	if v, err := mm.SwapUint32(ctx, a, 5, usermem.IOOpts{}); v != 0 || err != nil {
		t.Errorf("SwapUint32 = %d, %v", v, err)
	}
	if v, err := mm.CompareAndSwapUint32(ctx, a, 5, 6, usermem.IOOpts{}); v != 5 || err != nil {
		t.Errorf("CompareAndSwapUint32 = %d, %v", v, err)
	}
	if v, err := mm.LoadUint32(ctx, a, usermem.IOOpts{}); v != 6 || err != nil {
		t.Errorf("LoadUint32 = %d, %v", v, err)
	}
	_, err = mm.LoadUint32(ctx, a+2, usermem.IOOpts{})
	expect(t, "unaligned", err, unix.EINVAL)

	// Permissions, and hostile addresses.
	expect(t, "mprotect", mm.MProtect(ctx, a, page, hostarch.NoAccess, false), nil)
	_, err = mm.LoadUint32(ctx, a, usermem.IOOpts{})
	expect(t, "no access", err, unix.EFAULT)
	if v, err := mm.LoadUint32(ctx, a, usermem.IOOpts{IgnorePermissions: true}); v != 6 || err != nil {
		t.Errorf("LoadUint32 of PROT_NONE = %d, %v", v, err)
	}
	for _, addr := range []hostarch.Addr{0, 0x1000, 1<<47 - 1, 1 << 47, 1 << 63, math.MaxUint64} {
		n, err := mm.CopyIn(ctx, addr, got[:100], usermem.IOOpts{IgnorePermissions: true})
		expect(t, "CopyIn at "+addr.String(), err, unix.EFAULT)
		if n != 0 {
			t.Errorf("CopyIn at %v = %d", addr, n)
		}
		if n, err := mm.CopyIn(ctx, addr, nil, usermem.IOOpts{}); n != 0 || err != nil && addr < 1<<47-page {
			t.Errorf("empty CopyIn at %v: %d, %v", addr, n, err)
		}
	}
	// The very last page.
	last := mm.layout.max - page
	mmap(t, mm, at(anon(1), last))
	if n, err := mm.CopyIn(ctx, last+10, got, usermem.IOOpts{}); n != page-10 || !errors.Is(err, unix.EFAULT) {
		t.Errorf("CopyIn at the end = %d, %v", n, err)
	}
	check(t, mm)
}

// Ten thousand mappings, and no more than Linux allows.
func TestManyMappings(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	for i := range 10000 {
		opts := anon(1)
		opts.Perms = []hostarch.AccessType{hostarch.Read, hostarch.ReadWrite}[i%2]
		a := mmap(t, mm, opts)
		if i%10 == 0 {
			read(t, mm, a)
		}
	}
	if mm.vmas.count != 10000 {
		t.Errorf("%d vmas", mm.vmas.count)
	}
	check(t, mm)
	var err error
	a := mmap(t, mm, at(anon(200000), 0x10000000))
	for i := hostarch.Addr(0); err == nil && i < 70000; i++ {
		err = mm.MProtect(ctx, a+2*i*page, page, hostarch.Read, false)
	}
	expect(t, "too many mappings", err, unix.ENOMEM)
	if mm.vmas.count > maxVMAs {
		t.Errorf("%d vmas", mm.vmas.count)
	}
	for _, errs := range []error{
		mm.MProtect(ctx, a+190000*page, page, hostarch.Read, false),
		mm.Madvise(ctx, a+190000*page, page, linux.MADV_DONTFORK),
	} {
		expect(t, "too many mappings", errs, unix.ENOMEM)
	}
	check(t, mm)
}

// A host without room for another mapping loses none of the application's
// memory; one that has room for none gives an error.
func TestHostWithoutRoom(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	e.p.max = 100
	a := mmap(t, mm, at(anon(1000), 0x10000000))
	for i := range hostarch.Addr(1000) {
		write(t, mm, a+i*page, byte(i))
		if i == 15 {
			e.p.max = 600
		}
	}
	for i := range hostarch.Addr(1000) {
		if v := read(t, mm, a+i*page); v != byte(i) {
			t.Fatalf("page %d holds %d", i, v)
		}
	}
	check(t, mm)
	e.p.max = 0
	b := mmap(t, mm, at(anon(1), 0x20000000))
	e.p.err = unix.ENOMEM
	expect(t, "no room", mm.HandleUserFault(ctx, b, hostarch.Read, 0), unix.ENOMEM)
	check(t, mm)
	e.p.err = nil
	read(t, mm, b)
}

// Memory that runs out is ENOMEM, and what there is stays usable.
func TestMemoryRunsOut(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	e.mf.SetLimit(128 * page)
	a := mmap(t, mm, anon(1000))
	var err error
	n := 0
	for ; n < 1000 && err == nil; n++ {
		_, err = touch(mm, a+hostarch.Addr(n)*page, hostarch.Write, byte(n))
	}
	expect(t, "no memory", err, unix.ENOMEM)
	if n != 129 {
		t.Errorf("%d pages of 128 could be used", n-1)
	}
	child, err := mm.Fork(ctx)
	if err != nil {
		t.Fatal(err)
	}
	_, err = touch(child, a, hostarch.Write, 1)
	expect(t, "no memory for a copy", err, unix.ENOMEM)
	if v := read(t, child, a+5*page); v != 5 {
		t.Errorf("child reads %d", v)
	}
	_, err = child.CopyOut(ctx, a, []byte{1}, usermem.IOOpts{})
	expect(t, "no memory for a copy", err, unix.ENOMEM)
	check(t, child)
	child.DecUsers(ctx)
	write(t, mm, a, 1)
}

func TestNewAddressSpaceFails(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	mmap(t, mm, of(anon(4), e.newFile(4), true))
	e.p.newErr = unix.EMFILE
	_, err := mm.Fork(ctx)
	expect(t, "Fork", err, unix.EMFILE)
	_, err = New(e.p, e.mf, Options{})
	expect(t, "New", err, unix.EMFILE)
}

// Where AddressSpaces are few, one is held only while it is used.
func TestCooperative(t *testing.T) {
	e := newEnv(t)
	e.p.cooperative = true
	mm := e.newMM()
	if mm.AddressSpace() != nil {
		t.Error("an AddressSpace without need")
	}
	a := mmap(t, mm, anon(4))
	if _, err := mm.CopyOut(ctx, a, []byte("x"), usermem.IOOpts{}); err != nil {
		t.Errorf("CopyOut without an AddressSpace: %v", err)
	}
	for range 3 {
		if err := mm.Activate(); err != nil {
			t.Fatal(err)
		}
		if v := read(t, mm, a); v != 'x' {
			t.Errorf("memory holds %d", v)
		}
		check(t, mm)
		mm.Deactivate()
		if mm.AddressSpace() != nil || len(e.p.all) != 0 {
			t.Error("the AddressSpace was not given back")
		}
	}
	// Waiting for one.
	wait := make(chan struct{})
	e.p.wait = wait
	done := make(chan error)
	go func() { done <- mm.Activate() }()
	close(wait)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	mm.Deactivate()
}

func TestMetadata(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	mm.SetMetadata(Metadata{Executable: "/bin/x", Auxv: []byte{1}})
	child, err := mm.Fork(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if m := child.Metadata(); m.Executable != "/bin/x" || len(m.Auxv) != 1 {
		t.Errorf("child has %+v", m)
	}
	child.IncUsers()
	child.DecUsers(ctx)
	if child.AddressSpace() == nil {
		t.Error("released with a user left")
	}
	child.DecUsers(ctx)
	if child.AddressSpace() != nil {
		t.Error("not released")
	}
	_, err = child.CopyIn(ctx, 0x10000, make([]byte, 1), usermem.IOOpts{})
	expect(t, "CopyIn after the end", err, unix.EFAULT)
}

// Threads that fault, copy, map and fork at the same time see their own memory.
func TestConcurrent(t *testing.T) {
	e := newEnv(t)
	mm := e.newMM()
	f := e.newFile(16)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 9))
			base := hostarch.Addr(0x10000000 + g<<24)
			fail := func(what string, err error) {
				if err != nil {
					t.Errorf("%s: %v", what, err)
				}
			}
			for i := range 300 {
				n := uint64(1 + r.IntN(40))
				opts := at(anon(n), base)
				switch r.IntN(3) {
				case 0:
					opts.Private = false
				case 1:
					opts = at(of(anon(min(n, 16)), f, true), base)
				}
				_, err := mm.MMap(ctx, opts)
				fail("MMap", err)
				for j := range hostarch.Addr(opts.Length / page) {
					_, err := touch(mm, base+j*page, hostarch.Write, byte(i))
					fail("touch", err)
				}
				buf := make([]byte, opts.Length)
				_, err = mm.CopyIn(ctx, base, buf, usermem.IOOpts{})
				fail("CopyIn", err)
				for j := uint64(0); j < opts.Length; j += page {
					if buf[j] != byte(i) {
						t.Errorf("page %d holds %d, want %d", j/page, buf[j], byte(i))
					}
				}
				switch r.IntN(6) {
				case 0:
					child, err := mm.Fork(ctx)
					fail("Fork", err)
					if err != nil {
						return
					}
					v, err := touch(child, base, hostarch.Read, 0)
					fail("touch in child", err)
					if v != byte(i) {
						t.Errorf("child reads %d, want %d", v, byte(i))
					}
					if opts.Private {
						_, err = child.CopyOut(ctx, base, []byte{1}, usermem.IOOpts{})
						fail("CopyOut to child", err)
					}
					child.DecUsers(ctx)
				case 1:
					fail("MProtect", mm.MProtect(ctx, base, page, hostarch.Read, false))
				case 2:
					fail("Madvise", mm.Madvise(ctx, base, opts.Length, linux.MADV_DONTNEED))
				case 3:
					_, err := mm.MRemap(ctx, base, opts.Length, opts.Length, MRemapOpts{Move: MRemapFixed, NewAddr: base + 1<<23})
					fail("MRemap", err)
					fail("MUnmap", mm.MUnmap(ctx, base+1<<23, opts.Length))
				case 4:
					f.truncate(f.fr.Length()) // invalidates nothing, takes the locks
				}
				mm.ReadMaps()
			}
		})
	}
	wg.Wait()
	check(t, mm)
}

var _ platform.AddressSpace = (*fakeAS)(nil)

func BenchmarkCopyIn16(b *testing.B)  { benchmarkCopy(b, 16) }
func BenchmarkCopyIn64K(b *testing.B) { benchmarkCopy(b, 64<<10) }

func benchmarkCopy(b *testing.B, size int) {
	e := newEnv(b)
	e.p.forget = true
	mm := e.newMM()
	a := mmap(b, mm, anon(64))
	buf := make([]byte, size)
	b.SetBytes(int64(size))
	for b.Loop() {
		mm.CopyIn(ctx, a, buf, usermem.IOOpts{})
	}
}

// The Sentry's part of mapping 64 KiB, touching it and unmapping it.
func BenchmarkMapTouchUnmap(b *testing.B) {
	e := newEnv(b)
	e.p.forget = true
	mm := e.newMM()
	for b.Loop() {
		a := mmap(b, mm, anon(16))
		if err := mm.HandleUserFault(ctx, a, hostarch.Write, 0); err != nil {
			b.Fatal(err)
		}
		if err := mm.MUnmap(ctx, a, 16*page); err != nil {
			b.Fatal(err)
		}
	}
}

// The Sentry's part of a fork of 256 MiB in 1000 mappings.
func BenchmarkFork(b *testing.B) {
	e := newEnv(b)
	e.p.forget = true
	mm := e.newMM()
	for i := range 1000 {
		a := mmap(b, mm, at(anon(64), hostarch.Addr(0x10000000+i<<20)))
		for j := range hostarch.Addr(4) {
			mm.HandleUserFault(ctx, a+j*16*page, hostarch.Write, 0)
		}
	}
	for b.Loop() {
		child, err := mm.Fork(ctx)
		if err != nil {
			b.Fatal(err)
		}
		child.DecUsers(ctx)
	}
}
