package systrap

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
)

// Application code that means harm, run by a Sentry that does nothing for it.
// TestTraced runs all of it once more and looks at every system call of the host.

// tracedVar is set in the process whose stubs TestTraced traces.
const tracedVar = "RINGFENCE_SYSTRAP_TRACED"

// effort is how much is done: less when every system call is looked at.
func effort(n int) int {
	if os.Getenv(tracedVar) != "" {
		return max(1, n/4)
	}
	return n
}

// attacker is an application thread that does harm.
type attacker struct {
	m  *manager
	c  *threadContext
	ac *arch.Context64
}

func newAttacker(m *manager) *attacker {
	a := &attacker{m: m, c: &threadContext{}, ac: arch.New()}
	a.ac.SetIP(codeAddr)
	return a
}

// step lets it run until it has an event or a millisecond is over. It returns false
// when its AddressSpace is lost.
func (a *attacker) step(t *testing.T) bool {
	t.Helper()
	return !isContextError(bounded(t, a.c, a.m, a.ac))
}

// inBackground lets it run until stop is called or its AddressSpace is lost.
func (a *attacker) inBackground(t *testing.T) (stop func()) {
	t.Helper()
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		defer a.c.Release()
		for {
			select {
			case <-done:
				return
			default:
			}
			_, _, err := a.c.Switch(context.Background(), a.m, a.ac, -1)
			if isContextError(err) {
				return
			}
		}
	})
	ticker := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-ticker:
				return
			case <-time.After(time.Millisecond):
				a.c.Interrupt()
			}
		}
	})
	return func() {
		close(done)
		close(ticker)
		a.c.Interrupt()
		wg.Wait()
	}
}

// The application jumps to every byte of the stub's image, with random registers.
func TestJumpIntoImage(t *testing.T) {
	shorten(t)
	check := witness(t)
	rnd := rand.New(rand.NewPCG(3, 4))
	var m *manager
	died := 0
	const text = 1536 // bytes, more than there are
	for i := 0; i < text; i++ {
		if m == nil {
			m = newManager(t, syscallLoop)
		}
		a := newAttacker(m)
		image := m.as.zygote.Layout
		for _, r := range scRegisters(&a.ac.Regs) {
			switch rnd.IntN(4) {
			case 0:
				*r = rnd.Uint64()
			case 1:
				*r = uint64(m.as.at.slots) + rnd.Uint64N(chunkSize)&^7
			case 2:
				*r = uint64(rnd.UintN(512))
			case 3:
				*r = uint64(image.Start) + rnd.Uint64N(uint64(image.End-image.Start))
			}
		}
		a.ac.Regs.Eflags = 0x202
		if rnd.IntN(2) == 0 {
			a.ac.Regs.R12 = uint64(image.Start) + pageSize // as in the zygote
		}
		a.ac.SetIP(image.Start + uintptr(i))
		alive := true
		for range 3 {
			if alive = a.step(t); !alive {
				break
			}
		}
		a.c.Release()
		if !alive {
			m.as.Release()
			m = nil
			died++
		}
		if i%16 == 0 {
			check()
		}
	}
	t.Logf("%d stubs died", died)
}

// The application jumps to every byte of our text with a GS base that leads to where
// it should not, and to its own slot.
func TestJumpWithGS(t *testing.T) {
	shorten(t)
	check := witness(t)
	rnd := rand.New(rand.NewPCG(13, 14))
	var m *manager
	died := 0
	for off := uintptr(0); ; off++ {
		if m == nil {
			m = newManager(t, syscallLoop)
		}
		at := m.as.at
		if at.text+off >= at.textEnd {
			break
		}
		a, other := newAttacker(m), newAttacker(m)
		alive := other.step(t)
		if err := a.c.bind(m.as); err != nil {
			t.Fatal(err)
		}
		own := a.c.thread.addr
		if alive {
			bases := []uint64{own, own + stackSize, other.c.thread.addr, other.c.thread.addr + stackSize, uint64(at.ro), uint64(at.hint), uint64(at.slots) + 7*slotSize, codeAddr, 0, 1<<47 - 8}
			r := &a.ac.Regs
			for _, p := range scRegisters(r) {
				switch rnd.IntN(3) {
				case 0:
					*p = rnd.Uint64()
				case 1:
					*p = bases[rnd.IntN(len(bases))] + rnd.Uint64N(slotSize)&^7
				case 2:
					*p = codeAddr
				}
			}
			r.Eflags = 0x202
			r.Gs_base, r.Fs_base = bases[rnd.IntN(len(bases))], bases[rnd.IntN(len(bases))]
			a.ac.SetIP(at.text + off)
		}
		for n := 0; n < 3 && alive; n++ {
			alive = a.step(t) && other.step(t)
		}
		a.c.Release()
		other.c.Release()
		if !alive {
			m.as.Release()
			m = nil
			died++
		}
		if off%16 == 0 {
			check()
		}
	}
	t.Logf("%d stubs died", died)
}

