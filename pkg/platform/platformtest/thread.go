package platformtest

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
)

// Where things lie in every address space. All of it is below 4 GiB, for 32-bit
// code.
const (
	textBase  hostarch.Addr = 0x0040_0000
	stackBase hostarch.Addr = 0x0080_0000
	dataBase  hostarch.Addr = 0x1000_0000
	mmapBase  hostarch.Addr = 0x7000_0000

	stackPages = 128 // one for each thread
	dataPages  = 64
)

// space is an AddressSpace with the programs, stacks, and a data file that is
// mapped at dataBase as far as the subtest wants.
type space struct {
	*memoryManager
	t      *T
	data   *file
	stacks int
}

// newSpace returns an AddressSpace with nothing but the programs and stacks.
func (t *T) newSpace() *space {
	t.Helper()
	sp := t.newBareSpace()
	sp.mapText()
	sp.mustMap(stackBase, t.newFile(stackPages*pageSize), 0, stackPages*pageSize, hostarch.ReadWrite)
	sp.data = t.newFile(dataPages * pageSize)
	return sp
}

func (sp *space) mapText() {
	sp.t.Helper()
	sp.mustMap(textBase, sp.t.s.text.file, 0, uint64(len(sp.t.s.text.data)), hostarch.ReadExec)
}

// newBareSpace returns an empty AddressSpace.
func (t *T) newBareSpace() *space {
	t.Helper()
	var as platform.AddressSpace
	for as == nil {
		a, retry, err := t.s.p.NewAddressSpace(nil)
		switch {
		case err != nil:
			t.Fatalf("NewAddressSpace: %v", err)
		case a == nil && retry == nil:
			t.Fatalf("NewAddressSpace: neither AddressSpace nor error nor channel")
		case a == nil:
			t.wait(retry)
		}
		as = a
	}
	sp := &space{memoryManager: &memoryManager{as: as}, t: t}
	t.mu.Lock()
	t.spaces = append(t.spaces, sp)
	t.mu.Unlock()
	return sp
}

func (sp *space) release() {
	sp.t.Helper()
	if err := sp.memoryManager.release(); err != nil {
		sp.t.Error(err)
	}
}

// mustMap maps length bytes of f from off on at addr.
func (sp *space) mustMap(addr hostarch.Addr, f memmap.File, off, length uint64, at hostarch.AccessType) {
	sp.t.Helper()
	if err := sp.mapFile(addr, f, memmap.FileRange{Start: off, End: off + length}, at, false); err != nil {
		sp.t.Fatalf("MapFile(%v, offset %#x, length %#x, %v): %v", addr, off, length, at, err)
	}
}

// mapData maps pages pages of the data file at dataBase.
func (sp *space) mapData(pages uint64, at hostarch.AccessType) {
	sp.t.Helper()
	sp.mustMap(dataBase, sp.data, 0, pages*pageSize, at)
}

// thread is a Context and its state.
type thread struct {
	t  *T
	sp *space
	c  platform.Context
	ac *arch.Context64

	// busy says that a Switch is under way.
	busy     atomic.Bool
	released bool
}

// newThread returns a thread of sp that will start with prog.
func (sp *space) newThread(prog program, args ...uint64) *thread {
	t := sp.t
	th := &thread{t: t, sp: sp, c: t.s.p.NewContext(t.ctx), ac: arch.New()}
	sp.stacks++
	th.ac.SetStack(uintptr(stackBase + hostarch.Addr(sp.stacks%stackPages+1)*pageSize - 64))
	th.ac.SetIP(t.s.text.addr(prog))
	setArgs(th.ac, args...)
	t.mu.Lock()
	t.threads = append(t.threads, th)
	t.mu.Unlock()
	return th
}

func (th *thread) release() {
	if !th.released {
		th.released = true
		th.c.Release()
	}
}

// event is what came out of a Switch.
type event struct {
	info *linux.SignalInfo
	at   hostarch.AccessType
	err  error
}

// String describes e.
func (e event) String() string {
	switch {
	case e.err == nil:
		return "a system call"
	case e.err == platform.ErrContextSignal && e.info != nil:
		return fmt.Sprintf("signal %v with access %v", e.info, e.at)
	}
	return fmt.Sprintf("error %v", e.err)
}

