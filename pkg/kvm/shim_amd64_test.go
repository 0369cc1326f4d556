package kvm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"reflect"
	"runtime"
	"testing"
	"time"

	"golang.org/x/arch/x86/x86asm"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/sysmsg"
)

// The shim is what its source says, and fits.
func TestMakeShim(t *testing.T) {
	for _, ring0 := range []bool{false, true} {
		code, labels := makeShim(0xa100, ring0, maxPauses)
		if len(code) > shimSize {
			t.Errorf("%d bytes, there is room for %d", len(code), shimSize)
		}
		var text []string
		for at := 0; at < len(code); {
			inst, err := x86asm.Decode(code[at:], 64)
			if err != nil {
				t.Fatalf("at %#x: %v", at, err)
			}
			text = append(text, x86asm.IntelSyntax(inst, uint64(at), nil))
			if uint64(at) == labels.leave && inst.Op != x86asm.HLT {
				t.Errorf("it leaves with %v", inst)
			}
			at += inst.Len
			// The flags are the application's until it gives up.
			switch inst.Op {
			case x86asm.MOV, x86asm.NOT, x86asm.XCHG, x86asm.LEA, x86asm.JRCXZ, x86asm.JMP, x86asm.PAUSE, x86asm.CMPXCHG, x86asm.HLT, x86asm.SYSRET:
			default:
				t.Errorf("%v may change flags", inst)
			}
		}
		if uint64(len(code)) != labels.end || labels.posted == 0 {
			t.Errorf("labels %+v, %d bytes", labels, len(code))
		}
		t.Logf("%q", text)
	}
}

// withShims makes sure that a platform has shims, whatever is gained by them here: with
// one CPU nobody looks at slots, and the shim always leaves.
func withShims(t *testing.T, vcpus int) *kvm {
	t.Helper()
	p := newTestPlatformOf(t, constructor{options{vcpus: vcpus, spin: patient}})
	if p.m.shims == 0 {
		if err := p.m.enableShims(); err != nil {
			t.Fatal(err)
		}
		p.m.runners.max = maxRunners()
		p.m.spins, p.m.entrySpins = sysmsg.Spins(patient), sysmsg.Spins(p.probe.roundTrip)
	}
	return p
}

// onThread runs f on a thread to which the guest is bound.
func (g *guest) onThread(f func()) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	g.c.(*vcpuContext).BindThread()
	f()
}

// wait makes Switches until the thread waits in the shim, for runners can be late. It
// returns false if that cannot be here.
func (g *guest) wait() bool {
	g.t.Helper()
	c := g.c.(*vcpuContext)
	if c.m.runners.max == 0 {
		return false
	}
	for deadline := time.Now().Add(20 * time.Second); c.parked == nil; {
		if err := g.run(); err != nil {
			g.t.Fatal(err)
		}
		if time.Now().After(deadline) {
			g.t.Fatal("the thread never waits in the shim")
		}
	}
	return true
}

func (g *guest) run() error {
	_, _, err := g.c.Switch(context.Background(), probeMemory{as: g.as}, g.ac, -1)
	return err
}

// codeCount is inc %rbx; mov %rbx, %rdi; syscall; jmp to the start.
var codeCount = []byte{0x48, 0xff, 0xc3, 0x48, 0x89, 0xdf, 0x0f, 0x05, 0xeb, 0xf6}