// The application jumps to every system call instruction of the text with every
// number. All come back as if they had been made elsewhere, but for those that a
// handler needs.
func TestCallFromText(t *testing.T) {
	shorten(t)
	check := witness(t)
	text, err := textOf()
	if err != nil {
		t.Fatal(err)
	}
	var at []uintptr
	for i := range len(text.text) - 1 {
		if text.text[i] == 0x0f && text.text[i+1] == 0x05 {
			at = append(at, uintptr(i))
		}
		if b := text.text[i : i+2]; bytes.Equal(b, []byte{0xcd, 0x80}) || bytes.Equal(b, []byte{0x0f, 0x34}) {
			t.Errorf("the text has an instruction at %#x by which 32-bit code enters the kernel: % x", i, b)
		}
	}
	rnd := rand.New(rand.NewPCG(11, 12))
	var m *manager
	died, executed := 0, map[uint64]int{}
	for _, off := range at {
		for nr := range uint64(600) {
			if m == nil {
				m = newManager(t, syscallLoop)
			}
			a := newAttacker(m)
			r := &a.ac.Regs
			a.ac.SetIP(m.as.at.text + off)
			value := func() uint64 {
				return []uint64{0, 1, 2, codeAddr, pageSize, uint64(m.as.at.slots), m.as.ro(requestCalls), cloneThread, unix.PR_SET_SYSCALL_USER_DISPATCH}[rnd.IntN(9)]
			}
			r.Rax, r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8, r.R9 = nr, value(), value(), value(), value(), value(), value()
			r.R13, r.Rbx = uint64(m.as.at.ro), uint64(m.as.at.slots)+stackSize
			alive := a.step(t)
			if r.Orig_rax != nr {
				executed[nr]++
			}
			a.c.Release()
			if !alive {
				m.as.Release()
				m = nil
				died++
			}
		}
		check()
	}
	t.Logf("%d instructions; %d stubs died; not refused, or not in a millisecond: %v", len(at), died, executed)
}

// randomScribbler is code that writes random numbers from the seed RAX to every 8
// bytes from RDI to RSI, again and again.
var randomScribbler = []byte{
	0x48, 0x89, 0xf9, // mov %rdi, %rcx
	0x48, 0x89, 0xc2, 0x48, 0xc1, 0xe2, 0x0d, 0x48, 0x31, 0xd0, // rax ^= rax << 13
	0x48, 0x89, 0xc2, 0x48, 0xc1, 0xea, 0x07, 0x48, 0x31, 0xd0, // rax ^= rax >> 7
	0x48, 0x89, 0xc2, 0x48, 0xc1, 0xe2, 0x11, 0x48, 0x31, 0xd0, // rax ^= rax << 17
	0x48, 0x89, 0x01, // mov %rax, (%rcx)
	0x48, 0x83, 0xc1, 0x08, // add $8, %rcx
	0x48, 0x39, 0xf1, // cmp %rsi, %rcx
	0x72, 0xd6, // jb
	0xeb, 0xd1, // jmp
}

type mapping struct {
	start, end uint64
	perms      string
	line       string
}

