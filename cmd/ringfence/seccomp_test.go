package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled"
	"github.com/ringfence/ringfence/pkg/sentry/filter/programs"
)

// The test binary is the command as well, for what a test must do in another
// process: hooks has the names that hookEnv may have.
const hookEnv = "RINGFENCE_TEST_HOOK"

var hooks = map[string]func(){
	"none": func() {},
	// Without programs that were compiled at build time.
	"compile": func() { programs.Programs = precompiled.Set{} },
	// A Sentry that breaks the rules before the program's first instruction.
	"violate": func() {
		afterConfine = func() {
			unix.Mount("none", "/", "tmpfs", 0, "")
			os.Stderr.WriteString("the forbidden call returned\n")
		}
	},
}

func TestMain(m *testing.M) {
	// The monitor starts this binary, too; the environment is inherited.
	if hook, ok := hooks[os.Getenv(hookEnv)]; ok {
		hook()
		main()
	}
	os.Exit(m.Run())
}

// runCommand runs the command with a hook, and returns how it ended and what it
// printed.
func runCommand(t *testing.T, hook string, args ...string) (ws syscall.WaitStatus, stdout, stderr string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), hookEnv+"="+hook)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.Sys().(syscall.WaitStatus), out.String(), errOut.String()
}

func forEachPlatform(t *testing.T, f func(t *testing.T, name string)) {
	names := platform.List()
	if name := os.Getenv("RINGFENCE_PLATFORM"); name != "" {
		names = []string{name}
	}
	if len(names) == 0 {
		t.Fatal("no platform is linked in")
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) { f(t, name) })
	}
}

func TestSelfFilter(t *testing.T) {
	forEachPlatform(t, func(t *testing.T, name string) {
		for _, test := range []struct {
			name, hook string
			opts       []string
			killed     bool
			stderr     []string // what it says
			not        string   // what it does not
		}{
			{"on", "none", []string{"--verbose"}, false, nil, "precompiled"},
			{"compiled at start", "compile", []string{"--verbose"}, false, []string{"no precompiled seccomp program for \"" + name, "compiling"}, "killed"},
			{"not verbose", "compile", nil, false, nil, "precompiled"},
			{"violation", "violate", nil, true, []string{"ringfence: ", "forbids mount(", "--no-self-filter"}, "returned"},
			{"violation, write", "violate", []string{"--write"}, true, []string{"forbids mount("}, "returned"},
		} {
			t.Run(test.name, func(t *testing.T) {
				args := append([]string{"run", "--platform=" + name}, test.opts...)
				ws, stdout, stderr := runCommand(t, test.hook, append(args, "--", "/bin/sh", "-c", "echo it runs; /bin/cat /proc/self/status")...)
				if test.killed {
					if !ws.Signaled() || ws.Signal() != unix.SIGKILL || stdout != "" {
						t.Errorf("status %#x, stdout %q; want death by SIGKILL before the program starts", ws, stdout)
					}
				} else if ws != 0 || !strings.HasPrefix(stdout, "it runs\n") {
					t.Errorf("status %#x, stdout %q", ws, stdout)
				}
				for _, want := range test.stderr {
					if !strings.Contains(stderr, want) {
						t.Errorf("stderr is %q, want one with %q", stderr, want)
					}
				}
				if strings.Contains(stderr, test.not) {
					t.Errorf("stderr is %q, want one without %q", stderr, test.not)
				}
			})
		}
		t.Run("off", func(t *testing.T) {
			// The hook comes with the filter only.
			ws, stdout, stderr := runCommand(t, "violate", "run", "--platform="+name, "--no-self-filter", "--", "/bin/echo", "x")
			if ws != 0 || stdout != "x\n" || stderr != "" {
				t.Errorf("status %#x, stdout %q, stderr %q", ws, stdout, stderr)
			}
		})
	})
}

// TestRedirected runs programs whose standard files are regular files, which have
// a filter of their own.
func TestRedirected(t *testing.T) {
	forEachPlatform(t, func(t *testing.T, name string) {
		out, err := os.Create(filepath.Join(t.TempDir(), "out"))
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		cmd := exec.Command("/proc/self/exe", "run", "--platform="+name, "--", "/bin/sh", "-c",
			"echo one; echo two > /dev/stdout; chmod 600 /dev/stdout; touch /dev/stdout; echo three >> /dev/stdout")
		cmd.Env = append(os.Environ(), hookEnv+"=none")
		cmd.Stdout = out
		if err := cmd.Run(); err != nil {
			t.Error(err)
		}
		if b, err := os.ReadFile(out.Name()); string(b) != "two\nthree\n" {
			t.Errorf("the file has %q, %v", b, err)
		}
	})
}

