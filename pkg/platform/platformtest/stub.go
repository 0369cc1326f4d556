package platformtest

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// stubSubjects look at the processes in which application code runs.
var stubSubjects = []subject{
	{"Killed", testStubKilled},
	{"KilledWhileIdle", testStubKilledWhileIdle},
	{"KilledWhileMapping", testStubKilledWhileMapping},
	{"Stopped", testStubStopped},
	{"ForeignSignals", testStubForeignSignals},
	{"AddressSpaceLimit", testStubAddressSpaceLimit},
	{"HoldsNoOtherFiles", testStubFiles},
	{"MapsNothingElse", testStubMappings},
	{"DieWithUs", testStubsDieWithUs},
}

// newSpaceWithStubs returns a space with a thread that has made a system call,
// and the processes behind it.
func (t *T) newSpaceWithStubs(prog program, args ...uint64) (*space, *thread, []int) {
	t.Helper()
	before, err := descendants(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progCount)
	th.report()
	var pids []int
	if find := t.s.cfg.Stubs; find != nil {
		if pids, err = find(sp.as); err != nil {
			t.Fatalf("Config.Stubs: %v", err)
		}
	} else {
		after, err := descendants(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		for pid := range after {
			if !before[pid] && alive(pid) {
				pids = append(pids, pid)
			}
		}
	}
	if len(pids) == 0 {
		t.Fatalf("found no process that runs the AddressSpace: set Config.Stubs, or NoStubProcesses if there are none")
	}
	th.start(prog, args...)
	return sp, th, pids
}

// killAll kills the processes and waits until they are no more than zombies.
func (t *T) killAll(pids []int) {
	t.Helper()
	for _, pid := range pids {
		if err := kill(pid); err != nil {
			t.Fatalf("kill(%d): %v", pid, err)
		}
	}
	for _, pid := range pids {
		t.until(func() bool { return !alive(pid) })
	}
}

// mustContextError runs th until it gets a ContextError.
func (th *thread) mustContextError(why string) {
	th.t.Helper()
	e := th.next()
	// A system call or a signal from before may still be on its way.
	for i := 0; i < 3 && e.contextError() == nil; i++ {
		e = th.next()
	}
	if e.contextError() == nil {
		th.t.Fatalf("%s: got %v, want a ContextError", why, e)
	}
}

// A stub is killed while it runs: its Contexts get a ContextError, those of
// other AddressSpaces nothing.
func testStubKilled(t *T) {
	other := t.newSpace()
	other.mapData(1, hostarch.ReadWrite)
	w := other.newWitness()
	spinner := other.newThread(progBeat, uint64(dataBase))
	stop := spinner.background(func(e event) { t.Fatalf("a Context of another AddressSpace got %v", e) })
	for range 3 {
		sp, a, pids := t.newSpaceWithStubs(progBeat, uint64(dataBase))
		b := sp.newThread(progBeat, uint64(dataBase)+64)
		ea, eb := a.untilEvent(), b.untilEvent()
		t.beating(sp.data, 0)
		t.beating(sp.data, 64)
		t.killAll(pids)
		for i, ch := range []chan event{ea, eb} {
			if e := t.receive(ch); e.contextError() == nil {
				t.Fatalf("Context %d of the killed stub got %v", i, e)
			} else if i == 0 {
				t.Log(e.err)
			}
		}
		w.check("the death of another stub")
		t.beating(other.data, 0)
		// It stays so, and nothing else goes wrong.
		a.mustContextError("again")
		sp.newThread(progCount).mustContextError("a new Context in the AddressSpace of a killed stub")
		sp.unmap(dataBase, pageSize)
		a.release()
		b.release()
		sp.release()
	}
	stop()
	t.newSpace().newThread(progCount).report()
}

// It is killed while its threads are in the Sentry.
func testStubKilledWhileIdle(t *T) {
	w := t.newSpace().newWitness()
	for range 3 {
		sp, th, pids := t.newSpaceWithStubs(progCount)
		th.report()
		t.killAll(pids)
		th.mustContextError("the stub was killed")
		th.c.Interrupt()
		w.check("the death of another stub")
		th.release()
		sp.release()
	}
}

// It is killed, and then the Sentry changes mappings: errors, no hang.
func testStubKilledWhileMapping(t *T) {
	w := t.newSpace().newWitness()
	for range 3 {
		sp, th, pids := t.newSpaceWithStubs(progCount)
		t.killAll(pids)
		err := sp.mapFile(dataBase+pageSize, sp.data, fileRange(0, pageSize), hostarch.Read, false)
		if err == nil {
			// Allowed for a platform that maps lazily.
			t.Log("MapFile in the AddressSpace of a killed stub succeeds")
		} else if !isErrno(err) {
			t.Errorf("MapFile in the AddressSpace of a killed stub: %v wraps no errno", err)
		}
		sp.unmap(dataBase, pageSize)
		sp.as.PreFork()
		sp.as.PostFork()
		th.mustContextError("the stub was killed")
		w.check("the death of another stub")
		th.release()
		sp.release()
	}
}

// Someone stops a stub and lets it go on: it waits, and Interrupt is not lost.
func testStubStopped(t *T) {
	sp, th, pids := t.newSpaceWithStubs(progBeat, uint64(dataBase))
	// A platform may show it these signals, as ptrace(2) does.
	stop := th.background(func(e event) {
		if sig := e.signal(); sig != linux.SIGSTOP && sig != linux.SIGCONT {
			t.Fatalf("got %v", e)
		}
	})
	t.beating(sp.data, 0)
	for range 3 {
		for _, pid := range pids {
			if err := stopProcess(pid); err != nil {
				t.Fatal(err)
			}
		}
		th.c.Interrupt()
		for _, pid := range pids {
			if err := continueProcess(pid); err != nil {
				t.Fatal(err)
			}
		}
		t.beating(sp.data, 0)
	}
	stop()
	th.start(progCount, 0)
	th.report()
}

// Signals that someone else sends to a stub end, at worst, its own Contexts.
func testStubForeignSignals(t *T) {
	w := t.newSpace().newWitness()
	for _, sig := range []unix.Signal{unix.SIGUSR1, unix.SIGTERM, unix.SIGHUP, unix.SIGCHLD, unix.SIGURG, unix.SIGSEGV, unix.SIGSYS, unix.SIGTRAP} {
		sp, th, pids := t.newSpaceWithStubs(progBeat, uint64(dataBase))
		for _, pid := range pids {
			if err := unix.Kill(pid, sig); err != nil {
				t.Fatalf("kill(%d, %v): %v", pid, sig, err)
			}
		}
		for range 5 {
			if th.bounded().contextError() != nil {
				break
			}
		}
		w.check("a foreign signal")
		th.release()
		sp.release()
	}
}

// A stub has no room for a mapping: MapFile fails with ENOMEM, and the rest
// works on.
func testStubAddressSpaceLimit(t *T) {
	sp, th, pids := t.newSpaceWithStubs(progCount)
	f := t.newFile(1 << 30)
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
		if err != nil {
			t.Fatal(err)
		}
		pages, err := strconv.ParseUint(strings.Fields(string(b))[0], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		limit := pages*pageSize + 1<<20
		if err := unix.Prlimit(pid, unix.RLIMIT_AS, &unix.Rlimit{Cur: limit, Max: unix.RLIM_INFINITY}, nil); err != nil {
			t.Fatalf("prlimit(%d, RLIMIT_AS): %v", pid, err)
		}
	}
	for range 2 {
		if err := sp.mapFile(0x10_0000_0000, f, fileRange(0, 1<<30), hostarch.Read, false); !errors.Is(err, unix.ENOMEM) {
			t.Errorf("MapFile of 1 GiB with RLIMIT_AS 1 MiB above what is in use: %v, want ENOMEM", err)
		}
		th.report()
		th.mustUse(dataBase+pageSize, 1)
		th.start(progCount)
	}
}

// A stub holds nothing of the Sentry's but memory files, not even what the
// Sentry forgot to mark close-on-exec.
func testStubFiles(t *T) {
	fd, err := unix.Open("/proc/self/status", unix.O_RDONLY, 0)
	if err != nil {
		t.Fatalf("open(/proc/self/status): %v", err)
	}
	defer unix.Close(fd)
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], 0); err != nil {
		t.Fatalf("pipe2: %v", err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	_, th, pids := t.newSpaceWithStubs(progCount)
	ours, err := descriptors(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		fds, err := descriptors(pid)
		if err != nil {
			t.Fatal(err)
		}
		for fd, what := range fds {
			// These names say nothing, or /dev/null may be the stub's own.
			if strings.HasPrefix(what, "/memfd:") || strings.HasPrefix(what, "anon_inode:") || what == os.DevNull {
				continue
			}
			for n, our := range ours {
				if our == what {
					t.Errorf("stub %d holds as descriptor %d what we have as %d: %s", pid, fd, n, what)
				}
			}
		}
	}
	th.report()
}

// Where applications can map, a stub has what was mapped and nothing else, with
// the permissions that were asked for.
func testStubMappings(t *T) {
	sp, th, pids := t.newSpaceWithStubs(progCount)
	check := func(when string) {
		t.Helper()
		for _, pid := range pids {
			ms, err := mapsOf(pid)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range ms {
				ar := hostarch.AddrRange{Start: hostarch.Addr(m.start), End: hostarch.Addr(m.end)}.Intersect(t.userRange())
				for addr := ar.Start; addr < ar.End; addr += pageSize {
					want := "----"
					for _, v := range sp.vmas {
						if v.ar.Contains(addr) {
							want = v.at.String() + "s"
						}
					}
					if m.perms != want {
						t.Errorf("%s: stub %d has %v at %v (%s), want %s", when, pid, m.perms, addr, m.name, want)
						break
					}
				}
			}
		}
	}
	check("at first")
	sp.mustMap(dataBase, sp.data, 0, 8*pageSize, hostarch.Read)
	sp.mustMap(dataBase+2*pageSize, sp.data, 0, pageSize, hostarch.ReadExec)
	sp.unmap(dataBase+4*pageSize, 2*pageSize)
	check("after changes")
	sp.newThread(progCount).report()
	check("with a second Context")
	th.report()
}

// childVar makes a child process of the test play the part of a Sentry that is
// killed.
const childVar = "RINGFENCE_PLATFORMTEST_CHILD"

// When our process is killed its stubs die too, whatever they do.
func testStubsDieWithUs(t *T) {
	if os.Getenv(childVar) != "" {
		playVictim(t)
		return
	}
	var pattern []string
	for _, part := range strings.Split(t.Name(), "/") {
		pattern = append(pattern, "^"+part+"$")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run="+strings.Join(pattern, "/"))
	cmd.Env = append(os.Environ(), childVar+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.worker(func() {
		// Whatever happens, it does not outlive the subtest.
		<-t.failed
		cmd.Process.Kill()
	})
	defer cmd.Wait()
	defer cmd.Process.Kill()
	var pids []int
	for s := bufio.NewScanner(out); s.Scan(); {
		if line, ok := strings.CutPrefix(s.Text(), "stubs:"); ok {
			for _, f := range strings.Fields(line) {
				pid, err := strconv.Atoi(f)
				if err != nil {
					t.Fatalf("the child says %q", s.Text())
				}
				pids = append(pids, pid)
			}
			break
		}
	}
	if len(pids) == 0 {
		t.Fatalf("the child named no stubs")
	}
	for _, pid := range pids {
		if !alive(pid) {
			t.Fatalf("stub %d of the child is dead before its time", pid)
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		t.until(func() bool { return !alive(pid) })
	}
}

// playVictim has stubs that spin, and one that is idle, and waits to be killed.
func playVictim(t *T) {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progBeat, uint64(dataBase))
	th.run(func(e event) bool { return e.err != platform.ErrContextInterrupt })
	t.beating(sp.data, 0)
	t.newSpace().newThread(progCount).report()
	pids, err := descendants(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	line := "stubs:"
	for pid := range pids {
		line += " " + strconv.Itoa(pid)
	}
	fmt.Println(line)
	time.Sleep(t.s.cfg.Timeout)
}
