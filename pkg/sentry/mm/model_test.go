package mm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// The model of an address space has a byte per page, and shares it where memory
// is shared.
type modelPage struct {
	perms    hostarch.AccessType
	private  bool
	obj      any       // *testFile, the shared object, or nil
	contents *byte     // nil: private page that is still the file's
	shared   []byte    // of the object
	index    int       // page in shared
	_        [0]func() // not comparable
}

func (p *modelPage) value() byte {
	switch {
	case p.contents != nil:
		return *p.contents
	case p.shared != nil:
		return p.shared[p.index]
	}
	return 0
}

func (p *modelPage) set(v byte) {
	switch {
	case !p.private:
		p.shared[p.index] = v
	case p.contents == nil:
		p.contents = new(byte)
		fallthrough
	default:
		*p.contents = v
	}
}

type model struct {
	mm    *MemoryManager
	pages map[hostarch.Addr]*modelPage
}

const (
	modelBase  = hostarch.Addr(0x10000000)
	modelPages = 96
	filePages  = 24
)

// modelCompare is after how many steps all pages are compared.
const modelCompare = 250

type modelTest struct {
	*testing.T
	r     *rand.Rand
	e     *env
	procs []*model
	file  *testFile
	disk  []byte
	log   []string
}

func (m *modelTest) errorf(format string, args ...any) {
	m.Helper()
	for _, l := range m.log[max(0, len(m.log)-12):] {
		m.Log(l)
	}
	m.Fatalf(format, args...)
}

func (m *modelTest) note(format string, args ...any) {
	m.log = append(m.log, fmt.Sprintf(format, args...))
}

func (m *modelTest) perms() hostarch.AccessType {
	return []hostarch.AccessType{hostarch.NoAccess, hostarch.Read, hostarch.ReadWrite, hostarch.ReadWrite, hostarch.ReadWrite, hostarch.ReadExec}[m.r.IntN(6)]
}

// arena returns a range in the arena; small ones are likelier.
func (m *modelTest) arena() hostarch.AddrRange {
	start := m.r.IntN(modelPages)
	n := 1 + m.r.IntN(min(1+m.r.IntN(24), modelPages-start))
	return hostarch.AddrRange{Start: modelBase + hostarch.Addr(start)*hostarch.PageSize, End: modelBase + hostarch.Addr(start+n)*hostarch.PageSize}
}

func pagesOf(ar hostarch.AddrRange) []hostarch.Addr {
	var out []hostarch.Addr
	for a := ar.Start; a < ar.End; a += hostarch.PageSize {
		out = append(out, a)
	}
	return out
}

