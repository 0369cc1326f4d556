package platformtest

import (
	"runtime"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
)

var memorySubjects = []subject{
	{"EmptyAtStart", testEmptyAtStart},
	{"SharedWithSentry", testSharedWithSentry},
	{"SeveralFiles", testSeveralFiles},
	{"SamePageTwice", testSamePageTwice},
	{"SpacesAreSeparate", testSpacesAreSeparate},
	{"Replace", testReplace},
	{"UnmapPart", testUnmapPart},
	{"UnmapNothing", testUnmapNothing},
	{"UnmapEverything", testUnmapEverything},
	{"UnmapStopsOtherContext", testUnmapStopsOtherContext},
	{"DowngradeStopsOtherContext", testDowngradeStopsOtherContext},
	{"NoExecuteStopsOtherContext", testNoExecuteStopsOtherContext},
	{"ReplaceSeenByOtherContext", testReplaceSeenByOtherContext},
	{"PermissionChanges", testPermissionChanges},
	{"RemapLoop", testRemapLoop},
	{"ReplaceWhileFaulting", testReplaceWhileFaulting},
	{"ConcurrentChanges", testConcurrentChanges},
	{"Huge", testHuge},
	{"Sparse", testSparse},
	{"Precommit", testPrecommit},
	{"ManyMappings", testManyMappings},
	{"FirstAndLastPage", testFirstAndLastPage},
	{"AllOverTheRange", testAllOverTheRange},
	{"MapFileError", testMapFileError},
}

// userRange returns the addresses that can be mapped.
func (t *T) userRange() hostarch.AddrRange {
	return hostarch.AddrRange{Start: t.s.p.MinUserAddress(), End: t.s.p.MaxUserAddress()}
}

// someAddrs returns n page addresses spread over the range, on all scales.
func (t *T) someAddrs(n int) []hostarch.Addr {
	ar := t.userRange()
	rnd := random(30)
	var addrs []hostarch.Addr
	own := hostarch.AddrRange{Start: textBase, End: mmapBase + 1<<30}
	for a := ar.Start; a < ar.End; a *= 2 {
		addrs = append(addrs, a.RoundDown(), (ar.End - a).RoundDown())
	}
	for len(addrs) < n {
		addrs = append(addrs, (ar.Start + hostarch.Addr(rnd.Uint64N(ar.Length()))).RoundDown())
	}
	slices.Sort(addrs)
	return slices.DeleteFunc(slices.Compact(addrs), func(a hostarch.Addr) bool { return own.Contains(a) || !ar.Contains(a) })
}

// Nothing is mapped in a new AddressSpace: not the stub, nor what the host's
// kernel maps into a new process.
func testEmptyAtStart(t *T) {
	sp := t.newSpace()
	th := sp.newThread(progLoad)
	for _, addr := range t.someAddrs(200) {
		th.fault(fault{addr: addr, at: hostarch.Read}, progLoad, uint64(addr))
	}
}

func testSharedWithSentry(t *T) {
	sp := t.newSpace()
	sp.mapData(2, hostarch.ReadWrite)
	th := sp.newThread(progLoad)
	for i := range uint64(20) {
		off := i * 8
		sp.data.store(off, 1000+i)
		th.mustLoad(dataBase+hostarch.Addr(off), 1000+i)
		th.mustStore(dataBase+hostarch.Addr(off), 2000+i)
		if got := sp.data.load(off); got != 2000+i {
			t.Fatalf("the Sentry sees %d, want %d", got, 2000+i)
		}
	}
}

func testSeveralFiles(t *T) {
	sp := t.newSpace()
	const pages = 16
	files := []*file{t.newFile(pages * pageSize), t.newFile(pages * pageSize), t.newFile(pages * pageSize)}
	for i := range uint64(pages) {
		for k, f := range files {
			f.store(i*pageSize, i<<8|uint64(k))
		}
		// Neighbours in memory are neither neighbours in a file nor of one file.
		sp.mustMap(dataBase+hostarch.Addr(i)*pageSize, files[i%3], (pages-1-i)*pageSize, pageSize, hostarch.ReadWrite)
	}
	th := sp.newThread(progLoad)
	for i := range uint64(pages) {
		th.mustLoad(dataBase+hostarch.Addr(i)*pageSize, (pages-1-i)<<8|i%3)
	}
	a := th.call(progSum, uint64(dataBase), uint64(dataBase+pages*pageSize), pageSize)
	want := uint64(0)
	for i := range uint64(pages) {
		want += (pages-1-i)<<8 | i%3
	}
	if a[3] != want {
		t.Errorf("sum over all pages %#x, want %#x", a[3], want)
	}
}

