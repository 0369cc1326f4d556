// Package adversary attacks the Sentry from inside the sandbox, on every
// platform: programs that make random system calls, execute random bytes, storm
// each other with signals, fork without end. The sandbox must go on as if nothing
// had happened, and leave nothing behind.
//
// Like e2e it uses the command as a user would; it must not import the Sentry.
package adversary

import (
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	_ "github.com/ringfence/ringfence/pkg/platform/platforms"
	"github.com/ringfence/ringfence/test/sandbox"
)

var (
	seedFlag   = flag.Uint64("seed", 1, "of everything that is random")
	effortFlag = flag.Int("effort", 1, "how many times as much to do, in about as many times the time")
)

// timeout bounds every single run.
const timeout = 2 * time.Minute

// survived is the status of a program that has done all it meant to.
const survived = 42

func TestMain(m *testing.M) { os.Exit(sandbox.Main(m)) }

// start runs argv in a sandbox on platform p.
func start(t *testing.T, p string, opts []string, argv ...string) *sandbox.Sandbox {
	t.Helper()
	limit := timeout * time.Duration(*effortFlag)
	return sandbox.Start(t, p, limit, limit, opts, argv...)
}

// attack runs a program that does its work between the barriers start and end.
// Nothing may have grown in between: everything that the program made is gone. It
// returns the sandbox, which has ended, and what was printed at the end.
func attack(t *testing.T, p string, opts []string, argv ...string) (*sandbox.Sandbox, string) {
	t.Helper()
	s := start(t, p, opts, argv...)
	s.Await("start", nil)
	before := s.Usage()
	s.Proceed()
	s.Await("end", nil)
	// The runtime keeps threads that were blocked in the host, a stub those that its
	// program had at a time; a platform may have a stub ready for the next program.
	slack := sandbox.Usage{Children: 1, Stubs: 1, StubThreads: 300, StubFDs: 512, FDs: 4, MemFDs: 1, Threads: 300, RSS: 192, Memory: 48}
	if over := s.Returns(before, slack); over != "" {
		t.Errorf("the sandbox does not give back what a program took: %s", over)
	}
	s.Proceed()
	status, out := s.Finish()
	if status != survived {
		t.Errorf("status %d, want %d; stdout %q, stderr %q", status, survived, sandbox.Tail(out), sandbox.Tail(s.Stderr()))
	}
	return s, out
}

// Random system calls, and arguments that a program would not think of.
func TestSyscalls(t *testing.T) {
	prog := sandbox.Build(t, "fuzz")
	t.Logf("seed %d", *seedFlag)
	sandbox.ForEachPlatform(t, func(t *testing.T, p string) {
		attack(t, p, nil, prog, strconv.FormatUint(*seedFlag, 10), strconv.Itoa(100000**effortFlag))
	})
}

// Random bytes as code, and jumps into the stub's text with random registers.
func TestCode(t *testing.T) {
	prog := sandbox.Build(t, "code")
	t.Logf("seed %d", *seedFlag)
	sandbox.ForEachPlatform(t, func(t *testing.T, p string) {
		attack(t, p, nil, prog, strconv.FormatUint(*seedFlag, 10), strconv.Itoa(200**effortFlag))
	})
}

// Code in which a sandbox might like to change system calls: what is ambiguous, jumped
// into, written while it runs, shared, moved, forked; other ways into the kernel.
func TestText(t *testing.T) {
	prog := sandbox.Build(t, "text")
	t.Logf("seed %d", *seedFlag)
	sandbox.ForEachPlatform(t, func(t *testing.T, p string) {
		for _, opt := range []string{"--usertrap=false", "--usertrap"} {
			s, out := attack(t, p, []string{"--verbose", opt}, prog, strconv.FormatUint(*seedFlag, 10), strconv.Itoa(*effortFlag))
			if runtime.GOARCH == "amd64" {
				checkText(t, p == "systrap" && opt == "--usertrap", s, out)
			}
		}
	})
}

