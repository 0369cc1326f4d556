package sentry_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/platform"
	_ "github.com/ringfence/ringfence/pkg/platform/platforms"
	"github.com/ringfence/ringfence/pkg/sentry"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/rootfs"
)

// TestMain is the sandboxed program as well: this test runs itself.
func TestMain(m *testing.M) {
	if action := os.Getenv("SENTRY_TEST_ACTION"); action != "" {
		os.Exit(act(action))
	}
	os.Exit(m.Run())
}

func act(action string) int {
	switch action {
	case "show":
		wd, _ := os.Getwd()
		host, _ := os.Hostname()
		fmt.Printf("%s %s %d %q\n", wd, host, os.Getpid(), os.Args[1:])
		return 3
	case "unknown":
		for range 2 {
			if _, _, errno := syscall.RawSyscall(5000, 0, 0, 0); errno != syscall.ENOSYS {
				return 1
			}
		}
	case "spin":
		fmt.Println("ready")
		//lint:ignore SA5002 it is to be interrupted in application code
		for {
		}
	case "files":
		for fd := range 3 {
			var st unix.Stat_t
			if unix.Fstat(fd, &st) != nil {
				fmt.Printf("%d is closed\n", fd)
			}
		}
	case "cat":
		if _, err := io.Copy(os.Stdout, os.Stdin); err != nil {
			return 1
		}
	}
	return 0
}

// forEachPlatform runs f on every platform that is linked in.
func forEachPlatform(t *testing.T, f func(*testing.T, platform.Platform)) {
	t.Helper()
	names := platform.List()
	if name := os.Getenv("RINGFENCE_PLATFORM"); name != "" {
		names = []string{name}
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			p, _, err := sentry.NewPlatform(name, t.Logf)
			if err != nil {
				t.Fatal(err)
			}
			f(t, p)
		})
	}
}

// config runs this test as the program.
func config(t *testing.T, p platform.Platform, action string) sentry.Config {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return sentry.Config{
		Platform: p,
		Root:     "/",
		Binds:    []rootfs.Bind{{Source: exe, Target: exe}},
		Argv:     []string{exe},
		Env:      []string{"SENTRY_TEST_ACTION=" + action},
		Files:    []int{-1, -1, -1},
	}
}

// run runs c with a pipe as its standard output, and returns what it wrote.
func run(t *testing.T, ctx context.Context, c sentry.Config) (string, sentry.Result, error) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	out := make(chan string)
	go func() {
		b, _ := io.ReadAll(r)
		out <- string(b)
	}()
	c.Files[1] = int(w.Fd())
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	result, err := sentry.Run(ctx, c)
	w.Close()
	return <-out, result, err
}

func TestRun(t *testing.T) {
	forEachPlatform(t, func(t *testing.T, p platform.Platform) {
		c := config(t, p, "show")
		c.Cwd, c.Hostname = "/usr", "box"
		c.Argv = append(c.Argv, "a", "b c")
		out, result, err := run(t, t.Context(), c)
		if want := "/usr box 1 [\"a\" \"b c\"]\n"; out != want || err != nil || result.Status.ExitStatus() != 3 {
			t.Errorf("out %q, status %#x, %v; want %q, 3", out, result.Status, err, want)
		}
	})
}

func TestUnknown(t *testing.T) {
	forEachPlatform(t, func(t *testing.T, p platform.Platform) {
		c := config(t, p, "unknown")
		_, result, err := run(t, t.Context(), c)
		if err != nil || result.Status != 0 || result.Unknown[5000] != 2 {
			t.Errorf("status %#x, unknown calls %v, %v", result.Status, result.Unknown, err)
		}
		c.Strict = true
		_, _, err = run(t, t.Context(), c)
		if err == nil || !strings.Contains(err.Error(), "5000") || !strings.Contains(err.Error(), "--strict") {
			t.Errorf("strict: %v", err)
		}
	})
}

func TestCancel(t *testing.T) {
	cause := errors.New("enough")
	forEachPlatform(t, func(t *testing.T, p platform.Platform) {
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(100*time.Millisecond, func() { cancel(cause) })
		if _, _, err := run(t, ctx, config(t, p, "spin")); !errors.Is(err, cause) {
			t.Errorf("got %v, want %v", err, cause)
		}
	})
}

