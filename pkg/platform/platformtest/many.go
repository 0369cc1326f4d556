package platformtest

import (
	"runtime"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

var manySubjects = []subject{
	{"ContextsInOneSpace", testContextsInOneSpace},
	{"SpinningContextsInOneSpace", testSpinningContexts},
	{"Spaces", testManySpaces},
	{"ContextMovesBetweenSpaces", testContextMoves},
	{"ContextChurn", testContextChurn},
	{"SpaceChurn", testSpaceChurn},
	{"GoroutineMovesBetweenThreads", testGoroutineMoves},
}

// 32 Contexts add to one word.
func testContextsInOneSpace(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	const n, rounds, each = 32, 20, 100
	var dones []chan struct{}
	for range n {
		th := sp.newThread(progAtomicAdd, uint64(dataBase), each)
		dones = append(dones, t.worker(func() {
			for range rounds {
				th.report()
			}
		}))
	}
	for _, d := range dones {
		t.wait(d)
	}
	if got := sp.data.load(0); got != n*rounds*each {
		t.Fatalf("the word is %d, want %d", got, n*rounds*each)
	}
}

// More Contexts than CPUs never leave application code by themselves; all run,
// and each can be stopped.
func testSpinningContexts(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	n := 2*runtime.NumCPU() + 2
	var ths []*thread
	var dones []chan struct{}
	for i := range n {
		th := sp.newThread(progBeat, uint64(dataBase)+uint64(i)*64)
		ths = append(ths, th)
		dones = append(dones, th.run(func(e event) bool {
			if e.err != platform.ErrContextInterrupt {
				t.Fatalf("got %v", e)
			}
			return true
		}))
	}
	for i := range n {
		// A spurious interrupt may have ended a worker already.
		select {
		case <-dones[i]:
			dones[i] = ths[i].run(func(e event) bool { return e.err == platform.ErrContextInterrupt })
		default:
		}
		t.beating(sp.data, uint64(i)*64)
	}
	for i := range n {
		ths[i].halt(dones[i])
	}
}

// 64 AddressSpaces at once, each with memory of its own at the same address.
func testManySpaces(t *T) {
	const n = 64
	if t.s.p.CooperativelySchedulesAddressSpace() {
		t.Log("the platform has few AddressSpaces and may make NewAddressSpace wait")
	}
	data := t.newFile(n * pageSize)
	data.number(7)
	var ths []*thread
	for i := range uint64(n) {
		sp := t.newSpace()
		sp.mustMap(dataBase, data, i*pageSize, pageSize, hostarch.ReadWrite)
		ths = append(ths, sp.newThread(progLoad))
	}
	for round := range uint64(2) {
		for i, th := range ths {
			th.mustLoad(dataBase, 7<<32|uint64(i))
			th.mustStore(dataBase+8, round)
		}
	}
	for i := range uint64(n) {
		if got := data.load(i*pageSize + 8); got != 1 {
			t.Errorf("space %d stored %d, want 1", i, got)
		}
	}
	// From many goroutines at once.
	var dones []chan struct{}
	for i, th := range ths {
		dones = append(dones, t.worker(func() { th.mustLoad(dataBase, 7<<32|uint64(i)) }))
	}
	for _, d := range dones {
		t.wait(d)
	}
}

// One Context goes from AddressSpace to AddressSpace, as a thread does that
// calls execve(2).
func testContextMoves(t *T) {
	data := t.newFile(4 * pageSize)
	data.number(8)
	var sps []*space
	for i := range uint64(4) {
		sp := t.newSpace()
		sp.mustMap(dataBase, data, i*pageSize, pageSize, hostarch.Read)
		sps = append(sps, sp)
	}
	th := sps[0].newThread(progLoad)
	for i := range uint64(40) {
		th.pull()
		th.sp = sps[i*3%4]
		th.c.FullStateChanged()
		th.mustLoad(dataBase, 8<<32|i*3%4)
	}
	// Two at once, past each other.
	var dones []chan struct{}
	for k := range uint64(2) {
		th := sps[k].newThread(progLoad)
		dones = append(dones, t.worker(func() {
			for i := range uint64(40) {
				j := (i + 2*k) % 4
				th.pull()
				th.sp = sps[j]
				th.c.FullStateChanged()
				th.mustLoad(dataBase, 8<<32|j)
			}
		}))
	}
	for _, d := range dones {
		t.wait(d)
	}
	// After the space it was in is gone.
	old := th.sp // The 39*3%4 = 1st.
	th.pull()
	th.sp = sps[0]
	th.c.FullStateChanged()
	old.release()
	th.mustLoad(dataBase, 8<<32)
}

func testContextChurn(t *T) {
	sp := t.newSpace()
	keep := sp.newThread(progCount)
	for i := range uint64(100) {
		th := sp.newThread(progCount)
		if a := th.report(); a[0] != 1 {
			t.Fatalf("Context %d: its first call has number %d", i, a[0])
		}
		th.release()
		if a := keep.report(); a[0] != i+1 {
			t.Fatalf("the Context that stays: call %d, want %d", a[0], i+1)
		}
	}
}

func testSpaceChurn(t *T) {
	keep := t.newSpace().newThread(progCount)
	for i := range uint64(30) {
		sp := t.newSpace()
		sp.mapData(1, hostarch.ReadWrite)
		th := sp.newThread(progLoad)
		th.mustStore(dataBase, i)
		th.mustLoad(dataBase, i)
		th.release()
		sp.release()
		if a := keep.report(); a[0] != i+1 {
			t.Fatalf("the Context that stays: call %d, want %d", a[0], i+1)
		}
	}
}

// A Context is used from one OS thread after the other, spinning, making system
// calls and faulting.
func testGoroutineMoves(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progCount)
	t.onThreads(60, func(i int) {
		switch i % 3 {
		case 0:
			th.start(progCount, uint64(i))
			if a := th.report(); a[0] != uint64(i)+1 && a[0] != 1 {
				t.Fatalf("step %d: call %d", i, a[0])
			}
		case 1:
			th.fault(fault{addr: dataBase + pageSize, at: hostarch.Read}, progLoad, uint64(dataBase+pageSize))
		case 2:
			th.start(progBeat, uint64(dataBase))
			th.interruptUntil(2, func() {})
		}
	})
}