// mappings returns what a process has mapped.
func mappings(t *testing.T, pid int) []mapping {
	t.Helper()
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/maps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var all []mapping
	for s := bufio.NewScanner(f); s.Scan(); {
		var m mapping
		if _, err := fmt.Sscanf(s.Text(), "%x-%x %s", &m.start, &m.end, &m.perms); err != nil {
			t.Fatalf("%q: %v", s.Text(), err)
		}
		m.line = s.Text()
		all = append(all, m)
	}
	return all
}

// writable returns what application code can write in the stub.
func writable(t *testing.T, as *addressSpace) []mapping {
	t.Helper()
	all := mappings(t, as.pid)
	all = slices.DeleteFunc(all, func(m mapping) bool { return !strings.Contains(m.perms, "w") })
	if len(all) < 2 {
		t.Fatalf("the stub has %d writable mappings; its slots and its hint page are two", len(all))
	}
	return all
}

// Everything in the stub that can be written is overwritten with random numbers
// while other threads make system calls and the Sentry maps and unmaps.
func TestOverwriteEverything(t *testing.T) {
	shorten(t)
	check := witness(t)
	regions := len(writable(t, newManager(t, syscallLoop).as))
	for i := range regions {
		died := 0
		for round := range effort(8) {
			m := newManager(t, append(slices.Clone(syscallLoop), randomScribbler...))
			f := platformtest.NewMemFile(t, hostarch.PageSize)
			victim, scribbler := newAttacker(m), newAttacker(m)
			alive := victim.step(t) // so that it has a slot, the first
			region := writable(t, m.as)
			if len(region) <= i {
				t.Fatalf("the stub has %d writable mappings, and had %d", len(region), regions)
			}
			scribbler.ac.SetIP(codeAddr + uintptr(len(syscallLoop)))
			scribbler.ac.Regs.Rax = uint64(round*regions+i)*0x9e3779b97f4a7c15 + 1
			scribbler.ac.Regs.Rdi, scribbler.ac.Regs.Rsi = region[i].start, region[i].end
			stop := scribbler.inBackground(t)
			for n := 0; n < 100 && alive; n++ {
				alive = victim.step(t)
				if m.as.MapFile(0x10000000, f, memmap.FileRange{End: hostarch.PageSize}, hostarch.ReadWrite, false) == nil {
					m.as.Unmap(0x10000000, hostarch.PageSize)
				}
				fresh := newAttacker(m)
				alive = fresh.step(t) && alive // new threads start in what is being overwritten
				fresh.c.Release()
				check()
			}
			if !alive {
				died++
			}
			stop()
			victim.c.Release()
			m.as.Release()
		}
		t.Logf("region %d: %d stubs died", i, died)
	}
}

// pokeCall is code that writes EAX to (RDI) and makes a system call, again and
// again; poke makes none.
var (
	pokeCall = []byte{0x89, 0x07, 0x0f, 0x05, 0xeb, 0xfa}
	poke     = []byte{0x89, 0x07, 0xeb, 0xfc}
)

// A thread gives the state of every slot every value: of its own, of one that is in
// a system call, of one that runs, of one that no Context has, of one that no thread
// has yet.
func TestForgeStates(t *testing.T) {
	shorten(t)
	check := witness(t)
	values := []uint32{0, 1, 2, 3, 4, 5, 0x7fffffff, 0xffffffff}
	for target := range 5 {
		died := 0
		for _, value := range values {
			m := newManager(t, slices.Concat(syscallLoop, pokeCall, poke, []byte{0xeb, 0xfe}))
			victims := []*attacker{newAttacker(m), newAttacker(m), newAttacker(m)}
			victims[1].ac.SetIP(codeAddr + uintptr(len(syscallLoop)+len(pokeCall)+len(poke)))
			alive := true
			for _, v := range victims {
				alive = v.step(t) && alive
			}
			victims[2].c.Release()
			stop := victims[1].inBackground(t)
			forger := newAttacker(m)
			if err := forger.c.bind(m.as); err != nil { // the third slot, that of the one who has gone
				t.Fatal(err)
			}
			idle := newAttacker(m)
			if err := idle.c.bind(m.as); err != nil {
				t.Fatal(err)
			}
			slot := []uintptr{2, 0, 1, 3, 5}[target]
			idle.c.Release()
			forger.ac.SetIP(codeAddr + uintptr(len(syscallLoop)))
			if target != 0 && value%2 == 0 {
				forger.ac.SetIP(codeAddr + uintptr(len(syscallLoop)+len(pokeCall)))
			}
			forger.ac.Regs.Rdi = uint64(m.as.at.slots + slot*slotSize + stackSize + headerState)
			for range effort(8) {
				forger.ac.Regs.Rax = uint64(value) // a system call's number, too
				alive = forger.step(t) && alive
				alive = victims[0].step(t) && alive
				fresh := newAttacker(m)
				alive = fresh.step(t) && alive
				fresh.c.Release()
				if !alive {
					died++
					break
				}
			}
			check()
			stop()
			forger.c.Release()
			victims[0].c.Release()
			m.as.Release()
		}
		t.Logf("target %d: %d of %d stubs died", target, died, len(values))
	}
}

