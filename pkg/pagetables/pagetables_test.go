package pagetables

import (
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/ringfence/ringfence/pkg/hostarch"
)

const page = hostarch.PageSize

var (
	ro  = MapOpts{Access: hostarch.Read, User: true}
	rw  = MapOpts{Access: hostarch.ReadWrite, User: true}
	rx  = MapOpts{Access: hostarch.ReadExec, User: true}
	krx = MapOpts{Access: hostarch.ReadExec}
	rwx = MapOpts{Access: hostarch.AnyAccess, User: true}
)

var errFull = errors.New("no more tables")

// pool is an Allocator that knows what is in use.
type pool struct {
	t      testing.TB
	tables map[uint64]*Table
	next   uint64
	left   int
}

func newPool(t testing.TB, tables int) *pool {
	return &pool{t: t, tables: make(map[uint64]*Table), next: 0x100000, left: tables}
}

func (p *pool) New() (uint64, *Table, error) {
	if p.left == 0 {
		return 0, nil, errFull
	}
	p.left--
	p.next += page
	t := new(Table)
	p.tables[p.next] = t
	return p.next, t, nil
}

func (p *pool) Lookup(phys uint64) *Table {
	t := p.tables[phys]
	if t == nil {
		p.t.Fatalf("lookup of a table that is not there: %#x", phys)
	}
	return t
}

func (p *pool) Free(phys uint64) {
	p.Lookup(phys)
	delete(p.tables, phys)
	p.left++
}

func newTables(t testing.TB, p *pool, levels int) *PageTables {
	pt, err := New(p, levels)
	if err != nil {
		t.Fatal(err)
	}
	return pt
}

// want is what the model says of one page.
type want struct {
	phys uint64
	opts MapOpts
}

// model is a naive address space: every page by itself, and what a TLB that is
// never flushed may still hold.
type model struct {
	pages map[hostarch.Addr]want
	stale bool // a flush is due
}

func (m *model) mapPages(addr hostarch.Addr, n uint64, opts MapOpts, phys uint64) {
	opts.Access = opts.Access.Effective()
	for i := range n {
		a := addr + hostarch.Addr(i*page)
		new := want{phys + i*page, opts}
		if old, ok := m.pages[a]; ok {
			if old.phys != new.phys || !new.opts.Access.SupersetOf(old.opts.Access) || old.opts.User && !new.opts.User {
				m.stale = true
			}
		}
		m.pages[a] = new
	}
}

func (m *model) unmap(addr hostarch.Addr, n uint64) {
	for i := range n {
		a := addr + hostarch.Addr(i*page)
		if _, ok := m.pages[a]; ok {
			m.stale = true
			delete(m.pages, a)
		}
	}
}

func (m *model) protect(addr hostarch.Addr, n uint64, opts MapOpts) {
	for i := range n {
		a := addr + hostarch.Addr(i*page)
		if old, ok := m.pages[a]; ok {
			m.mapPages(a, 1, opts, old.phys)
		}
	}
}

