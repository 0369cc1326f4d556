// Package adversary attacks the Sentry from inside the sandbox, on every
// platform: programs that make random system calls, execute random bytes, storm
// each other with signals, fork without end. The sandbox must go on as if nothing
// had happened, and leave nothing behind.
//
// Like e2e it uses the command as a user would; it must not import the Sentry.
package adversary

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/platform"
	_ "github.com/ringfence/ringfence/pkg/platform/platforms"
)

var (
	platformFlag = flag.String("platform", os.Getenv("RINGFENCE_PLATFORM"), "test this platform only; default: every one that is linked in")
	seedFlag     = flag.Uint64("seed", 1, "of everything that is random")
	effortFlag   = flag.Int("effort", 1, "how many times as much to do, in about as many times the time")
)

// timeout bounds every single run.
const timeout = 2 * time.Minute

// survived is the status of a program that has done all it meant to.
const survived = 42

// bin is the path of the ringfence command, tools where test programs are put.
var bin, tools string

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(func() int {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			fmt.Fprintln(os.Stderr, "prctl(PR_SET_CHILD_SUBREAPER):", err)
			return 1
		}
		dir, err := os.MkdirTemp("", "ringfence-adversary-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		// Programs that give up their rights still look at themselves.
		if err := os.Chmod(dir, 0o755); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		tools = dir
		// A build system hands in the command that it built.
		if bin = os.Getenv("RINGFENCE"); bin == "" {
			bin = filepath.Join(dir, "ringfence")
			if out, err := exec.Command("go", "build", "-o", bin, "../../cmd/ringfence").CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "go build ./cmd/ringfence: %v\n%s", err, out)
				return 1
			}
		}
		if bin, err = filepath.Abs(bin); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// forEachPlatform runs f as a subtest per platform.
func forEachPlatform(t *testing.T, f func(t *testing.T, p string)) {
	names := platform.List()
	if *platformFlag != "" {
		names = []string{*platformFlag}
	}
	if len(names) == 0 {
		t.Fatal("no platform is linked in")
	}
	for _, p := range names {
		t.Run(p, func(t *testing.T) { f(t, p) })
	}
}

// build compiles a program of testdata, statically, unless that was done.
func build(t *testing.T, name string) string {
	t.Helper()
	out := filepath.Join(tools, name)
	if _, err := os.Stat(out); err == nil {
		return out
	}
	if b, err := exec.Command("gcc", "-O1", "-Wall", "-Werror", "-static", "-pthread", "-o", out, "testdata/"+name+".c").CombinedOutput(); err != nil {
		t.Fatalf("gcc %s.c: %v: install gcc and libc6-dev\n%s", name, err, b)
	}
	return out
}

// sandbox is a run of the command.
type sandbox struct {
	t      *testing.T
	cmd    *exec.Cmd
	cancel context.CancelFunc
	ctx    context.Context
	stdin  io.WriteCloser
	stdout *bufio.Reader
	stderr bytes.Buffer
}

// start runs argv in a sandbox on platform p, with the directory of test programs
// bound, and options opts.
func start(t *testing.T, p string, opts []string, argv ...string) *sandbox {
	t.Helper()
	s := &sandbox{t: t}
	s.ctx, s.cancel = context.WithTimeout(t.Context(), timeout*time.Duration(*effortFlag))
	args := append([]string{"run", "--platform=" + p, "--bind=" + tools}, opts...)
	s.cmd = exec.CommandContext(s.ctx, bin, append(append(args, "--"), argv...)...)
	s.cmd.Dir = "/"
	s.cmd.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin", "GOTRACEBACK=all"}
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	s.cmd.Stderr = &s.stderr
	// A hung Sentry says where.
	s.cmd.Cancel = func() error { return s.cmd.Process.Signal(unix.SIGABRT) }
	s.cmd.WaitDelay = 5 * time.Second
	var err error
	if s.stdin, err = s.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.stdout = bufio.NewReader(out)
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.cancel()
		if s.cmd.ProcessState == nil {
			s.cmd.Wait()
		}
	})
	return s
}

// await waits until the program is at the barrier name, with other lines before.
func (s *sandbox) await(name string) {
	s.t.Helper()
	for {
		line, err := s.stdout.ReadString('\n')
		if line == "at "+name+"\n" {
			return
		}
		if err != nil {
			s.cmd.Wait()
			s.t.Fatalf("the program ended before %q: %v; stderr %q", name, s.cmd.ProcessState, tail(s.stderr.String()))
		}
		s.t.Logf("%s", strings.TrimSuffix(line, "\n"))
	}
}

// proceed lets the program go on from a barrier.
func (s *sandbox) proceed() {
	s.t.Helper()
	if _, err := s.stdin.Write([]byte{'\n'}); err != nil {
		s.t.Errorf("the program does not read: %v", err)
	}
}

