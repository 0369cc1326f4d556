package mm

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/sentry/pgalloc"
)

// fakePlatform has AddressSpaces that remember what is mapped.
type fakePlatform struct {
	platform.Platform
	unit uint64

	mu  sync.Mutex
	all map[*fakeAS]bool
	// max bounds the pages of an AddressSpace if it is more than 0; err is what
	// MapFile returns in any case.
	max int
	err error
	// newErr is what NewAddressSpace returns; wait is returned once.
	newErr      error
	wait        chan struct{}
	cooperative bool
	// forget makes AddressSpaces not remember, for benchmarks.
	forget bool
	// batch makes AddressSpaces BatchMappers.
	batch bool
}

func (p *fakePlatform) CooperativelySchedulesAddressSpace() bool { return p.cooperative }
func (p *fakePlatform) MapUnit() uint64                          { return p.unit }
func (p *fakePlatform) MinUserAddress() hostarch.Addr            { return 0x10000 }
func (p *fakePlatform) MaxUserAddress() hostarch.Addr            { return 1<<47 - hostarch.PageSize }
func (p *fakePlatform) NewAddressSpace(any) (platform.AddressSpace, <-chan struct{}, error) {
	as := &fakeAS{p: p, pages: make(map[hostarch.Addr]fakePage)}
	p.mu.Lock()
	defer p.mu.Unlock()
	if w := p.wait; w != nil {
		p.wait = nil
		return nil, w, nil
	}
	if p.newErr != nil {
		return nil, nil, p.newErr
	}
	if p.all == nil {
		p.all = make(map[*fakeAS]bool)
	}
	p.all[as] = true
	if p.batch {
		return batchAS{as}, nil, nil
	}
	return as, nil, nil
}

// batchAS is a fakeAS that is a BatchMapper.
type batchAS struct{ *fakeAS }

// MapFiles counts as one MapFile.
func (as batchAS) MapFiles(ms []platform.FileMapping) error {
	as.mu.Lock()
	maps := as.maps + 1
	as.mu.Unlock()
	defer func() {
		as.mu.Lock()
		as.maps = maps
		as.mu.Unlock()
	}()
	for _, m := range ms {
		if m.Mapped {
			as.checkMapped(m)
		}
		if err := as.MapFile(m.Addr, m.File, m.Range, m.Access, m.Precommit); err != nil {
			return err
		}
	}
	return nil
}

// checkMapped checks that what m says to be mapped is.
func (as *fakeAS) checkMapped(m platform.FileMapping) {
	as.mu.Lock()
	defer as.mu.Unlock()
	if as.p.forget {
		return
	}
	for off := uint64(0); off < m.Range.Length(); off += hostarch.PageSize {
		p, ok := as.pages[m.Addr+hostarch.Addr(off)]
		if !ok || p.file != m.File || p.off != m.Range.Start+off || p.at == m.Access {
			as.bad = fmt.Errorf("MapFiles(%+v) of what is mapped, but there is %+v", m, p)
		}
	}
}

// fake returns the AddressSpace of mm.
func fake(mm *MemoryManager) *fakeAS {
	switch as := mm.AddressSpace().(type) {
	case batchAS:
		return as.fakeAS
	default:
		return as.(*fakeAS)
	}
}

type fakePage struct {
	file memmap.File
	off  uint64
	at   hostarch.AccessType
}

type fakeAS struct {
	platform.NoAddressSpaceIO
	p *fakePlatform

	mu       sync.Mutex
	pages    map[hostarch.Addr]fakePage
	maps     int
	unmaps   int
	released bool
	bad      error
}

func (as *fakeAS) MapFile(addr hostarch.Addr, f memmap.File, fr memmap.FileRange, at hostarch.AccessType, precommit bool) error {
	as.mu.Lock()
	defer as.mu.Unlock()
	as.maps++
	if as.p.forget {
		return nil
	}
	if !addr.IsPageAligned() || fr.Start%hostarch.PageSize != 0 || fr.End%hostarch.PageSize != 0 || fr.Length() == 0 || !at.Any() || as.released {
		as.bad = fmt.Errorf("MapFile(%v, %v, %v)", addr, fr, at)
	}
	if as.p.err != nil {
		return as.p.err
	}
	if as.p.max > 0 && len(as.pages)+int(fr.Length()/hostarch.PageSize) > as.p.max {
		return unix.ENOMEM
	}
	for off := fr.Start; off < fr.End; off += hostarch.PageSize {
		as.pages[addr+hostarch.Addr(off-fr.Start)] = fakePage{f, off, at}
	}
	return nil
}

func (as *fakeAS) Unmap(addr hostarch.Addr, length uint64) {
	as.mu.Lock()
	defer as.mu.Unlock()
	as.unmaps++
	if as.p.forget {
		return
	}
	if !addr.IsPageAligned() || length%hostarch.PageSize != 0 || length == 0 || as.released {
		as.bad = fmt.Errorf("Unmap(%v, %#x)", addr, length)
	}
	if length/hostarch.PageSize > uint64(len(as.pages)) {
		for a := range as.pages {
			if a >= addr && a < addr+hostarch.Addr(length) {
				delete(as.pages, a)
			}
		}
		return
	}
	for a := addr; a < addr+hostarch.Addr(length); a += hostarch.PageSize {
		delete(as.pages, a)
	}
}

