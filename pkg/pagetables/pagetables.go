// Package pagetables builds the page tables that a guest's CPU walks: 4 KiB
// pages and 2 MiB blocks, in tables of 512 entries, 4 or 5 levels deep.
//
// The lower half of the addresses is an application's. The upper half is the
// kernel's, and can be shared by many page tables.
//
// A page can be hidden: the CPU faults on it, and the tables still know it. That
// is for memory whose backing is gone for the moment.
//
// It depends on hostarch alone. It makes no host calls and flushes no TLB: it
// says when a flush is due, and keeps what the CPU may still see until it is
// told that one was done.
package pagetables

import (
	"fmt"
	"sync/atomic"

	"github.com/ringfence/ringfence/pkg/hostarch"
)

const (
	entriesPerTable = 512
	entryBits       = 9
	leafShift       = hostarch.PageShift
	blockShift      = leafShift + entryBits
	blockSize       = 1 << blockShift
)

// Table is one table as it lies in guest memory.
type Table [entriesPerTable]uint64

// Allocator hands out the memory of tables. It need not be safe for concurrent
// use: PageTables calls it with its owner's lock held.
type Allocator interface {
	// New returns a table of zeros and its guest-physical address, a multiple of
	// hostarch.PageSize.
	New() (phys uint64, t *Table, err error)

	// Lookup returns the table that New gave out at phys.
	Lookup(phys uint64) *Table

	// Free takes a table back. No CPU can reach it any more.
	Free(phys uint64)
}

// MapOpts say how pages are mapped.
type MapOpts struct {
	// Access is what the pages may be used for; Access.Any() must hold.
	Access hostarch.AccessType

	// User lets application code (ring 3, EL0) use the pages.
	User bool
}

// PageTables is one address space. Methods that change it must not be called
// concurrently; a CPU may walk the tables all the while.
//
// Non-leaf entries allow everything: permissions are those of the leaf alone.
type PageTables struct {
	// Count, unless nil, is told of memory that becomes mapped (delta is 1) or no
	// longer is (delta is -1), hidden pages included. It is told of the same page as
	// often as that is mapped.
	Count func(phys, length uint64, delta int)

	// Stale, unless nil, is told of single pages that a CPU may still use as an entry
	// said before. If NeedsFlush is false, a flush of these is all that is due.
	Stale func(phys uint64)

	// KeepEmpty says that a table stays when its last page is unmapped, unless all that
	// it spans is.
	KeepEmpty bool

	alloc  Allocator
	root   uint64
	levels int

	// shared says that the tables of the upper half are another's.
	shared bool

	// limbo holds tables that are unlinked but may still be cached by a CPU.
	limbo []uint64

	// deep says that more than single pages changed.
	deep bool
}

// New returns empty page tables with 4 or 5 levels.
func New(alloc Allocator, levels int) (*PageTables, error) {
	if levels != 4 && levels != 5 {
		return nil, fmt.Errorf("page tables of %d levels: only 4 and 5 exist", levels)
	}
	root, _, err := alloc.New()
	if err != nil {
		return nil, fmt.Errorf("allocate the root page table: %w", err)
	}
	return &PageTables{alloc: alloc, root: root, levels: levels}, nil
}

// NewSharing returns page tables with an empty lower half, whose upper half is
// that of p for ever: what p maps there must be mapped already as far as the top
// table is concerned. p must be released last.
func (p *PageTables) NewSharing() (*PageTables, error) {
	n, err := New(p.alloc, p.levels)
	if err != nil {
		return nil, err
	}
	n.shared = true
	copy(n.alloc.Lookup(n.root)[entriesPerTable/2:], p.alloc.Lookup(p.root)[entriesPerTable/2:])
	return n, nil
}

// Root returns the guest-physical address of the top table.
func (p *PageTables) Root() uint64 { return p.root }

// shift returns the number of address bits below an entry of the table at
// level, where 0 is the lowest level.
func shift(level int) uint { return leafShift + uint(level)*entryBits }

func index(addr hostarch.Addr, level int) int {
	return int(addr>>shift(level)) & (entriesPerTable - 1)
}

// canonical reports whether ar lies in one half of the address space that these
// tables cover: the upper bits of an address are copies of its highest one.
func (p *PageTables) canonical(ar hostarch.AddrRange) bool {
	ok := func(a hostarch.Addr) bool {
		bits := shift(p.levels)
		return int64(a)<<(64-bits)>>(64-bits) == int64(a)
	}
	return ok(ar.Start) && ok(ar.End-1) && (int64(ar.Start) < 0) == (int64(ar.End-1) < 0)
}