// finish waits for the end of the program and returns its status as a shell gives
// it, and what it printed since the last barrier. Nothing may be left of it.
func (s *sandbox) finish() (int, string) {
	s.t.Helper()
	out, err := io.ReadAll(s.stdout)
	if err != nil {
		s.t.Error(err)
	}
	s.cmd.Wait()
	if s.ctx.Err() != nil {
		s.t.Fatalf("the sandbox did not end in time; stderr %q", tail(s.stderr.String()))
	}
	s.cancel()
	if left := leftovers(s.t); len(left) > 0 {
		s.t.Errorf("processes were left behind: %v", left)
	}
	stderr := s.stderr.String()
	for _, bad := range []string{"panic:", "fatal error:", "goroutine ", "runtime: ", "SIGSYS", "forbidden"} {
		if strings.Contains(stderr, bad) {
			s.t.Errorf("the Sentry failed; stderr %q", tail(stderr))
			break
		}
	}
	status := s.cmd.ProcessState.ExitCode()
	if ws := s.cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
		status = 128 + int(ws.Signal())
	}
	return status, string(out)
}

// attack runs a program that does its work between the barriers start and end.
// Nothing may have grown in between: everything that the program made is gone.
func attack(t *testing.T, p string, opts []string, argv ...string) {
	t.Helper()
	s := start(t, p, opts, argv...)
	s.await("start")
	before := s.usage()
	s.proceed()
	s.await("end")
	var over string
	for range 40 { // what was killed may take a moment to go
		if over = s.usage().over(before); over == "" {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if over != "" {
		t.Errorf("the sandbox does not give back what a program took: %s", over)
	}
	s.proceed()
	if status, out := s.finish(); status != survived {
		t.Errorf("status %d, want %d; stdout %q, stderr %q", status, survived, tail(out), tail(s.stderr.String()))
	}
}

// usage is what a Sentry takes of the host.
type usage struct {
	stubs, fds, threads int
	rss, memory         int64 // MiB, of the Sentry itself and of its memory files
}

// over says what is more than was before, but for some slack, or returns nothing.
func (u usage) over(before usage) string {
	switch {
	case u.stubs > before.stubs, u.fds > before.fds+2, u.rss > before.rss+192, u.memory > before.memory+48,
		// The runtime keeps threads that were blocked in the host.
		u.threads > before.threads+300:
		return fmt.Sprintf("before %+v, now %+v", before, u)
	}
	return ""
}

func (s *sandbox) usage() usage {
	s.t.Helper()
	pid := s.cmd.Process.Pid
	dir := fmt.Sprintf("/proc/%d/", pid)
	var u usage
	u.stubs = len(stubs(s.t, pid))
	fds, err := os.ReadDir(dir + "fd")
	if err != nil {
		s.t.Fatal(err)
	}
	u.fds = len(fds)
	for _, fd := range fds {
		var st unix.Stat_t
		if target, err := os.Readlink(dir + "fd/" + fd.Name()); err == nil && strings.HasPrefix(target, "/memfd:") &&
			unix.Stat(dir+"fd/"+fd.Name(), &st) == nil {
			u.memory += st.Blocks * 512 >> 20
		}
	}
	status, err := os.ReadFile(dir + "status")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, line := range strings.Split(string(status), "\n") {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		n, _ := strconv.ParseInt(f[1], 10, 64)
		switch f[0] {
		case "RssAnon:":
			u.rss = n >> 10
		case "Threads:":
			u.threads = int(n)
		}
	}
	return u
}

// stat returns the fields of /proc/PID/stat from the state on, and the name.
func stat(path string) (comm string, fields []string) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", nil
	}
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return "", nil
	}
	return string(b[open+1 : end]), strings.Fields(string(b[end+1:]))
}

// startTime is the index in stat's fields of when a process started.
const startTime = 19

// children returns the processes whose parent is pid.
func children(t *testing.T, pid int) []int {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, path := range paths {
		_, f := stat(path)
		if len(f) > 1 && f[1] == strconv.Itoa(pid) {
			n, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			pids = append(pids, n)
		}
	}
	return pids
}

// stubs returns the stub processes of the Sentry pid, oldest first: the zygote, and
// the one of the first program.
func stubs(t *testing.T, pid int) []int {
	t.Helper()
	started := map[int]int{}
	for _, child := range children(t, pid) {
		if comm, f := stat(fmt.Sprintf("/proc/%d/stat", child)); comm == "ringfence-stub" && f[0] != "Z" {
			started[child], _ = strconv.Atoi(f[startTime])
		}
	}
	pids := slices.Collect(maps.Keys(started))
	slices.SortFunc(pids, func(a, b int) int { return cmp.Or(started[a]-started[b], a-b) })
	return pids
}

