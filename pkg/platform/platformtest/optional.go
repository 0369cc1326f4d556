package platformtest

import (
	"errors"
	"runtime"
	"time"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// Groups for what not every platform has.

var addressSpaceIOSubjects = []subject{
	{"Copy", testIOCopy},
	{"Faults", testIOFaults},
	{"Atomics", testIOAtomics},
}

func testIOCopy(t *T) {
	sp := t.newSpace()
	// Three pages, of which no two are neighbours in the file.
	for i := range uint64(3) {
		sp.mustMap(dataBase+hostarch.Addr(i)*pageSize, sp.data, i*2*pageSize, pageSize, hostarch.ReadWrite)
	}
	th := sp.newThread(progLoad)
	src := make([]byte, 2*pageSize)
	rnd := random(70)
	for i := range src {
		src[i] = byte(rnd.Uint32())
	}
	addr := dataBase + 100
	if n, err := sp.as.CopyOut(addr, src); n != len(src) || err != nil {
		t.Fatalf("CopyOut: %d, %v", n, err)
	}
	dst := make([]byte, len(src))
	if n, err := sp.as.CopyIn(addr, dst); n != len(dst) || err != nil {
		t.Fatalf("CopyIn: %d, %v", n, err)
	}
	if d := diffBytes(dst, src); d != "" {
		t.Fatalf("CopyIn after CopyOut: %s", d)
	}
	if d := diffBytes(sp.data.data[100:pageSize], src[:pageSize-100]); d != "" {
		t.Fatalf("the file after CopyOut: %s", d)
	}
	th.mustStore(dataBase+pageSize, 0x55)
	if n, err := sp.as.CopyIn(dataBase+pageSize, dst[:8]); n != 8 || err != nil || dst[0] != 0x55 {
		t.Fatalf("CopyIn of what the application stored: %d, %v, %x", n, err, dst[:8])
	}
	if n, err := sp.as.ZeroOut(dataBase+pageSize-8, 16); n != 16 || err != nil {
		t.Fatalf("ZeroOut: %d, %v", n, err)
	}
	th.mustLoad(dataBase+pageSize, 0)
	th.mustLoad(dataBase+pageSize-8, 0)
	for _, n := range []int{0, 1} {
		if m, err := sp.as.CopyOut(dataBase, src[:n]); m != n || err != nil {
			t.Errorf("CopyOut of %d bytes: %d, %v", n, m, err)
		}
	}
}

func testIOFaults(t *T) {
	sp := t.newSpace()
	sp.mustMap(dataBase, sp.data, 0, pageSize, hostarch.ReadWrite)
	sp.mustMap(dataBase+2*pageSize, sp.data, 0, pageSize, hostarch.Read)
	b := make([]byte, 64)
	check := func(what string, n int, err error, wantN int, addr hostarch.Addr) {
		t.Helper()
		var sf platform.SegmentationFault
		if n != wantN || !errors.As(err, &sf) {
			t.Errorf("%s: %d, %v; want %d and a SegmentationFault", what, n, err, wantN)
		} else if sf.Addr != addr {
			t.Errorf("%s: fault at %v, want %v", what, sf.Addr, addr)
		}
	}
	edge := dataBase + pageSize
	n, err := sp.as.CopyOut(edge-16, b)
	check("CopyOut over the end", n, err, 16, edge)
	n, err = sp.as.CopyIn(edge-16, b)
	check("CopyIn over the end", n, err, 16, edge)
	z, err := sp.as.ZeroOut(edge-16, 64)
	check("ZeroOut over the end", int(z), err, 16, edge)
	n, err = sp.as.CopyOut(dataBase+2*pageSize, b)
	check("CopyOut to a read-only page", n, err, 0, dataBase+2*pageSize)
	_, err = sp.as.SwapUint32(edge, 1)
	check("SwapUint32 of nothing", 0, err, 0, edge)
	_, err = sp.as.CompareAndSwapUint32(dataBase+2*pageSize, 0, 1)
	check("CompareAndSwapUint32 of a read-only page", 0, err, 0, dataBase+2*pageSize)
	_, err = sp.as.LoadUint32(edge)
	check("LoadUint32 of nothing", 0, err, 0, edge)
	sp.unmap(dataBase, pageSize)
	n, err = sp.as.CopyIn(dataBase, b)
	check("CopyIn after Unmap", n, err, 0, dataBase)
}

func testIOAtomics(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	step := func(what string, got uint32, err error, want, now uint32) {
		t.Helper()
		v := uint32(sp.data.load(0))
		if got != want || err != nil || v != now {
			t.Errorf("%s: %d, %v, then the word is %d; want %d and %d", what, got, err, v, want, now)
		}
	}
	v, err := sp.as.SwapUint32(dataBase, 7)
	step("SwapUint32(7)", v, err, 0, 7)
	v, err = sp.as.CompareAndSwapUint32(dataBase, 6, 8)
	step("CompareAndSwapUint32(6, 8)", v, err, 7, 7)
	v, err = sp.as.CompareAndSwapUint32(dataBase, 7, 8)
	step("CompareAndSwapUint32(7, 8)", v, err, 7, 8)
	v, err = sp.as.LoadUint32(dataBase)
	step("LoadUint32", v, err, 8, 8)
	// Against the application.
	sp.data.store(0, 0)
	const n = 2000
	th := sp.newThread(progAtomicAdd, uint64(dataBase), n)
	done := t.worker(func() { th.report() })
	for range n {
		for {
			old, err := sp.as.LoadUint32(dataBase)
			if err != nil {
				t.Fatal(err)
			}
			if prev, err := sp.as.CompareAndSwapUint32(dataBase, old, old+1); err != nil {
				t.Fatal(err)
			} else if prev == old {
				break
			}
		}
	}
	t.wait(done)
	if got := sp.data.load(0); got != 2*n {
		t.Errorf("the word is %d, want %d", got, 2*n)
	}
}

var preemptionSubjects = []subject{
	{"PreemptAllCPUs", testPreemptAllCPUs},
	{"PreemptWhileRunning", testPreemptWhileRunning},
	{"NoCPU", testNoCPU},
}

// switchOn is Switch for the CPU cpu.
func (th *thread) switchOn(cpu int32) error {
	_, _, err := th.c.Switch(th.t.ctx, th.sp, th.ac, cpu)
	return err
}

// The first Switch of each Context after PreemptAllCPUs says so.
func testPreemptAllCPUs(t *T) {
	sp := t.newSpace()
	ths := []*thread{sp.newThread(progCount), t.newSpace().newThread(progCount)}
	for _, th := range ths {
		th.report()
	}
	for range 5 {
		if err := t.s.p.PreemptAllCPUs(); err != nil {
			t.Fatalf("PreemptAllCPUs: %v", err)
		}
		for i, th := range ths {
			if e := th.switchOnce(); e.err != platform.ErrContextCPUPreempted {
				t.Fatalf("Context %d: after PreemptAllCPUs, Switch gives %v", i, e)
			}
			th.report()
		}
	}
}

func testPreemptWhileRunning(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progBeat, uint64(dataBase))
	for range 10 {
		events := make(chan event, 1)
		t.worker(func() { events <- th.next() })
		t.beating(sp.data, 0)
		if err := t.s.p.PreemptAllCPUs(); err != nil {
			t.Fatalf("PreemptAllCPUs: %v", err)
		}
		if e := t.receive(events); e.err != platform.ErrContextCPUPreempted {
			t.Fatalf("got %v", e)
		}
	}
}

