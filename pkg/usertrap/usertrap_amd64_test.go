package usertrap

import (
	"bytes"
	"context"
	"debug/elf"
	"debug/gosym"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/arch/x86/x86asm"
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/usermem"
)

func TestDecide(t *testing.T) {
	mov := func(nr byte) []byte { return []byte{0xb8, nr, 0, 0, 0, 0x0f, 0x05} }
	cat := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	cmp1, cmp0 := []byte{0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff}, []byte{0x48, 0x3d, 0x00, 0xf0, 0xff, 0xff}
	nops := bytes.Repeat([]byte{0x90}, 15)
	for _, test := range []struct {
		name   string
		before []byte // up to and with the system call instruction
		after  []byte
		nr     uint64
		varies bool
		want   any
	}{
		{name: "mov", before: cat(nops, mov(39)), nr: 39, want: movSyscall},
		{name: "mov at the start of what can be read", before: mov(39), nr: 39, want: movSyscall},
		{name: "mov and cmp", before: cat(nops, mov(39)), after: cmp1, nr: 39, want: movSyscall},
		{name: "xor edi before", before: cat(nops, []byte{0x31, 0xff}, mov(231)), nr: 231, want: movSyscall},
		// 00 b8 nr 00 00 00 is add %bh, nr(%rax): that would have faulted.
		{name: "mov $1 before", before: cat(nops, []byte{0xbf, 1, 0, 0, 0}, mov(1)), nr: 1, want: movSyscall},
		{name: "cmp", before: cat(nops, []byte{0x0f, 0x05}), after: cmp1, nr: 39, varies: true, want: syscallCmp},
		{name: "cmp of glibc", before: cat(nops, []byte{0x0f, 0x05}), after: cmp0, nr: 0, want: syscallCmp},
		{name: "guix's ioctl", before: cat(nops, []byte{0xc7, 0x44, 0x24}, mov(0x10)), nr: 16, want: Ambiguous},
		{name: "guix's ioctl and cmp", before: cat(nops, []byte{0xc7, 0x44, 0x24}, mov(0x10)), after: cmp1, nr: 16, want: syscallCmp},
		{name: "mov to R8D", before: cat(nops, []byte{0x41}, mov(39)), nr: 39, want: Ambiguous},
		{name: "lea", before: cat(nops, []byte{0x48, 0x8d}, mov(39)), nr: 39, want: Ambiguous},
		{name: "store to R8", before: cat(nops, []byte{0x41, 0x89}, mov(39)), nr: 39, want: Ambiguous},
		{name: "VEX", before: cat(nops, []byte{0xc5, 0xf8, 0x28}, mov(39)), nr: 39, want: Ambiguous},
		{name: "test as f7 /1", before: cat(nops, []byte{0xf7, 0x4d}, mov(39)), nr: 39, want: Ambiguous},
		{name: "test as f6 /1", before: cat(nops, []byte{0xf6, 0x8e}, mov(39)), nr: 39, want: Ambiguous},
		{name: "shl as c1 /6", before: cat(nops, []byte{0xc1, 0xb7}, mov(39)), nr: 39, want: Ambiguous},
		{name: "shl as d3 /6", before: cat(nops, []byte{0xd3, 0xb4}, mov(39)), nr: 39, want: Ambiguous},
		{name: "operand size and cmp", before: cat(nops, []byte{0x66, 0x0f, 0x05}), after: cmp1, nr: 39, want: Ambiguous},
		{name: "operand size, REX and cmp", before: cat(nops, []byte{0x66, 0x48, 0x0f, 0x05}), after: cmp1, nr: 39, want: Ambiguous},
		{name: "REX and cmp", before: cat(nops, []byte{0x66, 0x90, 0x48, 0x0f, 0x05}), after: cmp1, nr: 39, want: syscallCmp},
		{name: "another number", before: cat(nops, mov(39)), nr: 40, want: OtherNumber},
		{name: "it varies", before: cat(nops, mov(39)), nr: 39, varies: true, want: OtherNumber},
		{name: "the number of an address", before: cat(nops, []byte{0xb8, 0, 0, 0x40, 0, 0x0f, 5}), nr: 0x400000, want: OtherNumber},
		{name: "rt_sigreturn", before: cat(nops, mov(15)), nr: 15, want: Sigreturn},
		{name: "rt_sigreturn of gcc", before: cat(nops, []byte{0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 5}), nr: 15, want: Unknown},
		{name: "nothing", before: cat(nops, []byte{0x0f, 0x05}), after: nops[:6], nr: 39, want: Unknown},
		{name: "cmp that cannot be read", before: cat(nops, []byte{0x0f, 0x05}), after: cmp1[:5], nr: 39, want: Unknown},
		{name: "gone", before: cat(nops, []byte{0x0f, 0x0b}), after: cmp1, nr: 39, want: Unknown},
		{name: "int 80", before: cat(nops, []byte{0xcd, 0x80}), after: cmp1, nr: 39, want: Unknown},
	} {
		code := cat(test.before, test.after)
		if extra := len(test.before) - codeBefore; extra > 0 {
			code = code[extra:]
			test.before = test.before[extra:]
		}
		p, err := decide(code, len(test.before), test.nr, !test.varies)
		var got any = p
		if err != nil {
			got = err
		}
		if got != test.want {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
		}
	}
}

