// Package soak runs a sandbox for long, with much going on in it, and kills
// sandboxes at any moment: nothing may hang, grow or be left behind.
//
// Like e2e it uses the command as a user would; it must not import the Sentry.
package soak

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	_ "github.com/ringfence/ringfence/pkg/platform/platforms"
	"github.com/ringfence/ringfence/test/sandbox"
)

var (
	seedFlag     = flag.Uint64("seed", 1, "of everything that is random")
	durationFlag = flag.Duration("duration", variable("RINGFENCE_SOAK_DURATION", 5*time.Second, time.ParseDuration), "of the soak, on each platform")
	killsFlag    = flag.Int("kills", variable("RINGFENCE_SOAK_KILLS", 5, strconv.Atoi), "how many sandboxes to kill, on each platform")
)

// variable returns the value of an environment variable, or what it is without.
func variable[T any](name string, without T, parse func(string) (T, error)) T {
	s := os.Getenv(name)
	if s == "" {
		return without
	}
	v, err := parse(s)
	if err != nil {
		panic(fmt.Sprintf("the environment variable %s: %v", name, err))
	}
	return v
}

// silence is how long the program may print nothing: it prints every second, and
// finds threads that hang, after some minutes, by itself.
const silence = 2 * time.Minute

// survived is the status of a program that has done all it meant to.
const survived = 42

func TestMain(m *testing.M) { os.Exit(sandbox.Main(m)) }

// forEachVariant runs f on every platform, and once more with patched code where a
// platform can do that.
func forEachVariant(t *testing.T, f func(t *testing.T, p string, opts []string)) {
	sandbox.ForEachPlatform(t, func(t *testing.T, p string) {
		if p != "systrap" {
			f(t, p, nil)
			return
		}
		for _, opt := range []string{"--usertrap=false", "--usertrap"} {
			t.Run(opt, func(t *testing.T) { f(t, p, []string{opt}) })
		}
	})
}

// Eight processes with eight threads each do what programs do. The first quarter is
// for what grows once: pools of threads, the heap.
func TestSoak(t *testing.T) {
	prog := sandbox.Build(t, "soak")
	t.Logf("seed %d", *seedFlag)
	forEachVariant(t, func(t *testing.T, p string, opts []string) {
		s := sandbox.Start(t, p, *durationFlag+5*silence, silence, append(opts, "--verbose"),
			prog, strconv.FormatUint(*seedFlag, 10), strconv.FormatFloat(durationFlag.Seconds(), 'f', -1, 64))
		last := ""
		line := func(text string) {
			if !strings.HasPrefix(text, "did ") {
				t.Logf("%s; %s", last, text)
				return
			}
			last = text
		}
		s.Await("start", line)
		before := s.Usage()
		s.Proceed()
		s.Await("end", line)
		// Stubs, their memory and their files go with the last process that needs them;
		// a platform may have one ready for the next, and stubs keep descriptors of up to
		// 512 files, whose memory is gone when nobody else has them.
		slack := sandbox.Usage{Children: 1, Stubs: 1, StubThreads: 4, StubFDs: 512, FDs: 2, MemFDs: 1, Threads: 100, RSS: 64, Memory: 16}
		if over := s.Returns(before, slack); over != "" {
			t.Fatalf("%s things, and the sandbox does not give back what it took: %s\n%s", last, over, s.Dump())
		}
		t.Logf("%s things; before %+v, after %+v", last, before, s.Usage())
		s.Proceed()
		if status, out := s.Finish(); status != survived {
			t.Errorf("status %d, want %d; stdout %q, stderr %q", status, survived, sandbox.Tail(out), sandbox.Tail(s.Stderr()))
		}
		// It would take the program to see that nothing was, and test/adversary does that.
		if n, _ := s.Patches(); n == 0 && runtime.GOARCH == "amd64" && slices.Contains(opts, "--usertrap") {
			t.Error("no system call instruction was replaced")
		}
	})
}

// files returns what is where a Sentry could leave something.
func files(t *testing.T) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	for _, dir := range []string{sandbox.Temp, "/dev/shm"} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if dir == sandbox.Temp || strings.Contains(e.Name(), "ringfence") {
				all[filepath.Join(dir, e.Name())] = true
			}
		}
	}
	return all
}

// The Sentry is killed at any moment. Nothing is left: no process, and with the
// processes all their memory, descriptors and virtual machines are gone; no file.
func TestKill(t *testing.T) {
	prog := sandbox.Build(t, "soak")
	t.Logf("seed %d", *seedFlag)
	forEachVariant(t, func(t *testing.T, p string, opts []string) {
		r := rand.New(rand.NewPCG(*seedFlag, 0))
		before, running := files(t), 0
		for range *killsFlag {
			s := sandbox.Start(t, p, silence, silence, opts, prog, "1", "3600")
			// From before the Sentry has done anything to the middle of everything.
			time.Sleep(time.Duration(r.ExpFloat64() * float64(100*time.Millisecond)))
			if len(sandbox.Stubs(t, s.Pid())) > 0 || s.Usage().VMs > 0 {
				running++
			}
			if left := s.Kill(); len(left) > 0 {
				t.Fatalf("processes were left behind: %v", left)
			}
		}
		t.Logf("%d of %d had started a program", running, *killsFlag)
		if running == 0 {
			t.Error("none of the sandboxes has come so far that there was something to leave")
		}
		for name := range files(t) {
			if !before[name] {
				t.Errorf("%s was left behind", name)
			}
		}
	})
}