// leftovers returns our descendants that are still there after a grace period:
// the host may take a moment to end what was killed. Since we are a subreaper,
// processes that lose their parent become our children.
func leftovers(t *testing.T) []string {
	t.Helper()
	var left []string
	for range 100 {
		left = nil
		for _, pid := range children(t, os.Getpid()) {
			comm, f := stat(fmt.Sprintf("/proc/%d/stat", pid))
			if len(f) > 0 && f[0] == "Z" {
				syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
			} else if len(f) > 0 {
				left = append(left, fmt.Sprintf("%d (%s) %s", pid, comm, f[0]))
			}
		}
		if len(left) == 0 {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return left
}

func tail(s string) string {
	if len(s) > 4000 {
		return s[:2000] + "..." + s[len(s)-2000:]
	}
	return s
}

// Random system calls, and arguments that a program would not think of.
func TestSyscalls(t *testing.T) {
	prog := build(t, "fuzz")
	t.Logf("seed %d", *seedFlag)
	forEachPlatform(t, func(t *testing.T, p string) {
		attack(t, p, nil, prog, strconv.FormatUint(*seedFlag, 10), strconv.Itoa(100000**effortFlag))
	})
}

// Random bytes as code, and jumps into the stub's text with random registers.
func TestCode(t *testing.T) {
	prog := build(t, "code")
	t.Logf("seed %d", *seedFlag)
	forEachPlatform(t, func(t *testing.T, p string) {
		attack(t, p, nil, prog, strconv.FormatUint(*seedFlag, 10), strconv.Itoa(200**effortFlag))
	})
}

// Processes that signal each other without end, frames that are forged, stacks
// that are not there, timers that are always due.
func TestSignals(t *testing.T) {
	prog := build(t, "signals")
	t.Logf("seed %d", *seedFlag)
	forEachPlatform(t, func(t *testing.T, p string) {
		attack(t, p, nil, prog, strconv.FormatUint(*seedFlag, 10), strconv.Itoa(10000**effortFlag))
	})
}

// Fork bombs, threads that execute a program all at once, families in disorder.
func TestTasks(t *testing.T) {
	prog := build(t, "tasks")
	t.Logf("seed %d", *seedFlag)
	forEachPlatform(t, func(t *testing.T, p string) {
		attack(t, p, nil, prog, strconv.FormatUint(*seedFlag, 10), strconv.Itoa(*effortFlag))
	})
}

// Mappings by the thousand, and more memory than there is.
func TestMemory(t *testing.T) {
	prog := build(t, "memory")
	t.Logf("seed %d", *seedFlag)
	forEachPlatform(t, func(t *testing.T, p string) {
		attack(t, p, nil, prog, strconv.FormatUint(*seedFlag, 10))
	})
}

// Races between names that are resolved and directories that are moved, from
// inside and outside: nothing outside the root may be read or changed.
func TestFiles(t *testing.T) {
	prog := build(t, "files")
	forEachPlatform(t, func(t *testing.T, p string) {
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

// old leaves out the stubs that started less than a second ago: one that dies before
// it has told the Sentry of its birth takes the zygote along.
func old(pids []int) []int {
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) != nil {
		return nil
	}
	return slices.DeleteFunc(pids, func(pid int) bool {
		_, f := stat(fmt.Sprintf("/proc/%d/stat", pid))
		if len(f) <= startTime {
			return true
		}
		ticks, _ := strconv.ParseInt(f[startTime], 10, 64)
		return si.Uptime-ticks/100 < 2 // both are rounded down
	})
}

// Stubs are killed from outside, whatever they are doing: the program that ran there
// has been killed, and no other has.
func TestKilledStubs(t *testing.T) {
	prog := build(t, "victims")
	t.Logf("seed %d", *seedFlag)
	forEachPlatform(t, func(t *testing.T, p string) {
		for round := range 2 * *effortFlag {
			r := rand.New(rand.NewPCG(*seedFlag, uint64(round)))
			// A Sentry that has confined itself cannot start another zygote.
			fork, opts := "refused", []string(nil)
			if round%2 == 1 {
				fork, opts = "works", []string{"--no-self-filter"}
			}
			s := start(t, p, opts, prog, fork)
			s.await("start")
			s.proceed()
			dead := make(chan struct{})
			go func() {
				defer close(dead)
				s.await("zygote")
			}()
			for waiting := true; waiting; {
				select {
				case <-dead:
					waiting = false
				case <-time.After(10 * time.Millisecond):
					if pids := old(stubs(t, s.cmd.Process.Pid)); len(pids) > 2 {
						unix.Kill(pids[2+r.IntN(len(pids)-2)], unix.SIGKILL)
					}
				}
			}
			if t.Failed() {
				return
			}
			pids := stubs(t, s.cmd.Process.Pid)
			if len(pids) != 2 {
				t.Fatalf("stubs %v, want the zygote and one", pids)
			}
			unix.Kill(pids[0], unix.SIGKILL)
			s.proceed()
			s.await("end")
			// Now the first program itself.
			unix.Kill(pids[1], unix.SIGKILL)
			s.proceed()
			status, _ := s.finish()
			if status != 128+int(unix.SIGKILL) {
				t.Errorf("status %d, want that of SIGKILL; stderr %q", status, tail(s.stderr.String()))
			}
			if n := strings.Count(s.stderr.String(), "killed"); n < 2 {
				t.Errorf("%d messages about processes that were killed; stderr %q", n, tail(s.stderr.String()))
			}
		}
	})
}