// Whatever happens to a thread that waits in the shim, it goes on where it was, with
// the result that it was given and all of its registers.
func TestShim(t *testing.T) {
	p := withShims(t, 2)
	g := newGuestOf(t, p, codeCount)
	c := g.c.(*vcpuContext)
	other := newGuestOf(t, p, codeCount)
	g.onThread(func() {
		want := g.ac.Regs
		want.R12, want.R15, want.Rbp, want.Rsp = 12, 15, 16, 0x7000
		g.ac.Regs = want
		if err := g.run(); err != nil {
			t.Fatal(err)
		}
		calls := uint64(1)
		answers, parked := 0, 0
		for i := range 3000 {
			if g.ac.Regs.Rdi != calls {
				t.Fatalf("round %d: call %d says it is %d", i, calls, g.ac.Regs.Rdi)
			}
			if c.parked != nil {
				parked++
			}
			switch i % 16 {
			case 1:
				c.PrepareSleep()
			case 2:
				if err := g.c.PullFullState(g.as, g.ac); err != nil {
					t.Fatal(err)
				}
				r := &g.ac.Regs
				if r.Rbx != calls || r.R12 != 12 || r.R15 != 15 || r.Rbp != 16 || r.Rsp != 0x7000 || r.Rip != codeAddr+8 {
					t.Fatalf("round %d: registers %+v", i, r)
				}
			case 3:
				g.c.Interrupt()
				for err := g.run(); err != platform.ErrContextInterrupt; err = g.run() {
					if calls++; err != nil || g.ac.Regs.Rdi != calls {
						t.Fatalf("round %d: %v", i, err)
					}
				}
			case 4: // the application's memory changes
				g.mapPages(0x1000_0000, newTestFile(t, 1, 7), 0, 1, hostarch.Read)
				g.as.Unmap(0x1000_0000, page)
			case 5: // a register is changed
				if err := g.c.PullFullState(g.as, g.ac); err != nil {
					t.Fatal(err)
				}
				g.ac.Regs.R12, g.ac.Regs.Rbx = 12, calls+10
				g.c.FullStateChanged()
				calls += 10
			case 6: // it is late
				time.Sleep(time.Duration(i%300) * time.Microsecond)
			case 7:
				if err := other.run(); err != nil {
					t.Fatal(err)
				}
			case 8:
				if v := c.v.Load(); v != nil {
					v.kick()
				}
			case 9:
				if err := p.PreemptAllCPUs(); err != nil {
					t.Fatal(err)
				}
				if err := g.run(); err != platform.ErrContextCPUPreempted {
					t.Fatalf("after PreemptAllCPUs: %v", err)
				}
				other.c.(*vcpuContext).preempts = p.m.preempts.Load()
			}
			g.ac.SetReturn(uintptr(i))
			if err := g.run(); err != nil {
				t.Fatal(err)
			}
			calls++
			if c.parked != nil {
				answers++
			}
		}
		t.Logf("%d answers, %d waits in the shim", answers, parked)
		if p.m.runners.max > 0 && parked == 0 {
			t.Error("the thread never waits in the shim")
		}
	})
}

// A thread that waits in the shim holds nothing up: not the end of its AddressSpace,
// nor another Context that wants its vCPU.
func TestShimGivesWay(t *testing.T) {
	p := withShims(t, 1)
	g := newGuestOf(t, p, codeCount)
	g.onThread(func() {
		g.wait()
		other := newGuestOf(t, p, codeCount)
		for range 3 {
			if err := other.run(); err != nil {
				t.Fatal(err)
			}
			g.wait()
		}
		as := g.as
		next := newGuestOf(t, p, codeCount)
		as.Release() // as execve(2) does
		g.as = next.as
		if err := g.run(); err != nil {
			t.Errorf("in the next AddressSpace: %v", err)
		}
		g.c.PrepareSleep()
		// Release is not called twice.
		g.as, _ = p.m.newAddressSpace()
	})
}