func testSamePageTwice(t *T) {
	sp := t.newSpace()
	sp.mustMap(dataBase, sp.data, 0, pageSize, hostarch.ReadWrite)
	sp.mustMap(dataBase+pageSize, sp.data, 0, pageSize, hostarch.Read)
	th := sp.newThread(progLoad)
	for i := range uint64(10) {
		th.mustStore(dataBase, i)
		th.mustLoad(dataBase+pageSize, i)
	}
	th.fault(fault{addr: dataBase + pageSize, at: hostarch.Write, code: linux.SEGV_ACCERR}, progStore, uint64(dataBase+pageSize), 1)
	sp.unmap(dataBase, pageSize)
	th.mustLoad(dataBase+pageSize, 9)
}

func testSpacesAreSeparate(t *T) {
	a, b := t.newSpace(), t.newSpace()
	a.mapData(2, hostarch.ReadWrite)
	b.mapData(1, hostarch.ReadWrite)
	ta, tb := a.newThread(progLoad), b.newThread(progLoad)
	for i := range uint64(5) {
		ta.mustStore(dataBase, 2*i)
		tb.mustStore(dataBase, 2*i+1)
		ta.mustLoad(dataBase, 2*i)
		tb.mustLoad(dataBase, 2*i+1)
	}
	ta.mustLoad(dataBase+pageSize, 0)
	tb.fault(fault{addr: dataBase + pageSize, at: hostarch.Read}, progLoad, uint64(dataBase+pageSize))
	b.unmap(dataBase, pageSize)
	ta.mustLoad(dataBase, 8)
}

// number stores in every page of f the page's number and tag.
func (f *file) number(tag uint64) {
	for off := uint64(0); off < uint64(len(f.data)); off += pageSize {
		f.store(off, tag<<32|off/pageSize)
	}
}

// A mapping replaces the parts of others that it covers, and leaves the rest.
func testReplace(t *T) {
	sp := t.newSpace()
	a, b := t.newFile(16*pageSize), t.newFile(16*pageSize)
	a.number(1)
	b.number(2)
	th := sp.newThread(progLoad)
	for _, c := range []struct{ start, n uint64 }{{4, 3}, {0, 1}, {15, 1}, {0, 16}, {1, 14}} {
		sp.mustMap(dataBase, a, 0, 16*pageSize, hostarch.ReadWrite)
		th.call(progSum, uint64(dataBase), uint64(dataBase+16*pageSize), pageSize)
		sp.mustMap(dataBase+hostarch.Addr(c.start)*pageSize, b, 0, c.n*pageSize, hostarch.Read)
		for i := range uint64(16) {
			want := 1<<32 | i
			if i >= c.start && i < c.start+c.n {
				want = 2<<32 | i - c.start
			}
			th.mustLoad(dataBase+hostarch.Addr(i)*pageSize, want)
		}
	}
	// Over a hole and two mappings.
	sp.unmap(dataBase+5*pageSize, 2*pageSize)
	sp.mustMap(dataBase+4*pageSize, a, 8*pageSize, 4*pageSize, hostarch.Read)
	for i := uint64(4); i < 8; i++ {
		th.mustLoad(dataBase+hostarch.Addr(i)*pageSize, 1<<32|i+4)
	}
}

func testUnmapPart(t *T) {
	sp := t.newSpace()
	sp.data.number(3)
	th := sp.newThread(progLoad)
	for _, c := range []struct{ start, n uint64 }{{3, 2}, {0, 1}, {7, 1}, {0, 8}} {
		sp.mapData(8, hostarch.Read)
		th.call(progSum, uint64(dataBase), uint64(dataBase+8*pageSize), pageSize)
		sp.unmap(dataBase+hostarch.Addr(c.start)*pageSize, c.n*pageSize)
		for i := range uint64(8) {
			addr := dataBase + hostarch.Addr(i)*pageSize
			if i >= c.start && i < c.start+c.n {
				th.fault(fault{addr: addr, at: hostarch.Read}, progLoad, uint64(addr))
			} else {
				th.mustLoad(addr, 3<<32|i)
			}
		}
	}
}

