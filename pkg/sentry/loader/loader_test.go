package loader

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/sentry/mm"
	"github.com/ringfence/ringfence/pkg/sentry/pgalloc"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// nullPlatform runs nothing: the loader only writes memory.
type nullPlatform struct{ platform.Platform }

func (nullPlatform) CooperativelySchedulesAddressSpace() bool { return false }
func (nullPlatform) MapUnit() uint64                          { return 0 }
func (nullPlatform) MinUserAddress() hostarch.Addr            { return 0x10000 }
func (nullPlatform) MaxUserAddress() hostarch.Addr            { return 1<<47 - hostarch.PageSize }
func (nullPlatform) NewAddressSpace(any) (platform.AddressSpace, <-chan struct{}, error) {
	return nullSpace{}, nil, nil
}

type nullSpace struct{ platform.NoAddressSpaceIO }

func (nullSpace) MapFile(hostarch.Addr, memmap.File, memmap.FileRange, hostarch.AccessType, bool) error {
	return nil
}
func (nullSpace) Unmap(hostarch.Addr, uint64) {}
func (nullSpace) Release()                    {}
func (nullSpace) PreFork()                    {}
func (nullSpace) PostFork()                   {}

// env is a place to load programs in.
type env struct {
	t     testing.TB
	mf    *pgalloc.MemoryFile
	files map[string][]byte
	// opened are the ranges of files that may still be mapped.
	opened []memmap.FileRange
}

// end says that no program is left.
func (e *env) end(m *mm.MemoryManager) {
	m.DecUsers(context.Background())
	for _, fr := range e.opened {
		e.mf.DecRef(fr)
	}
	e.opened = nil
	if used := e.mf.UsedBytes(); used != 0 {
		e.t.Errorf("%d bytes of memory are still in use", used)
	}
}