// Whatever instruction ends in bytes that look like the mov, it is refused, unless
// it accesses memory at RAX.
func TestNoTailIsPatched(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	tails := 0
	for range 400000 {
		b := make([]byte, maxInstruction)
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		nr := uint64(rnd.IntN(460))
		k := rnd.IntN(10)
		if rnd.IntN(2) == 0 { // more often something that exists
			b[0] = []byte{0x40, 0x41, 0x48, 0x49, 0x66, 0xc7, 0x81, 0x69, 0x89, 0x8b, 0x0f, 0xf2, 0xf3, 0xc4, 0xc5, 0x62}[rnd.IntN(16)]
		}
		b[k] = opMov
		binary.LittleEndian.PutUint32(b[k+1:], uint32(nr))
		inst, err := x86asm.Decode(b, 64)
		if err != nil || inst.Len != k+patchSize || k == 0 {
			continue
		}
		tails++
		code := append(bytes.Repeat([]byte{0x90}, maxInstruction-inst.Len), b[:inst.Len]...)
		code = append(code, 0x0f, 0x05)
		p, err := decide(code, len(code), nr, true)
		if err == nil && p == movSyscall && !needsRAX(&inst) {
			t.Fatalf("% x is patched: %v", b[:inst.Len], inst)
		}
	}
	if tails < 1000 {
		t.Errorf("only %d were tried", tails)
	}
}

// In this program's own text, whose instructions are known, nothing else than
// instructions is taken for one.
func TestOwnText(t *testing.T) {
	f, err := elf.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	text, err := f.Section(".text").Data()
	if err != nil {
		t.Fatal(err)
	}
	lines, err := f.Section(".gopclntab").Data()
	if err != nil {
		t.Fatal(err)
	}
	base := f.Section(".text").Addr
	table, err := gosym.NewTable(nil, gosym.NewLineTable(lines, base))
	if err != nil {
		t.Fatal(err)
	}
	starts := make(map[uint64]bool)
	for _, fn := range table.Funcs {
		if fn.Entry < base || fn.End > base+uint64(len(text)) {
			continue
		}
		b := text[fn.Entry-base : fn.End-base]
		for pc := uint64(0); pc < uint64(len(b)); {
			inst, err := x86asm.Decode(b[pc:], 64)
			if err != nil {
				break
			}
			starts[fn.Entry-base+pc] = true
			pc += uint64(inst.Len)
		}
	}
	patched := 0
	for i := codeBefore; i+codeAfter < len(text); i++ {
		if text[i-2] != 0x0f || text[i-1] != 0x05 || text[i-7] != opMov || !starts[uint64(i-2)] {
			continue
		}
		nr := uint64(binary.LittleEndian.Uint32(text[i-6:]))
		p, err := decide(text[i-codeBefore:i+codeAfter], codeBefore, nr, true)
		if err != nil || p != movSyscall {
			continue
		}
		patched++
		if !starts[uint64(i-7)] {
			t.Errorf("% x at %#x is no instruction", text[i-7:i], base+uint64(i-7))
		}
	}
	if patched == 0 {
		t.Error("this program has no system calls")
	}
}