// Whatever is written to a slot, and wherever in the shim a thread jumps: its system
// calls may be wrong, or the Context fails; nothing hangs, and others are as before.
func TestHostileSlot(t *testing.T) {
	p := withShims(t, 2)
	rng := rand.New(rand.NewPCG(1, 2))
	failures, calls := 0, 0
	for round := range 12 {
		g := newGuestOf(t, p, codeCount)
		g.onThread(func() {
			stop, stopped := make(chan struct{}), make(chan struct{})
			seed := rng.Uint64()
			go func() {
				defer close(stopped)
				rng := rand.New(rand.NewPCG(seed, 0))
				for {
					select {
					case <-stop:
						return
					default:
					}
					for _, s := range g.as.slots[:2] {
						switch rng.IntN(3) {
						case 0:
							s.word.Store(rng.Uint32N(7))
						case 1:
							s.spins.Store(rng.Uint32N(1000))
						default:
							s.regs[rng.IntN(numPosted)].Store(rng.Uint64() >> rng.IntN(64))
						}
					}
					time.Sleep(time.Duration(rng.IntN(100)) * time.Microsecond)
				}
			}()
			for i := range 300 {
				switch err := g.run(); {
				case err == nil:
					calls++
				case err == platform.ErrContextInterrupt:
				case err == platform.ErrContextSignal, errors.As(err, new(*platform.ContextError)):
					failures++
					g.c.FullStateChanged()
					g.ac.Regs = arch.New().Regs
					g.ac.SetIP(codeAddr)
				default:
					t.Errorf("round %d: %v", round, err)
				}
				switch i % 8 {
				case 0:
					g.c.PrepareSleep()
				case 1:
					g.c.PullFullState(g.as, g.ac)
				case 2: // somewhere into the shim
					if err := g.c.PullFullState(g.as, g.ac); err == nil {
						g.ac.SetIP(uintptr(shimAddr(rng.IntN(2)) + rng.Uint64N(p.m.shim.end)))
						g.c.FullStateChanged()
					}
				case 3: // a loop in the shim needs an end
					time.AfterFunc(5*time.Millisecond, g.c.Interrupt)
				}
			}
			close(stop)
			<-stopped
			g.c.PrepareSleep()
		})
		check := newGuestOf(t, p, codeLoad)
		f := newTestFile(t, 1, 900)
		check.mapPages(0x1000_0000, f, 0, 1, hostarch.Read)
		if v, ok := check.load(0x1000_0000); v != 900 || !ok {
			t.Fatalf("round %d: another AddressSpace: %d, %v", round, v, ok)
		}
	}
	t.Logf("%d system calls, %d failures", calls, failures)
}

// Slots of other AddressSpaces are not there, nor are those of vCPUs writable by more
// than their own.
func TestSlotsArePrivate(t *testing.T) {
	p := withShims(t, 2)
	a, b := newGuest(t, p), newGuest(t, p)
	for i := range a.as.slots {
		a.as.slots[i].regs[0].Store(0xaaaa)
		if got := b.as.slots[i].regs[0].Load(); got != 0 {
			t.Fatalf("slot %d of another AddressSpace has %#x", i, got)
		}
	}
	v, ok := b.load(hostarch.Addr(slotAddr(0) + 16))
	if p.probe.ring0 && ok || !p.probe.ring0 && (!ok || v == 0xaaaa) {
		t.Errorf("the slot: %#x, %v", v, ok)
	}
	var code bytes.Buffer
	binary.Write(&code, binary.LittleEndian, []byte{0x48, 0x89, 0x37, 0x0f, 0x05}) // mov %rsi, (%rdi); syscall
	w := newGuestOf(t, p, code.Bytes())
	if _, ok := w.load(hostarch.Addr(shimAddr(0))); ok {
		t.Error("the shim can be written")
	}
}

// With one CPU nobody spins.
func TestNoSpinsOnOneCPU(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	p := newTestPlatform(t, 1)
	if p.m.shims != 0 || p.m.runners.max != 0 {
		t.Errorf("%d shims, %d runners", p.m.shims, p.m.runners.max)
	}
	g := newGuestOf(t, p, codeCount)
	g.onThread(func() {
		if err := g.run(); err != nil || g.c.(*vcpuContext).spins != 0 {
			t.Errorf("%v, %d spins", err, g.c.(*vcpuContext).spins)
		}
	})
}

// Threads that found waiting in the shim not worth it try it again now and then, both
// sides at once, and stay with it if it is.
func TestSpinsAgain(t *testing.T) {
	p := withShims(t, 1)
	if p.m.runners.max == 0 {
		return // nobody ever waits
	}
	const tries, tryAfter = 10, 31
	giveUp := func(s *sysmsg.Spinner) {
		for !s.GaveUp() {
			s.Report(sysmsg.Slept)
		}
	}
	for _, who := range []func(c *vcpuContext){
		func(c *vcpuContext) { giveUp(&c.spinner) },
		func(c *vcpuContext) { giveUp(&c.answers) },
		func(c *vcpuContext) { giveUp(&c.spinner); giveUp(&c.answers) },
	} {
		c := newContext(p.m)
		c.BindThread()
		who(c)
		got := 0
		for range tries * tryAfter {
			c.planSpins()
			if (c.spins > 0) != (c.looks > 0) {
				t.Fatalf("%d looks at the slot by one side, %d by the other", c.spins, c.looks)
			}
			if c.spins > 0 {
				got++
			}
		}
		if got != tries {
			t.Errorf("%d tries in %d Switches, want %d", got, tries*tryAfter, tries)
		}
		c.parked = new(addressSpace)
		if c.planSpins(); c.spins == 0 || c.looks == 0 {
			t.Error("a try ends while the thread waits in the shim")
		}
	}
	g := newGuestOf(t, p, codeCount)
	c := g.c.(*vcpuContext)
	g.onThread(func() {
		giveUp(&c.spinner)
		giveUp(&c.answers)
		for deadline := time.Now().Add(20 * time.Second); c.spinner.GaveUp() || c.answers.GaveUp(); {
			if err := g.run(); err != nil {
				t.Fatal(err)
			}
			if time.Now().After(deadline) {
				t.Fatal("it never waits again")
			}
		}
	})
}