// The program gets the signals that are for it, and no others.
func TestSignals(t *testing.T) {
	forEachPlatform(t, func(t *testing.T, p platform.Platform) {
		signals := make(chan os.Signal, 2)
		signals <- unix.SIGKILL
		signals <- unix.SIGTERM
		close(signals)
		c := config(t, p, "spin")
		c.Signals = signals
		_, result, err := run(t, t.Context(), c)
		if status := result.Status; err != nil || !status.Signaled() || status.Signal() != unix.SIGTERM {
			t.Errorf("status %#x, %v, want an end by SIGTERM", status, err)
		}
		c.Ignored = []os.Signal{unix.SIGKILL}
		if _, _, err := run(t, t.Context(), c); !errors.Is(err, unix.EINVAL) {
			t.Errorf("SIGKILL to be ignored: %v, want EINVAL", err)
		}
	})
}

func TestTrace(t *testing.T) {
	forEachPlatform(t, func(t *testing.T, p platform.Platform) {
		var trace bytes.Buffer
		c := config(t, p, "show")
		c.Trace = &trace
		if _, _, err := run(t, t.Context(), c); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"[    1] uname(", "write(1, \"/", "exit_group(3) = ?\n"} {
			if !strings.Contains(trace.String(), want) {
				t.Errorf("no %q in the trace:\n%s", want, trace.String())
			}
		}
	})
}

func TestFiles(t *testing.T) {
	forEachPlatform(t, func(t *testing.T, p platform.Platform) {
		c := config(t, p, "files")
		// The Go runtime opens /dev/null for those that are closed.
		if out, _, err := run(t, t.Context(), c); err != nil || out != "" {
			t.Errorf("out %q, %v", out, err)
		}
		name := filepath.Join(t.TempDir(), "in")
		want := strings.Repeat("some text\n", 100000)
		if err := os.WriteFile(name, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		c = config(t, p, "cat")
		c.Files[0] = int(f.Fd())
		if out, _, err := run(t, t.Context(), c); err != nil || out != want {
			t.Errorf("%d bytes, %v; want %d", len(out), err, len(want))
		}
	})
}

func TestErrors(t *testing.T) {
	forEachPlatform(t, func(t *testing.T, p platform.Platform) {
		for _, test := range []struct {
			name    string
			change  func(*sentry.Config)
			program bool // a ProgramError
			missing bool
			words   []string
		}{
			{"no-program", func(c *sentry.Config) { c.Argv = nil }, false, false, nil},
			{"missing", func(c *sentry.Config) { c.Argv = []string{"/no/such"} }, true, true, []string{"/no/such"}},
			{"not-in-path", func(c *sentry.Config) { c.Argv = []string{"no-such"}; c.Env = []string{"PATH=/usr:/etc"} }, true, true, []string{"no-such", "/usr:/etc"}},
			{"directory", func(c *sentry.Config) { c.Argv = []string{"/usr"} }, true, false, []string{"/usr", "directory"}},
			{"directory-in-path", func(c *sentry.Config) { c.Argv = []string{"usr"}; c.Env = []string{"PATH=/"} }, true, true, []string{"usr"}},
			{"not-executable", func(c *sentry.Config) { c.Argv = []string{"passwd"}; c.Env = []string{"PATH=/etc"} }, true, false, []string{"/etc/passwd", "chmod"}},
			{"cwd", func(c *sentry.Config) { c.Cwd = "/no/such" }, false, false, []string{"working directory /no/such"}},
			{"root", func(c *sentry.Config) { c.Root = "/no/such" }, false, false, []string{"/no/such"}},
		} {
			t.Run(test.name, func(t *testing.T) {
				c := config(t, p, "show")
				test.change(&c)
				_, _, err := run(t, t.Context(), c)
				var program *sentry.ProgramError
				if err == nil || errors.As(err, &program) != test.program || (program != nil && program.NotFound != test.missing) {
					t.Fatalf("got %#v", err)
				}
				for _, w := range test.words {
					if !strings.Contains(err.Error(), w) {
						t.Errorf("%q does not say %q", err, w)
					}
				}
			})
		}
	})
}

func TestNewPlatform(t *testing.T) {
	// The best that works here, and what is slow here after all others.
	var want, slow string
	for _, name := range []string{"systrap", "kvm", "ptrace"} {
		for _, d := range sentry.Diagnose(name) { // one, if it is linked in
			switch {
			case d.Err != nil:
			case d.Slow:
				slow = cmp.Or(slow, name)
			default:
				want = cmp.Or(want, name)
			}
		}
	}
	if _, name, err := sentry.NewPlatform("auto", t.Logf); err != nil || name != cmp.Or(want, slow) {
		t.Errorf("auto: %q, %v; want %q", name, err, cmp.Or(want, slow))
	}
	if _, _, err := sentry.NewPlatform("hovercraft", t.Logf); err == nil || !strings.Contains(err.Error(), "ptrace") {
		t.Errorf("hovercraft: %v", err)
	}
}