// memory is a MemoryManager with some pages of memory.
type memory struct {
	platform.MemoryManager
	pages map[hostarch.Addr][]byte
	state platform.TextState
	// refuse is what PatchText returns; before is called at its start.
	refuse  error
	before  func()
	patched map[hostarch.Addr][]byte // what was there
	full    bool
}

func newMemory() *memory {
	return &memory{pages: make(map[hostarch.Addr][]byte), patched: make(map[hostarch.Addr][]byte)}
}

func (m *memory) MMap(_ context.Context, o memmap.MMapOpts) (hostarch.Addr, error) {
	if m.full {
		return 0, unix.ENOMEM
	}
	for a := o.Addr; a < o.Addr+hostarch.Addr(o.Length); a += hostarch.PageSize {
		if m.pages[a] != nil || a < 0x10000 || a >= 1<<47 {
			return 0, unix.EEXIST
		}
	}
	for a := o.Addr; a < o.Addr+hostarch.Addr(o.Length); a += hostarch.PageSize {
		m.pages[a] = make([]byte, hostarch.PageSize)
	}
	return o.Addr, nil
}

func (m *memory) each(addr hostarch.Addr, n int, f func(i int, b *byte)) (int, error) {
	for i := range n {
		p := m.pages[(addr + hostarch.Addr(i)).RoundDown()]
		if p == nil {
			return i, unix.EFAULT
		}
		f(i, &p[(addr+hostarch.Addr(i)).PageOffset()])
	}
	return n, nil
}

func (m *memory) CopyIn(_ context.Context, addr hostarch.Addr, dst []byte, _ usermem.IOOpts) (int, error) {
	return m.each(addr, len(dst), func(i int, b *byte) { dst[i] = *b })
}

func (m *memory) CopyOut(_ context.Context, addr hostarch.Addr, src []byte, _ usermem.IOOpts) (int, error) {
	return m.each(addr, len(src), func(i int, b *byte) { *b = src[i] })
}

func (m *memory) PatchText(ctx context.Context, addr hostarch.Addr, new []byte, start hostarch.Addr, code []byte) error {
	if m.before != nil {
		m.before()
	}
	if m.refuse != nil {
		return m.refuse
	}
	b := make([]byte, len(code))
	m.CopyIn(ctx, start, b, usermem.IOOpts{})
	if !bytes.Equal(b, code) {
		return platform.TextChanged
	}
	m.patched[addr] = b[addr-start:][:len(new)]
	m.CopyOut(ctx, addr, new, usermem.IOOpts{})
	return nil
}

func (m *memory) UnpatchText(ctx context.Context, addr hostarch.Addr) error {
	if old := m.patched[addr]; old != nil {
		m.CopyOut(ctx, addr, old, usermem.IOOpts{})
		delete(m.patched, addr)
	}
	return nil
}

func (m *memory) RestoreText(ctx context.Context) error {
	for addr := range m.patched {
		m.UnpatchText(ctx, addr)
	}
	return nil
}

func (m *memory) TextState(create func() platform.TextState) platform.TextState {
	if m.state == nil {
		m.state = create()
	}
	return m.state
}

// machine executes the few instructions that patches consist of.
type machine struct {
	m                 *memory
	ip, rcx, r11, rax uint64
	compared          int
}

