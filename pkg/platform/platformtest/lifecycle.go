package platformtest

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
)

var lifecycleSubjects = []subject{
	{"ReleaseUnused", testReleaseUnused},
	{"ReleaseWithMappings", testReleaseWithMappings},
	{"ReleaseWhileRunning", testReleaseWhileRunning},
	{"ReleaseDuringSyscalls", testReleaseDuringSyscalls},
	{"ReleaseLeavesOthers", testReleaseLeavesOthers},
	{"ContextBeforeSpace", testContextBeforeSpace},
	{"ForkHooks", testForkHooks},
	{"MappingsID", testMappingsID},
	{"ErrorPaths", testErrorPaths},
	{"NoDescriptorsLeft", testNoDescriptorsLeft},
}

func testReleaseUnused(t *T) {
	for range 3 {
		t.newBareSpace().release()
		t.s.p.NewContext(t.ctx).Release()
	}
	sp := t.newSpace()
	sp.newThread(progCount).release()
	sp.release()
}

func testReleaseWithMappings(t *T) {
	sp := t.newSpace()
	sp.mapData(dataPages, hostarch.ReadWrite)
	th := sp.newThread(progFill)
	th.call(progFill, uint64(dataBase), uint64(dataBase+dataPages*pageSize), pageSize)
	th.release()
	sp.release()
	if got := sp.data.load(pageSize); got != uint64(dataBase+pageSize) {
		t.Errorf("after Release the file holds %#x, want %#x", got, uint64(dataBase+pageSize))
	}
}

// releaseUnder releases sp while threads run prog in it, and checks that all of
// them get a ContextError.
func (sp *space) releaseUnder(n int, prog program, running func()) {
	t := sp.t
	t.Helper()
	var ths []*thread
	events := make(chan event, n)
	for i := range n {
		th := sp.newThread(prog, uint64(dataBase)+uint64(i)*64)
		ths = append(ths, th)
		th.run(func(e event) bool {
			if e.contextError() == nil {
				return false
			}
			events <- e
			return true
		})
	}
	running()
	sp.release()
	for range n {
		if e := t.receive(events); e.contextError().Err == nil {
			t.Errorf("ContextError %v has no cause", e.err)
		}
	}
	for _, th := range ths {
		th.release()
	}
}

// Switches that are under way when their AddressSpace is released return with a
// ContextError.
func testReleaseWhileRunning(t *T) {
	for range 5 {
		sp := t.newSpace()
		sp.mapData(1, hostarch.ReadWrite)
		sp.releaseUnder(4, progBeat, func() {
			for i := range uint64(4) {
				t.until(func() bool { return sp.data.load(i*64) != 0 })
			}
		})
	}
}

// The same with threads that come and go all the time.
func testReleaseDuringSyscalls(t *T) {
	for i, prog := range []program{progCount, progIllegal, progCount, progIllegal} {
		sp := t.newSpace()
		sp.mapData(1, hostarch.ReadWrite)
		sp.releaseUnder(3, prog, func() { time.Sleep(time.Duration(i) * time.Millisecond) })
	}
}

// Other AddressSpaces, and their Contexts, do not notice.
func testReleaseLeavesOthers(t *T) {
	keep := t.newSpace()
	keep.mapData(1, hostarch.ReadWrite)
	spinner := keep.newThread(progBeat, uint64(dataBase))
	stop := spinner.background(func(e event) { t.Fatalf("a Context of another AddressSpace got %v", e) })
	caller := keep.newThread(progCount)
	for i := range uint64(5) {
		sp := t.newSpace()
		sp.mapData(1, hostarch.ReadWrite)
		sp.releaseUnder(2, progBeat, func() { t.beating(sp.data, 0) })
		if a := caller.report(); a[0] != i+1 {
			t.Fatalf("call %d, want %d", a[0], i+1)
		}
		t.beating(keep.data, 0)
	}
	stop()
}

// Contexts are released before their AddressSpace, or after it.
func testContextBeforeSpace(t *T) {
	for i := range 6 {
		sp := t.newSpace()
		a, b := sp.newThread(progCount), sp.newThread(progIllegal)
		a.report()
		b.next()
		switch i % 3 {
		case 0:
			sp.release()
			a.release()
			b.release()
		case 1:
			a.release()
			sp.release()
			b.release()
		case 2:
			a.release()
			b.release()
			sp.release()
		}
	}
}