// Random operations around the places where tables and blocks begin and end:
// every page translates as the model says, in both directions, and a flush is
// asked for whenever it is needed.
func TestRandom(t *testing.T) {
	for _, levels := range []int{4, 5} {
		bases := []hostarch.Addr{0, 0x40000000 - 3*blockSize, 0x7fff_ffff_f000 + page - 4*blockSize, 0xffff_8000_0000_0000, 1<<39 - 2*blockSize}
		if levels == 5 {
			bases = append(bases, 1<<48-2*blockSize, 1<<55)
		}
		rnd := rand.New(rand.NewPCG(1, uint64(levels)))
		p := newPool(t, 1<<20)
		pt := newTables(t, p, levels)
		m := model{pages: make(map[hostarch.Addr]want)}
		allOpts := []MapOpts{ro, rw, rx, krx, rwx}
		var flushes int
		for op := range 1500 {
			base := bases[rnd.IntN(len(bases))]
			off := rnd.Uint64N(3 * entriesPerTable)
			n := 1 + rnd.Uint64N(entriesPerTable*4-off)
			if rnd.IntN(2) == 0 {
				n = min(n, 1+rnd.Uint64N(8))
			}
			if rnd.IntN(3) == 0 { // what takes a block
				off = off / entriesPerTable * entriesPerTable
				n = max(n/entriesPerTable*entriesPerTable, entriesPerTable)
			}
			addr := base + hostarch.Addr(off*page)
			opts := allOpts[rnd.IntN(len(allOpts))]
			var flush bool
			var err error
			m.stale = false
			switch rnd.IntN(4) {
			case 0, 1:
				phys := rnd.Uint64N(1<<20) * page
				if rnd.IntN(2) == 0 { // congruent, so that blocks fit
					phys = phys/blockSize*blockSize + uint64(addr)%blockSize
				}
				flush, err = pt.Map(addr, n*page, opts, phys)
				m.mapPages(addr, n, opts, phys)
			case 2:
				flush, err = pt.Unmap(addr, n*page)
				m.unmap(addr, n)
			case 3:
				flush, err = pt.Protect(addr, n*page, opts)
				m.protect(addr, n, opts)
			}
			if err != nil {
				t.Fatal(err)
			}
			if m.stale && !flush {
				t.Fatalf("op %d at %v + %d pages: no flush was asked for", op, addr, n)
			}
			if flush {
				flushes++
			}
			if rnd.IntN(3) == 0 {
				pt.Flushed()
			}
			for _, b := range bases {
				for i := range hostarch.Addr(4 * entriesPerTable) {
					a := b + i*page
					phys, _, got, ok := pt.Lookup(a)
					w, mapped := m.pages[a]
					if ok != mapped || ok && (phys != w.phys || got != w.opts) {
						t.Fatalf("op %d: %v is %#x %+v %v; want %#x %+v %v", op, a, phys, got, ok, w.phys, w.opts, mapped)
					}
				}
			}
		}
		if flushes == 0 || flushes == 1500 {
			t.Errorf("%d of 1500 operations asked for a flush", flushes)
		}
		pt.Release(p.Free)
		if len(p.tables) != 0 {
			t.Errorf("%d tables leaked", len(p.tables))
		}
	}
}

func mustFlush(t *testing.T, want bool) func(bool, error) {
	t.Helper()
	return func(flush bool, err error) {
		t.Helper()
		if flush != want || err != nil {
			t.Errorf("flush %v, %v; want %v", flush, err, want)
		}
	}
}

func TestFlushes(t *testing.T) {
	pt := newTables(t, newPool(t, 100), 4)
	const addr = 0x200000
	mustFlush(t, false)(pt.Map(addr, page, ro, 0x5000))
	mustFlush(t, false)(pt.Map(addr, page, ro, 0x5000))
	mustFlush(t, false)(pt.Protect(addr, page, rw))
	mustFlush(t, false)(pt.Protect(addr, page, rwx))
	mustFlush(t, true)(pt.Protect(addr, page, rx))
	mustFlush(t, true)(pt.Map(addr, page, rx, 0x6000))
	mustFlush(t, true)(pt.Protect(addr, page, krx))
	mustFlush(t, true)(pt.Unmap(addr, page))
	mustFlush(t, false)(pt.Unmap(addr, page))
	mustFlush(t, false)(pt.Map(addr, blockSize, rw, 0x400000))
	if _, size, _, ok := pt.Lookup(addr + 0x1234); size != blockSize || !ok {
		t.Errorf("an aligned block is mapped by pages of %#x", size)
	}
	// Splitting changes a non-leaf entry.
	mustFlush(t, true)(pt.Protect(addr+page, page, rwx))
}

// A table that was unlinked is not given back before the flush.
func TestLimbo(t *testing.T) {
	p := newPool(t, 100)
	pt := newTables(t, p, 4)
	mustFlush(t, false)(pt.Map(0x1000, page, rw, 0x5000))
	before := len(p.tables)
	mustFlush(t, true)(pt.Unmap(0x1000, page))
	if len(p.tables) != before || !pt.NeedsFlush() {
		t.Errorf("%d tables before the flush, want %d still", len(p.tables), before)
	}
	pt.Flushed()
	if len(p.tables) != 1 || pt.NeedsFlush() {
		t.Errorf("%d tables after the flush, want the root alone", len(p.tables))
	}
}