// run executes until the system call is made: by the instruction, or at call. It
// returns an error for anything else.
func (c *machine) run(t *testing.T, call uint64) bool {
	t.Helper()
	for range 10 {
		b := make([]byte, maxInstruction)
		n, _ := c.m.CopyIn(context.Background(), hostarch.Addr(c.ip), b, usermem.IOOpts{})
		inst, err := x86asm.Decode(b[:n], 64)
		if err != nil {
			t.Fatalf("at %#x: % x: %v", c.ip, b[:n], err)
		}
		next := c.ip + uint64(inst.Len)
		rel := func(a x86asm.Arg) uint64 {
			switch a := a.(type) {
			case x86asm.Rel:
				return next + uint64(int64(a))
			case x86asm.Mem:
				if a.Base == x86asm.RIP {
					return next + uint64(int64(int32(a.Disp)))
				}
			}
			t.Fatalf("at %#x: %v", c.ip, inst)
			return 0
		}
		switch inst.Op {
		case x86asm.MOV:
			switch inst.Args[0] {
			case x86asm.EAX:
				c.rax = uint64(inst.Args[1].(x86asm.Imm))
			case x86asm.R11:
				c.r11 = c.rcx
			}
		case x86asm.LEA:
			if inst.Args[0] == x86asm.RCX {
				c.rcx = rel(inst.Args[1])
			} else {
				c.r11 = rel(inst.Args[1])
			}
		case x86asm.JMP:
			if _, ok := inst.Args[0].(x86asm.Mem); ok {
				var b [8]byte
				c.m.CopyIn(context.Background(), hostarch.Addr(rel(inst.Args[0])), b[:], usermem.IOOpts{})
				c.ip = binary.LittleEndian.Uint64(b[:])
				if c.ip != call {
					t.Fatalf("a trampoline calls %#x", c.ip)
				}
				return true
			}
			next = rel(inst.Args[0])
		case x86asm.SYSCALL:
			c.ip, c.rcx = next, next
			return false
		case x86asm.CMP:
			c.compared++
		case x86asm.NOP:
			c.ip = next
			return false
		default:
			t.Fatalf("at %#x: %v", c.ip, inst)
		}
		c.ip = next
	}
	t.Fatal("it does not end")
	return false
}

const (
	testCall = 0x7fff_ffff_e000
	testPage = 0x5555_5555_0000
	testText = testPage + 0x40
)

// patchedAt returns memory in which code is at text and was patched; the system call
// instruction ends at ip.
func patchedAt(t *testing.T, text uint64, code []byte, ip, nr uint64) (*memory, *Table, *Stats) {
	t.Helper()
	m := newMemory()
	for a := text &^ 4095; a < text+4096; a += 4096 {
		m.pages[hostarch.Addr(a)] = bytes.Repeat([]byte{0x90}, 4096)
	}
	m.CopyOut(context.Background(), hostarch.Addr(text), code, usermem.IOOpts{})
	var stats Stats
	table := NewTable(testCall, &stats)
	table.Patch(context.Background(), m, ip, nr, true)
	return m, table, &stats
}