func testUnmapNothing(t *T) {
	sp := t.newSpace()
	sp.unmap(dataBase, 1<<30)
	th := sp.newThread(progLoad)
	sp.mapData(1, hostarch.Read)
	sp.mustMap(dataBase+4*pageSize, sp.data, 0, pageSize, hostarch.Read)
	th.mustLoad(dataBase, 0)
	sp.unmap(dataBase+pageSize, 2*pageSize)
	sp.unmap(dataBase-pageSize, 8*pageSize) // holes on both sides
	sp.unmap(dataBase-pageSize, 8*pageSize)
	th.fault(fault{addr: dataBase, at: hostarch.Read}, progLoad, uint64(dataBase))
}

// All of the range is unmapped at once: what the platform needs itself must lie
// elsewhere.
func testUnmapEverything(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progLoad)
	th.mustLoad(dataBase, 0)
	for range 2 {
		sp.unmap(t.userRange().Start, t.userRange().Length())
		th.start(progLoad, uint64(dataBase))
		addr := hostarch.Addr(t.s.text.addr(progLoad))
		th.mustFault(fault{addr: addr, at: hostarch.Execute})
		sp.mapText()
		th.mustFault(fault{addr: dataBase, at: hostarch.Read})
		sp.mapData(1, hostarch.ReadWrite)
		th.report()
	}
	sp.newThread(progCount).report()
}

// spinner runs prog in a Context of its own, with its heartbeat at the last page
// of the data file, which it maps at beatAddr.
func (sp *space) spinner(prog program, args ...uint64) (*thread, chan event) {
	sp.t.Helper()
	sp.mustMap(beatAddr, sp.data, beatOff, pageSize, hostarch.ReadWrite)
	th := sp.newThread(prog, append([]uint64{uint64(beatAddr)}, args...)...)
	return th, th.untilEvent()
}

const (
	beatOff  = (dataPages - 1) * pageSize
	beatAddr = dataBase + beatOff
)

// mustStop waits for the event that ends the spinner, which must be want, and
// checks that its memory at off stays what it is.
func (th *thread) mustStop(events chan event, off uint64, want fault) {
	th.t.Helper()
	v := th.sp.data.load(off)
	th.checkFault(th.t.receive(events), want)
	if got := th.sp.data.load(off); got != v {
		th.t.Fatalf("the page changed from %d to %d after the call returned that forbids it", v, got)
	}
}

func testUnmapStopsOtherContext(t *T) {
	sp := t.newSpace()
	for range 10 {
		sp.mapData(1, hostarch.ReadWrite)
		th, events := sp.spinner(progWriteSpin, uint64(dataBase))
		t.beating(sp.data, beatOff)
		sp.unmap(dataBase, pageSize)
		th.mustStop(events, 0, fault{addr: dataBase, at: hostarch.Write})
		th.release()
	}
}

func testDowngradeStopsOtherContext(t *T) {
	sp := t.newSpace()
	for range 10 {
		sp.mapData(1, hostarch.ReadWrite)
		th, events := sp.spinner(progWriteSpin, uint64(dataBase))
		t.beating(sp.data, beatOff)
		sp.mapData(1, hostarch.Read)
		th.mustStop(events, 0, fault{addr: dataBase, at: hostarch.Write, code: linux.SEGV_ACCERR})
		// And the way back: it goes on.
		sp.mapData(1, hostarch.ReadWrite)
		done := th.run(func(e event) bool { return true })
		t.beating(sp.data, 0)
		th.halt(done)
		th.release()
	}
}

func testNoExecuteStopsOtherContext(t *T) {
	sp := t.newSpace()
	copy(sp.data.data, code(progBeat))
	for _, at := range []hostarch.AccessType{hostarch.Read, hostarch.ReadWrite, hostarch.Read} {
		sp.mapData(1, hostarch.ReadExec)
		sp.mustMap(beatAddr, sp.data, beatOff, pageSize, hostarch.ReadWrite)
		th := sp.newThread(progBeat, uint64(beatAddr))
		th.ac.SetIP(uintptr(dataBase))
		events := th.untilEvent()
		t.beating(sp.data, beatOff)
		sp.mapData(1, at)
		v := sp.data.load(beatOff)
		if e := t.receive(events); e.signal() != linux.SIGSEGV || !e.at.Execute {
			t.Fatalf("got %v instead of a SIGSEGV for execution", e)
		}
		if got := sp.data.load(beatOff); got != v {
			t.Fatalf("the code ran on after its page had become %v", at)
		}
		th.release()
	}
}