// Frames that are changed in every part of them while the slot is the Sentry's, or
// just when it is given back: what other threads of the stub can do at best.
func TestForgeFrames(t *testing.T) {
	shorten(t)
	check := witness(t)
	rnd := rand.New(rand.NewPCG(5, 6))
	f := &theFrame
	var m *manager
	var a, second *attacker
	died := 0
	for range effort(240) {
		if m == nil {
			m = newManager(t, syscallLoop)
			a, second = newAttacker(m), newAttacker(m)
		}
		alive := a.step(t) && second.step(t)
		if alive {
			b := a.c.thread.slot
			interesting := []uint64{
				0, 1, ^uint64(0), 1 << 63, 1<<47 - 1, 1 << 47, 0xffff_8000_0000_0000, uint64(rnd.Uint64()),
				uint64(m.as.at.text), uint64(m.as.at.handler), uint64(m.as.at.ro), uint64(m.as.at.hint), uint64(m.as.at.slots),
				second.c.thread.addr, second.c.thread.frameAddr(), a.c.thread.addr, codeAddr, uint64(m.as.zygote.Layout.Start),
				0x23, 0x2b, 0x33, 0xffff_ffff_ff60_0000,
			}
			pick := func() uint64 { return interesting[rnd.IntN(len(interesting))] }
			for range 1 + rnd.IntN(3) {
				le := binary.LittleEndian
				switch rnd.IntN(9) {
				case 0: // flags, link and signal stack
					le.PutUint64(b[f.sp+frameUC+8*rnd.IntN(5):], pick())
				case 1: // registers, selectors, error code, floating point state
					le.PutUint64(b[f.sc+8*rnd.IntN(32):], pick())
				case 2:
					le.PutUint64(b[f.sp+frameUC+ucMask:], rnd.Uint64())
				case 3: // siginfo
					le.PutUint32(b[f.info+4*rnd.IntN(32):], uint32(pick()))
				case 4: // the FPU's header and what is software's
					le.PutUint64(b[f.fp+fpSoftware+8*rnd.IntN(14):], pick())
				case 5:
					le.PutUint32(b[f.fp+4*rnd.IntN(f.fpSize/4+1):], rnd.Uint32())
				case 6: // where the frame is, segment bases, what a call saves
					le.PutUint64(b[stackSize+8+8*rnd.IntN(headerSize/8-1):], pick())
				case 7: // where the handler would return to
					le.PutUint64(b[f.sp:], pick())
				case 8: // selectors
					le.PutUint16(b[f.sc+scCS+2*rnd.IntN(4):], uint16(pick()))
				}
			}
			for range 3 {
				if alive = a.step(t) && second.step(t); !alive {
					break
				}
			}
		}
		if !alive {
			died++
			a.c.Release()
			second.c.Release()
			m.as.Release()
			m = nil
			check()
		}
	}
	t.Logf("%d stubs died", died)
}

// gateLoop makes a system call after the other as patched code does. RBX is the
// address of ·call.
var gateLoop = []byte{
	0xb8, 39, 0, 0, 0, // mov $39, %eax
	0x48, 0x8d, 0x0d, 9, 0, 0, 0, // lea after, %rcx
	0x4c, 0x8d, 0x1d, 2, 0, 0, 0, // lea after, %r11
	0xff, 0xe3, // jmp *%rbx
	0xeb, 0xe9, // after: jmp .-21
}

