package filter

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/bpf"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/seccomp"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// info is a platform with a variable: it may ask for the session of one process.
type info struct {
	arch sysno.Arch
	pid  uint32
}

func (i info) Variables() precompiled.Values                     { return precompiled.Values{"fake_pid": i.pid} }
func (info) ConfigKey() string                                   { return "fake" }
func (i info) ForArch(a sysno.Arch) (platform.SeccompInfo, bool) { return info{a, i.pid}, true }
func (i info) HottestSyscalls() []uintptr                        { return []uintptr{sysno.Getsid.On(i.arch)} }
func (i info) SyscallFilters(v precompiled.Values) seccomp.SyscallRules {
	if len(v) != 1 {
		panic(fmt.Sprintf("the platform sees the variables %v", v))
	}
	return seccomp.MakeSyscallRules(map[uintptr]seccomp.SyscallRule{
		sysno.Getsid.On(i.arch): seccomp.PerArg{seccomp.EqualTo(v["fake_pid"])},
	})
}

const minusOne = ^uint64(0)

// TestRules asks the programs about calls that matter, on both architectures.
func TestRules(t *testing.T) {
	const sentry, monitor, fake = 1000, 1001, 1002
	values := precompiled.Values{varPID: sentry, varMonitorPID: monitor, "fake_pid": fake}
	const never = Write + 1
	thread := map[sysno.Arch]uint64{sysno.AMD64: 0xd0f00, sysno.ARM64: 0x50f00}
	type test struct {
		call sysno.Call
		args [6]uint64
		from Access // the least that allows it
	}
	for _, a := range sysno.Arches() {
		tests := []test{
			{sysno.Read, [6]uint64{0, 1, 2}, ReadOnly},
			{sysno.Futex, [6]uint64{1, 128}, ReadOnly},
			{sysno.Futex, [6]uint64{1, 0}, never}, // of other processes
			{sysno.Getsid, [6]uint64{fake}, ReadOnly},
			{sysno.Getsid, [6]uint64{fake + 1}, never},

			// No new process or program, and no code.
			{sysno.Clone, [6]uint64{thread[a]}, ReadOnly},
			{sysno.Clone, [6]uint64{uint64(unix.SIGCHLD)}, never},
			{sysno.Clone, [6]uint64{unix.CLONE_VM | unix.CLONE_VFORK | uint64(unix.SIGCHLD)}, never},
			{sysno.Clone, [6]uint64{thread[a] | unix.CLONE_NEWUSER}, never},
			{sysno.Clone3, [6]uint64{1, 88}, never},
			{sysno.Execve, [6]uint64{1, 2, 3}, never},
			{sysno.Execveat, [6]uint64{3, 2, 3}, never},
			{sysno.Mmap, [6]uint64{0, 4096, 3, 0x22, minusOne}, ReadOnly},
			{sysno.Mmap, [6]uint64{0, 4096, 7, 0x22, minusOne}, never},
			{sysno.Mmap, [6]uint64{0, 4096, 3, 1, 5}, ReadOnly},
			{sysno.Mmap, [6]uint64{0, 4096, 5, 1, 5}, never},
			{sysno.Mmap, [6]uint64{0, 4096, 3, 1, minusOne}, never},
			{sysno.Mprotect, [6]uint64{4096, 4096, 5}, never},

			// No other process.
			{sysno.Tgkill, [6]uint64{sentry, 5, 23}, ReadOnly},
			{sysno.Tgkill, [6]uint64{1, 1, 9}, never},
			{sysno.Kill, [6]uint64{minusOne, 9}, never},
			{sysno.Kill, [6]uint64{sentry, 9}, never},
			{sysno.Wait4, [6]uint64{monitor}, ReadOnly},
			{sysno.Wait4, [6]uint64{minusOne}, never},
			{sysno.Ptrace, [6]uint64{16, 1}, never},
			{sysno.ProcessVmReadv, [6]uint64{1}, never},
			{sysno.Prlimit64, [6]uint64{0, 7, 1, 0}, never},

			// Files.
			{sysno.Openat2, [6]uint64{5, 1, 2, 24}, ReadOnly},
			{sysno.Openat2, [6]uint64{atFDCWD, 1, 2, 24}, never},
			{sysno.Openat, [6]uint64{5, 1, unix.O_RDONLY | unix.O_CLOEXEC}, ReadOnly},
			{sysno.Openat, [6]uint64{5, 1, unix.O_RDWR | unix.O_CLOEXEC}, Redirected},
			{sysno.Openat, [6]uint64{5, 1, unix.O_WRONLY | unix.O_TRUNC}, Redirected},
			{sysno.Openat, [6]uint64{5, 1, unix.O_RDWR | unix.O_CREAT}, never},
			{sysno.Openat, [6]uint64{atFDCWD, 1, unix.O_RDONLY | unix.O_CLOEXEC}, ReadOnly},
			{sysno.Openat, [6]uint64{atFDCWD, 1, unix.O_RDWR | unix.O_CLOEXEC}, never},
			{sysno.Fchmodat, [6]uint64{5, 1, 0o600}, Write},
			{sysno.Fchmodat, [6]uint64{atFDCWD, 1, 0o600}, never},
			{sysno.Setxattr, [6]uint64{1, 2, 3}, Write},
			{sysno.Mkdirat, [6]uint64{5, 1, 0o700}, Write},
			{sysno.Unlinkat, [6]uint64{5, 1}, Write},
			{sysno.Unlinkat, [6]uint64{atFDCWD, 1}, never},
			{sysno.Mknodat, [6]uint64{5, 1, unix.S_IFREG | 0o600}, Write},
			{sysno.Mknodat, [6]uint64{5, 1, unix.S_IFCHR | 0o600, 5}, never},
			{sysno.Renameat2, [6]uint64{5, 1, 6, 1}, Write},
			{sysno.Fcntl, [6]uint64{5, unix.F_SETOWN, 1}, never},
			{sysno.Ioctl, [6]uint64{0, unix.TCGETS}, ReadOnly},
			{sysno.Ioctl, [6]uint64{0, unix.TIOCSTI}, never},
			{sysno.Ioctl, [6]uint64{5, unix.SECCOMP_IOCTL_NOTIF_SEND}, never},
			{sysno.Sendmsg, [6]uint64{5, 1, unix.MSG_NOSIGNAL}, ReadOnly},
			{sysno.MemfdCreate, [6]uint64{1, unix.MFD_CLOEXEC}, ReadOnly},

			// The host.
			{sysno.Socket, [6]uint64{2, 1}, never},
			{sysno.Connect, [6]uint64{5}, never},
			{sysno.Mount, [6]uint64{}, never},
			{sysno.Unshare, [6]uint64{}, never},
			{sysno.Setns, [6]uint64{}, never},
			{sysno.Bpf, [6]uint64{}, never},
			{sysno.IoUringSetup, [6]uint64{}, never},
			{sysno.Userfaultfd, [6]uint64{}, never},
			{sysno.Seccomp, [6]uint64{1}, never},
			{sysno.Prctl, [6]uint64{unix.PR_SET_VMA, 0}, ReadOnly},
			{sysno.Prctl, [6]uint64{unix.PR_SET_DUMPABLE, 1}, never},
		}
		for access := ReadOnly; access <= Write; access++ {
			source := Source(info{a, fake}, access, a)
			p, err := source.Compile()
			if err != nil {
				t.Fatal(err)
			}
			program, err := p.Render(values)
			if err != nil {
				t.Fatal(err)
			}
			answer := func(d *bpf.Data) seccomp.Action {
				r, err := program.Run(d)
				if err != nil {
					t.Fatal(err)
				}
				return seccomp.Action(r.Action)
			}
			for _, test := range tests {
				d := bpf.Data{Nr: uint32(test.call.On(a)), Arch: a.AuditArch(), Args: test.args}
				want := seccomp.UserNotif
				if access >= test.from {
					want = seccomp.Allow
				}
				if got := answer(&d); got != want {
					t.Errorf("%v, %v: %v(%#x): %v, want %v", a, access, test.call, test.args, got, want)
				}
			}
			// Of the zygote's start, the first call is refused.
			d := bpf.Data{Nr: uint32(sysno.MemfdCreate.On(a)), Arch: a.AuditArch(), Args: [6]uint64{1, unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING | 0x10}}
			if got := answer(&d); got != seccomp.Errno(unix.EPERM) {
				t.Errorf("%v, %v: memfd_create of a stub's image: %v", a, access, got)
			}
			// Other calling conventions.
			foreign := bpf.Data{Nr: 4, Arch: 0x40000003}
			if got := answer(&foreign); got != seccomp.UserNotif {
				t.Errorf("%v, %v: a 32-bit system call: %v", a, access, got)
			}
		}
	}
}