func (p *PageTables) check(addr hostarch.Addr, length uint64) (hostarch.AddrRange, error) {
	ar := hostarch.AddrRange{Start: addr, End: addr + hostarch.Addr(length)}
	if length == 0 || !ar.IsPageAligned() || ar.End-1 < ar.Start || !p.canonical(ar) {
		return ar, fmt.Errorf("page table range %v of %#x bytes: must be page-aligned, not empty and canonical", addr, length)
	}
	if p.shared && int64(ar.Start) < 0 {
		return ar, fmt.Errorf("page table range %v: the upper half is shared", ar)
	}
	return ar, nil
}

// Map maps length bytes at addr to guest-physical memory from phys on, in place
// of what was mapped there. Blocks of 2 MiB are used where both are aligned.
//
// flush says that a CPU may still use what an entry said before, so that the
// caller must flush before it relies on the change. After an error the range is
// mapped in part.
func (p *PageTables) Map(addr hostarch.Addr, length uint64, opts MapOpts, phys uint64) (flush bool, err error) {
	ar, err := p.check(addr, length)
	if err != nil {
		return false, err
	}
	if !opts.Access.Any() || phys&hostarch.PageMask != 0 || phys+length > maxPhys || phys+length < phys {
		return false, fmt.Errorf("map %v to guest-physical %#x with access %v: not possible", ar, phys, opts.Access)
	}
	w := walk{p: p, visit: func(level int, base hostarch.Addr, old uint64) (uint64, action) {
		pa := phys + uint64(base-addr)
		if level == 0 {
			return leafEntry(pa, opts), replace
		}
		if level == 1 && pa&(blockSize-1) == 0 {
			return blockEntry(pa, opts), replace
		}
		return 0, descend
	}, create: true}
	err = w.run(ar)
	return w.flush, err
}

// Unmap removes what is mapped at length bytes from addr. flush is as for Map.
// Splitting a block can fail for want of a table; the rest is then unmapped, and
// the whole block with it if that is what it takes.
func (p *PageTables) Unmap(addr hostarch.Addr, length uint64) (flush bool, err error) {
	ar, err := p.check(addr, length)
	if err != nil {
		return false, err
	}
	w := walk{p: p, visit: func(level int, _ hostarch.Addr, old uint64) (uint64, action) {
		if level == 0 || isLeaf(old, level) {
			return 0, replace
		}
		return 0, remove
	}}
	err = w.run(ar)
	return w.flush, err
}

// Protect changes how the pages that are mapped in the range may be used; those
// that are hidden are so still. flush is as for Map; it is false if access was only
// added.
func (p *PageTables) Protect(addr hostarch.Addr, length uint64, opts MapOpts) (flush bool, err error) {
	ar, err := p.check(addr, length)
	if err != nil {
		return false, err
	}
	if !opts.Access.Any() {
		return false, fmt.Errorf("protect %v with no access: unmap it", ar)
	}
	w := walk{p: p, visit: func(level int, _ hostarch.Addr, old uint64) (uint64, action) {
		if !isLeaf(old, level) {
			return 0, descend
		}
		return keepHidden(old, newLeaf(level, entryPhys(old), opts)), replace
	}}
	err = w.run(ar)
	return w.flush, err
}

// Hide hides those pages of the range for which gone, given the guest-physical
// address, returns true. flush is as for Map. It looks at every page by itself, and
// splits blocks that are gone in part.
func (p *PageTables) Hide(addr hostarch.Addr, length uint64, gone func(phys uint64) bool) (flush bool, err error) {
	ar, err := p.check(addr, length)
	if err != nil {
		return false, err
	}
	w := walk{p: p, visit: func(level int, _ hostarch.Addr, old uint64) (uint64, action) {
		if !isLeaf(old, level) {
			return 0, descend
		}
		n := 0
		pages := 1 << (level * entryBits)
		for i := range pages {
			if gone(entryPhys(old) + uint64(i)*hostarch.PageSize) {
				n++
			}
		}
		switch n {
		case 0:
			return old, replace
		case pages:
			return hide(old), replace
		}
		return 0, descend
	}}
	err = w.run(ar)
	return w.flush, err
}