// A pause ends with the system call that it waits for, or soon will.
func TestPause(t *testing.T) {
	const longest, needed = 40, 25
	c := newContext(&machine{maxLull: longest})
	var s slot
	for range 10 * longest {
		s.word.Store(sysmsg.Stub)
		if c.pause(&s) {
			t.Fatal("there is no system call")
		}
	}
	if c.lull != longest {
		t.Errorf("the pause is %d, want %d at most", c.lull, longest)
	}
	for range 10 * longest {
		s.word.Store(sysmsg.Stub)
		if c.lull >= needed {
			s.word.Store(sysmsg.Sentry)
		}
		if c.pause(&s) != (s.word.Load() == sysmsg.Sentry) {
			t.Fatal("pause does not tell what is in the slot")
		}
	}
	if c.lull < needed-2 || c.lull > needed+2 {
		t.Errorf("the pause is %d, want %d", c.lull, needed)
	}
	c.lull = 0
	if s.word.Store(sysmsg.Sentry); !c.pause(&s) || c.lull != 0 {
		t.Errorf("the pause is %d, want none", c.lull)
	}
}

// Every register counts when it matters whether the Sentry changed one; RAX is the
// result.
func TestEqualButRAX(t *testing.T) {
	var a arch.Registers
	v := reflect.ValueOf(&a).Elem()
	for i := range v.NumField() {
		b := a
		v.Field(i).SetUint(1)
		name := v.Type().Field(i).Name
		if equalButRAX(&a, &b) != (name == "Rax") || equalButRAX(&b, &a) != (name == "Rax") {
			t.Errorf("another %s: equalButRAX gives %v", name, equalButRAX(&a, &b))
		}
	}
	b := a
	if !equalButRAX(&a, &b) {
		t.Error("a copy differs")
	}
}

// copyCall copies all that copyPosted sets, and nothing else.
func TestCopyCall(t *testing.T) {
	var s slot
	for i := range s.regs {
		s.regs[i].Store(uint64(i + 1))
	}
	from := arch.Registers{Rbx: 100, Rbp: 101, R12: 102, R13: 103, R14: 104, R15: 105, Fs_base: 106, Gs_base: 107, Ds: 108, Es: 109, Fs: 110, Gs: 111}
	want := from
	s.copyPosted(&want)
	other := arch.Registers{Rax: 200, Orig_rax: 201, Eflags: 202, Ss: 203}
	s.copyPosted(&other)
	copyCall(&from, &other)
	if from != want {
		t.Errorf("got %+v, want %+v", from, want)
	}
}

// An Interrupt ends a Switch whenever it comes: before it, while it answers, and while
// the thread runs on.
func TestInterruptInShim(t *testing.T) {
	p := withShims(t, 1)
	g := newGuestOf(t, p, codeCount)
	g.onThread(func() {
		const interrupts = 300
		seen := make(chan struct{})
		go func() {
			for i := range interrupts {
				for begin := time.Now(); time.Since(begin) < time.Duration(i%30)*time.Microsecond; {
				}
				g.c.Interrupt()
				<-seen
			}
		}()
		parked := 0
		deadline := time.Now().Add(20 * time.Second)
		for n := 0; n < interrupts; {
			if g.c.(*vcpuContext).parked != nil {
				parked++
			}
			switch err := g.run(); err {
			case nil:
				g.ac.SetReturn(0)
			case platform.ErrContextInterrupt:
				n++
				seen <- struct{}{}
			default:
				t.Fatal(err)
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d of %d interrupts seen", n, interrupts)
			}
		}
		if p.m.runners.max > 0 && parked == 0 {
			t.Error("the thread never waits in the shim")
		}
	})
}