// atFDCWD is AT_FDCWD as package unix passes it.
const atFDCWD = minusOne - 99

// Children are this test binary again, because filters cannot be removed.

const childEnv = "FILTER_TEST_CHILD"

func TestMain(m *testing.M) {
	name := os.Getenv(childEnv)
	switch {
	case len(os.Args) == 2 && os.Args[1] == "monitor":
		os.Exit(MonitorMain(os.Stderr))
	case name != "":
		if err := children[name](); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// confine installs the filter, compiled now.
func confine(m *Monitor) error {
	logged := ""
	err := Install(Config{
		Platform: info{sysno.Native, uint32(os.Getpid())}, Monitor: m,
		Logf: func(format string, args ...any) { logged += fmt.Sprintf(format, args...) },
	})
	if err == nil && !strings.Contains(logged, `no precompiled seccomp program for "fake,read-only"`) {
		return fmt.Errorf("Install logs %q", logged)
	}
	return err
}

// monitored confines the process with a monitor and calls f.
func monitored(f func(m *Monitor) error) error {
	m, err := StartMonitor([]string{os.Args[0], "monitor"})
	if err != nil {
		return err
	}
	defer m.Stop()
	if err := confine(m); err != nil {
		return err
	}
	return f(m)
}

var children = map[string]func() error{
	// Everything that is allowed works, and so does the end.
	"good": func() error {
		return monitored(func(*Monitor) error {
			done := make(chan error)
			for range 20 { // new threads
				go func() {
					runtime.LockOSThread()
					time.Sleep(time.Millisecond)
					_, err := unix.Getsid(os.Getpid())
					done <- err
				}()
			}
			for range 20 {
				if err := <-done; err != nil {
					return err
				}
			}
			runtime.GC()
			if _, err := os.ReadFile("/proc/cpuinfo"); err != nil {
				return err
			}
			if fd, err := unix.MemfdCreate("image", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING); err != unix.EPERM {
				return fmt.Errorf("memfd_create of an image: %d, %v", fd, err)
			}
			return nil
		})
	},
	"socket": func() error {
		return monitored(func(*Monitor) error { return must(unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)) })
	},
	// On a host that allows no programs in memory.
	"directly": func() error {
		watchProgram = func() (*os.File, error) { return nil, unix.EACCES }
		return monitored(func(*Monitor) error { return must(unix.Getsid(1)) })
	},
	// On a thread that was there before.
	"thread": func() error {
		ready, confined := make(chan bool), make(chan bool)
		go func() {
			runtime.LockOSThread()
			ready <- true
			<-confined
			unix.Mount("a", "b", "c", 0, "")
		}()
		<-ready
		return monitored(func(*Monitor) error {
			close(confined)
			time.Sleep(time.Minute)
			return nil
		})
	},
	// With all signals blocked, as the Go runtime does around fork(2).
	"fork": func() error {
		return monitored(func(*Monitor) error {
			runtime.LockOSThread()
			var all unix.Sigset_t
			for i := range all.Val {
				all.Val[i] = ^all.Val[i]
			}
			if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, nil); err != nil {
				return err
			}
			pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
			return must(int(pid), errno)
		})
	},
	// A platform's rule with another value of its variable.
	"variable": func() error {
		return monitored(func(*Monitor) error { return must(unix.Getsid(1)) })
	},
	"unmonitored": func() error {
		if err := confine(nil); err != nil {
			return err
		}
		return must(unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0))
	},
	// Somebody has killed the monitor.
	"orphaned": func() error {
		return monitored(func(m *Monitor) error {
			fmt.Println(m.pid)
			time.Sleep(time.Millisecond)
			for range 10_000 {
				if _, err := unix.Wait4(m.pid, nil, 0, nil); err == nil {
					break
				}
			}
			if fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0); err != unix.ENOSYS {
				return fmt.Errorf("socket without a monitor: %d, %v", fd, err)
			}
			return nil
		})
	},
	"wait": func() error {
		return monitored(func(m *Monitor) error {
			fmt.Println(m.pid)
			time.Sleep(time.Minute)
			return nil
		})
	},
}