// A patch calls with the registers that the instruction gives, goes on where it
// would, and every place in it stands for one in the original.
func TestTrampolines(t *testing.T) {
	ctx := context.Background()
	for _, test := range []struct {
		name    string
		code    []byte
		syscall uint64 // offset of the instruction
	}{
		{"mov", []byte{0xb8, 39, 0, 0, 0, 0x0f, 0x05}, 5},
		{"cmp", []byte{0x0f, 0x05, 0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff}, 0},
	} {
		for _, text := range []uint64{testText, 0x401020, 0x40f123, 0x7fff_0000_0ff0, 0x12345} {
			t.Run(test.name, func(t *testing.T) {
				ip := text + test.syscall + 2
				m, table, stats := patchedAt(t, text, test.code, ip, 39)
				if s := stats.Get(); s.Patched != 1 || len(s.Refused) != 0 {
					t.Fatalf("%+v", s)
				}
				c := &machine{m: m, ip: text, rax: 39}
				if !c.run(t, testCall) {
					t.Fatal("the patched code traps")
				}
				if c.rcx != ip || c.rax != 39 {
					t.Errorf("RCX is %#x, RAX %d", c.rcx, c.rax)
				}
				c.ip = c.r11
				if c.run(t, testCall) || c.ip <= text+uint64(len(test.code)) || c.ip > text+uint64(len(test.code))+2 {
					t.Errorf("it goes on at %#x", c.ip)
				}
				if test.name == "cmp" != (c.compared == 1) {
					t.Errorf("compared %d times", c.compared)
				}
				// Whoever goes on behind the instruction finds one that does not exist.
				to, ok := table.Continue(ctx, m, ip)
				if ok != (test.name == "cmp") || ok && to != c.r11 && to != table.sites[0].trampoline+trampolineCmp {
					t.Errorf("Continue: %#x, %v", to, ok)
				}
				if b := m.pages[hostarch.Addr(ip).RoundDown()][ip%4096]; test.name == "cmp" && !invalidOpcode(b) {
					t.Errorf("behind the system call instruction is %#x", b)
				}
				// From wherever an interrupt comes, the call is made once.
				s := table.sites[0]
				for at := s.trampoline; at < s.trampoline+trampolineSize; at++ {
					to, ok := table.Settle(at)
					if !ok {
						continue
					}
					if to < text || to >= text+uint64(len(test.code)) && at-s.trampoline != cmpBack {
						t.Errorf("Settle(%d) = %#x", at-s.trampoline, to)
					}
				}
				if _, ok := table.Settle(s.trampoline - 1); ok {
					t.Error("Settle of what is before a trampoline")
				}
				child := table.Fork().(*Table)
				if to, ok := child.Settle(s.trampoline); !ok || to != text {
					t.Errorf("Settle in a child: %#x, %v", to, ok)
				}
				// Undone.
				if stopped, err := table.Stop(ctx, m, Asked); !stopped || err != nil {
					t.Errorf("Stop: %v, %v", stopped, err)
				}
				b := make([]byte, len(test.code))
				m.CopyIn(ctx, hostarch.Addr(text), b, usermem.IOOpts{})
				if !bytes.Equal(b, test.code) {
					t.Errorf("after Stop there is % x", b)
				}
				// Whoever got SIGILL before goes on with what is there now, unless that is
				// something else.
				if to, ok := table.Continue(ctx, m, ip); ok != (test.name == "cmp") || ok && to != ip {
					t.Errorf("Continue of what is not patched any more: %#x, %v", to, ok)
				}
				m.CopyOut(ctx, hostarch.Addr(ip), []byte{0x06}, usermem.IOOpts{})
				if _, ok := table.Continue(ctx, m, ip); ok {
					t.Error("Continue where the application has put other code")
				}
				table.Patch(ctx, m, ip, 39, true)
				if stats.Get().Patched != 1 || table.On() {
					t.Error("patched after Stop")
				}
				if again, _ := table.Stop(ctx, m, Asked); again {
					t.Error("stopped twice")
				}
				if !child.On() {
					t.Error("the child was stopped as well")
				}
			})
		}
	}
}

// What is patched is left alone: threads that trapped before come later, and others
// jump to the system call instruction.
func TestPatchedAlready(t *testing.T) {
	mov, cmp := []byte{0xb8, 39, 0, 0, 0}, []byte{0x0f, 0x05, 0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff}
	for _, test := range []struct {
		name    string
		code    []byte
		syscall uint64
	}{
		{"mov", append(mov, 0x0f, 0x05), 5},
		{"cmp", cmp, 0},
		{"mov and cmp", append(mov, cmp...), 5},
	} {
		ip := testText + test.syscall + 2
		m, table, stats := patchedAt(t, testText, test.code, ip, 39)
		was := bytes.Clone(m.pages[testPage])
		for _, same := range []bool{true, false} {
			table.Patch(context.Background(), m, ip, 39, same)
		}
		if s := stats.Get(); s.Patched != 1 || len(s.Refused) != 0 || !bytes.Equal(m.pages[testPage], was) {
			t.Errorf("%s: %+v", test.name, s)
		}
		// Undone, it is patched again.
		m.RestoreText(context.Background())
		table.Patch(context.Background(), m, ip, 39, true)
		if s := stats.Get(); s.Patched != 2 || len(s.Refused) != 0 {
			t.Errorf("%s, undone: %+v", test.name, s)
		}
	}
}