// contextError returns e's ContextError, or nil.
func (e event) contextError() *platform.ContextError {
	var ce *platform.ContextError
	if errors.As(e.err, &ce) {
		return ce
	}
	return nil
}

// signal returns the number of e's signal, or 0.
func (e event) signal() linux.Signal {
	if e.err == platform.ErrContextSignal && e.info != nil {
		return linux.Signal(e.info.Signo)
	}
	return 0
}

// switchOnce is Context.Switch; it fails the subtest for results that package
// platform does not allow.
func (th *thread) switchOnce() event {
	th.t.Helper()
	th.busy.Store(true)
	info, at, err := th.c.Switch(th.t.ctx, th.sp, th.ac, -1)
	th.busy.Store(false)
	e := event{info, at, err}
	switch {
	case err == nil, err == platform.ErrContextInterrupt, err == platform.ErrContextCPUPreempted:
	case err == platform.ErrContextSignal:
		if info == nil {
			th.t.Fatalf("Switch returned ErrContextSignal without a SignalInfo")
		}
		if !linux.Signal(info.Signo).IsValid() {
			th.t.Fatalf("Switch returned signal %d, which does not exist", info.Signo)
		}
	case e.contextError() != nil:
		if ce := e.contextError(); ce.Errno == 0 {
			th.t.Fatalf("ContextError without an errno: %v", err)
		}
	default:
		th.t.Fatalf("Switch returned an error that it must not return: %v", err)
	}
	return e
}

// maxSpurious is how many interrupts without cause we take in a row.
const maxSpurious = 100

// next is switchOnce that goes on after interrupts without cause.
func (th *thread) next() event {
	th.t.Helper()
	for range maxSpurious {
		if e := th.switchOnce(); e.err != platform.ErrContextInterrupt && e.signal() != platform.SignalInterrupt {
			return e
		}
	}
	th.t.Fatalf("%d interrupts without cause in a row", maxSpurious)
	panic("unreachable")
}

// syscall runs th to its next system call, completes its state, and returns the
// arguments.
func (th *thread) syscall() [6]uint64 {
	th.t.Helper()
	if e := th.next(); e.err != nil {
		th.t.Fatalf("got %v at IP %#x instead of a system call", e, th.ac.IP())
	}
	return th.args()
}

// report is syscall for programs that report.
func (th *thread) report() [6]uint64 {
	th.t.Helper()
	a := th.syscall()
	if nr := th.ac.SyscallNo(); nr != nrReport {
		th.t.Fatalf("system call %#x instead of %#x, arguments %#x", nr, nrReport, a)
	}
	return a
}

// args returns the arguments of the system call that th made.
func (th *thread) args() (a [6]uint64) {
	for i, v := range th.ac.SyscallArgs() {
		a[i] = v.Uint64()
	}
	return a
}

// mustSignal runs th until it gets sig.
func (th *thread) mustSignal(sig linux.Signal) event {
	th.t.Helper()
	e := th.next()
	if e.signal() != sig {
		th.t.Fatalf("got %v at IP %#x instead of %v", e, th.ac.IP(), sig)
	}
	return e
}

// pull completes th's state.
func (th *thread) pull() {
	th.t.Helper()
	if err := th.c.PullFullState(th.sp.as, th.ac); err != nil {
		th.t.Fatalf("PullFullState: %v", err)
	}
}

// edit changes th's state as a Sentry must.
func (th *thread) edit(f func(ac *arch.Context64)) {
	th.t.Helper()
	th.pull()
	f(th.ac)
	th.c.FullStateChanged()
}

// start makes prog what th runs next.
func (th *thread) start(prog program, args ...uint64) {
	th.t.Helper()
	th.startAt(th.t.s.text.addr(prog), args...)
}

// startAt is start for code at an address.
func (th *thread) startAt(addr uintptr, args ...uint64) {
	th.t.Helper()
	th.edit(func(ac *arch.Context64) {
		ac.SetIP(addr)
		setArgs(ac, args...)
	})
}

// call runs prog until it reports.
func (th *thread) call(prog program, args ...uint64) [6]uint64 {
	th.t.Helper()
	th.start(prog, args...)
	return th.report()
}