func newEnv(t testing.TB) *env {
	mf, err := pgalloc.New("loader-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(mf.Destroy)
	return &env{t: t, mf: mf, files: make(map[string][]byte)}
}

// memFile is a File whose bytes lie in the memory file.
type memFile struct {
	*bytes.Reader
	path string
	mf   *pgalloc.MemoryFile
	fr   memmap.FileRange
}

func (e *env) open(_ context.Context, path string) (File, error) {
	b, ok := e.files[path]
	if !ok {
		return nil, unix.ENOENT
	}
	f := &memFile{Reader: bytes.NewReader(b), path: path, mf: e.mf}
	if size, _ := hostarch.PageRoundUp(uint64(len(b))); size > 0 {
		fr, err := e.mf.Allocate(size)
		if err != nil {
			return nil, err
		}
		blocks, err := e.mf.MapInternal(fr, hostarch.ReadWrite)
		if err != nil {
			return nil, err
		}
		for _, block := range blocks {
			b = b[copy(block, b):]
		}
		f.fr = fr
		e.opened = append(e.opened, fr)
	}
	return f, nil
}

func (f *memFile) Path() string { return f.path }
func (f *memFile) Close()       {}
func (f *memFile) ConfigureMMap(_ context.Context, opts *memmap.MMapOpts) error {
	opts.Mappable = f
	return nil
}
func (f *memFile) AddMapping(memmap.MappingSpace, hostarch.AddrRange, uint64, bool) error { return nil }
func (f *memFile) RemoveMapping(memmap.MappingSpace, hostarch.AddrRange, uint64, bool)    {}
func (f *memFile) CopyMapping(memmap.MappingSpace, hostarch.AddrRange, hostarch.AddrRange, uint64, bool) error {
	return nil
}
func (f *memFile) Translate(_ context.Context, required, optional memmap.MappableRange, _ hostarch.AccessType) ([]memmap.Translation, error) {
	var err error
	if required.End > f.fr.Length() {
		err = &memmap.BusError{Err: io.EOF}
	}
	end := min(optional.End, f.fr.Length())
	if end <= required.Start {
		return nil, err
	}
	return []memmap.Translation{{
		Source: memmap.MappableRange{Start: required.Start, End: end},
		File:   f.mf, Offset: f.fr.Start + required.Start, Perms: hostarch.AnyAccess,
	}}, err
}

// load loads path into new memory.
func (e *env) load(path string, argv, envv []string) (*mm.MemoryManager, Image, error) {
	m, err := mm.New(nullPlatform{}, e.mf, mm.Options{Limits: mm.Limits{AS: 1 << 46, Data: 1 << 46, Stack: 8 << 20, MemLock: 1 << 20}})
	if err != nil {
		e.t.Fatal(err)
	}
	f, err := e.open(context.Background(), path)
	if err != nil {
		e.t.Fatal(err)
	}
	defer f.Close()
	image, err := Load(context.Background(), Args{
		MM: m, Open: e.open, File: f, Filename: path, Argv: argv, Envv: envv,
		UID: 1, EUID: 2, GID: 3, EGID: 4, StackLimit: 8 << 20,
	})
	return m, image, err
}

// elf puts a program together. Parts are put into the file one after the other,
// page by page.
type elf struct {
	typ    uint16
	entry  uint64
	interp string
	parts  []part
}

type part struct {
	flags uint32
	vaddr uint64
	data  string
	memsz uint64
	align uint64
}

func (x elf) bytes() []byte {
	h := linux.ELFHeader{Type: x.typ, Machine: elfMachine, Version: 1, Entry: x.entry, Phoff: headerSize, Ehsize: headerSize, Phentsize: programSize}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	var phs []linux.ELFProgram
	file := make([]byte, hostarch.PageSize)
	for _, p := range x.parts {
		off := uint64(len(file)) + p.vaddr%hostarch.PageSize
		file = append(file, make([]byte, p.vaddr%hostarch.PageSize)...)
		file = append(file, p.data...)
		for len(file)%hostarch.PageSize != 0 {
			file = append(file, 0xee) // must not be seen in the program's zeros
		}
		phs = append(phs, linux.ELFProgram{Type: linux.PT_LOAD, Flags: p.flags, Off: off, Vaddr: p.vaddr, Filesz: uint64(len(p.data)), Memsz: p.memsz, Align: p.align})
	}
	if x.interp != "" {
		at := hostarch.PageSize / 2
		copy(file[at:], x.interp)
		phs = append(phs, linux.ELFProgram{Type: linux.PT_INTERP, Off: uint64(at), Filesz: uint64(len(x.interp) + 1)})
	}
	// The headers themselves are loaded before everything else.
	first := x.parts[0].vaddr &^ hostarch.PageMask
	phs = append([]linux.ELFProgram{{Type: linux.PT_LOAD, Flags: linux.PF_R, Vaddr: first - hostarch.PageSize, Filesz: hostarch.PageSize, Memsz: hostarch.PageSize, Align: hostarch.PageSize}}, phs...)
	h.Phnum = uint16(len(phs))
	h.MarshalBytes(file)
	for i, ph := range phs {
		ph.MarshalBytes(file[headerSize+i*programSize:])
	}
	return file
}

func static() elf {
	return elf{typ: linux.ET_EXEC, entry: 0x401010, parts: []part{
		{linux.PF_R | linux.PF_X, 0x401000, "code", 4, hostarch.PageSize},
		{linux.PF_R | linux.PF_W, 0x403100, "data", 0x3000, hostarch.PageSize},
	}}
}

func pie(interp string, align uint64) elf {
	return elf{typ: linux.ET_DYN, entry: 0x1010, interp: interp, parts: []part{
		{linux.PF_R | linux.PF_X, 0x1000, "pie!", 4, align},
		{linux.PF_R | linux.PF_W, 0x2ff0, "0123456789abcdef", 0x10, align},
	}}
}

func (e *env) read(m *mm.MemoryManager, addr hostarch.Addr, n int) string {
	e.t.Helper()
	b := make([]byte, n)
	if _, err := m.CopyIn(context.Background(), addr, b, usermem.IOOpts{}); err != nil {
		e.t.Errorf("read %d bytes at %v: %v", n, addr, err)
	}
	return string(b)
}

func (e *env) word(m *mm.MemoryManager, addr hostarch.Addr) uint64 {
	return binary.LittleEndian.Uint64([]byte(e.read(m, addr, 8)))
}

func (e *env) cstring(m *mm.MemoryManager, addr uint64) string {
	e.t.Helper()
	s, err := usermem.CopyStringIn(context.Background(), m, hostarch.Addr(addr), 4096, usermem.IOOpts{})
	if err != nil {
		e.t.Errorf("string at %#x: %v", addr, err)
	}
	return s
}

// stack returns what a program finds on its stack.
func (e *env) stack(m *mm.MemoryManager, sp hostarch.Addr) (argv, envv []string, auxv map[uint64]uint64) {
	e.t.Helper()
	if sp%16 != 0 {
		e.t.Errorf("stack pointer %v is not a multiple of 16", sp)
	}
	argc := e.word(m, sp)
	for sp += 8; e.word(m, sp) != 0; sp += 8 {
		argv = append(argv, e.cstring(m, e.word(m, sp)))
	}
	if argc != uint64(len(argv)) {
		e.t.Errorf("argc %d, argv %q", argc, argv)
	}
	for sp += 8; e.word(m, sp) != 0; sp += 8 {
		envv = append(envv, e.cstring(m, e.word(m, sp)))
	}
	auxv = make(map[uint64]uint64)
	for sp += 8; e.word(m, sp) != linux.AT_NULL; sp += 16 {
		auxv[e.word(m, sp)] = e.word(m, sp+8)
	}
	return argv, envv, auxv
}

func TestStatic(t *testing.T) {
	e := newEnv(t)
	e.files["/bin/a-program-with-a-long-name"] = static().bytes()
	m, image, err := e.load("/bin/a-program-with-a-long-name", []string{"one", "", "three"}, []string{"A=b", "C="})
	if err != nil {
		t.Fatal(err)
	}
	defer e.end(m)
	if image.Entry != 0x401010 || image.Name != "a-program-with-" {
		t.Errorf("image %+v", image)
	}
	if got := e.read(m, 0x401000, 4); got != "code" {
		t.Errorf("code %q", got)
	}
	if got := e.read(m, 0x403100, 8); got != "data\x00\x00\x00\x00" {
		t.Errorf("data %q", got)
	}
	if got := e.read(m, 0x403104, 0x2ffc); strings.Trim(got, "\x00") != "" {
		t.Error("the program's zeros are not zero")
	}
	argv, envv, auxv := e.stack(m, image.StackPointer)
	if !slices.Equal(argv, []string{"one", "", "three"}) || !slices.Equal(envv, []string{"A=b", "C="}) {
		t.Errorf("argv %q, envv %q", argv, envv)
	}
	for key, want := range map[uint64]uint64{
		linux.AT_PHDR: 0x400040, linux.AT_PHENT: 56, linux.AT_PHNUM: 3, linux.AT_ENTRY: 0x401010, linux.AT_BASE: 0,
		linux.AT_PAGESZ: hostarch.PageSize, linux.AT_UID: 1, linux.AT_EUID: 2, linux.AT_GID: 3, linux.AT_EGID: 4,
	} {
		if auxv[key] != want {
			t.Errorf("auxv[%d] = %#x, want %#x", key, auxv[key], want)
		}
	}
	if got := e.cstring(m, auxv[linux.AT_EXECFN]); got != "/bin/a-program-with-a-long-name" {
		t.Errorf("AT_EXECFN %q", got)
	}
	if got := e.read(m, hostarch.Addr(auxv[linux.AT_RANDOM]), 16); got == strings.Repeat("\x00", 16) {
		t.Error("AT_RANDOM is not random")
	}
	meta := m.Metadata()
	if got := e.read(m, meta.Args.Start, int(meta.Args.Length())); got != "one\x00\x00three\x00" {
		t.Errorf("argument strings %q", got)
	}
	if got := e.read(m, meta.Env.Start, int(meta.Env.Length())); got != "A=b\x00C=\x00" {
		t.Errorf("environment strings %q", got)
	}
	if brk, _ := m.Brk(context.Background(), 0); brk < 0x406100 { // asking for 0 tells where it is
		t.Errorf("heap at %v: within the program", brk)
	}
}

func TestPIE(t *testing.T) {
	for _, align := range []uint64{hostarch.PageSize, 1 << 16, 1 << 21} {
		e := newEnv(t)
		e.files["/pie"] = pie("/ld.so", align).bytes()
		e.files["/ld.so"] = pie("", align).bytes()
		m, image, err := e.load("/pie", []string{"pie"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _, auxv := e.stack(m, image.StackPointer)
		bias, interp := hostarch.Addr(auxv[linux.AT_ENTRY]-0x1010), hostarch.Addr(auxv[linux.AT_BASE])
		if uint64(bias)%align != 0 || uint64(interp)%align != 0 || bias == interp || interp == 0 {
			t.Errorf("alignment %#x: program at %v, interpreter at %v", align, bias, interp)
		}
		if image.Entry != interp+0x1010 {
			t.Errorf("entry %v, want the interpreter's %v", image.Entry, interp+0x1010)
		}
		for _, b := range []hostarch.Addr{bias, interp} {
			if got := e.read(m, b+0x1000, 4) + e.read(m, b+0x2ff0, 16); got != "pie!0123456789abcdef" {
				t.Errorf("at %v: %q", b, got)
			}
		}
		if auxv[linux.AT_PHDR] != uint64(bias)+headerSize {
			t.Errorf("AT_PHDR %#x, program at %v", auxv[linux.AT_PHDR], bias)
		}
		e.end(m)
	}
}

func TestScript(t *testing.T) {
	long := strings.Repeat("x", 300)
	for _, test := range []struct {
		head   string
		interp string
		arg    string
		ok     bool
		err    error
	}{
		{"#!/bin/sh\necho", "/bin/sh", "", true, nil},
		{"#!/bin/sh", "/bin/sh", "", true, nil},
		{"#! \t /bin/sh  -e  -x \t\n", "/bin/sh", "-e  -x", true, nil},
		{"#!/bin/sh\x00-e\n", "/bin/sh", "", true, nil},
		{"#!\n/bin/sh\n", "", "", true, unix.ENOEXEC},
		{"#!", "", "", true, unix.ENOEXEC},
		{"#!   ", "", "", true, unix.ENOEXEC},
		{"#!/" + long, "", "", true, unix.ENOEXEC},
		{"#!/i " + long, "/i", long[:scriptHead-5], true, nil},
		{"#/bin/sh", "", "", false, nil},
		{"", "", "", false, nil},
		{"\x7fELF", "", "", false, nil},
	} {
		head := test.head[:min(len(test.head), scriptHead)]
		interp, arg, ok, err := parseScript([]byte(head))
		if interp != test.interp || arg != test.arg || ok != test.ok || !errors.Is(err, test.err) {
			t.Errorf("parseScript(%.20q) = %q, %q, %v, %v; want %q, %q, %v, %v", head, interp, arg, ok, err, test.interp, test.arg, test.ok, test.err)
		}
	}

	e := newEnv(t)
	e.files["/bin/prog"] = static().bytes()
	e.files["/a"] = []byte("#!/b with arg\n")
	e.files["/b"] = []byte("#!/bin/prog\n")
	m, image, err := e.load("/a", []string{"zero", "one"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	argv, _, auxv := e.stack(m, image.StackPointer)
	if want := []string{"/bin/prog", "/b", "with arg", "/a", "one"}; !slices.Equal(argv, want) {
		t.Errorf("argv %q, want %q", argv, want)
	}
	if got := e.cstring(m, auxv[linux.AT_EXECFN]); got != "/a" || image.Name != "a" {
		t.Errorf("AT_EXECFN %q, name %q", got, image.Name)
	}
}

func TestErrors(t *testing.T) {
	good := static().bytes()
	edit := func(f func(b []byte)) []byte {
		b := bytes.Clone(good)
		f(b)
		return b
	}
	le := binary.LittleEndian
	ph := func(b []byte, i int) []byte { return b[headerSize+i*programSize:] }
	for name, test := range map[string]struct {
		file []byte
		err  error
		says string
	}{
		"empty":            {nil, unix.ENOEXEC, "#!"},
		"text":             {[]byte("text\n"), unix.ENOEXEC, "#!"},
		"short":            {good[:40], unix.ENOEXEC, "ends in the ELF header"},
		"no headers":       {good[:70], unix.ENOEXEC, "ends in the program headers"},
		"32 bits":          {edit(func(b []byte) { b[4] = 1 }), unix.ENOEXEC, "32-bit"},
		"big endian":       {edit(func(b []byte) { b[5] = 2 }), unix.ENOEXEC, "little-endian"},
		"other machine":    {edit(func(b []byte) { le.PutUint16(b[18:], 8) }), unix.ENOEXEC, "machine 8"},
		"object file":      {edit(func(b []byte) { le.PutUint16(b[16:], linux.ET_REL) }), unix.ENOEXEC, "type 1"},
		"header size":      {edit(func(b []byte) { le.PutUint16(b[54:], 55) }), unix.ENOEXEC, "55 bytes"},
		"no segments":      {edit(func(b []byte) { le.PutUint16(b[56:], 0) }), unix.ENOEXEC, "0 program headers"},
		"phoff":            {edit(func(b []byte) { le.PutUint64(b[32:], 1<<63) }), unix.ENOEXEC, "program headers"},
		"filesz > memsz":   {edit(func(b []byte) { le.PutUint64(ph(b, 1)[32:], 99) }), unix.ENOEXEC, "segment"},
		"wraps":            {edit(func(b []byte) { le.PutUint64(ph(b, 2)[40:], 1<<64-1) }), unix.ENOEXEC, "segment"},
		"not congruent":    {edit(func(b []byte) { le.PutUint64(ph(b, 1)[8:], 1) }), unix.ENOEXEC, "congruent"},
		"order":            {edit(func(b []byte) { le.PutUint64(ph(b, 2)[16:], 0x1100) }), unix.ENOEXEC, "order"},
		"kernel addresses": {edit(func(b []byte) { le.PutUint64(ph(b, 2)[16:], 1<<55+0x100) }), unix.ENOMEM, "no room"},
		"address 0":        {edit(func(b []byte) { le.PutUint64(ph(b, 0)[16:], 0) }), unix.ENOEXEC, "cannot be mapped"},
		"no interpreter":   {pie("/no/ld.so", hostarch.PageSize).bytes(), unix.ENOENT, "/no/ld.so"},
		"bad interpreter":  {pie("/text", hostarch.PageSize).bytes(), unix.ELIBBAD, "/text"},
		"script to itself": {[]byte("#!/prog\n"), unix.ELOOP, "deep"},
		"no shell":         {[]byte("#!/no/sh\n"), unix.ENOENT, "/no/sh"},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			e.files["/prog"], e.files["/text"] = test.file, []byte("text")
			m, _, err := e.load("/prog", []string{"prog"}, nil)
			e.end(m)
			if !errors.Is(err, test.err) || !strings.Contains(err.Error(), test.says) || !strings.Contains(err.Error(), "/prog") {
				t.Errorf("%v; want %v that says %q and /prog", err, test.err, test.says)
			}
		})
	}

	e := newEnv(t)
	e.files["/prog"] = good
	for name, argv := range map[string][]string{
		"long string":  {strings.Repeat("x", maxArgString)},
		"many strings": slices.Repeat([]string{strings.Repeat("x", 1000)}, 3000),
	} {
		if m, _, err := e.load("/prog", argv, nil); !errors.Is(err, unix.E2BIG) {
			t.Errorf("%s: %v, want E2BIG", name, err)
		} else {
			e.end(m)
		}
	}
	if m, _, err := e.load("/prog", slices.Repeat([]string{strings.Repeat("x", 1000)}, 2000), nil); err != nil {
		t.Errorf("2 MB of arguments with a stack of 8 MiB: %v", err)
	} else {
		e.end(m)
	}
}

// Ten thousand files with damaged headers: each is loaded or refused, and
// nothing is left of it.
func TestMutations(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 7))
	e := newEnv(t)
	e.files["/ld.so"] = pie("", hostarch.PageSize).bytes()
	seeds := [][]byte{static().bytes(), pie("/ld.so", 1<<16).bytes(), pie("", hostarch.PageSize).bytes()}
	interesting := []uint64{0, 1, 2, 0xfff, 0x1000, 0x1001, 1 << 31, 1<<32 - 1, 1 << 47, 1<<47 - 0x1000, 1 << 55, 1 << 56, 1 << 63, 1<<63 - 1, 1<<64 - 1, 1<<64 - 0x1000}
	loaded := 0
	for range 10000 {
		b := bytes.Clone(seeds[rnd.IntN(len(seeds))])
		headers := headerSize + 4*programSize
		for range 1 + rnd.IntN(4) {
			at := rnd.IntN(headers)
			switch rnd.IntN(3) {
			case 0:
				b[at] = byte(rnd.Uint32())
			case 1:
				b[at] ^= 1 << rnd.IntN(8)
			case 2:
				binary.LittleEndian.PutUint64(b[at&^7:], interesting[rnd.IntN(len(interesting))])
			}
		}
		if rnd.IntN(10) == 0 {
			b = b[:rnd.IntN(len(b))]
		}
		e.files["/prog"] = b
		m, _, err := e.load("/prog", []string{"prog"}, nil)
		if err == nil {
			loaded++
		}
		e.end(m)
	}
	if loaded == 0 || loaded == 10000 {
		t.Errorf("%d of 10000 were loaded", loaded)
	}
}

func FuzzLoad(f *testing.F) {
	f.Add(static().bytes())
	f.Add(pie("/ld.so", 1<<16).bytes())
	f.Add([]byte("#!/ld.so arg\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		e := newEnv(t)
		e.files["/ld.so"], e.files["/prog"] = pie("", hostarch.PageSize).bytes(), b
		m, _, _ := e.load("/prog", []string{"prog"}, nil)
		e.end(m)
	})
}
