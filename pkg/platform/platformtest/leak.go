package platformtest

import "github.com/ringfence/ringfence/pkg/hostarch"

// leakSubjects repeat what takes things from the host, more often than a census
// of one round could overlook.
var leakSubjects = []subject{
	{"Cycles", testLeakCycles},
	{"CyclesWithErrors", testLeakCyclesWithErrors},
}

// grown runs cycle a few times, and then n times more, and compares the process
// before and after those.
func (t *T) grown(n int, cycle func()) {
	t.Helper()
	for range 5 {
		cycle()
	}
	before, err := takeCensus()
	if err != nil {
		t.Fatal(err)
	}
	for range n {
		cycle()
	}
	if err := before.compareSettled(); err != nil {
		t.Errorf("after %d rounds: %v", n, err)
	}
	now, err := takeCensus()
	if err != nil {
		t.Fatal(err)
	}
	// A few may be the runtime's.
	if d := now.threads - before.threads; d > n/3 {
		t.Errorf("after %d rounds there are %d more threads", n, d)
	}
}

// cycle makes a space and a file, lets two threads of it run, and frees all of
// it.
func (t *T) cycle(body func(sp *space, th *thread)) {
	t.Helper()
	n := len(t.files)
	sp := t.newSpace()
	sp.mapData(4, hostarch.ReadWrite)
	th := sp.newThread(progLoad)
	th.mustLoad(dataBase, 0)
	other := sp.newThread(progBeat, uint64(dataBase))
	done := other.run(func(e event) bool { return true })
	t.beating(sp.data, 0)
	other.halt(done)
	body(sp, th)
	th.release()
	other.release()
	sp.release()
	for _, f := range t.files[n:] {
		if err := f.close(); err != nil {
			t.Errorf("%v", err)
		}
	}
	t.files = t.files[:n]
}

func testLeakCycles(t *T) {
	t.grown(40, func() { t.cycle(func(*space, *thread) {}) })
}

func testLeakCyclesWithErrors(t *T) {
	t.grown(20, func() {
		t.cycle(func(sp *space, th *thread) {
			// A mapping that fails.
			if err := sp.mapFile(dataBase, badFile{sp.data}, fileRange(0, pageSize), hostarch.Read, false); err == nil {
				t.Fatalf("MapFile of a file with a closed descriptor succeeds")
			}
			// A state that the host may refuse.
			rnd := random(80)
			wild := sp.newThread(progCount)
			wild.report()
			wild.pull()
			scrambleRegs(wild.ac, rnd)
			wild.c.FullStateChanged()
			wild.bounded()
			wild.release()
			// A space that is released under its threads.
			gone := t.newSpace()
			gone.mapData(1, hostarch.ReadWrite)
			gone.releaseUnder(2, progBeat, func() { t.beating(gone.data, 0) })
		})
		if !t.s.cfg.NoStubProcesses {
			sp, th, pids := t.newSpaceWithStubs(progCount)
			t.killAll(pids)
			th.mustContextError("the stub was killed")
			th.release()
			sp.release()
		}
		for _, f := range t.files {
			if err := f.close(); err != nil {
				t.Errorf("%v", err)
			}
		}
		t.files = nil
	})
}