// A CPU that does not exist is never the one that the thread runs on.
func testNoCPU(t *T) {
	th := t.newSpace().newThread(progCount)
	th.report()
	for range 5 {
		if err := th.switchOn(1 << 20); err != platform.ErrContextCPUPreempted {
			t.Fatalf("Switch for CPU %d gives %v", 1<<20, err)
		}
	}
	th.report()
}

var barrierSubjects = []subject{
	{"Returns", testBarrierReturns},
	{"Order", testBarrierOrder},
}

func testBarrierReturns(t *T) {
	barrier := func() {
		t.Helper()
		if err := t.s.p.GlobalMemoryBarrier(); err != nil {
			t.Fatalf("GlobalMemoryBarrier: %v", err)
		}
	}
	barrier()
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progBeat, uint64(dataBase))
	stop := th.background(func(e event) { t.Fatalf("got %v", e) })
	t.beating(sp.data, 0)
	for range 3 {
		barrier()
		t.beating(sp.data, 0)
	}
	stop()
	barrier()
}

// Dekker's test: the application stores x and then loads y without a barrier,
// the Sentry stores y, makes the barrier, and loads x. One of the two must see
// the other's store.
func testBarrierOrder(t *T) {
	const x, y, goOff, out = 0, 256, 512, 768
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	b := uint64(dataBase)
	th := sp.newThread(progDekker, b+x, b+y, b+goOff, b+out)
	stop := th.background(func(e event) { t.Fatalf("got %v", e) })
	// A barrier can take the host many milliseconds: as many rounds as fit.
	deadline := time.Now().Add(300 * time.Millisecond)
	rounds := 0
	for r := uint64(1); r <= 2000 && time.Now().Before(deadline); r++ {
		sp.data.store(goOff, r)
		for range r % 50 {
			runtime.KeepAlive(sp)
		}
		sp.data.store(y, r)
		if err := t.s.p.GlobalMemoryBarrier(); err != nil {
			t.Fatalf("GlobalMemoryBarrier: %v", err)
		}
		sentrySaw := sp.data.load(x)
		t.until(func() bool { return sp.data.load(out+8) == r })
		if appSaw := sp.data.load(out); sentrySaw != r && appSaw != r {
			t.Fatalf("round %d: neither the application (%d) nor the Sentry (%d) sees the other's store", r, appSaw, sentrySaw)
		}
		rounds++
	}
	stop()
	t.Logf("%d rounds", rounds)
}