// Calls without a signal, by a thread whose slot is changed meanwhile: by the
// Sentry's hand between two calls, and by another thread at any time.
func TestForgeCalls(t *testing.T) {
	shorten(t)
	check := witness(t)
	rnd := rand.New(rand.NewPCG(15, 16))
	caller := func() *attacker {
		m := newManager(t, slices.Concat(gateLoop, randomScribbler))
		a := newAttacker(m)
		if err := a.c.bind(m.as); err != nil {
			t.Fatal(err)
		}
		a.ac.Regs.Rbx, a.ac.Regs.Gs_base = uint64(m.as.at.call), a.c.thread.headerAddr()
		called := false
		for range 20 {
			alive := a.step(t)
			if called = a.c.thread.called; called || !alive {
				break
			}
		}
		if !called {
			t.Fatal("calls that nobody forges do not work")
		}
		return a
	}
	done := func(a *attacker) {
		a.c.Release()
		a.m.as.Release()
	}
	died := 0
	var a *attacker
	for range effort(400) {
		if a == nil {
			a = caller()
		}
		b := a.c.thread.slot[stackSize:]
		at := a.m.as.at
		interesting := []uint64{0, 1, 2, 3, 4, ^uint64(0), 1 << 63, 1 << 47, uint64(at.call), uint64(at.handler), uint64(at.makeCall), uint64(at.ro), a.c.thread.addr, codeAddr, rnd.Uint64()}
		for range 1 + rnd.IntN(2) {
			v := interesting[rnd.IntN(len(interesting))]
			if off := 4 * (1 + rnd.IntN(headerSize/4-1)); rnd.IntN(2) == 0 && off%8 == 0 {
				binary.LittleEndian.PutUint64(b[off:], v)
			} else {
				binary.LittleEndian.PutUint32(b[off:], uint32(v))
			}
		}
		if rnd.IntN(4) == 0 { // the floating point state, and its header
			fp := a.c.thread.slot[8*rnd.IntN(theFrame.fpSize/8):]
			if rnd.IntN(2) == 0 {
				fp = a.c.thread.slot[fpHeader+8*rnd.IntN(8):]
			}
			binary.LittleEndian.PutUint64(fp, interesting[rnd.IntN(len(interesting))])
		}
		switch rnd.IntN(4) {
		case 0: // an answer that is more than a result
			a.ac.Regs.Rdx ^= 1
		case 1: // what an application may ask for meanwhile
			a.c.PullFullState(a.m.as, a.ac)
		case 2:
			a.c.FullStateChanged()
		}
		for n := range 3 {
			if n == 1 { // once more as it should be, but for the slot
				a.ac.SetIP(codeAddr)
				a.ac.Regs.Rbx, a.ac.Regs.Gs_base = uint64(at.call), a.c.thread.headerAddr()
			}
			if !a.step(t) {
				done(a)
				a = nil
				died++
				check()
				break
			}
		}
	}
	if a != nil {
		done(a)
	}
	t.Logf("changed between calls: %d stubs died", died)

	died = 0
	rounds := effort(8)
	for round := range rounds {
		a := caller()
		scribbler := newAttacker(a.m)
		scribbler.ac.SetIP(codeAddr + uintptr(len(gateLoop)))
		scribbler.ac.Regs.Rax = uint64(round)*0x9e3779b97f4a7c15 + 1
		scribbler.ac.Regs.Rdi = a.c.thread.headerAddr()
		scribbler.ac.Regs.Rsi = a.c.thread.headerAddr() + headerSize
		switch round % 4 {
		case 0, 2:
			scribbler.ac.Regs.Rdi += 8 // all but the word
		case 3:
			scribbler.ac.Regs.Rdi = a.c.thread.addr // of the floating point
			scribbler.ac.Regs.Rsi = scribbler.ac.Regs.Rdi + uint64(theFrame.fpSize)
		}
		stop := scribbler.inBackground(t)
		for range 200 {
			if !a.step(t) {
				died++
				break
			}
			switch rnd.IntN(8) {
			case 0, 1:
				a.ac.Regs.Rdx ^= 1
			case 2:
				a.c.PullFullState(a.m.as, a.ac)
				a.c.FullStateChanged()
			}
		}
		check()
		stop()
		done(a)
	}
	t.Logf("changed at any time: %d of %d stubs died", died, rounds)
}

