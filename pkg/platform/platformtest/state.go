package platformtest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"runtime"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// stateSubjects: what a thread has in its registers is kept.
var stateSubjects = []subject{
	{"GeneralSentryView", testGeneralSentryView},
	{"GeneralApplicationView", testGeneralApplicationView},
	{"GeneralAcrossInterrupts", testGeneralAcrossInterrupts},
	{"GeneralAcrossContextsAndThreads", testGeneralAcrossContextsAndThreads},
	{"FirstSwitchRestoresAll", testFirstSwitchRestoresAll},
	{"EditAfterInterrupt", testEditAfterInterrupt},
	{"PullFullStateTwice", testPullFullStateTwice},
	{"Fork", testForkState},
	{"TLS", testTLS},
	{"VectorAcrossSyscall", testVectorAcrossSyscall},
	{"VectorAcrossInterrupts", testVectorAcrossInterrupts},
	{"VectorAcrossFault", testVectorAcrossFault},
	{"VectorAcrossContextsAndThreads", testVectorAcrossContextsAndThreads},
	{"VectorNewThread", testVectorNewThread},
	{"VectorFork", testVectorFork},
	{"VectorEdit", testVectorEdit},
	{"VectorPull", testVectorPull},
}

// diffRegs describes the first difference between the registers of got and want.
func diffRegs(got, want *arch.Context64) string {
	w := generalRegs(want)
	for i, g := range generalRegs(got) {
		if (*g.v^*w[i].v)&g.mask != 0 {
			return fmt.Sprintf("%s is %#x, want %#x", g.name, *g.v&g.mask, *w[i].v&g.mask)
		}
	}
	if got.IP() != want.IP() {
		return fmt.Sprintf("IP is %#x, want %#x", got.IP(), want.IP())
	}
	return ""
}

// dumped returns a copy of ac with the general registers that progDump wrote to
// off of f.
func dumped(ac *arch.Context64, f *file, off uint64) *arch.Context64 {
	n := ac.Fork()
	for i, r := range generalRegs(n) {
		*r.v = binary.LittleEndian.Uint64(f.data[off+uint64(i)*8:])
	}
	return n
}

// The Sentry sees the registers that the thread had at the system call.
func testGeneralSentryView(t *T) {
	th := t.newSpace().newThread(progSyscall)
	rnd := random(1)
	for i := range 50 {
		th.start(progSyscall)
		th.edit(func(ac *arch.Context64) { randomRegs(ac, rnd) })
		want := th.ac.Fork()
		th.syscall()
		th.pull()
		atSyscall(want, th.ac)
		if d := diffRegs(th.ac, want); d != "" {
			t.Fatalf("round %d: after the system call %s", i, d)
		}
	}
}

// The application sees the registers that the Sentry set, and after a system
// call those that it had, but for the result and what the instruction changes.
func testGeneralApplicationView(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progDump)
	rnd := random(2)
	for i := range 50 {
		th.start(progDump)
		th.edit(func(ac *arch.Context64) {
			randomRegs(ac, rnd)
			setDump(ac, uint64(dataBase))
		})
		want := th.ac.Fork()
		th.syscall()
		if d := diffRegs(dumped(want, sp.data, 0), want); d != "" {
			t.Fatalf("round %d: when the thread starts, %s", i, d)
		}
		// A result and nothing else: the Sentry's usual answer.
		th.ac.SetReturn(uintptr(0x1000 + i))
		clear(sp.data.data[:dumpSize])
		want.SetIP(th.ac.IP())
		th.syscall()
		got := dumped(want, sp.data, 0)
		want.SetIP(want.IP() - syscallLen)
		atSyscall(want, got)
		want.SetReturn(uintptr(0x1000 + i))
		want.SetIP(got.IP())
		if d := diffRegs(got, want); d != "" {
			t.Fatalf("round %d: after the system call the application has: %s", i, d)
		}
	}
}

