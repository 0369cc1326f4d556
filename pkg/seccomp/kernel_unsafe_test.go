package seccomp

import (
	"bytes"
	"encoding/gob"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/bpf"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// The kernel is asked in child processes (this test binary again), because
// filters cannot be removed.

// childEnv names the function of children to run.
const childEnv = "SECCOMP_TEST_CHILD"

// children are what child processes do. They write their answer to stdout.
var children = map[string]func() error{
	"jobs":         serveJobs,
	"action":       childAction,
	"kill thread":  childKillThread,
	"install":      childInstall,
	"tsync":        childTSync,
	"thread error": childThreadError,
	"forbidden":    childForbidden,
	"notify":       childNotify,
}

func init() {
	if os.Getenv(childEnv) != "" {
		// So that no other goroutine has the main thread, which stays until
		// the process ends.
		runtime.LockOSThread()
	}
}

func TestMain(m *testing.M) {
	if name := os.Getenv(childEnv); name != "" {
		if err := children[name](); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// runChild runs the child called name with input on stdin, and returns its
// output, what it wrote to stderr, and how it ended.
func runChild(t *testing.T, name string, input []byte, args ...string) (stdout []byte, stderr string, err error) {
	t.Helper()
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), childEnv+"="+name)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(input), &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	defer timer.Stop()
	err = cmd.Wait()
	return out.Bytes(), errs.String(), err
}

// mustRunChild is runChild for children that must exit with 0.
func mustRunChild(t *testing.T, name string, input []byte) []byte {
	t.Helper()
	out, stderr, err := runChild(t, name, input)
	if err != nil {
		t.Fatalf("child %q: %v\n%s", name, err, stderr)
	}
	return out
}

// job is a filter to install on a fresh thread, and calls to make there.
type job struct {
	Program bpf.Program
	Calls   []bpf.Data // Nr and Args only
}

// answers is what the kernel made of jobs.
type answers struct {
	// IP is what filters see as the instruction pointer of the calls.
	IP uint64
	// Returned has the raw results of the calls of each job.
	Returned [][]int64
}

func askKernel(t *testing.T, jobs []job) answers {
	t.Helper()
	var in bytes.Buffer
	if err := gob.NewEncoder(&in).Encode(jobs); err != nil {
		t.Fatal(err)
	}
	var a answers
	if err := gob.NewDecoder(bytes.NewReader(mustRunChild(t, "jobs", in.Bytes()))).Decode(&a); err != nil {
		t.Fatal(err)
	}
	if len(a.Returned) != len(jobs) {
		t.Fatalf("%d answers to %d jobs", len(a.Returned), len(jobs))
	}
	return a
}

func serveJobs() error {
	var jobs []job
	if err := gob.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		return err
	}
	n, _, err := notified(sysno.Getppid, 0)
	if err != nil {
		return err
	}
	a := answers{IP: n.data.IP}
	for _, j := range jobs {
		var returned []int64
		if err := onNewThread(func() error {
			if err := InstallOnThread(j.Program); err != nil {
				return err
			}
			for _, d := range j.Calls {
				returned = append(returned, call(uintptr(d.Nr), d.Args))
			}
			return nil
		}); err != nil {
			return err
		}
		a.Returned = append(a.Returned, returned)
	}
	return gob.NewEncoder(os.Stdout).Encode(a)
}

// onNewThread runs f on an OS thread that ends afterwards.
func onNewThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock
		done <- f()
	}()
	return <-done
}

// call returns the raw result of a system call.
func call(nr uintptr, args [6]uint64) int64 {
	r, _, errno := unix.RawSyscall6(nr, uintptr(args[0]), uintptr(args[1]), uintptr(args[2]), uintptr(args[3]), uintptr(args[4]), uintptr(args[5]))
	if errno != 0 {
		return -int64(errno)
	}
	return int64(r)
}