// Every refusal has a reason, and is counted once.
func TestRefusals(t *testing.T) {
	ctx := context.Background()
	code := []byte{0xb8, 39, 0, 0, 0, 0x0f, 0x05}
	for name, test := range map[string]struct {
		prepare func(m *memory)
		want    platform.TextRefusal
	}{
		"by the memory manager": {func(m *memory) { m.refuse = platform.TextShared }, platform.TextShared},
		"failure":               {func(m *memory) { m.refuse = unix.ENOMEM }, Failed},
		"no room":               {func(m *memory) { m.full = true }, NoRoom},
		"not there":             {func(m *memory) { clear(m.pages) }, Failed},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMemory()
			m.pages[testPage] = bytes.Repeat([]byte{0x90}, 4096)
			m.CopyOut(ctx, testText, code, usermem.IOOpts{})
			test.prepare(m)
			var stats Stats
			table := NewTable(testCall, &stats)
			for range 3 {
				table.Patch(ctx, m, testText+7, 39, true)
			}
			s := stats.Get()
			if s.Patched != 0 || len(s.Refused) != 1 || s.Refused[test.want] != 1 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// What a patch relies on is in one page: the rest of the pattern, and in front of it
// what could be the beginning of a longer instruction.
func TestTwoPages(t *testing.T) {
	ctx := context.Background()
	for _, test := range []struct {
		name          string
		code          []byte
		syscall       uint64
		before, after uint64 // how far from the start and the end of a page it can be
	}{
		{"mov", []byte{0xb8, 39, 0, 0, 0, 0x0f, 0x05}, 5, maxInstruction - patchSize, 7},
		{"cmp", []byte{0x0f, 0x05, 0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff}, 0, maxInstruction - syscallSize, 8},
	} {
		for off := uint64(0); off < 4096; off++ {
			if off == 32 {
				off = 4096 - 32
			}
			m := newMemory()
			for page := hostarch.Addr(testPage - 4096); page <= testPage+4096; page += 4096 {
				m.pages[page] = bytes.Repeat([]byte{0x90}, 4096)
			}
			addr := testPage + off
			m.CopyOut(ctx, hostarch.Addr(addr), test.code, usermem.IOOpts{})
			var stats Stats
			table := NewTable(testCall, &stats)
			table.Patch(ctx, m, addr+test.syscall+2, 39, true)
			want := off >= test.before && off+test.after <= 4096
			if s := stats.Get(); (s.Patched == 1) != want || !want && s.Refused[platform.TextTwoPages] != 1 {
				t.Errorf("%s at %#x of a page: %+v", test.name, off, s)
			}
		}
	}
}

// Whatever was looked at may change until the patch is made, which then is not made.
func TestChangedMeanwhile(t *testing.T) {
	for _, test := range []struct {
		name        string
		code        []byte
		syscall     int
		first, last int // what is looked at, from the end of the system call instruction on
	}{
		{"mov", []byte{0xb8, 39, 0, 0, 0, 0x0f, 0x05}, 5, -17, -1},
		{"cmp", []byte{0x0f, 0x05, 0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff}, 0, -15, 5},
	} {
		for off := -20; off < 10; off++ {
			m := newMemory()
			m.pages[testPage] = bytes.Repeat([]byte{0x90}, 4096)
			m.CopyOut(context.Background(), testText, test.code, usermem.IOOpts{})
			ip := testText + test.syscall + 2
			m.before = func() { m.pages[testPage][ip+off-testPage] ^= 0x55 }
			var stats Stats
			NewTable(testCall, &stats).Patch(context.Background(), m, uint64(ip), 39, true)
			want := off < test.first || off > test.last
			if s := stats.Get(); (s.Patched == 1) != want || !want && s.Refused[platform.TextChanged] != 1 {
				t.Errorf("%s, %d: %+v", test.name, off, s)
			}
		}
	}
}

// A patch to whose middle threads jump all the time is undone, in one process, and
// not made again.
func TestJumps(t *testing.T) {
	ctx := context.Background()
	code := []byte{0x0f, 0x05, 0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff}
	m, table, stats := patchedAt(t, testText, bytes.Repeat(code, 2), testText+2, 39)
	table.Patch(ctx, m, testText+10, 39, true)
	child := table.Fork().(*Table)
	jump := func() uint64 {
		to, ok := table.Continue(ctx, m, testText+2)
		if !ok {
			t.Fatal("a jump to the middle of a patch is not known")
		}
		return to
	}
	for range maxJumps / 2 {
		if jump() == testText+2 {
			t.Fatal("undone too early")
		}
	}
	if s := stats.Get(); s.Jumps != maxJumps/2 || len(s.Refused) != 0 {
		t.Errorf("%+v", s)
	}
	// Seldom is never too often.
	for range maxJumps {
		table.jumps[testText].since = time.Time{}
		jump()
	}
	n := 0
	for ; jump() != testText+2; n++ {
		if n == 1000*maxJumps {
			t.Fatal("it is never undone")
		}
	}
	b := make([]byte, len(code))
	if m.CopyIn(ctx, testText, b, usermem.IOOpts{}); !bytes.Equal(b, code) {
		t.Errorf("now there is % x", b)
	}
	if m.CopyIn(ctx, testText+8, b, usermem.IOOpts{}); bytes.Equal(b, code) {
		t.Error("the other patch was undone as well")
	}
	table.Patch(ctx, m, testText+2, 39, true)
	if s := stats.Get(); s.Patched != 2 || s.Refused[Jumped] != 1 {
		t.Errorf("%+v", s)
	}
	if m.CopyIn(ctx, testText, b, usermem.IOOpts{}); !bytes.Equal(b, code) {
		t.Error("it was patched again")
	}
	// Of what was undone threads are still in the trampoline.
	if to, ok := table.Settle(table.byAddr[testText].trampoline); !ok || to != testText {
		t.Errorf("Settle: %#x, %v", to, ok)
	}
	if len(child.jumps) != 0 {
		t.Error("the child counts its parent's jumps")
	}
	if again := table.Fork().(*Table); !again.jumps[testText].undone {
		t.Error("a child forgets what was undone")
	}
}

// Of many threads that jump to the middle of a patch too often, one undoes it.
func TestJumpsAtOnce(t *testing.T) {
	const threads = 4
	code := []byte{0x0f, 0x05, 0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff}
	m, table, stats := patchedAt(t, testText, code, testText+2, 39)
	j := &jumps{since: time.Now().Add(time.Hour), n: maxJumps}
	table.jumps[testText] = j
	table.patchMu.Lock()
	var wg sync.WaitGroup
	for range threads {
		wg.Go(func() { table.Continue(context.Background(), m, testText+2) })
	}
	for n := uint32(0); n < maxJumps+threads; runtime.Gosched() { // until all want to
		table.mu.Lock()
		n = j.n
		table.mu.Unlock()
	}
	table.patchMu.Unlock()
	wg.Wait()
	if s := stats.Get(); s.Refused[Jumped] != 1 {
		t.Errorf("%+v", s)
	}
}

// Something else that came to lie where trampolines were is not overwritten.
// Whoever is in a system call is told when the code around it changes.
func TestChanges(t *testing.T) {
	code := []byte{0x0f, 0x05, 0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff}
	_, table, _ := patchedAt(t, testText, code, testText+2, 39)
	for _, test := range []struct {
		start, end hostarch.Addr
		want       bool
	}{
		{testText - hostarch.PageSize, testText, false},
		{testText + hostarch.PageSize, testText + 2*hostarch.PageSize, false},
		{testText, testText + hostarch.PageSize, true},
		{0, 1 << 47, true},
	} {
		before := table.Changes()
		table.Lose(hostarch.AddrRange{Start: test.start, End: test.end})
		if got := table.Changes() != before; got != test.want {
			t.Errorf("from %v to %v: %v", test.start, test.end, got)
		}
	}
}

func TestAreaIsGone(t *testing.T) {
	ctx := context.Background()
	code := []byte{0xb8, 39, 0, 0, 0, 0x0f, 0x05}
	m, table, stats := patchedAt(t, testText, bytes.Repeat(code, 2), testText+7, 39)
	for a := table.areas[0].start; a < table.areas[0].start+areaSize; a += 4096 {
		m.pages[hostarch.Addr(a)] = bytes.Repeat([]byte{0x55}, 4096)
	}
	table.Patch(ctx, m, testText+14, 39, true)
	if s := stats.Get(); s.Patched != 1 || s.Refused[NoRoom] != 1 {
		t.Errorf("%+v", s)
	}
}

// There is room for as many trampolines as there may be, and then there is none.
func TestManySites(t *testing.T) {
	ctx := context.Background()
	m := newMemory()
	var stats Stats
	table := NewTable(testCall, &stats)
	code := []byte{0x0f, 0x05, 0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff}
	for i := uint64(0); i < maxSites+50; i++ {
		addr := hostarch.Addr(testText + i*16)
		if m.pages[addr.RoundDown()] == nil {
			m.pages[addr.RoundDown()] = bytes.Repeat([]byte{0x90}, 4096)
		}
		m.CopyOut(ctx, addr, code, usermem.IOOpts{})
		table.Patch(ctx, m, uint64(addr)+2, 1, false)
	}
	s := stats.Get()
	if s.Patched < maxSites/2 || s.Refused[platform.TextTooMany] == 0 {
		t.Errorf("%+v", s)
	}
	for i, s := range table.sites {
		if i > 0 && s.trampoline < table.sites[i-1].trampoline+trampolineSize {
			t.Fatalf("trampolines at %#x and %#x", table.sites[i-1].trampoline, s.trampoline)
		}
	}
}

func TestCounts(t *testing.T) {
	var c Counts
	hots := 0
	for i := range 64*Threshold - 1 {
		hot, same := c.Hot(1000, 39)
		if hot {
			hots++
		}
		if hot && (i != Threshold-1 || !same) {
			t.Errorf("trap %d: %v, %v", i, hot, same)
		}
	}
	if hots != 1 {
		t.Errorf("hot %d times", hots)
	}
	c = Counts{}
	for i := range Threshold {
		if _, same := c.Hot(1000, uint64(i/2)); same {
			t.Error("numbers vary")
		}
	}
}

// Nothing that code contains makes decide panic, and what it takes for a mov is
// there.
func FuzzDecide(f *testing.F) {
	f.Add([]byte{0xc7, 0x44, 0x24, 0xb8, 0x10, 0, 0, 0, 0x0f, 0x05}, uint16(10), uint64(16))
	f.Add([]byte{0xb8, 39, 0, 0, 0, 0x0f, 0x05, 0x48, 0x3d, 1, 0xf0, 0xff, 0xff}, uint16(7), uint64(39))
	f.Fuzz(func(t *testing.T, code []byte, pos uint16, nr uint64) {
		p := int(pos)
		if p > len(code) || len(code) > codeBefore+codeAfter {
			return
		}
		got, err := decide(code, p, nr, true)
		if err != nil {
			if !errors.As(err, new(platform.TextRefusal)) {
				t.Errorf("%v is no refusal", err)
			}
			return
		}
		if !bytes.Equal(code[p-2:p], []byte{0x0f, 0x05}) {
			t.Error("there is no system call instruction")
		}
		if got == movSyscall && (code[p-7] != opMov || uint64(binary.LittleEndian.Uint32(code[p-6:])) != nr) {
			t.Error("there is no mov")
		}
	})
}