// interruptUntil runs th, which spins, and sends it n interrupts; check sees the
// state after each of them.
func (th *thread) interruptUntil(n int, check func()) {
	th.t.Helper()
	stop := make(chan struct{})
	done := th.t.worker(func() {
		for !th.t.over() {
			select {
			case <-stop:
				return
			default:
				th.c.Interrupt()
				runtime.Gosched()
			}
		}
	})
	for range n {
		e := th.switchOnce()
		if e.err != platform.ErrContextInterrupt {
			th.t.Fatalf("got %v instead of an interrupt", e)
		}
		check()
	}
	close(stop)
	<-done
}

func testGeneralAcrossInterrupts(t *T) {
	th := t.newSpace().newThread(progSpin)
	rnd := random(3)
	for i := range 5 {
		th.edit(func(ac *arch.Context64) { randomRegs(ac, rnd) })
		want := th.ac.Fork()
		th.interruptUntil(40, func() {
			th.pull()
			if d := diffRegs(th.ac, want); d != "" {
				t.Fatalf("round %d: after an interrupt %s", i, d)
			}
		})
	}
}

// onThreads calls step(i) for i below n, each in the other of two OS threads.
func (t *T) onThreads(n int, step func(i int)) {
	turns := [2]chan int{make(chan int), make(chan int)}
	back := make(chan struct{})
	for _, turn := range turns {
		t.worker(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			for i := range turn {
				step(i)
				select {
				case back <- struct{}{}:
				case <-t.failed:
					return
				}
			}
		})
	}
	defer close(turns[0])
	defer close(turns[1])
	for i := range n {
		select {
		case turns[i%2] <- i:
		case <-t.failed:
			runtime.Goexit()
		}
		t.wait(back)
	}
}

// Four Contexts take turns, each in one OS thread and then in the other.
func testGeneralAcrossContextsAndThreads(t *T) {
	sp := t.newSpace()
	sp.mapData(4, hostarch.ReadWrite)
	rnd := random(4)
	var ths []*thread
	var wants []*arch.Context64
	for i := range 4 {
		th := sp.newThread(progDump)
		randomRegs(th.ac, rnd)
		setDump(th.ac, uint64(dataBase)+uint64(i)*pageSize)
		ths, wants = append(ths, th), append(wants, th.ac.Fork())
	}
	t.onThreads(4*2*15, func(i int) {
		// Three times in a row, so that each gets to both threads.
		k := i / 3 % 4
		th, want := ths[k], wants[k].Fork()
		th.syscall()
		got := dumped(want, sp.data, uint64(k)*pageSize)
		if i >= 12 {
			want.SetIP(th.ac.IP() - syscallLen)
			atSyscall(want, got)
			want.SetReturn(uintptr(k))
			want.SetIP(got.IP())
		}
		if d := diffRegs(got, want); i >= 12 && d != "" {
			t.Fatalf("step %d, Context %d: %s", i, k, d)
		}
		th.ac.SetReturn(uintptr(k))
	})
}

// The first Switch of a Context restores all, without FullStateChanged: so does
// a Sentry after clone(2).
func testFirstSwitchRestoresAll(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	rnd := random(5)
	for i := range 5 {
		th := sp.newThread(progDump)
		randomRegs(th.ac, rnd)
		setDump(th.ac, uint64(dataBase))
		want := th.ac.Fork()
		th.syscall()
		if d := diffRegs(dumped(want, sp.data, 0), want); d != "" {
			t.Fatalf("Context %d: %s", i, d)
		}
	}
}

// A Sentry may replace the state after an interrupt: so it delivers signals.
func testEditAfterInterrupt(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progBeat, uint64(dataBase))
	rnd := random(6)
	for i := range 20 {
		th.interruptUntil(1, func() {})
		th.start(progDump)
		th.edit(func(ac *arch.Context64) {
			randomRegs(ac, rnd)
			setDump(ac, uint64(dataBase))
		})
		want := th.ac.Fork()
		th.syscall()
		if d := diffRegs(dumped(want, sp.data, 0), want); d != "" {
			t.Fatalf("round %d: %s", i, d)
		}
		th.start(progBeat, uint64(dataBase))
	}
}