// Hidden returns the guest-physical address that addr stands for if it is hidden.
func (p *PageTables) Hidden(addr hostarch.Addr) (phys uint64, ok bool) {
	e, level := p.leaf(addr)
	if e == nil || isPresent(*e) {
		return 0, false
	}
	return entryPhys(*e) + uint64(addr)&(1<<shift(level)-1), true
}

// Unhide undoes Hide for the page or block at addr.
func (p *PageTables) Unhide(addr hostarch.Addr) {
	if e, _ := p.leaf(addr); e != nil {
		atomic.StoreUint64(e, unhide(*e))
	}
}

// Lookup translates addr. size is that of the page or block, and phys the
// guest-physical address that addr itself stands for. A hidden page is not there.
func (p *PageTables) Lookup(addr hostarch.Addr) (phys uint64, size uint64, opts MapOpts, ok bool) {
	e, level := p.leaf(addr)
	if e == nil || !isPresent(*e) {
		return 0, 0, MapOpts{}, false
	}
	size = 1 << shift(level)
	return entryPhys(*e) + uint64(addr)&(size-1), size, entryOpts(*e), true
}

// leaf returns the leaf that is used for addr, and its level, or nil.
func (p *PageTables) leaf(addr hostarch.Addr) (*uint64, int) {
	if !p.canonical(hostarch.AddrRange{Start: addr, End: addr + 1}) {
		return nil, 0
	}
	t := p.alloc.Lookup(p.root)
	for level := p.levels - 1; ; level-- {
		e := &t[index(addr, level)]
		if !isUsed(*e) {
			return nil, 0
		}
		if isLeaf(*e, level) {
			return e, level
		}
		t = p.alloc.Lookup(entryPhys(*e))
	}
}

// NeedsFlush reports whether a flush is due of more than what Stale was told of:
// blocks or tables changed, and tables wait to be freed.
func (p *PageTables) NeedsFlush() bool { return p.deep }

// Flushed says that no CPU holds anything of what was unmapped: every flush that
// was asked for is done.
func (p *PageTables) Flushed() {
	for _, phys := range p.limbo {
		p.alloc.Free(phys)
	}
	p.limbo = p.limbo[:0]
	p.deep = false
}

// Release gives up all tables: free is called for each. No CPU may use them any more,
// but unless a flush was done CPUs may hold what they said.
func (p *PageTables) Release(free func(phys uint64)) {
	for _, phys := range p.limbo {
		free(phys)
	}
	p.limbo = nil
	if p.shared {
		clear(p.alloc.Lookup(p.root)[entriesPerTable/2:])
	}
	p.freeTree(p.root, p.levels-1, free)
	p.root = 0
}

// freeTree calls free for the table at phys and all below it.
func (p *PageTables) freeTree(phys uint64, level int, free func(uint64)) {
	for _, e := range p.alloc.Lookup(phys) {
		switch {
		case !isUsed(e):
		case isLeaf(e, level):
			p.count(e, level, -1)
		default:
			p.freeTree(entryPhys(e), level-1, free)
		}
	}
	free(phys)
}

// count tells Count of the leaf e at level.
func (p *PageTables) count(e uint64, level, delta int) {
	if p.Count != nil {
		p.Count(entryPhys(e), 1<<shift(level), delta)
	}
}

// isUsed reports whether an entry says anything: it is a table, a page, or hidden.
func isUsed(e uint64) bool { return e != 0 }

// hide and unhide change a leaf.
func hide(e uint64) uint64   { return e &^ entryPresent }
func unhide(e uint64) uint64 { return e | entryPresent }

// keepHidden hides new if old is hidden.
func keepHidden(old, new uint64) uint64 {
	if !isPresent(old) {
		return hide(new)
	}
	return new
}

func isPresent(e uint64) bool { return e&entryPresent != 0 }

// newLeaf returns a leaf of a table at level.
func newLeaf(level int, phys uint64, opts MapOpts) uint64 {
	if level == 0 {
		return leafEntry(phys, opts)
	}
	return blockEntry(phys, opts)
}

// action is what a walk does with an entry.
type action int

const (
	replace action = iota // store the entry that was returned
	descend               // go on in the table below
	remove                // unlink the table below, if it is covered or empty
)

// walk visits the entries of a range from the top table down. visit is called
// for entries whose whole span lies in the range, and for all of level 0.
type walk struct {
	p      *PageTables
	visit  func(level int, base hostarch.Addr, old uint64) (uint64, action)
	create bool // make tables that are missing
	flush  bool
}