// Every number of a system call, and some that are none, comes to the Sentry, and to
// nobody else.
func TestAllNumbers(t *testing.T) {
	m := newManager(t, syscallLoop)
	a := newAttacker(m)
	defer a.c.Release()
	numbers := []uint64{^uint64(0), 1 << 31, 1<<32 | unix.SYS_EXIT_GROUP, 1 << 63}
	for nr := range uint64(600) {
		numbers = append(numbers, nr, nr|0x4000_0000) // and x32's
	}
	rnd := rand.New(rand.NewPCG(7, 8))
	args := func() uint64 {
		return []uint64{0, 1, uint64(m.as.pid), codeAddr, uint64(m.as.at.slots), uint64(m.as.at.ro), cloneThread, unix.SECCOMP_SET_MODE_FILTER, 1000}[rnd.IntN(9)]
	}
	for _, nr := range numbers {
		a.ac.SetIP(codeAddr)
		r := &a.ac.Regs
		r.Rax, r.Rdi, r.Rsi, r.Rdx, r.R10, r.R8, r.R9 = nr, args(), args(), args(), args(), args(), args()
		want := *r
		for {
			_, _, err := a.c.Switch(context.Background(), m, a.ac, -1)
			if err == platform.ErrContextInterrupt {
				continue
			}
			if err != nil {
				t.Fatalf("system call %#x: %v", nr, err)
			}
			break
		}
		if r.Orig_rax != nr&0xffff_ffff && r.Orig_rax != nr {
			t.Errorf("system call %#x is %#x to the Sentry", nr, r.Orig_rax)
		}
		if r.Rdi != want.Rdi || r.Rsi != want.Rsi || r.Rdx != want.Rdx || r.R10 != want.R10 || r.R8 != want.R8 || r.R9 != want.R9 {
			t.Errorf("the arguments of system call %#x have changed: %+v, want %+v", nr, *r, want)
		}
	}
}

// oddities is code that enters the kernel by other ways, or with a CPU in a state
// that few programs have. RBX is the address of a far pointer or of a function, RAX a
// value.
var oddities = []struct {
	name   string
	code   []byte
	values []uint64
}{
	{"int 0x80", []byte{0xcd, 0x80, 0xf4}, []uint64{1, 2, 11, 20, 120, 192}},
	{"sysenter", []byte{0x0f, 0x34, 0xf4}, []uint64{1, 2, 11, 20}},
	{"compat int 0x80", []byte{0xff, 0x2b, 0xcd, 0x80, 0xf4}, []uint64{1, 2, 11, 20, 120, 173, 119}},
	{"compat syscall", []byte{0xff, 0x2b, 0x0f, 0x05, 0xf4}, []uint64{1, 2, 11, 20, 120}},
	{"compat sysenter", []byte{0xff, 0x2b, 0x0f, 0x34, 0xf4}, []uint64{1, 2, 11, 20, 120}},
	{"compat loop", []byte{0xff, 0x2b, 0xeb, 0xfe}, []uint64{0}},
	{"vsyscall", []byte{0xff, 0xd3, 0xf4}, []uint64{0xffff_ffff_ff60_0000, 0xffff_ffff_ff60_0400, 0xffff_ffff_ff60_0800, 0xffff_ffff_ff60_0001}},
	// AC, TF, NT, DF, IOPL, ID.
	{"flags", []byte{0x50, 0x9d, 0x0f, 0x05, 0xf4}, []uint64{0x40202, 0x302, 0x4202, 0x602, 0x3202, 0x200202, 0x247fd7}},
	{"selectors", []byte{0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xe0, 0x8e, 0xe8, 0x0f, 0x05, 0xf4}, []uint64{0, 3, 0x23, 0x2b, 0x33, 0x53, 7, 0xffff}},
	{"pkru", []byte{0x31, 0xc9, 0x31, 0xd2, 0x0f, 0x01, 0xef, 0x0f, 0x05, 0xf4}, []uint64{0xffff_ffff, 0x5555_5554}},
	{"segment bases", []byte{0xf3, 0x48, 0x0f, 0xae, 0xd0, 0x0f, 0x05, 0xf3, 0x48, 0x0f, 0xae, 0xd8, 0x0f, 0x05, 0xf4}, []uint64{0, codeAddr, 1<<47 - 1, 1 << 47, ^uint64(0), 0xffff_8000_0000_0000}},
	{"far return", []byte{0x48, 0xcb}, []uint64{0}},
	{"iret", []byte{0x48, 0xcf}, []uint64{0}},
	{"icebp", []byte{0xf1, 0xf4}, []uint64{0}},
	{"int3", []byte{0xcc, 0xcd, 0x03, 0xcd, 0x04, 0xf4}, []uint64{0}},
	{"software interrupts", []byte{0xcd, 0x02, 0xf4}, []uint64{0}},
	{"ud2", []byte{0x0f, 0x0b}, []uint64{0}},
	{"rdmsr", []byte{0x0f, 0x32}, []uint64{0}},
	{"in", []byte{0xe4, 0x60}, []uint64{0}},
	{"cli", []byte{0xfa}, []uint64{0}},
	{"sysret", []byte{0x48, 0x0f, 0x07}, []uint64{0}},
}