// PullFullState gives the same twice, and after FullStateChanged it leaves ac
// alone.
func testPullFullStateTwice(t *T) {
	th := t.newSpace().newThread(progSyscall)
	rnd := random(7)
	randomRegs(th.ac, rnd)
	for i := range 20 {
		th.syscall()
		th.pull()
		want := th.ac.Fork()
		th.pull()
		if d := diffRegs(th.ac, want); d != "" {
			t.Fatalf("round %d: after the second PullFullState %s", i, d)
		}
		if !bytes.Equal(th.ac.FloatingPointData(), want.FloatingPointData()) {
			t.Fatalf("round %d: the second PullFullState changed the floating point state", i)
		}
		randomRegs(th.ac, rnd)
		th.ac.SetIP(th.t.s.text.addr(progSyscall))
		var v [16]byte
		binary.LittleEndian.PutUint64(v[:], rnd.Uint64())
		setVector0(th.ac, v)
		th.c.FullStateChanged()
		want = th.ac.Fork()
		th.pull()
		if d := diffRegs(th.ac, want); d != "" {
			t.Fatalf("round %d: PullFullState after FullStateChanged: %s", i, d)
		}
		if vector0(th.ac) != v {
			t.Fatalf("round %d: PullFullState after FullStateChanged replaced the floating point state", i)
		}
	}
}

// A copy of the state runs in another Context as the original does, in the same
// AddressSpace and in another one.
func testForkState(t *T) {
	sp, sp2 := t.newSpace(), t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	sp2.data = sp.data
	sp2.mapData(1, hostarch.ReadWrite)
	rnd := random(8)
	parent := sp.newThread(progDump)
	randomRegs(parent.ac, rnd)
	setDump(parent.ac, uint64(dataBase))
	parent.syscall()
	parent.pull()
	for i, s := range []*space{sp, sp2} {
		child := s.newThread(progDump)
		child.ac = parent.ac.Fork()
		child.ac.SetReturn(0)
		want := child.ac.Fork()
		clear(sp.data.data[:dumpSize])
		child.syscall()
		if d := diffRegs(dumped(want, sp.data, 0), want); d != "" {
			t.Fatalf("child %d: %s", i, d)
		}
	}
	parent.ac.SetReturn(1)
	parent.syscall()
	if got := dumped(parent.ac, sp.data, 0).Return(); got != 1 {
		t.Fatalf("the parent's result is %d, want 1", got)
	}
}

// The thread pointer is what the Sentry set, in each Context its own.
func testTLS(t *T) {
	sp := t.newSpace()
	sp.mapData(4, hostarch.ReadWrite)
	var ths []*thread
	for i := range uint64(4) {
		sp.data.store(i*pageSize+8, 100+i)
		th := sp.newThread(progTLS)
		tls := uintptr(dataBase) + uintptr(i*pageSize) + 8
		if !th.ac.SetTLS(tls) {
			t.Fatalf("SetTLS(%#x) refused", tls)
		}
		ths = append(ths, th)
	}
	t.onThreads(24, func(i int) {
		k := i / 2 % 4
		if got := ths[k].report()[0]; got != uint64(100+k) {
			t.Fatalf("Context %d reads %d by its thread pointer, want %d", k, got, 100+k)
		}
	})
	for k, th := range ths {
		th.pull()
		if got, want := th.ac.TLS(), uintptr(dataBase)+uintptr(k*pageSize)+8; got != want {
			t.Errorf("Context %d: TLS() is %#x, want %#x", k, got, want)
		}
	}
	// arch_prctl(ARCH_SET_FS) and its like: the Sentry changes it after a call.
	ths[0].edit(func(ac *arch.Context64) { ac.SetTLS(uintptr(dataBase) + 3*pageSize + 8) })
	if got := ths[0].report()[0]; got != 103 {
		t.Errorf("after SetTLS the thread reads %d, want 103", got)
	}
}

// vectorState is a set of vector registers and the programs that load and store
// all of it: prog loads it from arg0, reports, counts the word at arg2+8 up,
// waits until the word at arg2 is not 0, stores it at arg1, and reports. save
// stores it at arg1 and reports.
type vectorState struct {
	name       string
	prog, save program
	size       int // bytes
	random     func(rnd *rand.Rand) []byte
	initial    func() []byte // of a new thread
	diff       func(got, want []byte) string
	vector0    func(b []byte) []byte // the first register's low 16 bytes
}