// checkText checks that the program text was changed, by a platform that can, or not.
func checkText(t *testing.T, changed bool, s *sandbox.Sandbox, out string) {
	t.Helper()
	// As the program sees it: the command says nothing when it has not allowed it.
	want := "hot code is as it was\n"
	if changed {
		want = "hot code is a jump\n"
	}
	if out != want {
		t.Errorf("the program says %q, want %q", out, want)
	}
	replaced, stopped := s.Patches()
	if (replaced > 0) != changed {
		t.Errorf("the command says that %d instructions were replaced; stderr %q", replaced, sandbox.Tail(s.Stderr()))
	}
	// Who does what in the program: trampolines, in five ways; overItself; usesGS; singleSteps; setsGS.
	for why, n := range map[string]int{"memory of trampolines is gone": 6, "use of GS": 1, "single steps": 1, "trap in a trampoline": 1} {
		if changed && stopped[why] < n {
			t.Errorf("%d processes were left alone because of %s, want %d or more", stopped[why], why, n)
		}
	}
}

// Processes that signal each other without end, frames that are forged, stacks
// that are not there, timers that are always due.
func TestSignals(t *testing.T) {
	prog := sandbox.Build(t, "signals")
	t.Logf("seed %d", *seedFlag)
	sandbox.ForEachPlatform(t, func(t *testing.T, p string) {
		attack(t, p, nil, prog, strconv.FormatUint(*seedFlag, 10), strconv.Itoa(10000**effortFlag))
	})
}

// Fork bombs, threads that execute a program all at once, families in disorder.
func TestTasks(t *testing.T) {
	prog := sandbox.Build(t, "tasks")
	t.Logf("seed %d", *seedFlag)
	sandbox.ForEachPlatform(t, func(t *testing.T, p string) {
		attack(t, p, nil, prog, strconv.FormatUint(*seedFlag, 10), strconv.Itoa(*effortFlag))
	})
}

// Mappings by the thousand, and more memory than there is.
func TestMemory(t *testing.T) {
	prog := sandbox.Build(t, "memory")
	t.Logf("seed %d", *seedFlag)
	sandbox.ForEachPlatform(t, func(t *testing.T, p string) {
		attack(t, p, nil, prog, strconv.FormatUint(*seedFlag, 10))
	})
}