// Afterwards the same thread, and another one, make system calls as before.
func TestOddities(t *testing.T) {
	shorten(t)
	check := witness(t)
	const stack, pointer = 0x20000000, 0x20000800
	for _, odd := range oddities {
		for _, value := range odd.values {
			for _, rsp := range []uint64{stack + 0x400, stack + 0x3f9, 0, 1 << 63, ^uint64(0)} {
				m := newManager(t, slices.Concat(odd.code, syscallLoop))
				data := platformtest.NewMemFile(t, hostarch.PageSize)
				var far [6]byte
				binary.LittleEndian.PutUint32(far[:], codeAddr+2)
				binary.LittleEndian.PutUint16(far[4:], 0x23)
				if _, err := unix.Pwrite(data.FD(), far[:], pointer-stack); err != nil {
					t.Fatal(err)
				}
				if err := m.as.MapFile(stack, data, memmap.FileRange{End: hostarch.PageSize}, hostarch.ReadWrite, false); err != nil {
					t.Fatal(err)
				}
				a, other := newAttacker(m), newAttacker(m)
				other.ac.SetIP(codeAddr + uintptr(len(odd.code)))
				a.ac.Regs.Rax, a.ac.Regs.Rbx, a.ac.Regs.Rsp = value, pointer, rsp
				if odd.name == "vsyscall" {
					a.ac.Regs.Rbx = value
				}
				alive := true
				for range 4 {
					if alive = a.step(t) && other.step(t); !alive {
						break
					}
				}
				if alive {
					a.ac = arch.New()
					a.ac.SetIP(codeAddr + uintptr(len(odd.code)))
					a.ac.Regs.Rax = 0x123
					var err error
					for range 10 {
						if _, _, err = a.c.Switch(context.Background(), m, a.ac, -1); err != platform.ErrContextInterrupt {
							break
						}
					}
					if err != nil || a.ac.Regs.Orig_rax != 0x123 {
						t.Errorf("%s, %#x, stack %#x: afterwards a system call gives %v, number %#x", odd.name, value, rsp, err, a.ac.Regs.Orig_rax)
					}
				} else {
					t.Logf("%s, %#x, stack %#x: the stub died", odd.name, value, rsp)
				}
				a.c.Release()
				other.c.Release()
				m.as.Release()
			}
		}
		check()
	}
}