// plainVectorState is one whose registers can hold any value, and are 0 at first.
func plainVectorState(name string, prog, save program, size int) vectorState {
	return vectorState{
		name: name, prog: prog, save: save, size: size,
		random: func(rnd *rand.Rand) []byte {
			b := make([]byte, size)
			for i := range b {
				b[i] = byte(rnd.Uint32())
			}
			return b
		},
		initial: func() []byte { return make([]byte, size) },
		diff:    diffBytes,
		vector0: func(b []byte) []byte { return b[:16] },
	}
}

// diffBytes describes the first difference.
func diffBytes(got, want []byte) string {
	for i := range want {
		if got[i] != want[i] {
			return fmt.Sprintf("byte %d of %d is %#02x, want %#02x", i, len(want), got[i], want[i])
		}
	}
	return ""
}

// vectorThread is a thread that runs a vectorState program, with memory of its
// own: a page for what it loads, one for what it stores, one for the flags.
type vectorThread struct {
	*thread
	vs   vectorState
	want []byte
	off  uint64
}

const vectorPages = 3

// newVectorThread returns the i-th vector thread of sp, whose data file is
// mapped as a whole.
func (sp *space) newVectorThread(vs vectorState, i int, rnd *rand.Rand) *vectorThread {
	off := uint64(i) * vectorPages * pageSize
	base := uint64(dataBase) + off
	v := &vectorThread{vs: vs, want: vs.random(rnd), off: off}
	v.thread = sp.newThread(vs.prog, base, base+pageSize, base+2*pageSize)
	copy(sp.data.data[off:], v.want)
	clear(sp.data.data[off+pageSize : off+3*pageSize])
	return v
}

// letStore allows the thread to store its registers, and check compares these.
func (v *vectorThread) letStore() { v.sp.data.store(v.off+2*pageSize, 1) }

func (v *vectorThread) check(when string) {
	v.t.Helper()
	got := v.sp.data.data[v.off+pageSize:][:v.vs.size]
	if d := v.vs.diff(got, v.want); d != "" {
		v.t.Fatalf("%s %s: %s", v.vs.name, when, d)
	}
}

func testVectorAcrossSyscall(t *T) {
	sp := t.newSpace()
	sp.mapData(dataPages, hostarch.ReadWrite)
	rnd := random(10)
	for i, vs := range vectorStates() {
		for range 3 {
			v := sp.newVectorThread(vs, i, rnd)
			v.letStore()
			v.report()
			v.ac.SetReturn(0)
			v.report()
			v.check("across a system call")
			// With the full state pulled and restored.
			clear(sp.data.data[v.off+pageSize:][:vs.size])
			v.ac.SetReturn(0)
			v.report()
			v.edit(func(ac *arch.Context64) { ac.SetReturn(0) })
			v.report()
			v.check("across a system call with the full state")
			v.release()
		}
	}
}

func testVectorAcrossInterrupts(t *T) {
	sp := t.newSpace()
	sp.mapData(dataPages, hostarch.ReadWrite)
	rnd := random(11)
	for i, vs := range vectorStates() {
		v := sp.newVectorThread(vs, i, rnd)
		v.report()
		v.interruptUntil(20, func() {})
		v.interruptUntil(20, func() { v.edit(func(*arch.Context64) {}) })
		v.letStore()
		v.report()
		v.check("across interrupts")
	}
}

// A fault in the middle: the page of the flags comes and goes.
func testVectorAcrossFault(t *T) {
	sp := t.newSpace()
	sp.mapData(dataPages, hostarch.ReadWrite)
	rnd := random(12)
	for i, vs := range vectorStates() {
		v := sp.newVectorThread(vs, i, rnd)
		v.report()
		flags := dataBase + hostarch.Addr(v.off) + 2*pageSize
		sp.unmap(flags, pageSize)
		e := v.next()
		if e.signal() == 0 {
			t.Fatalf("%s: got %v instead of a fault at %v", vs.name, e, flags)
		}
		v.letStore()
		sp.mustMap(flags, sp.data, v.off+2*pageSize, pageSize, hostarch.ReadWrite)
		v.report()
		v.check("across a fault")
	}
}