func must(v int, err error) error { return fmt.Errorf("the forbidden call returned %d, %v", v, err) }

func child(name string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+name)
	return cmd
}

// end returns how a child ended and what it printed.
func end(t *testing.T, cmd *exec.Cmd) (syscall.WaitStatus, string) {
	t.Helper()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
	defer timer.Stop()
	err := cmd.Wait() // for the monitor as well, which has the pipe
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.Sys().(syscall.WaitStatus), out.String()
}

func TestConfined(t *testing.T) {
	ws, out := end(t, child("good"))
	if !ws.Exited() || ws.ExitStatus() != 0 || out != "" {
		t.Errorf("status %#x, %q", ws, out)
	}
}

func TestViolation(t *testing.T) {
	for name, call := range map[string]string{"socket": "socket(0x2, 0x1,", "thread": "mount(", "fork": "clone(0x11,", "variable": "getsid(0x1,", "directly": "getsid(0x1,"} {
		t.Run(name, func(t *testing.T) {
			ws, out := end(t, child(name))
			if !ws.Signaled() || ws.Signal() != unix.SIGKILL {
				t.Errorf("status %#x, want death by SIGKILL", ws)
			}
			if !strings.HasPrefix(out, "ringfence: ") || !strings.Contains(out, "forbids "+call) || strings.Count(out, "\n") != 1 {
				t.Errorf("the message is %q, want one that names %s)", out, call)
			}
		})
	}
}