// fault runs prog, which must get a SIGSEGV for an access at of addr, or any
// signal that sig says.
func (th *thread) fault(want fault, prog program, args ...uint64) {
	th.t.Helper()
	th.start(prog, args...)
	th.mustFault(want)
}

// fault is a signal for an access of memory.
type fault struct {
	addr hostarch.Addr
	at   hostarch.AccessType // Read, Write or Execute
	sig  linux.Signal        // 0 means SIGSEGV
	code int32               // 0 means SEGV_MAPERR
}

// mustFault runs th until it gets want.
func (th *thread) mustFault(want fault) {
	th.t.Helper()
	th.checkFault(th.next(), want)
}

// checkFault compares e with want.
func (th *thread) checkFault(e event, want fault) {
	th.t.Helper()
	if want.sig == 0 {
		want.sig = linux.SIGSEGV
	}
	if want.code == 0 {
		want.code = linux.SEGV_MAPERR
	}
	if e.signal() != want.sig {
		th.t.Fatalf("got %v at IP %#x instead of %v for %v at %v", e, th.ac.IP(), want.sig, want.at, want.addr)
	}
	if got := hostarch.Addr(e.info.Addr()); got != want.addr {
		th.t.Errorf("%v: si_addr %v, want %v", want.sig, got, want.addr)
	}
	if e.info.Code != want.code {
		th.t.Errorf("%v at %v: si_code %d, want %d", want.sig, want.addr, e.info.Code, want.code)
	}
	// A write may be reported as a read as well: some CPUs do both.
	if got := e.at; !got.SupersetOf(want.at) || got.Execute != want.at.Execute || got.Write != want.at.Write {
		th.t.Errorf("%v at %v: access type %v, want %v", want.sig, want.addr, got, want.at)
	}
	checkFaultInfo(th, want)
	if th.t.Failed() {
		th.t.end()
		runtime.Goexit()
	}
}

// mustLoad makes th load the word at addr, which must be want.
func (th *thread) mustLoad(addr hostarch.Addr, want uint64) {
	th.t.Helper()
	if got := th.call(progLoad, uint64(addr))[1]; got != want {
		th.t.Fatalf("loaded %#x from %v, want %#x", got, addr, want)
	}
}

// mustStore makes th store v at addr.
func (th *thread) mustStore(addr hostarch.Addr, v uint64) {
	th.t.Helper()
	th.call(progStore, uint64(addr), v)
}

// run runs th in a worker until the subtest is over or stop says so, which sees
// every event.
func (th *thread) run(stop func(e event) bool) chan struct{} {
	return th.t.worker(func() {
		for !th.t.over() && !stop(th.switchOnce()) {
		}
	})
}

// untilEvent runs th in a worker until something other than an interrupt comes
// out, and sends that.
func (th *thread) untilEvent() chan event {
	events := make(chan event, 1)
	th.run(func(e event) bool {
		if e.err == platform.ErrContextInterrupt {
			return false
		}
		events <- e
		return true
	})
	return events
}

// background runs th in a worker until stop is called. see gets every event but
// interrupts.
func (th *thread) background(see func(e event)) (stop func()) {
	var stopping atomic.Bool
	done := th.run(func(e event) bool {
		if e.err != platform.ErrContextInterrupt {
			see(e)
		}
		return stopping.Load()
	})
	return func() {
		stopping.Store(true)
		th.halt(done)
	}
}

// receive waits for an event, or ends the goroutine when the subtest has failed.
func (t *T) receive(events chan event) event {
	select {
	case e := <-events:
		return e
	case <-t.failed:
		runtime.Goexit()
		panic("unreachable")
	}
}

// beating waits until the word at off of f, which the application counts up, has
// changed.
func (t *T) beating(f *file, off uint64) {
	v := f.load(off)
	t.until(func() bool { return f.load(off) != v })
}

// halt interrupts th, which run runs, until its worker is done.
func (th *thread) halt(done chan struct{}) {
	for {
		th.c.Interrupt()
		select {
		case <-done:
			return
		case <-th.t.failed:
			runtime.Goexit()
		case <-time.After(time.Millisecond):
		}
	}
}