// notification is struct seccomp_notif.
type notification struct {
	id    uint64
	pid   uint32
	flags uint32
	data  struct {
		Nr, Arch uint32
		IP       uint64
		Args     [6]uint64
	}
}

// response is struct seccomp_notif_resp.
type response struct {
	id    uint64
	val   int64
	error int32
	flags uint32
}

// notified makes a call on a new thread whose filter notifies of it, and
// returns the notification and the call's result, which is val by the
// notification's response.
func notified(c sysno.Call, val int64) (n notification, result int64, err error) {
	nr := c.On(sysno.Native)
	p, err := BuildProgram([]RuleSet{{MakeSyscallRules(map[uintptr]SyscallRule{nr: MatchAll{}}), UserNotif}}, ProgramOptions{DefaultAction: Allow})
	if err != nil {
		return n, 0, err
	}
	results := make(chan int64)
	err = onNewThread(func() error {
		fd, err := InstallListener(p)
		if err != nil {
			return err
		}
		go func() {
			defer unix.Close(fd)
			for {
				n = notification{} // the kernel wants it so
				_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&n)))
				if errno == 0 {
					r := response{id: n.id, val: val}
					_, _, errno = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&r)))
				}
				// A signal, such as the Go runtime sends, has the call made again.
				if errno == unix.ENOENT || errno == unix.EINTR {
					continue
				}
				if errno != 0 {
					fmt.Fprintln(os.Stderr, "a notification of seccomp:", errno)
					os.Exit(1)
				}
				break
			}
			results <- 0
		}()
		// Syscall and not RawSyscall, so that the goroutine above runs. Both
		// end in the same instruction.
		r, _, _ := unix.Syscall6(nr, 1, 2, 3, 4, 5, 6)
		<-results
		result = int64(r)
		return nil
	})
	return n, result, err
}

// harmless are calls that take no arguments, so that they can be made with any.
var harmless = []sysno.Call{sysno.Getppid, sysno.Getuid, sysno.Geteuid, sysno.Getgid, sysno.Getegid}