func (m *modelTest) step() {
	ctx := context.Background()
	p := m.procs[m.r.IntN(len(m.procs))]
	ar := m.arena()
	n := int(ar.Length() / hostarch.PageSize)
	switch op := m.r.IntN(100); {
	case op < 12: // mmap
		opts := memmap.MMapOpts{
			Length: ar.Length(), Addr: ar.Start, Fixed: true, Unmap: true,
			Perms: m.perms(), MaxPerms: hostarch.AnyAccess, Private: m.r.IntN(2) == 0,
			Precommit: m.r.IntN(8) == 0,
		}
		page := modelPage{perms: opts.Perms, private: opts.Private}
		if m.r.IntN(2) == 0 {
			first := m.r.IntN(filePages)
			opts.Length = min(opts.Length, uint64(filePages-first)*hostarch.PageSize)
			opts.Mappable, opts.MappingIdentity, opts.Offset = m.file, m.file, uint64(first)*hostarch.PageSize
			page.obj, page.shared, page.index = m.file, m.disk, first
		} else if !opts.Private {
			page.shared = make([]byte, n)
			page.obj = &page.shared[0]
		}
		m.note("mmap %v length %#x %v private %v file %v off %#x", ar, opts.Length, opts.Perms, opts.Private, opts.Mappable != nil, opts.Offset)
		if _, err := p.mm.MMap(ctx, opts); err != nil {
			m.errorf("MMap: %v", err)
		}
		ar.End = ar.Start + hostarch.Addr(opts.Length)
		for i, a := range pagesOf(ar) {
			c := page
			c.index += i
			if opts.Precommit && opts.Private && opts.Perms.Write {
				v := c.value() // as Linux: populating writes
				c.contents = &v
			}
			p.pages[a] = &c
		}
	case op < 18:
		m.note("munmap %v", ar)
		if err := p.mm.MUnmap(ctx, ar.Start, ar.Length()); err != nil {
			m.errorf("MUnmap: %v", err)
		}
		for _, a := range pagesOf(ar) {
			delete(p.pages, a)
		}
	case op < 30:
		perms := m.perms()
		m.note("mprotect %v %v", ar, perms)
		err := p.mm.MProtect(ctx, ar.Start, ar.Length(), perms, false)
		var exp error
		for _, a := range pagesOf(ar) {
			page := p.pages[a]
			if page == nil {
				exp = unix.ENOMEM
				break
			}
			page.perms = perms
		}
		if !errors.Is(err, exp) || (err == nil) != (exp == nil) {
			m.errorf("MProtect: %v, want %v", err, exp)
		}
	case op < 36:
		advice := []int32{linux.MADV_DONTNEED, linux.MADV_FREE, linux.MADV_WILLNEED}[m.r.IntN(3)]
		m.note("madvise %v %d", ar, advice)
		err := p.mm.Madvise(ctx, ar.Start, ar.Length(), advice)
		var exp error
		for _, a := range pagesOf(ar) {
			page := p.pages[a]
			if page == nil {
				exp = unix.ENOMEM
				continue
			}
			if advice == linux.MADV_FREE && (page.obj != nil || !page.private) {
				exp = unix.EINVAL
				break
			}
			if advice != linux.MADV_WILLNEED && page.private {
				page.contents = nil
			}
		}
		if !errors.Is(err, exp) || (err == nil) != (exp == nil) {
			m.errorf("Madvise: %v, want %v", err, exp)
		}
	case op < 46:
		m.remap(p, ar)
	case op < 50: // fork
		if len(m.procs) >= 4 {
			i := m.r.IntN(len(m.procs))
			m.note("exit %d", i)
			m.procs[i].mm.DecUsers(ctx)
			m.procs = append(m.procs[:i], m.procs[i+1:]...)
			return
		}
		m.note("fork")
		child, err := p.mm.Fork(ctx)
		if err != nil {
			m.errorf("Fork: %v", err)
		}
		c := &model{child, make(map[hostarch.Addr]*modelPage)}
		for a, page := range p.pages {
			copied := *page
			if page.contents != nil {
				v := *page.contents
				copied.contents = &v
			}
			c.pages[a] = &copied
		}
		m.procs = append(m.procs, c)
		check(m.T, child)
	case op < 55: // copy through the Sentry, over several pages
		buf := make([]byte, ar.Length())
		m.note("copyin %v", ar)
		got, err := p.mm.CopyIn(ctx, ar.Start, buf, usermem.IOOpts{})
		exp := 0
		for _, a := range pagesOf(ar) {
			page := p.pages[a]
			if page == nil || !page.perms.Effective().Read {
				break
			}
			if v := page.value(); exp < got && buf[exp] != v {
				m.errorf("CopyIn read %d at %v, want %d", buf[exp], a, v)
			}
			exp += hostarch.PageSize
		}
		if got != exp || (err == nil) != (exp == len(buf)) || err != nil && !errors.Is(err, unix.EFAULT) {
			m.errorf("CopyIn = %d, %v; want %d of %d", got, err, exp, len(buf))
		}
	case op < 60:
		v := byte(m.r.IntN(256))
		buf := make([]byte, ar.Length())
		for i := range buf {
			buf[i] = v
		}
		m.note("copyout %v %d", ar, v)
		got, err := p.mm.CopyOut(ctx, ar.Start, buf, usermem.IOOpts{})
		exp := 0
		for _, a := range pagesOf(ar) {
			page := p.pages[a]
			if page == nil || !page.perms.Write {
				break
			}
			page.set(v)
			exp += hostarch.PageSize
		}
		if got != exp || (err == nil) != (exp == len(buf)) {
			m.errorf("CopyOut = %d, %v; want %d of %d", got, err, exp, len(buf))
		}
	default:
		addr := modelBase + hostarch.Addr(m.r.IntN(modelPages))*hostarch.PageSize
		if len(p.pages) > 0 && m.r.IntN(3) == 0 { // one that may have moved out of the arena
			k := m.r.IntN(len(p.pages))
			for _, a := range pagesOf(hostarch.AddrRange{Start: modelBase, End: modelBase + modelPages*hostarch.PageSize}) {
				if p.pages[a] != nil {
					if k--; k < 0 {
						addr = a
						break
					}
				}
			}
		}
		at := []hostarch.AccessType{hostarch.Read, hostarch.Write, hostarch.Execute}[m.r.IntN(3)]
		m.touch(p, addr, at)
	}
	check(m.T, p.mm)
	if m.Failed() {
		m.errorf("after these steps")
	}
}

// touch accesses a byte as the application does.
func (m *modelTest) touch(p *model, addr hostarch.Addr, at hostarch.AccessType) {
	v := byte(m.r.IntN(256))
	page := p.pages[addr]
	m.note("touch %v %v %d", addr, at, v)
	got, err := touch(p.mm, addr, at, v)
	if page == nil || !page.perms.Effective().SupersetOf(at) {
		var fault *FaultError
		if !errors.As(err, &fault) || fault.Mapped != (page != nil) || fault.Addr != addr {
			m.errorf("touch %v %v: %v, want a fault, mapped %v", addr, at, err, page != nil)
		}
		return
	}
	if err != nil {
		m.errorf("touch %v %v: %v", addr, at, err)
	}
	if at.Write {
		page.set(v)
	} else if got != page.value() {
		m.errorf("read %d at %v, want %d (%+v)", got, addr, page.value(), *page)
	}
}