func (w *walk) run(ar hostarch.AddrRange) error {
	top := w.p.levels - 1
	return w.table(w.p.alloc.Lookup(w.p.root), top, ar)
}

// table visits the entries of t, a table at level, that ar touches.
func (w *walk) table(t *Table, level int, ar hostarch.AddrRange) error {
	span := hostarch.Addr(1) << shift(level)
	for base := ar.Start &^ (span - 1); ; base += span {
		part := hostarch.AddrRange{Start: max(base, ar.Start), End: ar.End}
		if base+span-1 < ar.End-1 {
			part.End = base + span
		}
		if err := w.entry(&t[index(base, level)], level, base, part); err != nil {
			return err
		}
		if base+span-1 >= ar.End-1 {
			return nil
		}
	}
}

// entry handles one entry, of which part is in the range.
func (w *walk) entry(e *uint64, level int, base hostarch.Addr, part hostarch.AddrRange) error {
	old := *e
	if !isUsed(old) && !w.create {
		return nil
	}
	covered := part.Length() == 1<<shift(level)
	act := descend
	if covered {
		var new uint64
		if new, act = w.visit(level, base, old); act == replace {
			w.set(e, level, new)
			return nil
		}
	}
	if act == remove {
		below := entryPhys(old)
		w.set(e, level, 0)
		w.unlink(below, level-1)
		return nil
	}
	if isUsed(old) && isLeaf(old, level) {
		if err := w.split(e, level); err != nil {
			if !w.create { // an unmap or downgrade must not be left undone
				w.set(e, level, 0)
			}
			return err
		}
	} else if !isUsed(old) {
		phys, _, err := w.p.alloc.New()
		if err != nil {
			return fmt.Errorf("allocate a page table for %v: %w", part, err)
		}
		atomic.StoreUint64(e, tableEntry(phys))
	}
	below := entryPhys(*e)
	if err := w.table(w.p.alloc.Lookup(below), level-1, part); err != nil {
		return err
	}
	if !w.create && !w.p.KeepEmpty && isEmpty(w.p.alloc.Lookup(below)) {
		w.set(e, level, 0)
		w.unlink(below, level-1)
	}
	return nil
}

// set stores new in *e, frees a table that hung there, and notes whether a CPU
// may hold something that is no longer so.
func (w *walk) set(e *uint64, level int, new uint64) {
	old := *e
	if old == new {
		return
	}
	atomic.StoreUint64(e, new)
	newLeaf := isUsed(new) && isLeaf(new, level)
	if newLeaf {
		w.p.count(new, level, 1)
	}
	if !isUsed(old) {
		return
	}
	if !isLeaf(old, level) {
		w.flush, w.p.deep = true, true
		if newLeaf { // a block in place of a table
			w.unlink(entryPhys(old), level-1)
		}
		return
	}
	if newLeaf || !isUsed(new) { // otherwise it was split
		w.p.count(old, level, -1)
	}
	if !isPresent(old) || newLeaf && isPresent(new) && isUpgrade(old, new) {
		return
	}
	w.flush = true
	if level > 0 {
		w.p.deep = true
	} else if w.p.Stale != nil {
		w.p.Stale(entryPhys(old))
	}
}

// unlink puts the tables from phys down into limbo.
func (w *walk) unlink(phys uint64, level int) {
	w.flush, w.p.deep = true, true
	w.p.freeTree(phys, level, func(phys uint64) { w.p.limbo = append(w.p.limbo, phys) })
}

// split replaces a block by a table of pages that says the same.
func (w *walk) split(e *uint64, level int) error {
	phys, t, err := w.p.alloc.New()
	if err != nil {
		return fmt.Errorf("allocate a page table to split a block: %w", err)
	}
	base, opts := entryPhys(*e), entryOpts(*e)
	for i := range t {
		t[i] = keepHidden(*e, newLeaf(level-1, base+uint64(i)<<shift(level-1), opts))
	}
	w.set(e, level, tableEntry(phys))
	return nil
}

func isEmpty(t *Table) bool { return *t == Table{} }

// isUpgrade reports whether new maps the same memory as old and allows at least
// as much: a CPU that still holds old faults at worst where it need not.
func isUpgrade(old, new uint64) bool {
	a, b := entryOpts(old), entryOpts(new)
	return entryPhys(old) == entryPhys(new) && b.Access.SupersetOf(a.Access) && (b.User || !a.User)
}