// TestKernelAgrees compares, for every type of rule, what the kernel makes of
// at least 500 calls with what the interpreter says.
func TestKernelAgrees(t *testing.T) {
	const (
		jobsPerKind = 25
		callsPerJob = 24
		matched     = 1000 // errno of the rules' action; more for further sets
	)
	s := &source{rnd: rand.New(rand.NewPCG(11, 12))}
	ip := askKernel(t, nil).IP

	arg := func() int { return s.n(6) }
	kinds := []struct {
		name string
		make func() SyscallRule
	}{
		{"MatchAll", func() SyscallRule { return MatchAll{} }},
		{"PerArg", func() SyscallRule {
			var p PerArg
			for range 3 {
				p[arg()] = s.value(-1, 1)
			}
			return p
		}},
		{"Or", func() SyscallRule { return Or{s.rule(1), s.rule(1)} }},
		{"And", func() SyscallRule { return And{s.rule(1), s.rule(0)} }},
		{"RuleIP", func() SyscallRule {
			p := PerArg{RuleIP: []ValueMatcher{EqualTo(ip), NotEqual(ip), GreaterThanOrEqual(ip), GreaterThan(ip), LessThan(ip + 1), MaskedEqual{^uint64(0), ip}}[s.n(6)]}
			p[arg()] = s.value(-1, 1)
			return p
		}},
	}
	for kind := range valueKinds {
		name := strings.TrimPrefix(fmt.Sprintf("%T", s.value(kind, 1)), "seccomp.")
		kinds = append(kinds, struct {
			name string
			make func() SyscallRule
		}{name, func() SyscallRule {
			var p PerArg
			p[arg()] = s.value(kind, 1)
			return p
		}})
	}

	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			var jobs []job
			for range jobsPerKind {
				s.values = []uint64{ip}
				x := sample{o: ProgramOptions{DefaultAction: Allow, BadArchAction: Errno(matched + 9), Arch: sysno.Native}}
				for i := range 2 {
					set := RuleSet{NewSyscallRules(), Errno(unix.Errno(matched + i))}
					for _, c := range harmless[:3] {
						set.Rules.Add(c.On(sysno.Native), kind.make())
					}
					x.sets = append(x.sets, set)
				}
				p, err := BuildProgram(x.sets, x.o)
				if err != nil {
					t.Fatal(err)
				}
				j := job{Program: p}
				for range callsPerJob {
					d := s.call(&x)
					d.Nr = uint32(harmless[s.n(len(harmless)-1)].On(sysno.Native))
					if sysno.Native == sysno.AMD64 && s.n(32) == 0 {
						d.Nr |= x32Bit
					}
					j.Calls = append(j.Calls, d)
				}
				jobs = append(jobs, j)
			}
			a := askKernel(t, jobs)
			if a.IP != ip {
				t.Fatalf("the instruction pointer is %#x now and was %#x: build the test without -buildmode=pie", a.IP, ip)
			}
			var cases, denied int
			for i, j := range jobs {
				for k, d := range j.Calls {
					d.Arch, d.IP = sysno.Native.AuditArch(), ip
					r, err := j.Program.Run(&d)
					if err != nil {
						t.Fatal(err)
					}
					got := a.Returned[i][k]
					cases++
					switch want := Action(r.Action); {
					case want == Allow && got < 0:
						t.Errorf("the kernel returns %d for %+v, the interpreter allows it\n%v", got, d, j.Program)
					case want != Allow && got != -int64(want.Data()):
						t.Errorf("the kernel returns %d for %+v, the interpreter says %v\n%v", got, d, want, j.Program)
					case want != Allow:
						denied++
					}
				}
			}
			if cases < 500 {
				t.Errorf("only %d cases", cases)
			}
			if constant := kind.name == "MatchAll" || kind.name == "AnyValue"; !constant && (denied < cases/20 || denied > cases*19/20) {
				t.Errorf("%d of %d cases denied: too one-sided to test much", denied, cases)
			}
		})
	}
}

// childAction installs a filter with the action given as number on stdin and
// makes the call that it is for.
func childAction() error {
	var action Action
	if _, err := fmt.Fscan(os.Stdin, &action); err != nil {
		return err
	}
	nr := sysno.Getppid.On(sysno.Native)
	p, err := BuildProgram([]RuleSet{{MakeSyscallRules(map[uintptr]SyscallRule{nr: MatchAll{}}), action}}, ProgramOptions{DefaultAction: Allow})
	if err != nil {
		return err
	}
	if err := Install(p); err != nil {
		return err
	}
	if r := call(nr, [6]uint64{}); r < 0 {
		fmt.Print(unix.ErrnoName(unix.Errno(-r)))
	} else {
		fmt.Print("allowed")
	}
	return nil
}