// Races between names that are resolved and directories that are moved, from
// inside and outside: nothing outside the root may be read or changed.
func TestFiles(t *testing.T) {
	prog := sandbox.Build(t, "files")
	sandbox.ForEachPlatform(t, func(t *testing.T, p string) {
		// The bound directory, with a secret on every level above it, and one in a
		// directory beside it.
		top := t.TempDir()
		root, inside, outside := filepath.Join(top, "root"), filepath.Join(top, "a/inside"), filepath.Join(top, "a/outside")
		for _, dir := range []string{root, filepath.Join(inside, "x/y"), filepath.Join(inside, "d"), outside} {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		secrets := []string{filepath.Join(outside, "secret"), filepath.Join(top, "secret"), filepath.Join(top, "a/secret")}
		for _, file := range secrets {
			if err := os.WriteFile(file, []byte("secret"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		for _, dir := range []string{"x", "x/y", "d"} {
			if err := os.WriteFile(filepath.Join(inside, dir, "inside"), []byte("inside"), 0o644); err != nil {
				t.Fatal(err)
			}
			os.Symlink("..", filepath.Join(inside, dir, "up"))
		}
		os.Symlink(outside, filepath.Join(inside, "l"))
		b, err := os.ReadFile(prog)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "files"), b, 0o755); err != nil {
			t.Fatal(err)
		}

		// Directories go out of the bound one, and come back.
		stop, done := make(chan struct{}), make(chan int)
		go func() {
			n := 0
			for {
				select {
				case <-stop:
					done <- n
					return
				default:
				}
				for _, name := range []string{"x", "d", "l"} {
					there := filepath.Join(outside, name)
					if os.Rename(filepath.Join(inside, name), there) == nil {
						n++
						time.Sleep(100 * time.Microsecond)
						os.Rename(there, filepath.Join(inside, name))
					}
				}
			}
		}()
		args := append([]string{"/files", strconv.Itoa(2 * *effortFlag)}, secrets...)
		attack(t, p, []string{"--root=" + root, "--write", "--bind=" + inside + ":/box"}, args...)
		close(stop)
		if n := <-done; n == 0 {
			t.Error("nothing was moved on the host")
		}

		for _, file := range secrets {
			st, err := os.Stat(file)
			if err != nil || st.Size() != int64(len("secret")) || st.Mode() != 0o644 {
				t.Errorf("%s was changed from inside: %v, %v", file, st, err)
			}
		}
		for dir, want := range map[string]string{top: "a root secret", filepath.Join(top, "a"): "inside outside secret"} {
			var names []string
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				names = append(names, e.Name())
			}
			if got := strings.Join(names, " "); got != want {
				t.Errorf("%s has %q, want %q", dir, got, want)
			}
		}
		if evil, _ := filepath.Glob(filepath.Join(outside, "evil*")); len(evil) > 0 {
			t.Errorf("made from inside: %v", evil)
		}
	})
}

// Stubs are killed from outside, whatever they are doing: the program that ran there
// has been killed, and no other has.
func TestKilledStubs(t *testing.T) {
	prog := sandbox.Build(t, "victims")
	t.Logf("seed %d", *seedFlag)
	sandbox.ForEachPlatform(t, func(t *testing.T, p string) {
		for round := range 2 * *effortFlag {
			r := rand.New(rand.NewPCG(*seedFlag, uint64(round)))
			// A Sentry that has confined itself cannot start another zygote.
			fork, opts := "refused", []string(nil)
			if round%2 == 1 {
				fork, opts = "works", []string{"--no-self-filter"}
			}
			s := start(t, p, opts, prog, fork)
			s.Await("start", nil)
			if u := s.Usage(); u.Stubs == 0 && u.VMs == 1 {
				return // a platform without stubs
			}
			s.Proceed()
			dead := make(chan struct{})
			go func() {
				defer close(dead)
				s.Await("zygote", nil)
			}()
			for waiting := true; waiting; {
				select {
				case <-dead:
					waiting = false
				case <-time.After(10 * time.Millisecond):
					if pids := sandbox.Stubs(t, s.Pid()); len(pids) > 2 {
						unix.Kill(pids[2+r.IntN(len(pids)-2)], unix.SIGKILL)
					}
				}
			}
			if t.Failed() {
				return
			}
			// A program hears of its child's end before the stub is gone.
			pids := sandbox.Stubs(t, s.Pid())
			for deadline := time.Now().Add(time.Minute); len(pids) != 2 && (len(pids) != 3 || p != "systrap"); pids = sandbox.Stubs(t, s.Pid()) {
				if time.Now().After(deadline) {
					t.Fatalf("stubs %v, want the zygote, one, and systrap's spare", pids)
				}
				time.Sleep(10 * time.Millisecond)
			}
			unix.Kill(pids[0], unix.SIGKILL)
			s.Proceed()
			s.Await("end", nil)
			// Now the first program itself.
			unix.Kill(pids[1], unix.SIGKILL)
			s.Proceed()
			status, _ := s.Finish()
			if status != 128+int(unix.SIGKILL) {
				t.Errorf("status %d, want that of SIGKILL; stderr %q", status, sandbox.Tail(s.Stderr()))
			}
			// A stub that we killed when it was just born was a fork that failed.
			n, born := strings.Count(s.Stderr(), "no more processes"), strings.Count(s.Stderr(), "just born")
			if fork == "refused" && n != 1 || fork == "works" && n != born {
				t.Errorf("fork is %s, with %d messages about it; stderr %q", fork, n, sandbox.Tail(s.Stderr()))
			}
			if n := strings.Count(s.Stderr(), "killed"); n < 2 {
				t.Errorf("%d messages about processes that were killed; stderr %q", n, sandbox.Tail(s.Stderr()))
			}
		}
	})
}