// remap tries mremap within one mapping or across several.
func (m *modelTest) remap(p *model, ar hostarch.AddrRange) {
	first := p.mm.vmas.lookup(ar.Start)
	if first == nil || first.End < ar.End {
		_, err := p.mm.MRemap(context.Background(), ar.Start, ar.Length(), ar.Length()+hostarch.PageSize, MRemapOpts{Move: MRemapMayMove})
		m.note("mremap %v grows over a hole", ar)
		if err != unix.EFAULT {
			m.errorf("MRemap of %v: %v, want EFAULT", ar, err)
		}
		return
	}
	// Growing stays within the object: shared memory has an end.
	newPages := 1 + m.r.IntN(12)
	if last := p.pages[ar.Start]; last.obj != nil {
		newPages = min(newPages, len(last.shared)-last.index)
	}
	newAR := m.arena()
	newAR.End = newAR.Start + hostarch.Addr(newPages)*hostarch.PageSize
	opts := MRemapOpts{Move: MRemapMove(m.r.IntN(3)), NewAddr: newAR.Start}
	m.note("mremap %v to %d pages %+v", ar, newPages, opts)
	addr, err := p.mm.MRemap(context.Background(), ar.Start, ar.Length(), newAR.Length(), opts)
	if opts.Move == MRemapFixed && newAR.Overlaps(ar) {
		if err != unix.EINVAL {
			m.errorf("MRemap onto itself: %v, want EINVAL", err)
		}
		return
	}
	if opts.Move == MRemapNoMove && err == unix.ENOMEM {
		// Right if there is something in the way, or the mapping goes on.
		if newAR.Length() <= ar.Length() {
			m.errorf("shrinking MRemap: %v", err)
		}
		next := p.pages[ar.End]
		for a := ar.End; next == nil && a < ar.Start+hostarch.Addr(newAR.Length()); a += hostarch.PageSize {
			next = p.pages[a]
		}
		if next == nil {
			m.errorf("MRemap has room at %v: %v", ar, err)
		}
		return
	}
	if err != nil {
		m.errorf("MRemap: %v", err)
	}
	proto := *p.pages[ar.Start]
	old := make([]*modelPage, 0)
	for _, a := range pagesOf(ar) {
		old = append(old, p.pages[a])
		delete(p.pages, a)
	}
	for i := range newPages {
		page := proto
		page.contents = nil
		page.index += i
		if i < len(old) {
			page = *old[i]
		}
		p.pages[addr+hostarch.Addr(i)*hostarch.PageSize] = &page
	}
	// What moved far away comes back, so that the arena stays full.
	if opts.Move == MRemapMayMove && (addr < modelBase || addr >= modelBase+modelPages*hostarch.PageSize) {
		moved := hostarch.AddrRange{Start: addr, End: addr + hostarch.Addr(newAR.Length())}
		for _, a := range pagesOf(moved) {
			m.touch(p, a, hostarch.Read)
			delete(p.pages, a)
		}
		if err := p.mm.MUnmap(context.Background(), moved.Start, moved.Length()); err != nil {
			m.errorf("MUnmap: %v", err)
		}
	}
}

// all compares every page of every process.
func (m *modelTest) all() {
	for _, p := range m.procs {
		for a := range p.pages {
			m.touch(p, a, hostarch.Read)
		}
		check(m.T, p.mm)
	}
}

func runModel(t *testing.T, seed uint64, steps int, unit uint64, max int) {
	e := newEnv(t)
	e.p.unit, e.p.max, e.p.batch = unit, max, seed%2 == 0
	m := &modelTest{T: t, r: rand.New(rand.NewPCG(seed, 7)), e: e, file: e.newFile(filePages), disk: make([]byte, filePages)}
	for i := range m.disk {
		m.disk[i] = byte(i + 1)
		m.file.bytes()[i*hostarch.PageSize] = byte(i + 1)
	}
	first, err := New(e.p, e.mf, Options{})
	if err != nil {
		t.Fatal(err)
	}
	m.procs = []*model{{first, make(map[hostarch.Addr]*modelPage)}}
	defer func() {
		for _, p := range m.procs {
			p.mm.DecUsers(context.Background())
		}
	}()
	for i := range steps {
		m.step()
		if len(m.procs) == 0 {
			mm, err := New(e.p, e.mf, Options{})
			if err != nil {
				t.Fatal(err)
			}
			m.procs = append(m.procs, &model{mm, make(map[hostarch.Addr]*modelPage)})
		}
		if i%modelCompare == modelCompare-1 {
			m.all()
		}
	}
	m.all()
}

// Random operations have the effects that a simple model gives, and the
// AddressSpace has no page mapped that it should not.
func TestModel(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { runModel(t, seed, 6000, 0, 0) })
	}
}

// The same with a platform that maps small units, and one that has no room.
func TestModelSmallUnits(t *testing.T)  { runModel(t, 100, 6000, 8*hostarch.PageSize, 0) }
func TestModelFewMappings(t *testing.T) { runModel(t, 101, 6000, 0, 40) }
