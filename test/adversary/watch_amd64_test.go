package adversary

import (
	"bufio"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/stub/stubtest"
	"github.com/ringfence/ringfence/test/sandbox"
)

// image returns the executable parts of the stub's image.
func image(zygote int) (parts [][2]uint64, err error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", zygote))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		var start, end uint64
		var perms string
		if _, err := fmt.Sscanf(s.Text(), "%x-%x %s", &start, &end, &perms); err != nil {
			return nil, err
		}
		if strings.Contains(perms, "x") && strings.Contains(s.Text(), "memfd:ringfence-stub") {
			parts = append(parts, [2]uint64{start, end})
		}
	}
	if len(parts) == 0 {
		err = fmt.Errorf("process %d has no executable mapping of the stub's image", zygote)
	}
	return parts, err
}

// calls are what the threads of systrap's stubs may ask of the host, by role: the
// text of the stub, and nobody else. What the system call thread asks for is the
// Sentry's to say; that nobody else can make it do so is checked in pkg/systrap.
var calls = map[stubtest.Role][]uint64{
	stubtest.Zygote: {unix.SYS_RECVMSG, unix.SYS_CLOSE, unix.SYS_SENDTO, unix.SYS_CLONE, unix.SYS_RESTART_SYSCALL},
	stubtest.Caller: {unix.SYS_PRCTL, unix.SYS_GETPPID, unix.SYS_GETPID, unix.SYS_RT_SIGPROCMASK, unix.SYS_GETTID, unix.SYS_SENDTO, unix.SYS_LSEEK, unix.SYS_FUTEX, unix.SYS_MMAP, unix.SYS_MPROTECT, unix.SYS_MUNMAP, unix.SYS_CLONE, unix.SYS_RT_SIGACTION, unix.SYS_SECCOMP},
	stubtest.App:    {unix.SYS_RT_SIGRETURN, unix.SYS_FUTEX},
}

// setUp are what an application's thread asks for before it runs application code.
var setUp = []uint64{unix.SYS_SIGALTSTACK, unix.SYS_PRCTL, unix.SYS_SECCOMP}

// Programs that attack the sandbox make no system call of the host, whether their own
// system calls are replaced by jumps or not: another process, this one, looks at every
// one that is made in their stubs.
func TestWatched(t *testing.T) {
	for name, argv := range map[string][]string{
		"text":  {"text", strconv.FormatUint(*seedFlag, 10), strconv.Itoa(*effortFlag - 1)},
		"code":  {"code", strconv.FormatUint(*seedFlag, 10), strconv.Itoa(24 * *effortFlag)},
		"tasks": {"tasks", strconv.FormatUint(*seedFlag, 10), strconv.Itoa(*effortFlag)},
	} {
		prog := sandbox.Build(t, name)
		for _, opts := range [][]string{{"--usertrap=false"}, {"--usertrap"}} {
			t.Run(strings.Join(append([]string{name}, opts...), ""), func(t *testing.T) {
				s, out := watched(t, append([]string{"--verbose"}, opts...), append([]string{prog}, argv[1:]...))
				on := opts[0] == "--usertrap"
				if name == "text" {
					checkText(t, on, s, out)
				} else if n, _ := s.Patches(); (n > 0) != on {
					t.Errorf("the command says that %d instructions were replaced", n)
				}
			})
		}
	}
}

// watched returns the sandbox, which has ended, and what was printed at the end.
func watched(t *testing.T, opts, argv []string) (*sandbox.Sandbox, string) {
	// The thread that watches is there before the sandbox, which must not be its
	// child.
	stubs, attached, done := make(chan []int), make(chan error), make(chan error, 1)
	w := &stubtest.Watch{}
	go func() {
		runtime.LockOSThread()
		attached <- nil
		pids, ok := <-stubs
		if !ok {
			return
		}
		parts, err := image(pids[0])
		inImage := func(ip uint64) bool {
			return slices.ContainsFunc(parts, func(p [2]uint64) bool { return ip > p[0] && ip <= p[1] })
		}
		w.Unfiltered = inImage
		w.Permit = func(_ int, th *stubtest.Thread, regs *unix.PtraceRegs) bool {
			nr := regs.Orig_rax
			if !inImage(regs.Rip) {
				return false
			}
			if th.Role == stubtest.App {
				if th.Calls <= len(setUp) {
					return nr == setUp[th.Calls-1]
				}
				if nr == unix.SYS_FUTEX && regs.Rsi > 1 { // FUTEX_WAIT, FUTEX_WAKE
					return false
				}
			}
			return slices.Contains(calls[th.Role], nr)
		}
		if err == nil {
			err = w.Attach(pids[0], pids[1:]...)
		}
		attached <- err
		if err == nil {
			_, err = w.Run(0)
			done <- err
		}
	}()
	<-attached
	defer close(stubs)
	s := start(t, "systrap", opts, argv...)
	s.Await("start", nil)
	stubs <- sandbox.Stubs(t, s.Pid())
	if err := <-attached; err != nil {
		t.Fatal(err)
	}
	s.Proceed()
	s.Await("end", nil)
	s.Proceed()
	status, out := s.Finish()
	if status != survived {
		t.Errorf("status %d, want %d; stdout %q, stderr %q", status, survived, sandbox.Tail(out), sandbox.Tail(s.Stderr()))
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	for what, n := range w.Bad {
		t.Errorf("%d times: %s", n, what)
	}
	for _, what := range slices.Sorted(maps.Keys(w.Made)) {
		t.Logf("seen, what was refused included: %s: %d", what, w.Made[what])
	}
	for _, must := range []string{"zygote: system call 56", "system call thread: system call 9", "application thread: system call 15", "application thread: system call 202", "application thread: system call 317"} {
		if w.Made[must] == 0 {
			t.Errorf("%s was never made: the watcher does not see what it should", must)
		}
	}
	return s, out
}