// A hidden page or block faults and is still known: it comes back as it was, can be
// replaced and unmapped, and needs a flush when it goes but not when it comes.
func TestHide(t *testing.T) {
	p := newPool(t, 100)
	pt := newTables(t, p, 4)
	hide := func(addr hostarch.Addr, length uint64, from uint64) func() (bool, error) {
		return func() (bool, error) { return pt.Hide(addr, length, func(phys uint64) bool { return phys >= from }) }
	}
	check := func(addr hostarch.Addr, phys uint64, present, hidden bool) {
		t.Helper()
		got, _, _, ok := pt.Lookup(addr)
		if ok != present || ok && got != phys {
			t.Errorf("%v: %#x, present %v; want %#x, %v", addr, got, ok, phys, present)
		}
		got, ok = pt.Hidden(addr)
		if ok != hidden || ok && got != phys {
			t.Errorf("%v: %#x, hidden %v; want %#x, %v", addr, got, ok, phys, hidden)
		}
	}
	const a, block = 0x1000, 0x400000
	mustFlush(t, false)(pt.Map(a, 4*page, rw, 0x10000))
	mustFlush(t, false)(hide(a, 4*page, 0x20000)())
	mustFlush(t, true)(hide(a, 4*page, 0x12000)())
	mustFlush(t, false)(hide(a, 4*page, 0x12000)())
	check(a+page, 0x11000, true, false)
	check(a+2*page+8, 0x12008, false, true)
	check(a+3*page, 0x13000, false, true)
	check(a+4*page, 0, false, false)
	// Without its backing, a page is changed without a flush.
	mustFlush(t, false)(pt.Protect(a+2*page, page, ro))
	check(a+2*page, 0x12000, false, true)
	pt.Unhide(a + 2*page)
	check(a+2*page, 0x12000, true, false)
	if _, _, opts, _ := pt.Lookup(a + 2*page); opts != ro {
		t.Errorf("after Unhide: %+v, want %+v", opts, ro)
	}
	mustFlush(t, false)(pt.Map(a+3*page, page, rw, 0x50000))
	check(a+3*page, 0x50000, true, false)
	mustFlush(t, true)(hide(a, 4*page, 0)())
	mustFlush(t, false)(pt.Unmap(a, page)) // its neighbours stay
	check(a, 0, false, false)
	check(a+page, 0x11000, false, true)

	// A block that is gone in part is split, and one that is gone is hidden whole.
	mustFlush(t, false)(pt.Map(block, blockSize, rx, 0x800000))
	mustFlush(t, true)(hide(block, blockSize, 0x800000+5*page)())
	check(block+4*page, 0x804000, true, false)
	check(block+5*page, 0x805000, false, true)
	pt.Flushed()
	mustFlush(t, true)(pt.Map(block, blockSize, rx, 0x800000))
	mustFlush(t, true)(hide(block, blockSize, 0)())
	check(block+7*page+1, 0x807001, false, true)
	mustFlush(t, false)(pt.Unmap(block, page)) // a split
	check(block, 0, false, false)
	check(block+7*page, 0x807000, false, true)
	pt.Unhide(block + 7*page)
	check(block+7*page, 0x807000, true, false)
	check(block+8*page, 0x808000, false, true)
	pt.Release(p.Free)
	if len(p.tables) != 0 {
		t.Errorf("%d tables leaked", len(p.tables))
	}
}