func testVectorAcrossContextsAndThreads(t *T) {
	sp := t.newSpace()
	sp.mapData(dataPages, hostarch.ReadWrite)
	rnd := random(13)
	for _, vs := range vectorStates() {
		var vts []*vectorThread
		for i := range 4 {
			v := sp.newVectorThread(vs, i, rnd)
			v.letStore()
			vts = append(vts, v)
		}
		// Contexts in turn, each Switch of one in the other OS thread.
		t.onThreads(4*7, func(i int) {
			v := vts[i%4]
			if i/4%2 == i%4%2 {
				runtime.Gosched()
			}
			v.report()
			v.ac.SetReturn(0)
			if i/4%2 == 1 {
				v.check("across Contexts and threads")
				clear(sp.data.data[v.off+pageSize:][:vs.size])
			}
		})
		for _, v := range vts {
			v.release()
		}
	}
}

// A new thread starts with the initial state: nothing of other threads, of the
// stub or of the Sentry is in its registers.
func testVectorNewThread(t *T) {
	sp := t.newSpace()
	sp.mapData(dataPages, hostarch.ReadWrite)
	rnd := random(14)
	for i, vs := range vectorStates() {
		v := sp.newVectorThread(vs, i, rnd)
		v.report()
		n := sp.newVectorThread(vs, i, rnd)
		n.ac.SetIP(t.s.text.addr(vs.save))
		n.want = vs.initial()
		n.report()
		n.check("of a new thread")
		// As execve(2) does.
		fresh := arch.New()
		fresh.SetIP(t.s.text.addr(vs.save))
		fresh.SetStack(v.ac.Stack())
		base := uint64(dataBase) + v.off
		setArgs(fresh, base, base+pageSize, base+2*pageSize)
		clear(sp.data.data[v.off+pageSize:][:vs.size])
		v.pull()
		v.ac = fresh
		v.c.FullStateChanged()
		v.want = vs.initial()
		v.report()
		v.check("of a thread with a new state")
	}
}

func testVectorFork(t *T) {
	sp, sp2 := t.newSpace(), t.newSpace()
	sp.mapData(dataPages, hostarch.ReadWrite)
	sp2.data = sp.data
	sp2.mapData(dataPages, hostarch.ReadWrite)
	rnd := random(15)
	for i, vs := range vectorStates() {
		parent := sp.newVectorThread(vs, i, rnd)
		parent.letStore()
		parent.report()
		parent.pull()
		for _, s := range []*space{sp, sp2} {
			// Something else in the registers before.
			other := s.newVectorThread(vs, 10, rnd)
			other.report()
			child := *parent
			child.thread = s.newThread(vs.prog)
			child.ac = parent.ac.Fork()
			child.report()
			child.check("in a forked Context")
			clear(sp.data.data[parent.off+pageSize:][:vs.size])
		}
	}
}

// The Sentry changes a vector register in place.
func testVectorEdit(t *T) {
	sp := t.newSpace()
	sp.mapData(dataPages, hostarch.ReadWrite)
	rnd := random(16)
	for i, vs := range vectorStates() {
		v := sp.newVectorThread(vs, i, rnd)
		v.letStore()
		v.report()
		var nv [16]byte
		binary.LittleEndian.PutUint64(nv[:], rnd.Uint64())
		v.edit(func(ac *arch.Context64) { setVector0(ac, nv) })
		copy(vs.vector0(v.want), nv[:])
		v.report()
		v.check("after an edit of register 0")
	}
}

// The Sentry sees a vector register of the application, after a system call and
// after an interrupt.
func testVectorPull(t *T) {
	sp := t.newSpace()
	sp.mapData(dataPages, hostarch.ReadWrite)
	rnd := random(17)
	for i, vs := range vectorStates() {
		v := sp.newVectorThread(vs, i, rnd)
		v.report()
		look := func(when string) {
			v.pull()
			if got := vector0(v.ac); !bytes.Equal(got[:], vs.vector0(v.want)) {
				t.Fatalf("%s: register 0 after %s is %x, want %x", vs.name, when, got, vs.vector0(v.want))
			}
		}
		look("a system call")
		v.interruptUntil(3, func() { look("an interrupt") })
	}
}
