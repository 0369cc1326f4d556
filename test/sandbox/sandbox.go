// Package sandbox runs hostile and restless programs under the ringfence command
// for tests, and looks from outside at what a sandbox takes of the host, where it
// hangs if it does, and what it leaves behind.
//
// It uses the command as a user would. It depends on package platform, for the
// names of what is linked in, and must not import a backend or the Sentry.
package sandbox

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"maps"
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
)

var (
	platformFlag = flag.String("platform", os.Getenv("RINGFENCE_PLATFORM"), "test this platform only; default: every one that is linked in")
	optionsFlag  = flag.String("options", os.Getenv("RINGFENCE_TEST_OPTIONS"), "more options of ringfence run, separated by spaces")
)

// Bin is the path of the ringfence command, Tools the directory where test programs
// are put, Temp the one that the command has for temporary files.
var Bin, Tools, Temp string

// Main is the TestMain of a package whose tests use this one. Afterwards the
// process is a subreaper: whatever loses its parent becomes its child.
func Main(m *testing.M) int {
	flag.Parse()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, "prctl(PR_SET_CHILD_SUBREAPER):", err)
		return 1
	}
	dir, err := os.MkdirTemp("", "ringfence-test-")
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
	Tools, Temp = dir, filepath.Join(dir, "tmp")
	if err := os.Mkdir(Temp, 0o777); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// A build system hands in the command that it built.
	if Bin = os.Getenv("RINGFENCE"); Bin == "" {
		Bin = filepath.Join(dir, "ringfence")
		if out, err := exec.Command("go", "build", "-o", Bin, "../../cmd/ringfence").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "go build ./cmd/ringfence: %v\n%s", err, out)
			return 1
		}
	}
	if Bin, err = filepath.Abs(Bin); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// ForEachPlatform runs f as a subtest per platform.
func ForEachPlatform(t *testing.T, f func(t *testing.T, p string)) {
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

// Build compiles a C program of testdata, statically, unless that was done, and
// returns its path.
func Build(t *testing.T, name string) string {
	t.Helper()
	out := filepath.Join(Tools, name)
	if _, err := os.Stat(out); err == nil {
		return out
	}
	if b, err := exec.Command("gcc", "-O1", "-Wall", "-Werror", "-static", "-pthread", "-o", out, "testdata/"+name+".c").CombinedOutput(); err != nil {
		t.Fatalf("gcc %s.c: %v: install gcc and libc6-dev\n%s", name, err, b)
	}
	return out
}

// Sandbox is a run of the command.
type Sandbox struct {
	t       *testing.T
	cmd     *exec.Cmd
	silence time.Duration
	cancel  context.CancelFunc
	ctx     context.Context
	stdin   io.WriteCloser
	stdout  *bufio.Reader
	stderr  bytes.Buffer
	where   string
}

// Start runs argv in a sandbox on platform p, with the directory of test programs
// bound, and options opts. The test fails, and says where everything hangs, when it
// takes longer than limit, or when the program prints nothing for silence while it
// is waited for.
func Start(t *testing.T, p string, limit, silence time.Duration, opts []string, argv ...string) *Sandbox {
	t.Helper()
	s := &Sandbox{t: t, silence: silence}
	s.ctx, s.cancel = context.WithTimeout(t.Context(), limit)
	args := append([]string{"run", "--platform=" + p, "--bind=" + Tools}, strings.Fields(*optionsFlag)...)
	args = append(args, opts...)
	s.cmd = exec.CommandContext(s.ctx, Bin, append(append(args, "--"), argv...)...)
	s.cmd.Dir = "/"
	s.cmd.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin", "GOTRACEBACK=all", "TMPDIR=" + Temp}
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	s.cmd.Stderr = &s.stderr
	s.cmd.Cancel = func() error {
		s.where = where(t, s.cmd.Process.Pid)
		return s.cmd.Process.Signal(unix.SIGABRT) // the Go runtime prints all goroutines
	}
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

// Pid returns the Sentry's process.
func (s *Sandbox) Pid() int { return s.cmd.Process.Pid }

// Stderr returns what the command has printed on standard error, once it has ended.
func (s *Sandbox) Stderr() string { return s.stderr.String() }

// Patches returns what a command with --verbose that has ended says of system call
// instructions: how many were replaced, and in how many processes none is to be any
// more, by reason.
func (s *Sandbox) Patches() (replaced int, stopped map[string]int) {
	stopped = map[string]int{}
	for line := range strings.Lines(s.stderr.String()) {
		n, what, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "ringfence: "), " ")
		count, err := strconv.Atoi(n)
		if err != nil {
			continue
		}
		if why, ok := strings.CutPrefix(what, "processes were to stay as they are: "); ok {
			stopped[why] = count
		} else if what == "system call instructions were replaced" {
			replaced = count
		}
	}
	return replaced, stopped
}