func (as *fakeAS) Release() {
	as.mu.Lock()
	defer as.mu.Unlock()
	if as.released {
		as.bad = errors.New("Release twice")
	}
	as.released = true
	as.p.mu.Lock()
	delete(as.p.all, as)
	as.p.mu.Unlock()
}

func (as *fakeAS) PreFork()  {}
func (as *fakeAS) PostFork() {}

// counts returns and resets the numbers of calls.
func (as *fakeAS) counts() (maps, unmaps int) {
	as.mu.Lock()
	defer as.mu.Unlock()
	maps, unmaps = as.maps, as.unmaps
	as.maps, as.unmaps = 0, 0
	return maps, unmaps
}

// touch does what a CPU does for an access of one byte, and the Sentry for its
// faults. It returns the byte that it read, or had written.
func touch(mm *MemoryManager, addr hostarch.Addr, at hostarch.AccessType, value byte) (byte, error) {
	for range 4 {
		as := fake(mm)
		as.mu.Lock()
		p, ok := as.pages[addr.RoundDown()]
		if ok && p.at.SupersetOf(at) {
			mem, err := p.file.MapInternal(memmap.FileRange{Start: p.off, End: p.off + hostarch.PageSize}, at)
			if err != nil {
				as.mu.Unlock()
				return 0, err
			}
			b := &mem[0][addr.PageOffset()]
			if at.Write {
				*b = value
			}
			value = *b
			as.mu.Unlock()
			return value, nil
		}
		as.mu.Unlock()
		if err := mm.HandleUserFault(context.Background(), addr, at, 0); err != nil {
			return 0, err
		}
	}
	return 0, fmt.Errorf("fault at %v is not solved by HandleUserFault", addr)
}

// testFile is a file that can be mapped. It checks what it is told of mappings.
type testFile struct {
	t    testing.TB
	mf   *pgalloc.MemoryFile
	fr   memmap.FileRange
	refs atomic.Int64
	// perms is the most that a mapping can have.
	perms hostarch.AccessType

	mapsMu sync.Mutex
	maps   map[testMapping]int

	mu   sync.Mutex
	size uint64
}

// testMapping is one page of a mapping.
type testMapping struct {
	ms       memmap.MappingSpace
	addr     hostarch.Addr
	off      uint64
	writable bool
}

func newTestFile(t testing.TB, mf *pgalloc.MemoryFile, pages uint64) *testFile {
	fr, err := mf.Allocate(pages * hostarch.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	return &testFile{t: t, mf: mf, fr: fr, size: fr.Length(), perms: hostarch.AnyAccess, maps: make(map[testMapping]int)}
}

func (f *testFile) change(ms memmap.MappingSpace, ar hostarch.AddrRange, off uint64, writable bool, n int) {
	f.mapsMu.Lock()
	defer f.mapsMu.Unlock()
	for a := ar.Start; a < ar.End; a += hostarch.PageSize {
		m := testMapping{ms, a, off + uint64(a-ar.Start), writable}
		f.maps[m] += n
		if c := f.maps[m]; c < 0 || c > 1 {
			f.t.Errorf("mapping %v of file counted %d times", m, c)
		}
		if f.maps[m] == 0 {
			delete(f.maps, m)
		}
	}
}

func (f *testFile) AddMapping(ms memmap.MappingSpace, ar hostarch.AddrRange, off uint64, writable bool) error {
	f.change(ms, ar, off, writable, 1)
	return nil
}

func (f *testFile) RemoveMapping(ms memmap.MappingSpace, ar hostarch.AddrRange, off uint64, writable bool) {
	f.change(ms, ar, off, writable, -1)
}

func (f *testFile) CopyMapping(ms memmap.MappingSpace, _, dst hostarch.AddrRange, off uint64, writable bool) error {
	f.change(ms, dst, off, writable, 1)
	return nil
}

func (f *testFile) Translate(_ context.Context, required, optional memmap.MappableRange, at hostarch.AccessType) ([]memmap.Translation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	end, _ := hostarch.PageRoundUp(f.size)
	var err error
	if required.End > end {
		err = &memmap.BusError{Err: unix.EIO}
	}
	if required.Start >= end {
		return nil, err
	}
	optional.End = min(optional.End, end)
	return []memmap.Translation{{Source: optional, File: f.mf, Offset: f.fr.Start + optional.Start, Perms: f.perms}}, err
}

func (f *testFile) truncate(size uint64) {
	f.mapsMu.Lock()
	defer f.mapsMu.Unlock()
	f.mu.Lock()
	f.size = size
	f.mu.Unlock()
	for m := range f.maps {
		if m.off >= size {
			m.ms.Invalidate(hostarch.AddrRange{Start: m.addr, End: m.addr + hostarch.PageSize})
		}
	}
}

func (f *testFile) IncRef()                                               { f.refs.Add(1) }
func (f *testFile) DecRef()                                               { f.refs.Add(-1) }
func (f *testFile) MappedName() string                                    { return "/a/file" }
func (f *testFile) DeviceID() uint64                                      { return 0x801 }
func (f *testFile) InodeID() uint64                                       { return 42 }
func (f *testFile) Msync(_ context.Context, _ memmap.MappableRange) error { return nil }

// bytes returns the contents of the file.
func (f *testFile) bytes() []byte {
	b, err := f.mf.Bytes(f.fr)
	if err != nil || uint64(len(b)) < f.fr.Length() {
		f.t.Fatalf("contents of file: %d bytes, %v", len(b), err)
	}
	return b
}

type env struct {
	t  testing.TB
	p  *fakePlatform
	mf *pgalloc.MemoryFile

	files []*testFile
}

// newEnv returns a platform and memory; the test fails if it leaves something.
func newEnv(t testing.TB) *env {
	mf, err := pgalloc.New("test")
	if err != nil {
		t.Fatal(err)
	}
	e := &env{t: t, p: &fakePlatform{}, mf: mf}
	t.Cleanup(func() {
		for _, f := range e.files {
			if len(f.maps) != 0 || f.refs.Load() != 0 {
				t.Errorf("file has %d mappings and %d references left", len(f.maps), f.refs.Load())
			}
			mf.DecRef(f.fr)
		}
		if n := len(e.p.all); n != 0 {
			t.Errorf("%d AddressSpaces left", n)
		}
		if n := mf.UsedBytes(); n != 0 {
			t.Errorf("%d bytes of memory left", n)
		}
		mf.Destroy()
	})
	return e
}

// newMM returns an empty address space, released at the end of the test.
func (e *env) newMM() *MemoryManager {
	mm, err := New(e.p, e.mf, Options{})
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { mm.DecUsers(context.Background()) })
	return mm
}

