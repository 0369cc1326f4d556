package mm

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/usermem"
)

var oldCode, newCode = []byte("ABCDE"), []byte("vwxyz")

// text returns oldCode at codeAt, in three pages of code, of a file if f is not nil.
func (e *env) text(f *testFile) (*MemoryManager, hostarch.Addr) {
	mm := e.newMM()
	o := anon(3)
	if f != nil {
		o = of(o, f, true)
	}
	addr := mmap(e.t, mm, o)
	codeAt := addr + page + 10
	if _, err := mm.CopyOut(ctx, codeAt, oldCode, usermem.IOOpts{}); err != nil {
		e.t.Fatal(err)
	}
	if err := mm.MProtect(ctx, addr, 3*page, hostarch.ReadExec, false); err != nil {
		e.t.Fatal(err)
	}
	return mm, codeAt
}

// bytesAt reads what the application sees.
func bytesAt(t testing.TB, mm *MemoryManager, addr hostarch.Addr) string {
	t.Helper()
	b := make([]byte, len(oldCode))
	for i := range b {
		b[i] = read(t, mm, addr+hostarch.Addr(i))
	}
	return string(b)
}

func TestPatchText(t *testing.T) {
	for _, kind := range []string{"anonymous", "file"} {
		t.Run(kind, func(t *testing.T) {
			e := newEnv(t)
			var f *testFile
			if kind == "file" {
				f = e.newFile(3)
			}
			mm, codeAt := e.text(f)
			expect(t, "PatchText", mm.PatchText(ctx, codeAt, newCode, codeAt, oldCode), nil)
			if got := bytesAt(t, mm, codeAt); got != string(newCode) {
				t.Errorf("patched: %q", got)
			}
			expect(t, "again", mm.PatchText(ctx, codeAt, newCode, codeAt, oldCode), platform.TextChanged)
			child, err := mm.Fork(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer child.DecUsers(ctx)
			if got := bytesAt(t, child, codeAt); got != string(newCode) {
				t.Errorf("in a child: %q", got)
			}
			expect(t, "RestoreText", mm.RestoreText(ctx), nil)
			if got := bytesAt(t, mm, codeAt); got != string(oldCode) {
				t.Errorf("restored: %q", got)
			}
			if got := bytesAt(t, child, codeAt); got != string(newCode) {
				t.Errorf("in a child, after the parent's is restored: %q", got)
			}
			expect(t, "RestoreText in the child", child.RestoreText(ctx), nil)
			if got := bytesAt(t, child, codeAt); got != string(oldCode) {
				t.Errorf("restored in the child: %q", got)
			}
			expect(t, "once more", mm.PatchText(ctx, codeAt, newCode, codeAt, oldCode), nil)
		})
	}
}

func TestPatchTextRefuses(t *testing.T) {
	e := newEnv(t)
	mm, codeAt := e.text(nil)
	start := codeAt.RoundDown() - page
	f := e.newFile(1)
	shared := of(anon(1), f, false)
	shared.Perms = hostarch.ReadExec
	sharedAt := mmap(t, mm, shared)
	for _, test := range []struct {
		name string
		addr hostarch.Addr
		want error
	}{
		{"other bytes", codeAt + 1, platform.TextChanged},
		{"two pages", codeAt.RoundDown() + page - 4, platform.TextTwoPages},
		{"shared", sharedAt, platform.TextShared},
		{"nothing", 0x10000, unix.EFAULT},
	} {
		expect(t, test.name, mm.PatchText(ctx, test.addr, newCode, test.addr, oldCode), test.want)
	}
	expect(t, "sizes", mm.PatchText(ctx, codeAt, newCode, codeAt, oldCode[1:]), unix.EINVAL)
	expect(t, "none", mm.PatchText(ctx, codeAt, nil, codeAt, nil), unix.EINVAL)
	for perms, want := range map[hostarch.AccessType]error{
		hostarch.AnyAccess: platform.TextWritable, hostarch.ReadWrite: platform.TextWritable, hostarch.Read: platform.TextNotExecutable,
	} {
		expect(t, "MProtect", mm.MProtect(ctx, start, 3*page, perms, false), nil)
		expect(t, perms.String(), mm.PatchText(ctx, codeAt, newCode, codeAt, oldCode), want)
	}
}

// Of a file that may change in memory no copy is made, so that changes are seen, and
// that there is no page any more. What is in one that may not is patched.
func TestPatchTextOfFile(t *testing.T) {
	for perms, want := range map[hostarch.AccessType]error{hostarch.AnyAccess: platform.TextFile, hostarch.ReadExec: nil} {
		e := newEnv(t)
		f := e.newFile(3)
		f.perms = perms
		copy(f.bytes()[page+10:], oldCode)
		mm := e.newMM()
		o := of(anon(3), f, true)
		o.Perms = hostarch.ReadExec
		codeAt := mmap(t, mm, o) + page + 10
		expect(t, "PatchText", mm.PatchText(ctx, codeAt, newCode, codeAt, oldCode), want)
		if want == nil {
			continue
		}
		copy(f.bytes()[page+10:], "other")
		if got := bytesAt(t, mm, codeAt); got != "other" {
			t.Errorf("the file has changed, and there is %q", got)
		}
		f.truncate(page)
		if bus := (*memmap.BusError)(nil); !errors.As(mm.PatchText(ctx, codeAt, newCode, codeAt, oldCode), &bus) {
			t.Error("a page behind the end of the file is patched")
		}
	}
}

// Before the application writes code, or the Sentry for it, it is as it was; and it
// is not patched again.
func TestPatchesGoBeforeWrites(t *testing.T) {
	for name, write := range map[string]func(t *testing.T, mm *MemoryManager, addr hostarch.Addr){
		"mprotect": func(t *testing.T, mm *MemoryManager, addr hostarch.Addr) {
			expect(t, "MProtect", mm.MProtect(ctx, addr.RoundDown(), page, hostarch.AnyAccess, false), nil)
		},
		"CopyOut": func(t *testing.T, mm *MemoryManager, addr hostarch.Addr) {
			_, err := mm.CopyOut(ctx, addr+2, []byte("C"), usermem.IOOpts{IgnorePermissions: true})
			expect(t, "CopyOut", err, nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			mm, codeAt := e.text(e.newFile(3))
			expect(t, "PatchText", mm.PatchText(ctx, codeAt, newCode, codeAt, oldCode), nil)
			write(t, mm, codeAt)
			if got := bytesAt(t, mm, codeAt); got != string(oldCode) {
				t.Errorf("after a write: %q", got)
			}
			expect(t, "MProtect", mm.MProtect(ctx, codeAt.RoundDown(), page, hostarch.ReadExec, false), nil)
			expect(t, "again", mm.PatchText(ctx, codeAt, newCode, codeAt, oldCode), platform.TextRestored)
		})
	}
}

// Code that is moved is moved as it was; code that is thrown away is forgotten.
func TestPatchesMove(t *testing.T) {
	e := newEnv(t)
	mm, codeAt := e.text(e.newFile(3))
	expect(t, "PatchText", mm.PatchText(ctx, codeAt, newCode, codeAt, oldCode), nil)
	to, err := mm.MRemap(ctx, codeAt.RoundDown(), page, page, MRemapOpts{Move: MRemapFixed, NewAddr: 0x30000000})
	if err != nil {
		t.Fatal(err)
	}
	if got := bytesAt(t, mm, to+10); got != string(oldCode) {
		t.Errorf("moved: %q", got)
	}
	expect(t, "PatchText", mm.PatchText(ctx, to+10, newCode, to+10, oldCode), nil)
	expect(t, "Madvise", mm.Madvise(ctx, to, page, linux.MADV_DONTNEED), nil)
	if got := bytesAt(t, mm, to+10); got == string(newCode) || got == string(oldCode) {
		t.Errorf("thrown away: %q", got)
	}
	expect(t, "RestoreText", mm.RestoreText(ctx), nil)
	if got := bytesAt(t, mm, to+10); got == string(oldCode) {
		t.Errorf("restored what is not there: %q", got)
	}
}

// A patch is made if all of what is around it is as it was, patches included, and
// undone whatever happens to those.
func TestPatchTextAround(t *testing.T) {
	const was = "..ABCDE.FGHIJ.."
	for _, first := range []hostarch.Addr{2, 8} { // is undone first
		mm, codeAt := newEnv(t).text(nil)
		start := codeAt + 100
		_, err := mm.CopyOut(ctx, start, []byte(was), usermem.IOOpts{IgnorePermissions: true})
		expect(t, "CopyOut", err, nil)
		in := func(off hostarch.Addr, new, code string) error {
			return mm.PatchText(ctx, start+off, []byte(new), start, []byte(code))
		}
		has := func(want string) {
			t.Helper()
			b := make([]byte, len(want))
			mm.CopyIn(ctx, start, b, usermem.IOOpts{})
			if string(b) != want {
				t.Errorf("%q, want %q", b, want)
			}
		}
		expect(t, "start differs", in(2, "vwxyz", ",.ABCDE.FGHIJ.."), platform.TextChanged)
		expect(t, "end differs", in(2, "vwxyz", "..ABCDE.FGHIJ.,"), platform.TextChanged)
		expect(t, "not in it", in(11, "vwxyz", was), unix.EINVAL)
		expect(t, "before it", mm.PatchText(ctx, start-1, newCode, start, []byte(was)), unix.EINVAL)
		has(was)
		expect(t, "one", in(2, "vwxyz", was), nil)
		expect(t, "the other, without the one", in(8, "12345", was), platform.TextChanged)
		expect(t, "the other", in(8, "12345", "..vwxyz.FGHIJ.."), nil)
		expect(t, "over both", in(6, "+++++", "..vwxyz.12345.."), platform.TextChanged)
		has("..vwxyz.12345..")
		expect(t, "UnpatchText", mm.UnpatchText(ctx, start+first), nil)
		has(map[hostarch.Addr]string{2: "..ABCDE.12345..", 8: "..vwxyz.FGHIJ.."}[first])
		expect(t, "RestoreText", mm.RestoreText(ctx), nil)
		has(was)

		// What is gone is in nobody's way.
		expect(t, "the other", in(8, "12345", was), nil)
		expect(t, "Madvise", mm.Madvise(ctx, codeAt.RoundDown(), page, linux.MADV_DONTNEED), nil)
		zeros := string(make([]byte, len(was)))
		expect(t, "over what is gone", in(6, "+++++", zeros), nil)
		expect(t, "RestoreText", mm.RestoreText(ctx), nil)
		has(zeros)
	}
}

// Trampolines leave a stack the room to grow that it may have.
func TestTrampolinesBelowStack(t *testing.T) {
	for _, limit := range []uint64{8 << 20, math.MaxUint64} {
		mm := newEnv(t).newMM()
		l := DefaultLimits
		l.Stack = limit
		mm.SetLimits(l)
		const end = hostarch.Addr(0x40000000)
		stack := at(anon(16), end-16*page)
		stack.GrowsDown = true
		mmap(t, mm, stack)
		lowest := end - hostarch.Addr(min(limit, minMMapGap)) // of the stack
		for off, want := range map[hostarch.Addr]error{
			end - 64*page:                 unix.EEXIST,
			lowest - stackGuardGap:        unix.EEXIST,
			lowest - stackGuardGap - page: nil,
			end:                           nil,
		} {
			o := at(anon(1), off)
			o.Unmap, o.Hint = false, "[usertrap]"
			_, err := mm.MMap(ctx, o)
			expect(t, fmt.Sprintf("MMap at %v", off), err, want)
		}
		if _, err := touch(mm, lowest, hostarch.Write, 1); err != nil {
			t.Errorf("growing: %v", err)
		}
		o := at(anon(1), lowest-32*page)
		o.Unmap = false
		_, err := mm.MMap(ctx, o)
		expect(t, "MMap of the application", err, nil)
	}
}

// There is an end to patches, which those of code that is gone do not count for.
func TestTooManyPatches(t *testing.T) {
	const each = 400 // in a page
	mm := newEnv(t).newMM()
	o := anon(maxPatches/each + 2)
	o.Perms = hostarch.ReadExec
	addr := mmap(t, mm, o)
	old := make([]byte, len(oldCode))
	at := func(i int) hostarch.Addr { return addr + hostarch.Addr(i/each*page+i%each*10) }
	for i := range maxPatches {
		if err := mm.PatchText(ctx, at(i), newCode, at(i), old); err != nil {
			t.Fatal(err)
		}
	}
	expect(t, "one more", mm.PatchText(ctx, at(maxPatches), newCode, at(maxPatches), old), platform.TextTooMany)
	expect(t, "MUnmap", mm.MUnmap(ctx, addr, page), nil)
	for i := range each {
		if err := mm.PatchText(ctx, at(maxPatches+i), newCode, at(maxPatches+i), old); err != nil {
			t.Fatalf("instead: %v", err)
		}
	}
	expect(t, "again one more", mm.PatchText(ctx, at(maxPatches+each), newCode, at(maxPatches+each), old), platform.TextTooMany)
	expect(t, "RestoreText", mm.RestoreText(ctx), nil)
	for i := each; i < maxPatches+each; i++ {
		if got := bytesAt(t, mm, at(i)); got != string(old) {
			t.Fatalf("restored %d: %q", i, got)
		}
	}
}

// textState says that patches need what is in area.
type textState struct {
	area hostarch.AddrRange
	lost int
}

func (s *textState) Fork() platform.TextState { c := *s; return &c }

func (s *textState) Lose(ar hostarch.AddrRange) func() {
	if s.lost > 0 || !ar.Overlaps(s.area) {
		return nil
	}
	return func() { s.lost++ }
}

// When the application changes memory that patches need, they are undone before.
func TestPatchesLoseMemory(t *testing.T) {
	for name, change := range map[string]func(mm *MemoryManager, ar hostarch.AddrRange) error{
		"munmap": func(mm *MemoryManager, ar hostarch.AddrRange) error { return mm.MUnmap(ctx, ar.Start, page) },
		"mprotect": func(mm *MemoryManager, ar hostarch.AddrRange) error {
			return mm.MProtect(ctx, ar.Start, page, hostarch.NoAccess, false)
		},
		"mmap": func(mm *MemoryManager, ar hostarch.AddrRange) error {
			_, err := mm.MMap(ctx, at(anon(1), ar.Start))
			return err
		},
		"madvise": func(mm *MemoryManager, ar hostarch.AddrRange) error {
			return mm.Madvise(ctx, ar.Start, page, linux.MADV_DONTNEED)
		},
		"dontfork": func(mm *MemoryManager, ar hostarch.AddrRange) error {
			return mm.Madvise(ctx, ar.Start, page, linux.MADV_DONTFORK)
		},
		"wipeonfork": func(mm *MemoryManager, ar hostarch.AddrRange) error {
			return mm.Madvise(ctx, ar.Start, page, linux.MADV_WIPEONFORK)
		},
		"mremap": func(mm *MemoryManager, ar hostarch.AddrRange) error {
			_, err := mm.MRemap(ctx, ar.Start, page, page, MRemapOpts{Move: MRemapFixed, NewAddr: 0x30000000})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			mm, codeAt := e.text(nil)
			area := mmap(t, mm, anon(2))
			s := &textState{area: hostarch.AddrRange{Start: area, End: area + 2*page}}
			if got := mm.TextState(func() platform.TextState { return s }); got != platform.TextState(s) {
				t.Fatal("TextState returns something else")
			}
			expect(t, "PatchText", mm.PatchText(ctx, codeAt, newCode, codeAt, oldCode), nil)
			child, err := mm.Fork(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer child.DecUsers(ctx)
			expect(t, name, change(mm, s.area), nil)
			if got := bytesAt(t, mm, codeAt); got != string(oldCode) || s.lost != 1 {
				t.Errorf("%q, lost %d times", got, s.lost)
			}
			expect(t, "PatchText", mm.PatchText(ctx, codeAt, newCode, codeAt, oldCode), platform.TextRestored)
			c := child.TextState(nil).(*textState)
			if got := bytesAt(t, child, codeAt); got != string(newCode) || c.lost != 0 || c == s {
				t.Errorf("in the child %q, lost %d times", got, c.lost)
			}
		})
	}
}

// Whoever executes code while it is patched sees what was there, or what is, and no
// mixture.
func TestPatchTextAtOnce(t *testing.T) {
	e := newEnv(t)
	mm, codeAt := e.text(e.newFile(3))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 300 {
			if err := mm.PatchText(ctx, codeAt, newCode, codeAt, oldCode); err != nil {
				t.Errorf("PatchText: %v", err)
			}
			if err := mm.RestoreText(ctx); err != nil {
				t.Errorf("RestoreText: %v", err)
			}
		}
	}()
	as := fake(mm)
	b := make([]byte, len(oldCode))
	for seen := 0; ; seen++ {
		select {
		case <-done:
			if seen == 0 {
				t.Error("it was never there")
			}
			return
		default:
		}
		as.mu.Lock()
		p, ok := as.pages[codeAt.RoundDown()]
		var err error
		if ok {
			var mem [][]byte
			if mem, err = p.file.MapInternal(memmap.FileRange{Start: p.off, End: p.off + page}, hostarch.Read); err == nil {
				copy(b, mem[0][codeAt.PageOffset():])
			}
		}
		as.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			if err := mm.HandleUserFault(ctx, codeAt, hostarch.Execute, 0); err != nil && !errors.Is(err, unix.EFAULT) {
				t.Fatal(err)
			}
			continue
		}
		if !bytes.Equal(b, oldCode) && !bytes.Equal(b, newCode) {
			t.Fatalf("%q", b)
		}
	}
}