// Await waits until the program is at the barrier name, with other lines before:
// each is given to line unless that is nil, and to the test's log otherwise.
func (s *Sandbox) Await(name string, line func(string)) {
	s.t.Helper()
	watchdog := time.AfterFunc(s.silence, s.cancel)
	defer watchdog.Stop()
	for {
		text, err := s.stdout.ReadString('\n')
		watchdog.Reset(s.silence)
		switch text = strings.TrimSuffix(text, "\n"); {
		case err != nil:
			s.ended(name)
		case text == "at "+name:
			return
		case text == "at hung":
			s.cancel()
			s.ended(name)
		case line != nil:
			line(text)
		default:
			s.t.Log(text)
		}
	}
}

// ended fails the test because the program is not coming to a barrier any more.
func (s *Sandbox) ended(barrier string) {
	s.t.Helper()
	hung := s.ctx.Err() != nil
	s.cmd.Wait()
	if hung {
		s.t.Fatalf("the program hangs before %q\n%s\n%s", barrier, s.where, s.stderr.String())
	}
	s.t.Fatalf("the program ended before %q: %v; stderr %q", barrier, s.cmd.ProcessState, Tail(s.stderr.String()))
}

// Proceed lets the program go on from a barrier.
func (s *Sandbox) Proceed() {
	s.t.Helper()
	if _, err := s.stdin.Write([]byte{'\n'}); err != nil {
		s.t.Errorf("the program does not read: %v", err)
	}
}

// Finish waits for the end of the program and returns its status as a shell gives
// it, and what it printed since the last barrier. Nothing may be left of it.
func (s *Sandbox) Finish() (int, string) {
	s.t.Helper()
	out, err := io.ReadAll(s.stdout)
	if err != nil {
		s.t.Error(err)
	}
	s.cmd.Wait()
	if s.ctx.Err() != nil {
		s.t.Fatalf("the sandbox did not end in time\n%s\n%s", s.where, s.stderr.String())
	}
	s.cancel()
	if left := Leftovers(s.t); len(left) > 0 {
		s.t.Errorf("processes were left behind: %v", left)
	}
	stderr := s.stderr.String()
	for _, bad := range []string{"panic:", "fatal error:", "goroutine ", "runtime: ", "SIGSYS", "forbidden"} {
		if strings.Contains(stderr, bad) {
			s.t.Errorf("the Sentry failed; stderr %q", Tail(stderr))
			break
		}
	}
	status := s.cmd.ProcessState.ExitCode()
	if ws := s.cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
		status = 128 + int(ws.Signal())
	}
	return status, string(out)
}

// Kill ends the Sentry with a SIGKILL and returns the processes that it leaves
// behind. The test fails if it had ended of its own.
func (s *Sandbox) Kill() []string {
	s.t.Helper()
	s.cmd.Process.Kill()
	s.cmd.Wait()
	s.cancel()
	if ws := s.cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signal() != unix.SIGKILL {
		s.t.Errorf("%v before it was killed; stderr %q", s.cmd.ProcessState, Tail(s.stderr.String()))
	}
	return Leftovers(s.t)
}

// Usage is what a Sentry takes of the host.
type Usage struct {
	// Children are all its processes, those that were not reaped among them; Stubs
	// those that live, and StubFDs the descriptors that they share.
	Children, Stubs, StubThreads, StubFDs int
	FDs, MemFDs, VMs, Threads             int
	RSS, Memory                           int64 // MiB, of the Sentry itself and of its memory files
}