// TestUnmonitored is for kernels that cannot have a monitor.
func TestUnmonitored(t *testing.T) {
	ws, out := end(t, child("unmonitored"))
	if !ws.Signaled() || ws.Signal() != unix.SIGSYS || out != "" {
		t.Errorf("status %#x, %q, want death by SIGSYS", ws, out)
	}
}

// start starts a child that prints its monitor's process ID.
func start(t *testing.T, name string) (cmd *exec.Cmd, monitor int, rest func() string) {
	cmd = child(name)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fscanln(out, &monitor); err != nil {
		t.Fatal(err)
	}
	return cmd, monitor, func() string {
		var b bytes.Buffer
		b.ReadFrom(out)
		return b.String()
	}
}

// TestOrphaned kills the monitor: what is forbidden stays so.
func TestOrphaned(t *testing.T) {
	cmd, monitor, rest := start(t, "orphaned")
	if err := unix.Kill(monitor, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	out := rest()
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v, %q", err, out)
	}
}

// TestSentryKilled checks that the monitor ends with the Sentry.
func TestSentryKilled(t *testing.T) {
	cmd, monitor, _ := start(t, "wait")
	pidfd, err := unix.PidfdOpen(monitor, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	cmd.Process.Kill()
	cmd.Wait()
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 20_000)
		if err == unix.EINTR {
			continue
		}
		if n != 1 {
			t.Errorf("the monitor outlives the Sentry: %v", err)
		}
		return
	}
}

// TestMonitorMisused runs the monitor without a Sentry.
func TestMonitorMisused(t *testing.T) {
	cmd := exec.Command(os.Args[0], "monitor")
	out, err := cmd.CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("ringfence run")) {
		t.Errorf("%v, %q", err, out)
	}
}

// staticInfo has rules for one architecture only.
type staticInfo struct{ platform.StaticSeccompInfo }

func TestSourcesRefuse(t *testing.T) {
	_, err := Sources([]platform.SeccompInfo{staticInfo{platform.StaticSeccompInfo{PlatformName: "static"}}}, sysno.AMD64)
	if err == nil || !strings.Contains(err.Error(), "static") {
		t.Errorf("Sources of a platform for one architecture: %v", err)
	}
}

// TestInstallErrors gives Install what it must refuse.
func TestInstallErrors(t *testing.T) {
	stale := precompiled.Set{{Key: "fake,read-only", Variables: []precompiled.Variable{{Name: "other"}}}}
	err := Install(Config{Platform: info{sysno.Native, 1}, Programs: stale, Logf: t.Logf})
	var want *precompiled.VariablesError
	if !errors.As(err, &want) {
		t.Errorf("Install of a program with other variables: %v", err)
	}
}

// TestForeignCall is what the monitor says of a call that has no name here.
func TestForeignCall(t *testing.T) {
	v := violation{data: bpf.Data{Nr: 11, Arch: 0x40000003}}
	if want := "forbids system call 11 of the architecture 0x40000003("; !strings.Contains(v.String(), want) {
		t.Errorf("%q does not say %q", v.String(), want)
	}
}