// seccompOut runs ringfence seccomp in this process.
func seccompOut(t *testing.T, args ...string) string {
	t.Helper()
	var b bytes.Buffer
	if err := seccompRun(&b, args); err != nil {
		t.Fatalf("seccomp %q: %v\n%s", args, err, b.String())
	}
	return b.String()
}

func TestSeccompCommands(t *testing.T) {
	for _, test := range []struct {
		args []string
		want []string
	}{
		{[]string{"--help"}, []string{"Usage:", "amd64 or arm64"}},
		{[]string{"list"}, []string{"NAME", "ptrace,read-only", "ptrace,write", "amd64", "arm64", "sentry_pid", "yes"}},
		{[]string{"dump", "ptrace,write", "--arch=amd64"}, []string{"mkdirat", "allow if", "errno EPERM if", "return 0x7fff0000", "COST"}},
		{[]string{"dump", "--arch", "arm64", "ptrace,read-only"}, []string{"on arm64", "0xc00000b7", "openat2"}},
		{[]string{"explain", "--arch=amd64", "ptrace,read-only", "read", "0"}, []string{"read(0x0,", ": allow\n", "cost:"}},
		{[]string{"explain", "--arch=amd64", "ptrace,read-only", "41", "2", "1"}, []string{"socket(0x2, 0x1,", ": user notification", "monitor", "none"}},
		{[]string{"explain", "--arch=amd64", "ptrace,read-only", "openat", "-100", "0", "0x80000"}, []string{"openat(0xffffffffffffff9c,", ": allow\n"}},
		{[]string{"explain", "--arch=arm64", "--set=sentry_pid=7", "ptrace,read-only", "tgkill", "7", "8", "23"}, []string{"on arm64", ": allow\n"}},
		{[]string{"explain", "--arch=arm64", "--set=sentry_pid=8", "ptrace,read-only", "tgkill", "7", "8", "23"}, []string{": user notification"}},
		{[]string{"explain", "ptrace,read-only", "memfd_create", "0", "2"}, []string{": errno EPERM"}},
	} {
		out := seccompOut(t, test.args...)
		for _, want := range test.want {
			if !strings.Contains(out, want) {
				t.Errorf("seccomp %q does not print %q:\n%s", test.args, want, out)
			}
		}
	}
}

func TestSeccompErrors(t *testing.T) {
	for _, test := range []struct {
		args string
		want string
	}{
		{"", "--help"},
		{"list x", "--help"},
		{"dump", "--help"},
		{"explain ptrace,write", "--help"},
		{"dance", "--help"},
		{"list --no-such", "--help"},
		{"list --arch=mips", "amd64, arm64"},
		{"dump hovercraft", "ptrace,read-only ptrace,redirected"},
		{"dump --set=x ptrace,write", "VAR=N"},
		{"dump --set=x=5 ptrace,write", "only sentry_pid"},
		{"explain ptrace,write no_such_call", "no_such_call"},
		{"explain --arch=arm64 ptrace,write open", "arm64 has no system call"},
		{"explain ptrace,write read zero", "argument 0"},
	} {
		if err := seccompRun(&bytes.Buffer{}, strings.Fields(test.args)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("seccomp %s: %v, want an error with %q", test.args, err, test.want)
		}
	}
}

// TestSeccompTest runs ringfence seccomp test, which must be able to fail.
func TestSeccompTest(t *testing.T) {
	ws, stdout, stderr := runCommand(t, "none", "seccomp", "test")
	if ws != 0 || strings.Count(stdout, " kills and names a forbidden call") == 0 {
		t.Errorf("status %#x, stdout:\n%s\nstderr: %s", ws, stdout, stderr)
	}
	ws, stdout, _ = runCommand(t, "compile", "seccomp", "test")
	if ws.ExitStatus() != exitError || !strings.Contains(stdout, "go generate") {
		t.Errorf("without compiled programs: status %#x, stdout:\n%s", ws, stdout)
	}
	ws, _, stderr = runCommand(t, "none", "seccomp", seccompViolate, "hovercraft")
	if ws.ExitStatus() != exitError || !strings.Contains(stderr, "hovercraft") {
		t.Errorf("status %#x, stderr %q", ws, stderr)
	}
}