// A Context that reads a page for ever sees the page that replaces it.
func testReplaceSeenByOtherContext(t *T) {
	sp := t.newSpace()
	sp.data.store(0, 100)
	sp.data.store(pageSize, 101)
	sp.mapData(1, hostarch.Read)
	sp.mustMap(beatAddr, sp.data, beatOff, pageSize, hostarch.ReadWrite)
	// It reports when the word is not 100.
	th := sp.newThread(progReadCheck, uint64(beatAddr), uint64(dataBase), 100, 100)
	for i := range uint64(40) {
		events := th.untilEvent()
		t.beating(sp.data, beatOff)
		page := (i + 1) % 2
		sp.mustMap(dataBase, sp.data, page*pageSize, pageSize, hostarch.Read)
		if e := t.receive(events); e.err != nil || th.args()[4] != 100+page {
			t.Fatalf("round %d: got %v, read %d, want %d", i, e, th.args()[4], 100+page)
		}
		th.start(progReadCheck, uint64(beatAddr), uint64(dataBase), 100+page, 100+page)
	}
}

// Every change of permission works in both directions.
func testPermissionChanges(t *T) {
	sp := t.newSpace()
	copy(sp.data.data[64:], code(progCount))
	th := sp.newThread(progLoad)
	ats := []hostarch.AccessType{hostarch.Read, hostarch.ReadWrite, hostarch.ReadExec, hostarch.AnyAccess}
	for _, from := range ats {
		for _, to := range ats {
			sp.mapData(2, from)
			th.mustLoad(dataBase+8, sp.data.load(8))
			if err := sp.protect(hostarch.AddrRange{Start: dataBase, End: dataBase + pageSize}, to); err != nil {
				t.Fatalf("%v to %v: %v", from, to, err)
			}
			for i, at := range []hostarch.AccessType{to, from} {
				base := dataBase + hostarch.Addr(i)*pageSize
				th.start(progStore, uint64(base), 1)
				e := th.next()
				if ok := e.err == nil; ok != at.Write {
					t.Fatalf("from %v to %v: page %d, mapped %v: a write gives %v", from, to, i, at, e)
				}
				if i == 0 {
					th.start(progJump, uint64(base+64))
					e = th.next()
					if ok := e.err == nil; ok != at.Execute {
						t.Fatalf("from %v to %v: page %d, mapped %v: a jump gives %v", from, to, i, at, e)
					}
				}
			}
		}
	}
}

// The page at one address changes again and again, and each change is seen.
func testRemapLoop(t *T) {
	sp := t.newSpace()
	sp.data.number(4)
	th := sp.newThread(progLoad)
	for i := range uint64(300) {
		page := i % 7
		sp.mustMap(dataBase, sp.data, page*pageSize, pageSize, hostarch.Read)
		th.mustLoad(dataBase, 4<<32|page)
		if i%5 == 0 {
			sp.unmap(dataBase, pageSize)
			th.fault(fault{addr: dataBase, at: hostarch.Read}, progLoad, uint64(dataBase))
		}
	}
}

// Contexts read and fault on a page that is replaced, unmapped and mapped again
// meanwhile: they never see anything but the two pages.
func testReplaceWhileFaulting(t *T) {
	sp := t.newSpace()
	sp.data.store(0, 100)
	sp.data.store(pageSize, 101)
	sp.mustMap(beatAddr, sp.data, beatOff, pageSize, hostarch.ReadWrite)
	var stops []func()
	for i := range uint64(3) {
		th := sp.newThread(progReadCheck, uint64(beatAddr)+8*i, uint64(dataBase), 100, 101)
		stops = append(stops, th.background(func(e event) {
			switch {
			case e.err == nil:
				t.Fatalf("read %#x, which is on neither page", th.args()[4])
			case e.signal() != linux.SIGSEGV || e.info.Addr() != uint64(dataBase):
				t.Fatalf("got %v", e)
			}
		}))
	}
	for i := range 300 {
		sp.mustMap(dataBase, sp.data, uint64(i%2)*pageSize, pageSize, hostarch.Read)
		if i%3 == 0 {
			sp.mustMap(dataBase, sp.data, uint64(1-i%2)*pageSize, pageSize, hostarch.ReadExec)
		}
		runtime.Gosched()
		sp.unmap(dataBase, pageSize)
	}
	for _, stop := range stops {
		stop()
	}
}