// TestKernelActions checks what each action does.
func TestKernelActions(t *testing.T) {
	for _, test := range []struct {
		action Action
		want   string
	}{
		{Allow, "allowed"},
		{Log, "allowed"},
		{Errno(0), "allowed"},
		{Errno(unix.EXDEV), "EXDEV"},
		{Trace(1), "ENOSYS"},
		{UserNotif, "ENOSYS"},
		{Trap(1), "Go runtime: SIGSYS"},
		{KillProcess, "signal: bad system call"},
		{0x12340000, "signal: bad system call"}, // unknown actions kill
	} {
		t.Run(test.action.String(), func(t *testing.T) {
			out, stderr, err := runChild(t, "action", fmt.Append(nil, uint32(test.action)))
			got := string(out)
			var exit *exec.ExitError
			switch {
			case errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signaled():
				got = fmt.Sprint("signal: ", exit.Sys().(syscall.WaitStatus).Signal())
			case err != nil && strings.Contains(stderr, "SIGSYS: bad system call"):
				got = "Go runtime: SIGSYS"
			case err != nil:
				t.Fatalf("%v\n%s", err, stderr)
			}
			if got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

// childKillThread lets a thread be killed and reports that it is gone while
// the process lives.
func childKillThread() error {
	nr := sysno.Getppid.On(sysno.Native)
	p, err := BuildProgram([]RuleSet{{MakeSyscallRules(map[uintptr]SyscallRule{nr: MatchAll{}}), KillThread}}, ProgramOptions{DefaultAction: Allow})
	if err != nil {
		return err
	}
	tid := make(chan int)
	go func() {
		runtime.LockOSThread()
		if err := InstallOnThread(p); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		tid <- unix.Gettid()
		unix.Syscall(nr, 0, 0, 0) // not raw: the runtime goes on without the thread
		fmt.Print("survived")
	}()
	dir := fmt.Sprintf("/proc/self/task/%d", <-tid)
	for range 1000 {
		if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
			fmt.Print("killed")
			return nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	return errors.New("the thread is still there")
}

func TestKernelKillThread(t *testing.T) {
	if got := string(mustRunChild(t, "kill thread", nil)); got != "killed" {
		t.Errorf("the thread was %q", got)
	}
}

// childNotify checks a notification and its response.
func childNotify() error {
	n, result, err := notified(sysno.Getuid, 4242)
	if err != nil {
		return err
	}
	if n.data.Nr != uint32(sysno.Getuid.On(sysno.Native)) || n.data.Args != [6]uint64{1, 2, 3, 4, 5, 6} || n.data.Arch != sysno.Native.AuditArch() {
		return fmt.Errorf("the notification is %+v", n)
	}
	fmt.Print(result)
	return nil
}

func TestKernelNotify(t *testing.T) {
	if got := string(mustRunChild(t, "notify", nil)); got != "4242" {
		t.Errorf("the call returned %s, want 4242", got)
	}
}

// childTSync installs a filter while other threads exist and reports the
// result of the call on those.
func childTSync() error {
	nr := sysno.Getppid.On(sysno.Native)
	p, err := BuildProgram([]RuleSet{{MakeSyscallRules(map[uintptr]SyscallRule{nr: MatchAll{}}), Errno(unix.EXDEV)}}, ProgramOptions{DefaultAction: Allow})
	if err != nil {
		return err
	}
	const threads = 8
	ready, installed := make(chan bool), make(chan bool)
	results := make(chan int64)
	for range threads {
		go func() {
			runtime.LockOSThread()
			ready <- true
			<-installed
			results <- call(nr, [6]uint64{})
		}()
	}
	for range threads {
		<-ready
	}
	if err := Install(p); err != nil {
		return err
	}
	close(installed)
	for range threads {
		if r := <-results; r != -int64(unix.EXDEV) {
			return fmt.Errorf("a thread's call returned %d", r)
		}
	}
	status, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return err
	}
	if !strings.Contains(string(status), "NoNewPrivs:\t1\n") {
		return errors.New("no_new_privs is not set")
	}
	return nil
}

func TestInstallOnAllThreads(t *testing.T) { mustRunChild(t, "tsync", nil) }

// childThreadError installs a filter on one thread only and then on all.
func childThreadError() error {
	p := bpf.Program{bpf.Stmt(bpf.Ret|bpf.K, uint32(Allow))}
	tids, done := make(chan int), make(chan bool)
	go func() {
		runtime.LockOSThread()
		if err := InstallOnThread(p); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		if err := os.WriteFile("/proc/thread-self/comm", []byte("loner"), 0); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		tids <- unix.Gettid()
		<-done
	}()
	tid := <-tids
	err := Install(p)
	close(done)
	var refused *ThreadError
	if !errors.As(err, &refused) {
		return fmt.Errorf("Install: %v, want a ThreadError", err)
	}
	if want := (ThreadError{TID: tid, Name: "loner"}); *refused != want {
		return fmt.Errorf("Install: %+v, want %+v", *refused, want)
	}
	fmt.Print(err)
	return nil
}

func TestInstallNamesThread(t *testing.T) {
	got := string(mustRunChild(t, "thread error", nil))
	if !strings.Contains(got, "(loner) has filters that the calling thread does not have") {
		t.Errorf("the error is %q", got)
	}
}

// childForbidden installs a filter under one that forbids it.
func childForbidden() error {
	nr := sysno.Seccomp.On(sysno.Native)
	p, err := BuildProgram([]RuleSet{{MakeSyscallRules(map[uintptr]SyscallRule{nr: MatchAll{}}), Errno(unix.EPERM)}}, ProgramOptions{DefaultAction: Allow})
	if err != nil {
		return err
	}
	if err := Install(p); err != nil {
		return err
	}
	err = Install(p)
	var refused *InstallError
	if !errors.As(err, &refused) || !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("Install: %v, want an InstallError with EPERM", err)
	}
	if IsSupported(FeatureFilter) {
		return errors.New("FeatureFilter is supported where seccomp is forbidden")
	}
	fmt.Print(err)
	return nil
}

func TestInstallForbidden(t *testing.T) {
	got := string(mustRunChild(t, "forbidden", nil))
	if want := "install seccomp filter: seccomp(SECCOMP_SET_MODE_FILTER): EPERM (operation not permitted): a filter that is already there forbids seccomp(2)"; !strings.HasPrefix(got, want) {
		t.Errorf("the error is %q, want %q...", got, want)
	}
}

// childInstall installs filters until the kernel has enough.
func childInstall() error {
	long := make(bpf.Program, bpf.MaxInstructions)
	for i := range long {
		long[i] = bpf.Stmt(bpf.Ret|bpf.K, uint32(Allow))
	}
	for range 100 {
		err := Install(long)
		if errors.Is(err, unix.ENOMEM) {
			fmt.Print(err)
			return nil
		}
		if err != nil {
			return err
		}
	}
	return errors.New("the kernel took a hundred filters of 4096 instructions")
}

func TestInstallTooMany(t *testing.T) {
	if got := string(mustRunChild(t, "install", nil)); !strings.Contains(got, "install fewer filters") {
		t.Errorf("the error is %q", got)
	}
}

func TestInstallInvalid(t *testing.T) {
	for _, p := range []bpf.Program{nil, {}, {bpf.Stmt(bpf.Ld|bpf.Imm, 0)}, make(bpf.Program, 5000)} {
		var invalid *bpf.InvalidError
		if err := Install(p); !errors.As(err, &invalid) {
			t.Errorf("Install of %d bad instructions: %v, want an InvalidError", len(p), err)
		}
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(status), "NoNewPrivs:\t0\n") {
		t.Error("an invalid program has set no_new_privs")
	}
}

func TestFeatures(t *testing.T) {
	avail, err := os.ReadFile("/proc/sys/kernel/seccomp/actions_avail")
	if err != nil {
		t.Fatal(err)
	}
	actions := strings.Fields(string(avail))
	for f, action := range map[Feature]string{FeatureKillProcess: "kill_process", FeatureLog: "log", FeatureUserNotif: "user_notif"} {
		if got, want := IsSupported(f), slices.Contains(actions, action); got != want {
			t.Errorf("%v: %v, the kernel says %v", f, got, want)
		}
	}
	for _, f := range []Feature{FeatureFilter, FeatureTSync} {
		if err := Probe(f); err != nil {
			t.Error(err)
		}
	}
	if err := Probe(numFeatures); err == nil {
		t.Error("a feature that does not exist is supported")
	}
	names := make(map[string]bool)
	for _, f := range Features() {
		names[f.String()] = true
	}
	if len(names) != numFeatures {
		t.Errorf("the names are %v", names)
	}
}