// PreFork and PostFork around a copy of the mappings; the copy runs as the
// original does.
func testForkHooks(t *T) {
	sp := t.newSpace()
	sp.mapData(2, hostarch.ReadWrite)
	th := sp.newThread(progCount)
	spinner := sp.newThread(progBeat, uint64(dataBase))
	stop := spinner.background(func(e event) { t.Fatalf("the spinning Context got %v", e) })
	for i := range uint64(10) {
		t.beating(sp.data, 0)
		if a := th.report(); a[0] != i+1 {
			t.Fatalf("parent: call %d, want %d", a[0], i+1)
		}
		th.pull()
		sp.as.PreFork()
		child := t.newSpace()
		child.data = sp.data
		child.mapData(2, hostarch.ReadWrite)
		sp.as.PostFork()
		cth := child.newThread(progCount)
		cth.ac = th.ac.Fork()
		cth.ac.SetReturn(0)
		th.ac.SetReturn(uintptr(100 + i))
		if a := cth.report(); a[0] != i+2 || a[1] != 0 {
			t.Fatalf("child: call %d with result %d, want %d and 0", a[0], a[1], i+2)
		}
		cth.release()
		child.release()
	}
	if a := th.report(); a[0] != 11 || a[1] != 109 {
		t.Fatalf("parent: call %d with result %d, want 11 and 109", a[0], a[1])
	}
	stop()
}

// A mappingsID does no more than allow the platform to keep things.
func testMappingsID(t *T) {
	type id struct{ n int }
	for i := range 4 {
		as, _, err := t.s.p.NewAddressSpace(&id{i % 2})
		if err != nil || as == nil {
			t.Fatalf("NewAddressSpace: %v, %v", as, err)
		}
		sp := &space{memoryManager: &memoryManager{as: as}, t: t, data: t.newFile(pageSize)}
		t.mu.Lock()
		t.spaces = append(t.spaces, sp)
		t.mu.Unlock()
		sp.mapText()
		sp.mapData(1, hostarch.ReadWrite)
		th := sp.newThread(progLoad)
		th.mustStore(dataBase, 1)
		th.release()
		sp.release()
	}
}

// After errors everything still works, and is still freed.
func testErrorPaths(t *T) {
	for range 3 {
		sp := t.newSpace()
		th := sp.newThread(progCount)
		th.report()
		// A Context whose thread only ever faults.
		lost := sp.newThread(progJump, 0)
		for range 3 {
			if e := lost.next(); e.signal() == 0 {
				t.Fatalf("got %v", e)
			}
		}
		// A thread that starts where nothing is.
		nowhere := sp.newThread(progSpin)
		nowhere.ac = arch.New()
		nowhere.ac.SetIP(uintptr(dataBase))
		if e := nowhere.next(); e.signal() == 0 {
			t.Fatalf("got %v", e)
		}
		th.report()
		runtime.Gosched()
	}
}

// The process can open nothing more: whatever fails says so with an errno, and
// when there is room again everything works.
func testNoDescriptorsLeft(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progCount)
	th.report()
	next, err := unix.Dup(sp.data.fd)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(next)
	var old unix.Rlimit
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &old); err != nil {
		t.Fatal(err)
	}
	// No descriptor from the lowest free one on.
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(next), Max: old.Max}, nil); err != nil {
		t.Fatal(err)
	}
	restore := func() {
		if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &old, nil); err != nil {
			t.Errorf("prlimit(RLIMIT_NOFILE): %v", err)
		}
	}
	func() {
		defer restore()
		for range 3 {
			as, _, err := t.s.p.NewAddressSpace(nil)
			if err != nil && !isErrno(err) {
				t.Errorf("NewAddressSpace without descriptors: %v wraps no errno", err)
			}
			if as != nil {
				err := as.MapFile(textBase, t.s.text.file, fileRange(0, pageSize), hostarch.ReadExec, false)
				if err != nil && !isErrno(err) {
					t.Errorf("MapFile without descriptors: %v wraps no errno", err)
				}
				as.Release()
			}
		}
		// What is there goes on; a new Context may fail, with an error.
		th.report()
		more := sp.newThread(progCount)
		if e := more.next(); e.err != nil && e.contextError() == nil {
			t.Errorf("a new Context without descriptors gets %v", e)
		}
	}()
	th.report()
	sp2 := t.newSpace()
	sp2.mapData(1, hostarch.ReadWrite)
	sp2.newThread(progLoad).mustLoad(dataBase, 0)
}