// Mappings are changed from several goroutines at once, while Contexts use them.
func testConcurrentChanges(t *T) {
	sp := t.newSpace()
	sp.data.number(5)
	var dones []chan struct{}
	for w := range uint64(4) {
		th := sp.newThread(progLoad)
		rnd := random(40 + w)
		base := dataBase + hostarch.Addr(w)<<24
		dones = append(dones, t.worker(func() {
			for range 60 {
				if t.over() {
					return
				}
				off := rnd.Uint64N(8)
				n := 1 + rnd.Uint64N(8)
				addr := base + hostarch.Addr(rnd.Uint64N(8))*pageSize
				sp.mustMap(addr, sp.data, off*pageSize, n*pageSize, hostarch.Read)
				i := rnd.Uint64N(n)
				th.mustLoad(addr+hostarch.Addr(i)*pageSize, 5<<32|off+i)
				sp.unmap(addr+hostarch.Addr(i)*pageSize, pageSize)
				hole := addr + hostarch.Addr(i)*pageSize
				th.fault(fault{addr: hole, at: hostarch.Read}, progLoad, uint64(hole))
			}
		}))
	}
	for _, d := range dones {
		t.wait(d)
	}
}

// A mapping of 1 GiB, of which the application touches some pages.
func testHuge(t *T) {
	sp := t.newSpace()
	const size, stride = 1 << 30, 32 << 20
	base := hostarch.Addr(0x10_0000_0000)
	f := t.newFile(size)
	sp.mustMap(base, f, 0, size, hostarch.ReadWrite)
	th := sp.newThread(progFill)
	th.call(progFill, uint64(base), uint64(base+size), stride)
	for off := uint64(0); off < size; off += stride {
		if got, want := f.load(off), uint64(base)+off; got != want {
			t.Fatalf("the Sentry sees %#x at offset %#x, want %#x", got, off, want)
		}
	}
	th.mustStore(base+size-8, 1)
	if f.load(size-8) != 1 {
		t.Fatalf("the last word was not stored")
	}
	sp.unmap(base+pageSize, size-2*pageSize)
	th.mustLoad(base, uint64(base))
	th.mustLoad(base+size-8, 1)
	for _, addr := range []hostarch.Addr{base + pageSize, base + stride, base + size - 2*pageSize} {
		th.fault(fault{addr: addr, at: hostarch.Read}, progLoad, uint64(addr))
	}
}

// Single pages, far apart in memory and in a file of 16 GiB.
func testSparse(t *T) {
	sp := t.newSpace()
	const size, n = 16 << 30, 32
	f := t.newFile(size)
	th := sp.newThread(progLoad)
	addr := func(i uint64) hostarch.Addr { return 0x10_0000_0000 + hostarch.Addr(i)<<32 + hostarch.Addr(i)*pageSize }
	for i := range uint64(n) {
		off := size/n*i + (n-i)*pageSize
		f.store(off, i)
		sp.mustMap(addr(i), f, off, pageSize, hostarch.ReadWrite)
	}
	for i := range uint64(n) {
		th.mustLoad(addr(i), i)
	}
	sp.unmap(addr(1), uint64(addr(n-2)-addr(1)))
	th.mustLoad(addr(0), 0)
	th.mustLoad(addr(n-1), n-1)
	th.fault(fault{addr: addr(n / 2), at: hostarch.Read}, progLoad, uint64(addr(n/2)))
}

func testPrecommit(t *T) {
	sp := t.newSpace()
	const pages = dataPages
	sp.data.store(5*pageSize, 55)
	th := sp.newThread(progFill)
	for _, at := range []hostarch.AccessType{hostarch.ReadWrite, hostarch.Read, hostarch.ReadExec} {
		if err := sp.mapFile(dataBase, sp.data, memmap.FileRange{End: pages * pageSize}, at, true); err != nil {
			t.Fatalf("MapFile(%v, precommit): %v", at, err)
		}
		th.mustLoad(dataBase+5*pageSize, 55)
		th.start(progStore, uint64(dataBase), 1)
		if e := th.next(); (e.err == nil) != at.Write {
			t.Fatalf("mapped %v with precommit: a write gives %v", at, e)
		}
	}
	th.call(progSum, uint64(dataBase), uint64(dataBase+pages*pageSize), pageSize)
}