// The Sentry is asked, on behalf of an application, to map and unmap what is the
// stub's own. Nothing changes.
func TestMapOverStub(t *testing.T) {
	m := newManager(t, syscallLoop)
	f := platformtest.NewMemFile(t, 1<<20)
	a := newAttacker(m)
	defer a.c.Release()
	a.step(t)
	at, image := m.as.at, m.as.zygote.Layout
	before := mappings(t, m.as.pid)
	for _, start := range []uintptr{at.slots, at.slots + pageSize, at.hint, at.ro, at.text &^ (pageSize - 1), image.Start, image.SignalStack[0], image.End - pageSize, image.End, 1 << 47, 1 << 63, 1<<64 - pageSize} {
		for _, length := range []uint64{pageSize, 16 * pageSize, 1 << 47, 1 << 63, 1<<64 - pageSize} {
			for _, addr := range []hostarch.Addr{hostarch.Addr(start), hostarch.Addr(start - pageSize)} {
				if end := uint64(addr) + length; end > uint64(addr) && end <= uint64(at.slots) {
					continue // the application's own
				}
				if err := m.as.MapFile(addr, f, memmap.FileRange{End: length}, hostarch.AnyAccess, false); !errors.Is(err, unix.EINVAL) {
					t.Errorf("MapFile of %#x bytes at %#x: %v, want EINVAL", length, addr, err)
				}
			}
		}
	}
	for _, wrong := range []memmap.FileRange{{Start: 1, End: pageSize + 1}, {Start: pageSize, End: 0}, {Start: 0, End: 1}, {}} {
		if err := m.as.MapFile(0x10000000, f, wrong, hostarch.Read, false); err == nil {
			t.Errorf("MapFile of the bytes %v of a file works", wrong)
		}
	}
	if after := mappings(t, m.as.pid); !slices.EqualFunc(before, after, func(a, b mapping) bool { return a.line == b.line }) {
		t.Errorf("the stub's mappings have changed from\n%v\nto\n%v", before, after)
	}
	if !a.step(t) {
		t.Error("the stub died")
	}
	for _, start := range []uintptr{at.slots, at.ro, image.Start} {
		m := newManager(t, syscallLoop)
		before := mappings(t, m.as.pid)
		m.as.Unmap(hostarch.Addr(start), pageSize)
		if m.as.check() == nil {
			t.Errorf("the AddressSpace lives on after Unmap at %#x, whose failure nobody has heard of", start)
		}
		if after := mappings(t, m.as.pid); len(after) != 0 && len(after) != len(before) {
			t.Errorf("Unmap at %#x has unmapped something", start)
		}
	}
}

// Stubs are killed at any moment. Whoever uses them gets an error, and nobody hangs.
func TestKilledStub(t *testing.T) {
	check := witness(t)
	rnd := rand.New(rand.NewPCG(9, 10))
	for range effort(24) {
		m := newManager(t, syscallLoop)
		f := platformtest.NewMemFile(t, hostarch.PageSize)
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				a := newAttacker(m)
				defer a.c.Release()
				for {
					_, _, err := a.c.Switch(context.Background(), m, a.ac, -1)
					if isContextError(err) {
						return
					}
				}
			})
		}
		wg.Go(func() { // new threads
			for {
				a := newAttacker(m)
				_, _, err := a.c.Switch(context.Background(), m, a.ac, -1)
				if isContextError(err) {
					return
				}
				defer a.c.Release()
			}
		})
		wg.Go(func() {
			for m.as.MapFile(0x10000000, f, memmap.FileRange{End: hostarch.PageSize}, hostarch.ReadWrite, false) == nil {
				m.as.Unmap(0x10000000, hostarch.PageSize)
			}
		})
		time.Sleep(time.Duration(rnd.IntN(5000)) * time.Microsecond)
		unix.Kill(m.as.pid, unix.SIGKILL)
		wg.Wait()
		m.as.Release()
		check()
	}
}

// While application threads keep the Sentry waiting, and forge what they can, it
// takes next to no CPU time itself.
func TestSentryDoesNotSpin(t *testing.T) {
	m := newManager(t, slices.Concat(poke, []byte{0xeb, 0xfe}))
	var threads []*attacker
	for range 3 {
		a := newAttacker(m)
		defer a.c.Release()
		a.ac.SetIP(codeAddr + uintptr(len(poke)))
		a.step(t)
		threads = append(threads, a)
	}
	// One of them writes the hint page, where the system call thread is waited for.
	threads[0].ac.SetIP(codeAddr)
	threads[0].ac.Regs.Rdi, threads[0].ac.Regs.Rax = uint64(m.as.at.hint)+64, 0
	sentryCPU(t, threads, func(time.Time) {})
}