// Count knows at any time how often every page is mapped.
func TestCount(t *testing.T) {
	rnd := rand.New(rand.NewPCG(2, 2))
	pt := newTables(t, newPool(t, 1<<20), 4)
	counted := make(map[uint64]int)
	pt.Count = func(phys, length uint64, delta int) {
		for p := phys; p < phys+length; p += page {
			if counted[p] += delta; counted[p] == 0 {
				delete(counted, p)
			}
		}
	}
	const base, pages = 0x40000000 - 2*blockSize, 4 * entriesPerTable
	for op := range 600 {
		off := rnd.Uint64N(pages)
		n := 1 + rnd.Uint64N(pages-off)
		phys := rnd.Uint64N(4*entriesPerTable) * page
		if rnd.IntN(2) == 0 {
			off, phys = off/entriesPerTable*entriesPerTable, phys/blockSize*blockSize
		}
		addr := hostarch.Addr(base + off*page)
		var err error
		switch rnd.IntN(4) {
		case 0, 1:
			_, err = pt.Map(addr, n*page, rw, phys)
		case 2:
			_, err = pt.Unmap(addr, n*page)
		case 3:
			if _, err = pt.Protect(addr, n*page, ro); err == nil {
				_, err = pt.Hide(addr, n*page, func(phys uint64) bool { return phys%(7*page) == 0 })
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		want := make(map[uint64]int)
		for i := range hostarch.Addr(pages) {
			phys, _, _, ok := pt.Lookup(base + i*page)
			if !ok {
				phys, ok = pt.Hidden(base + i*page)
			}
			if ok {
				want[phys]++
			}
		}
		if !maps.Equal(counted, want) {
			t.Fatalf("op %d: counted %d pages, want %d", op, len(counted), len(want))
		}
	}
	pt.Release(pt.alloc.Free)
	if len(counted) != 0 {
		t.Errorf("%d pages are counted after Release", len(counted))
	}
}

// Single pages that need a flush are told, and everything else is NeedsFlush.
func TestStale(t *testing.T) {
	p := newPool(t, 100)
	pt := newTables(t, p, 4)
	pt.KeepEmpty = true
	var stale []uint64
	pt.Stale = func(phys uint64) { stale = append(stale, phys) }
	check := func(what string, deep bool, want ...uint64) {
		t.Helper()
		if !slices.Equal(stale, want) || pt.NeedsFlush() != deep {
			t.Errorf("%s: stale %#x, NeedsFlush %v; want %#x, %v", what, stale, pt.NeedsFlush(), want, deep)
		}
		stale = nil
		pt.Flushed()
	}
	mustFlush(t, false)(pt.Map(0x1000, 3*page, rw, 0x5000))
	check("new", false)
	mustFlush(t, true)(pt.Protect(0x1000, 2*page, ro))
	check("downgrade", false, 0x5000, 0x6000)
	mustFlush(t, false)(pt.Protect(0x1000, 2*page, rw))
	check("upgrade", false)
	mustFlush(t, true)(pt.Map(0x2000, page, rw, 0x9000))
	check("replace", false, 0x6000)
	tables := len(p.tables)
	mustFlush(t, true)(pt.Unmap(0, 5*page))
	check("unmap", false, 0x5000, 0x9000, 0x7000)
	if len(p.tables) != tables {
		t.Errorf("%d tables, want %d still", len(p.tables), tables)
	}
	mustFlush(t, false)(pt.Map(0x1000, page, rw, 0x5000))
	mustFlush(t, true)(pt.Hide(0x1000, page, func(uint64) bool { return true }))
	check("hide", false, 0x5000)
	mustFlush(t, true)(pt.Unmap(0, blockSize))
	check("unmap of a table", true)
	mustFlush(t, false)(pt.Map(0, blockSize, rw, 0x200000))
	mustFlush(t, true)(pt.Protect(0, blockSize, ro))
	check("downgrade of a block", true)
	mustFlush(t, true)(pt.Protect(0, page, rw))
	check("split", true)
}

// The upper half is another's.
func TestSharing(t *testing.T) {
	p := newPool(t, 100)
	upper := newTables(t, p, 4)
	const kernel = 0xffff_ff80_0000_0000
	mustFlush(t, false)(upper.Map(kernel, page, krx, 0x5000))
	a, err := upper.NewSharing()
	if err != nil {
		t.Fatal(err)
	}
	a.Count = func(uint64, uint64, int) { t.Error("the upper half is counted") }
	// What is added below the top table is seen at once.
	mustFlush(t, false)(upper.Map(kernel+page, page, krx, 0x6000))
	for i := range uint64(2) {
		if phys, _, opts, ok := a.Lookup(hostarch.Addr(kernel + i*page)); phys != 0x5000+i*page || opts != krx || !ok {
			t.Errorf("page %d of the upper half: %#x %+v %v", i, phys, opts, ok)
		}
	}
	if _, err := a.Map(kernel, page, krx, 0x7000); err == nil {
		t.Error("the shared half can be changed")
	}
	a.Count = nil
	mustFlush(t, false)(a.Map(0x1000, page, rw, 0x9000))
	if _, _, _, ok := upper.Lookup(0x1000); ok {
		t.Error("the lower half is shared")
	}
	a.Release(p.Free)
	if phys, _, _, ok := upper.Lookup(kernel); phys != 0x5000 || !ok {
		t.Errorf("after the Release of one that shares: %#x %v", phys, ok)
	}
	upper.Release(p.Free)
	if len(p.tables) != 0 {
		t.Errorf("%d tables leaked", len(p.tables))
	}
	if _, err := newTables(t, newPool(t, 1), 4).NewSharing(); !errors.Is(err, errFull) {
		t.Errorf("without memory: %v", err)
	}
}

func TestErrors(t *testing.T) {
	p := newPool(t, 4)
	pt := newTables(t, p, 4)
	for name, f := range map[string]func() (bool, error){
		"unaligned":     func() (bool, error) { return pt.Map(0x1001, page, rw, 0) },
		"empty":         func() (bool, error) { return pt.Map(0x1000, 0, rw, 0) },
		"wraps":         func() (bool, error) { return pt.Map(0xffff_ffff_ffff_f000, 2*page, rw, 0) },
		"not canonical": func() (bool, error) { return pt.Map(0x8000_0000_0000, page, rw, 0) },
		"both halves":   func() (bool, error) { return pt.Unmap(0x7fff_ffff_f000, 0xffff_0000_0000_2000) },
		"no access":     func() (bool, error) { return pt.Map(0x1000, page, MapOpts{}, 0) },
		"no access 2":   func() (bool, error) { return pt.Protect(0x1000, page, MapOpts{}) },
		"phys":          func() (bool, error) { return pt.Map(0x1000, page, rw, maxPhys) },
		"phys align":    func() (bool, error) { return pt.Map(0x1000, page, rw, 1) },
	} {
		if _, err := f(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := New(newPool(t, 1), 3); err == nil {
		t.Error("3 levels: no error")
	}
	if _, err := New(newPool(t, 0), 4); !errors.Is(err, errFull) {
		t.Errorf("no memory: %v", err)
	}
	mustFlush(t, false)(pt.Map(0x1000, page, rw, 0x5000))
	if _, err := pt.Map(1<<30, page, rw, 0); !errors.Is(err, errFull) {
		t.Errorf("no memory for a table: %v", err)
	}

	// A block that cannot be split is unmapped as a whole rather than left.
	p = newPool(t, 3)
	pt = newTables(t, p, 4)
	mustFlush(t, false)(pt.Map(0x200000, blockSize, rw, 0x200000))
	flush, err := pt.Unmap(0x200000, page)
	if _, _, _, ok := pt.Lookup(0x200000); ok || !flush || !errors.Is(err, errFull) {
		t.Errorf("unmap without memory: mapped %v, flush %v, %v", ok, flush, err)
	}
}

func BenchmarkMapUnmap(b *testing.B) {
	pt := newTables(b, newPool(b, 100), 4)
	if _, err := pt.Map(0, page, rw, 0x5000); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := pt.Map(0x1000, page, rw, 0x5000); err != nil {
			b.Fatal(err)
		}
		if _, err := pt.Unmap(0x1000, page); err != nil {
			b.Fatal(err)
		}
	}
}