// More mappings than anyone has room for in a fixed table.
func testManyMappings(t *T) {
	sp := t.newSpace()
	sp.data.number(6)
	const n = 1000
	for i := range uint64(n) {
		at := hostarch.Read
		if i%2 == 1 {
			at = hostarch.ReadWrite
		}
		sp.mustMap(dataBase+hostarch.Addr(i)*2*pageSize, sp.data, i%dataPages*pageSize, pageSize, at)
	}
	th := sp.newThread(progSum)
	want := uint64(0)
	for i := range uint64(n) {
		want += 6<<32 | i%dataPages
	}
	if a := th.call(progSum, uint64(dataBase), uint64(dataBase+n*2*pageSize), 2*pageSize); a[3] != want {
		t.Fatalf("sum over %d mappings is %#x, want %#x", n, a[3], want)
	}
	sp.unmap(dataBase, n*2*pageSize)
	for _, i := range []hostarch.Addr{0, n / 2, n - 1} {
		addr := dataBase + i*2*pageSize
		th.fault(fault{addr: addr, at: hostarch.Read}, progLoad, uint64(addr))
	}
}

// mustUse maps the page at addr and makes th use it.
func (th *thread) mustUse(addr hostarch.Addr, v uint64) {
	th.t.Helper()
	th.sp.mustMap(addr, th.sp.data, 0, pageSize, hostarch.AnyAccess)
	copy(th.sp.data.data[64:], code(progCount))
	th.sp.data.store(8, v)
	th.mustLoad(addr+8, v)
	th.mustStore(addr+16, v+1)
	if got := th.sp.data.load(16); got != v+1 {
		th.t.Fatalf("%v: the application stored %#x, want %#x", addr, got, v+1)
	}
	th.call(progJump, uint64(addr+64))
	th.sp.unmap(addr, pageSize)
	th.fault(fault{addr: addr, at: hostarch.Read}, progLoad, uint64(addr))
}

func testFirstAndLastPage(t *T) {
	sp := t.newSpace()
	th := sp.newThread(progLoad)
	ar := t.userRange()
	for i, addr := range []hostarch.Addr{ar.Start, ar.Start + pageSize, ar.End - 2*pageSize, ar.End - pageSize} {
		th.mustUse(addr, uint64(i))
	}
}

// Everything between MinUserAddress and MaxUserAddress can be mapped.
func testAllOverTheRange(t *T) {
	sp := t.newSpace()
	th := sp.newThread(progLoad)
	for i, addr := range t.someAddrs(120) {
		th.mustUse(addr, uint64(i))
	}
}

// badFile is a memmap.File without a usable descriptor.
type badFile struct{ *file }

func (badFile) FD() int { return 1 << 20 }

func (badFile) MapInternal(fr memmap.FileRange, _ hostarch.AccessType) ([][]byte, error) {
	return nil, &memmap.BusError{Err: unix.EBADF}
}

// A mapping that the host refuses is an error with its errno, and nothing else
// is harmed.
func testMapFileError(t *T) {
	sp := t.newSpace()
	sp.mapData(4, hostarch.ReadWrite)
	th := sp.newThread(progLoad)
	th.mustStore(dataBase+3*pageSize, 33)
	for i := range 3 {
		bad := badFile{sp.data}
		err := sp.mapFile(dataBase+pageSize, bad, memmap.FileRange{End: pageSize}, hostarch.Read, i == 1)
		if err == nil {
			t.Fatalf("MapFile of a file with a closed descriptor succeeds")
		}
		if !isErrno(err) {
			t.Errorf("MapFile of a file with a closed descriptor: %v wraps no errno", err)
		}
	}
	th.mustLoad(dataBase+3*pageSize, 33)
	th.fault(fault{addr: dataBase + pageSize, at: hostarch.Read}, progLoad, uint64(dataBase+pageSize))
	sp.mapData(4, hostarch.ReadWrite)
	th.mustLoad(dataBase+pageSize, 0)
}