// Usage returns what the Sentry takes now.
func (s *Sandbox) Usage() Usage {
	s.t.Helper()
	pid := s.cmd.Process.Pid
	dir := fmt.Sprintf("/proc/%d/", pid)
	var u Usage
	u.Children = len(children(s.t, pid))
	for _, stub := range Stubs(s.t, pid) {
		u.Stubs++
		tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", stub))
		u.StubThreads += len(tasks)
		fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", stub))
		u.StubFDs = max(u.StubFDs, len(fds))
	}
	fds, err := os.ReadDir(dir + "fd")
	if err != nil {
		s.t.Fatal(err)
	}
	u.FDs = len(fds)
	for _, fd := range fds {
		target, err := os.Readlink(dir + "fd/" + fd.Name())
		if err != nil {
			continue
		}
		if strings.HasPrefix(target, "anon_inode:kvm-vm") {
			u.VMs++
		}
		var st unix.Stat_t
		if strings.HasPrefix(target, "/memfd:") && unix.Stat(dir+"fd/"+fd.Name(), &st) == nil {
			u.MemFDs++
			u.Memory += st.Blocks * 512 >> 20
		}
	}
	status, err := os.ReadFile(dir + "status")
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		n, _ := strconv.ParseInt(f[1], 10, 64)
		switch f[0] {
		case "RssAnon:":
			u.RSS = n >> 10
		case "Threads:":
			u.Threads = int(n)
		}
	}
	return u
}