// newFile returns a file, freed at the end of the test.
func (e *env) newFile(pages uint64) *testFile {
	f := newTestFile(e.t, e.mf, pages)
	e.files = append(e.files, f)
	return f
}

// check verifies what must always hold of mm.
func check(t *testing.T, mm *MemoryManager) {
	t.Helper()
	as := fake(mm)
	as.mu.Lock()
	defer as.mu.Unlock()
	if as.bad != nil {
		t.Errorf("bad call: %v", as.bad)
	}
	checkSet(t, &mm.vmas)
	checkSet(t, &mm.pmas)
	var usage, data, resident uint64
	for p := (pos{}); mm.vmas.at(p) != nil; p = mm.vmas.next(p) {
		seg := mm.vmas.at(p)
		usage += seg.Length()
		if seg.v.isData() {
			data += seg.Length()
		}
	}
	if usage != mm.usage || data != mm.dataUsage {
		t.Errorf("usage %#x and %#x, counted %#x and %#x", mm.usage, mm.dataUsage, usage, data)
	}
	mapped := 0
	for p := (pos{}); mm.pmas.at(p) != nil; p = mm.pmas.next(p) {
		seg := mm.pmas.at(p)
		resident += seg.Length()
		for a := seg.Start; a < seg.End; a += hostarch.PageSize {
			v := mm.vmas.lookup(a)
			if v == nil {
				t.Errorf("page at %v is not mapped", a)
				continue
			}
			got, ok := as.pages[a]
			if ok != seg.v.mapped.Any() {
				t.Errorf("page at %v mapped %v, noted %v", a, ok, seg.v.mapped)
			}
			if !ok {
				continue
			}
			mapped++
			exp := fakePage{seg.v.file, seg.v.off + uint64(a-seg.Start), seg.v.mapped}
			if got != exp {
				t.Errorf("page at %v mapped as %+v, noted %+v", a, got, exp)
			}
			if !want(seg, v.v.perms).SupersetOf(got.at) {
				t.Errorf("page at %v mapped %v, more than %v (vma %v, max %v, cow %v)", a, got.at, want(seg, v.v.perms), v.v.perms, seg.v.max, seg.v.cow)
			}
		}
	}
	if mapped != len(as.pages) {
		t.Errorf("AddressSpace has %d pages, %d are known", len(as.pages), mapped)
	}
	if resident != mm.ResidentSize() {
		t.Errorf("resident %#x, counted %#x", mm.ResidentSize(), resident)
	}
}

func checkSet[V any](t *testing.T, s *set[V]) {
	t.Helper()
	n := 0
	var last hostarch.Addr
	for _, c := range s.chunks {
		if len(c.segs) == 0 || len(c.segs) > maxChunk {
			t.Errorf("chunk of %d segments", len(c.segs))
		}
		for _, seg := range c.segs {
			if seg.Start < last || seg.Start >= seg.End {
				t.Errorf("segment %v after %v", seg.AddrRange, last)
			}
			last = seg.End
			n++
		}
	}
	if n != s.count {
		t.Errorf("%d segments, counted %d", n, s.count)
	}
}