// Returns reports what is more than slack allows over before, after a grace period:
// what was killed may take a moment to go, and long on a busy host. It returns "" if
// nothing is.
func (s *Sandbox) Returns(before, slack Usage) string {
	s.t.Helper()
	var u Usage
	for range 1200 {
		if u = s.Usage(); !u.over(before, slack) {
			return ""
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Sprintf("before %+v, now %+v; memory files:\n%s", before, u, memFiles(s.t, s.Pid()))
}

// memFile is a memory file as somebody has it.
type memFile struct {
	name string
	size int64 // of the memory in use
	// holders says who has descriptors and mappings of it.
	holders []string
}

// memFiles says of every memory file who holds it: the Sentry pid, which of its
// processes, and by what.
func memFiles(t *testing.T, pid int) string {
	files := map[uint64]*memFile{}
	for _, p := range append([]int{pid}, children(t, pid)...) {
		dir := fmt.Sprintf("/proc/%d/", p)
		comm, f := Stat(dir + "stat")
		if len(f) == 0 {
			continue
		}
		who := fmt.Sprintf("%d (%s, %s, started %s)", p, comm, f[0], f[StartTime])
		fds, mapped := map[uint64][]string{}, map[uint64]int{}
		add := func(inode uint64, name string) *memFile {
			if files[inode] == nil {
				files[inode] = &memFile{name: name}
			}
			return files[inode]
		}
		entries, _ := os.ReadDir(dir + "fd")
		for _, e := range entries {
			target, err := os.Readlink(dir + "fd/" + e.Name())
			var st unix.Stat_t
			if err == nil && strings.HasPrefix(target, "/memfd:") && unix.Stat(dir+"fd/"+e.Name(), &st) == nil {
				add(st.Ino, target).size = st.Blocks * 512
				fds[st.Ino] = append(fds[st.Ino], e.Name())
			}
		}
		maps, _ := os.ReadFile(dir + "maps")
		for line := range strings.Lines(string(maps)) {
			if f := strings.Fields(line); len(f) > 5 && strings.HasPrefix(f[5], "/memfd:") {
				inode, _ := strconv.ParseUint(f[4], 10, 64)
				add(inode, f[5])
				mapped[inode]++
			}
		}
		for inode, file := range files {
			if len(fds[inode]) > 0 || mapped[inode] > 0 {
				file.holders = append(file.holders, fmt.Sprintf("%s: descriptors %v, %d mappings", who, fds[inode], mapped[inode]))
			}
		}
	}
	var b strings.Builder
	for _, inode := range slices.Sorted(maps.Keys(files)) {
		f := files[inode]
		fmt.Fprintf(&b, "%s, inode %d, %d KiB: %s\n", f.name, inode, f.size>>10, strings.Join(f.holders, "; "))
	}
	return b.String()
}

// Dump ends the Sentry and returns what all its threads and goroutines were doing.
func (s *Sandbox) Dump() string {
	s.cancel()
	s.cmd.Wait()
	return s.where + "\n" + s.stderr.String()
}

func (u Usage) over(b, slack Usage) bool {
	return u.Children > b.Children+slack.Children || u.Stubs > b.Stubs+slack.Stubs ||
		u.StubThreads > b.StubThreads+slack.StubThreads || u.StubFDs > b.StubFDs+slack.StubFDs ||
		u.FDs > b.FDs+slack.FDs || u.MemFDs > b.MemFDs+slack.MemFDs || u.VMs > b.VMs+slack.VMs ||
		u.Threads > b.Threads+slack.Threads || u.RSS > b.RSS+slack.RSS || u.Memory > b.Memory+slack.Memory
}

// Stat returns the fields of a stat file of proc(5) from the state on, and the name.
func Stat(path string) (comm string, fields []string) {
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

// StartTime is the index in Stat's fields of when a process started, in clock ticks.
const StartTime = 19

// children returns the processes whose parent is pid.
func children(t *testing.T, pid int) []int {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, path := range paths {
		_, f := Stat(path)
		if len(f) > 1 && f[1] == strconv.Itoa(pid) {
			n, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			pids = append(pids, n)
		}
	}
	return pids
}

// Stubs returns the stub processes of the Sentry pid, oldest first: the zygote, and
// the one of the first program.
func Stubs(t *testing.T, pid int) []int {
	t.Helper()
	started := map[int]int{}
	for _, child := range children(t, pid) {
		if comm, f := Stat(fmt.Sprintf("/proc/%d/stat", child)); comm == "ringfence-stub" && f[0] != "Z" {
			started[child], _ = strconv.Atoi(f[StartTime])
		}
	}
	pids := slices.Collect(maps.Keys(started))
	slices.SortFunc(pids, func(a, b int) int { return cmp.Or(started[a]-started[b], a-b) })
	return pids
}

// where says what every thread of the Sentry and of its stubs waits for.
func where(t *testing.T, pid int) string {
	var b strings.Builder
	for _, pid := range append([]int{pid}, Stubs(t, pid)...) {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
		for _, task := range tasks {
			comm, f := Stat(task + "/stat")
			if len(f) == 0 {
				continue
			}
			fmt.Fprintf(&b, "process %d (%s), thread %s: %s", pid, comm, filepath.Base(task), f[0])
			for _, file := range []string{"wchan", "syscall", "stack"} {
				text, err := os.ReadFile(task + "/" + file)
				if err != nil {
					text = []byte(err.Error())
				}
				fmt.Fprintf(&b, "; %s %s", file, strings.Join(strings.Fields(string(text)), " "))
			}
			status, _ := os.ReadFile(task + "/status")
			for line := range strings.Lines(string(status)) {
				if strings.HasPrefix(line, "SigPnd") || strings.HasPrefix(line, "ShdPnd") || strings.HasPrefix(line, "SigBlk") {
					fmt.Fprintf(&b, "; %s", strings.Join(strings.Fields(line), " "))
				}
			}
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// Leftovers returns this process's descendants that are still there after a grace
// period: the host may take a moment to end what was killed. The dead are buried
// here, but for those that somebody traces: waiting for them is the tracer's, even if
// that is another thread of this process.
func Leftovers(t *testing.T) []string {
	t.Helper()
	var left []string
	for range 600 {
		left = nil
		for _, pid := range children(t, os.Getpid()) {
			comm, f := Stat(fmt.Sprintf("/proc/%d/stat", pid))
			if len(f) > 0 && f[0] == "Z" && !traced(pid) {
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

// traced reports whether somebody traces the process pid.
func traced(pid int) bool {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	return bytes.Contains(status, []byte("\nTracerPid:")) && !bytes.Contains(status, []byte("\nTracerPid:\t0\n"))
}

// Tail returns the beginning and the end of what is long.
func Tail(s string) string {
	if len(s) > 4000 {
		return s[:2000] + "..." + s[len(s)-2000:]
	}
	return s
}
