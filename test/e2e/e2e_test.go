// Package e2e runs unmodified programs under `ringfence run` on every platform
// and compares what they print and how they end with the host's own run.
//
// It uses the command as a user would and the host's programs; it must not
// import the Sentry.
package e2e

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/platform"
	_ "github.com/ringfence/ringfence/pkg/platform/platforms"
)

var platformFlag = flag.String("platform", os.Getenv("RINGFENCE_PLATFORM"), "test this platform only; default: every one that is linked in")

// timeout bounds every single run; a program that hangs is killed and fails.
const timeout = 3 * time.Minute

// bin is the path of the ringfence command, tools where test programs are put.
var bin, tools string

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(func() int {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			fmt.Fprintln(os.Stderr, "prctl(PR_SET_CHILD_SUBREAPER):", err)
			return 1
		}
		dir, err := os.MkdirTemp("", "ringfence-e2e-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
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

// result is how a program ended and what it printed.
type result struct {
	Status int // as a shell gives it
	Stdout string
	stderr string
}

// run runs argv in a session of its own and waits until every process that came
// of it is gone; those that stay are an error.
func run(t *testing.T, stdin string, argv ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = environ()
	cmd.Dir = "/"
	cmd.Stdin = strings.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err := cmd.Run()
	if ctx.Err() != nil {
		t.Fatalf("%q did not end in %v; stdout %q, stderr %q", argv, timeout, tail(stdout.String()), tail(stderr.String()))
	}
	if cmd.ProcessState == nil {
		t.Fatalf("%q: %v", argv, err)
	}
	if left := leftovers(t); len(left) > 0 {
		t.Errorf("%q left processes behind: %v", argv, left)
	}
	status := cmd.ProcessState.ExitCode()
	if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signaled() {
		status = 128 + int(ws.Signal())
	}
	return result{status, stdout.String(), stderr.String()}
}

// environ is the environment of every program: fixed, so that outputs are equal.
func environ() []string {
	return []string{"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME=/", "LANG=C", "LC_ALL=C", "TZ=UTC"}
}

// leftovers returns our descendants that are still there after a grace period:
// the host may take a moment to end what was killed. Since we are a subreaper
// (see TestMain), processes that lose their parent become our children, whatever
// they do about sessions; the dead among them are buried here.
func leftovers(t *testing.T) []string {
	t.Helper()
	var left []string
	for range 600 {
		left = nil
		stats, err := filepath.Glob("/proc/[0-9]*/stat")
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range stats {
			b, err := os.ReadFile(path)
			if err != nil {
				continue // ended meanwhile
			}
			// pid (comm) state ppid
			comm := string(b[:bytes.LastIndexByte(b, ')')+1])
			f := strings.Fields(string(b[len(comm):]))
			if f[1] != strconv.Itoa(os.Getpid()) {
				continue
			}
			if pid, err := strconv.Atoi(strings.Fields(comm)[0]); f[0] == "Z" && err == nil {
				syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
				continue
			}
			left = append(left, comm+" "+f[0])
		}
		if len(left) == 0 {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return left
}

func tail(s string) string {
	if len(s) > 2000 {
		return "..." + s[len(s)-2000:]
	}
	return s
}

// ringfence returns the command line of `ringfence run` on platform p.
func ringfence(p string, args ...string) []string {
	return append([]string{bin, "run", "--platform=" + p}, args...)
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

// compare runs argv on the host and in the sandbox. The host's own result may
// change under our hands (other programs write files), so it is taken before
// and after, until both agree.
func compare(t *testing.T, p, stdin string, opts []string, argv ...string) result {
	t.Helper()
	before := run(t, stdin, argv...)
	for range 4 {
		got := run(t, stdin, ringfence(p, append(append(opts, "--"), argv...)...)...)
		after := run(t, stdin, argv...)
		if before != after && got.Stdout != after.Stdout {
			before = after
			continue
		}
		if got.Status != after.Status {
			t.Errorf("%q: status %d, on the host %d; stderr %q", argv, got.Status, after.Status, tail(got.stderr))
		}
		if got.Stdout != after.Stdout {
			t.Errorf("%q prints otherwise than on the host (-host +sandbox):\n%s\nstderr %q",
				argv, tail(cmp.Diff(strings.Split(after.Stdout, "\n"), strings.Split(got.Stdout, "\n"))), tail(got.stderr))
		}
		return got
	}
	t.Fatalf("%q prints something else each time on the host", argv)
	return result{}
}

func TestPrograms(t *testing.T) {
	big := make([]byte, 64<<20)
	for i := range big {
		big[i] = byte(i * 7 >> 3)
	}
	bigInput := string(big)

	forEachPlatform(t, func(t *testing.T, p string) {
		for _, test := range []struct {
			name  string
			stdin string
			argv  []string
		}{
			{"true", "", []string{"/bin/true"}},
			{"false", "", []string{"/bin/false"}},
			{"echo", "", []string{"/bin/echo", "hello", "world"}},
			{"ls-l", "", []string{"/bin/ls", "-l", "/usr"}},
			{"ls-lR", "", []string{"/bin/ls", "-lR", "/usr/share/doc"}},
			{"cat", bigInput, []string{"/bin/cat"}},
			{"cat-pipe", bigInput, []string{"/bin/sh", "-c", "cat | cat | cksum"}},
			{"pipeline", "", []string{"/bin/sh", "-c", "seq 1 20000 | grep 7 | sort -rn | head -n 20; echo done >&2"}},
			{"redirections", "", []string{"/bin/sh", "-c", `
				cd /tmp && d=$(mktemp -d) && cd "$d" || exit 9
				seq 100 > a; tail -n 3 < a > b; cat a b >> c; wc -l c 2>&1; (echo out; echo err >&2) 2> e; cat e
				cat <<X
here $(wc -l < c)
X
				cd /; rm -r "$d"; ls "$d" 2>/dev/null; echo $?`}},
			{"kill-segv", "", []string{"/bin/sh", "-c", "kill -SEGV $$"}},
			{"kill-child", "", []string{"/bin/sh", "-c", "sh -c 'kill -TERM $$'; echo $?; exit 3"}},
			{"bash-traps", "", []string{"/bin/bash", "-c", `
				set +m
				trap 'echo usr1' USR1; trap 'echo exit' EXIT
				kill -USR1 $$; (trap 'echo sub' TERM; kill -TERM $BASHPID; echo after; exit 5); echo "sub $?"
				# Bash itself may lose a signal between its fork and exec; sh does not.
				exec 9< <(exec sh -c 'echo $$; exec sleep 30'); q=$!; read -r p <&9; kill "$p"; wait "$q"; echo "wait $?"
				f() { local x=$(echo inner); echo "$x $((6*7))"; }; f
				coproc cat; echo ping >&"${COPROC[1]}"; read -r l <&"${COPROC[0]}"; echo "$l"; kill $COPROC_PID
				while read -r n; do s=$((s+n)); done < <(seq 10); echo "$s"
				exit 11`}},
			{"text-tools", "", []string{"/bin/bash", "-c", `
				set -e
				d=$(mktemp -d); cd "$d"
				awk 'BEGIN { for (i = 0; i < 160000; i++) printf "%06d line %d of the test %s\n", (i*7919)%160000, i, "abcdefghijklmnopqrstuvwxyz" }' > in
				wc -c in
				sort in > sorted; sed 's/line/LINE/; s/^0*//' sorted | grep -c '7 LINE'
				tar cf t.tar in sorted; gzip -k t.tar; gzip -dc t.tar.gz | cmp - t.tar
				mkdir x; tar xzf t.tar.gz -C x; cmp in x/in; cmp sorted x/sorted
				cksum < in; cksum < sorted; cd /; rm -r "$d"; echo ok`}},
			{"find", "", []string{"/bin/sh", "-c", "find /usr /etc -xdev -maxdepth 3 | sort"}},
			{"python", "", []string{"python3", "-c", `
import json, subprocess, sys, threading, os
r = []
def work(i):
    r.append(sum(range(i * 1000)))
ts = [threading.Thread(target=work, args=(i,)) for i in range(8)]
[t.start() for t in ts]; [t.join() for t in ts]
p = subprocess.run(["sh", "-c", "echo child; exit 3"], stdout=subprocess.PIPE)
print(json.dumps({"sum": sorted(r), "child": p.stdout.decode(), "status": p.returncode, "v": sys.version_info[:2]}))
q = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
print(len(q.communicate(b"x" * 300000)[0]))
sys.exit(5)
`}},
			{"env", "", []string{"/usr/bin/env"}},
			{"id", "", []string{"/usr/bin/id"}},
			{"uname", "", []string{"/bin/uname", "-sm"}},
			{"stat-dev", "", []string{"/bin/sh", "-c", "echo x > /dev/null; head -c 4 /dev/zero | od -c; test -c /dev/null && echo char; head -c 8 /dev/urandom | wc -c"}},
		} {
			t.Run(test.name, func(t *testing.T) { compare(t, p, test.stdin, nil, test.argv...) })
		}
	})
}

// System call instructions of programs as they are get replaced, where the platform can.
func TestReplaced(t *testing.T) {
	some := regexp.MustCompile(`(?m)^ringfence: [1-9]\d* system call instructions were replaced$`)
	forEachPlatform(t, func(t *testing.T, p string) {
		got := compare(t, p, "", []string{"--verbose"}, "/bin/dd", "if=/dev/zero", "of=/dev/null", "bs=1", "count=1000", "status=none")
		if want := p == "systrap" && runtime.GOARCH == "amd64"; some.MatchString(got.stderr) != want {
			t.Errorf("instructions were replaced: %t, want %t; stderr %q", !want, want, got.stderr)
		}
	})
}

// buildC compiles a program of testdata once for each set of flags.
func buildC(t *testing.T, name string, flags ...string) string {
	t.Helper()
	out := filepath.Join(tools, name+strings.Join(flags, ""))
	args := append([]string{"-O1", "-Wall", "-o", out, "testdata/" + name + ".c", "-pthread"}, flags...)
	if b, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		t.Fatalf("gcc %q: %v: install gcc and libc6-dev\n%s", args, err, b)
	}
	return out
}

// bind makes the directory of test programs visible where the host has it.
func bind() []string { return []string{"--bind", tools} }

func TestCThreads(t *testing.T) {
	programs := map[string]string{"dynamic": buildC(t, "threads"), "static": buildC(t, "threads", "-static"), "static-pie": buildC(t, "threads", "-static-pie")}
	forEachPlatform(t, func(t *testing.T, p string) {
		for name, prog := range programs {
			t.Run(name, func(t *testing.T) {
				if got := compare(t, p, "", bind(), prog); got.Status != 42 {
					t.Errorf("status %d, want 42; stdout %q", got.Status, got.Stdout)
				}
			})
		}
	})
}

func TestGoProgram(t *testing.T) {
	prog, err := goBuild("goprog")
	if err != nil {
		t.Fatal(err)
	}
	forEachPlatform(t, func(t *testing.T, p string) {
		if got := compare(t, p, "", []string{"--bind", filepath.Dir(prog)}, prog); got.Status != 7 {
			t.Errorf("status %d, want 7; stdout %q", got.Status, got.Stdout)
		}
	})
}

// A sandbox whose ringfence is killed leaves no process.
func TestKill9(t *testing.T) {
	forEachPlatform(t, func(t *testing.T, p string) {
		argv := ringfence(p, "--", "/bin/sh", "-c", "sleep 1000 & sleep 1000 & echo started; (while :; do :; done) & wait")
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Env = environ()
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer cmd.Wait()
		defer cmd.Process.Kill()
		buf := make([]byte, 100)
		if n, err := out.Read(buf); string(buf[:n]) != "started\n" {
			t.Fatalf("read %q, %v; want \"started\"", buf[:n], err)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		if left := leftovers(t); len(left) > 0 {
			t.Errorf("after kill -9 these are left: %v", left)
		}
	})
}

// Signals sent to ringfence reach the program, as they would without it.
func TestSignalForwarding(t *testing.T) {
	for _, test := range []struct {
		name   string
		outer  string // what a shell does before it executes ringfence
		script string
		sig    syscall.Signal
		status int
		stdout string
	}{
		{"default-int", "", "echo ready; sleep 100", syscall.SIGINT, 130, "ready\n"},
		{"default-term", "", "echo ready; exec sleep 100", syscall.SIGTERM, 143, "ready\n"},
		{"trapped-int", "", "trap 'echo got; exit 9' INT; echo ready; while :; do sleep 0.05; done", syscall.SIGINT, 9, "ready\ngot\n"},
		{"trapped-hup", "", "trap 'echo got; exit 8' HUP; echo ready; while :; do sleep 0.05; done", syscall.SIGHUP, 8, "ready\ngot\n"},
		{"ignored-hup", "trap '' HUP;", "kill -HUP $$; echo ready; sleep 0.5; echo alive", syscall.SIGHUP, 0, "ready\nalive\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			forEachPlatform(t, func(t *testing.T, p string) {
				ctx, cancel := context.WithTimeout(t.Context(), timeout)
				defer cancel()
				argv := ringfence(p, "--", "/bin/bash", "-c", test.script)
				argv = append([]string{"/bin/sh", "-c", test.outer + ` exec "$@"`, "sh"}, argv...)
				cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
				cmd.Env = environ()
				cmd.Dir = "/"
				cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
				out, err := cmd.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				var stdout bytes.Buffer
				buf := make([]byte, 256)
				signalled := false
				for {
					n, err := out.Read(buf)
					stdout.Write(buf[:n])
					if !signalled && strings.Contains(stdout.String(), "ready\n") {
						signalled = true
						cmd.Process.Signal(test.sig)
					}
					if err != nil {
						break
					}
				}
				cmd.Wait()
				ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
				status := ws.ExitStatus()
				if ws.Signaled() {
					status = 128 + int(ws.Signal())
				}
				if status != test.status || stdout.String() != test.stdout {
					t.Errorf("status %d, stdout %q; want %d, %q", status, stdout.String(), test.status, test.stdout)
				}
				if left := leftovers(t); len(left) > 0 {
					t.Errorf("left behind: %v", left)
				}
			})
		})
	}
}

// oneLine checks that an error is a single line that says what is wanted.
func oneLine(t *testing.T, got result, status int, words ...string) {
	t.Helper()
	if got.Status != status {
		t.Errorf("status %d, want %d; stderr %q", got.Status, status, tail(got.stderr))
	}
	if n := strings.Count(got.stderr, "\n"); n != 1 || !strings.HasSuffix(got.stderr, "\n") {
		t.Errorf("stderr is not one line: %q", tail(got.stderr))
	}
	if !strings.HasPrefix(got.stderr, "ringfence: ") {
		t.Errorf("stderr does not say who speaks: %q", tail(got.stderr))
	}
	for _, w := range words {
		if !strings.Contains(got.stderr, w) {
			t.Errorf("stderr %q does not say %q", tail(got.stderr), w)
		}
	}
}

func write(t *testing.T, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(tools, name)
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestBadInput(t *testing.T) {
	lsBytes, err := os.ReadFile("/bin/ls")
	if err != nil {
		t.Fatal(err)
	}
	elf32 := append([]byte(nil), lsBytes...)
	elf32[4] = 1 // ELFCLASS32
	noInterp := bytes.Replace(lsBytes, []byte("/lib64/ld-linux-x86-64.so.2"), []byte("/lib64/no-such-loader-27.so"), 1)
	if bytes.Equal(noInterp, lsBytes) {
		noInterp = bytes.Replace(lsBytes, []byte("/lib/ld-linux-aarch64.so.1"), []byte("/lib/no-such-loader-264.so"), 1)
	}
	corrupt := append([]byte(nil), lsBytes...)
	for i := 32; i < 64; i++ {
		corrupt[i] = 0xff // e_phoff and what follows
	}
	text := write(t, "text", []byte("just some text\n"))
	truncated := write(t, "truncated", lsBytes[:100])
	corrupted := write(t, "corrupted", corrupt)
	elf32Path := write(t, "elf32", elf32)
	noInterpPath := write(t, "nointerp", noInterp)
	noShebang := write(t, "noshebang", []byte("#!/no/such/interpreter\n"))
	notExec := write(t, "notexec", lsBytes)
	if err := os.Chmod(notExec, 0o644); err != nil {
		t.Fatal(err)
	}

	forEachPlatform(t, func(t *testing.T, p string) {
		for _, test := range []struct {
			name   string
			args   []string
			status int
			words  []string
		}{
			{"missing", []string{"/no/such/program"}, 127, []string{"/no/such/program"}},
			{"missing-in-path", []string{"no-such-program-anywhere"}, 127, []string{"no-such-program-anywhere", "PATH"}},
			{"directory", []string{"/usr"}, 126, []string{"/usr", "directory"}},
			{"text", []string{text}, 126, []string{text, "#!"}},
			{"truncated", []string{truncated}, 126, []string{truncated}},
			{"corrupted", []string{corrupted}, 126, []string{corrupted}},
			{"elf32", []string{elf32Path}, 126, []string{elf32Path, "32-bit"}},
			{"no-interpreter", []string{noInterpPath}, 127, []string{noInterpPath, "no-such-loader"}},
			{"no-shebang-interpreter", []string{noShebang}, 127, []string{noShebang, "/no/such/interpreter"}},
			{"not-executable", []string{notExec}, 126, []string{notExec}},
			{"no-program", nil, 125, []string{"PROGRAM"}},
		} {
			t.Run(test.name, func(t *testing.T) {
				args := append(bind(), "--")
				oneLine(t, run(t, "", ringfence(p, append(args, test.args...)...)...), test.status, test.words...)
			})
		}
		t.Run("unreadable-root", func(t *testing.T) {
			oneLine(t, run(t, "", ringfence(p, "--root=/no/such/root", "--", "/bin/true")...), 125, "/no/such/root")
		})
		t.Run("root-is-a-file", func(t *testing.T) {
			oneLine(t, run(t, "", ringfence(p, "--root=/etc/passwd", "--", "/bin/true")...), 125, "/etc/passwd")
		})
		t.Run("bad-bind", func(t *testing.T) {
			oneLine(t, run(t, "", ringfence(p, "--bind=/no/such/source", "--", "/bin/true")...), 125, "/no/such/source")
		})
	})
	t.Run("unknown-platform", func(t *testing.T) {
		oneLine(t, run(t, "", bin, "run", "--platform=hovercraft", "--", "/bin/true"), 125, "hovercraft", "ptrace")
	})
	t.Run("unknown-flag", func(t *testing.T) {
		oneLine(t, run(t, "", bin, "run", "--no-such-flag", "--", "/bin/true"), 125, "no-such-flag", "--help")
	})
	t.Run("unknown-command", func(t *testing.T) {
		oneLine(t, run(t, "", bin, "dance"), 125, "dance")
	})
}

// Writes outside of /tmp fail with EROFS unless --write is given.
func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("old\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	script := `
		cd "$1" || exit 9
		for c in 'echo x > new' 'echo x > f' 'echo x >> f' 'mkdir d' 'rm f' 'mv f g' 'ln -s f l' 'ln f h' 'chmod 600 f' 'truncate -s 1 f' 'touch f' 'mknod p p'; do
			if m=$( { eval "$c"; } 2>&1 ); then echo "$c: done"; else echo "$c: ${m##*: }"; fi
		done
		cat f; touch /tmp/ok && echo tmp ok`
	forEachPlatform(t, func(t *testing.T, p string) {
		got := run(t, "", ringfence(p, "--bind", dir, "--", "/bin/sh", "-c", script, "sh", dir)...)
		want := ""
		for _, c := range []string{"echo x > new", "echo x > f", "echo x >> f", "mkdir d", "rm f", "mv f g", "ln -s f l", "ln f h", "chmod 600 f", "truncate -s 1 f", "touch f", "mknod p p"} {
			want += c + ": Read-only file system\n"
		}
		want += "old\ntmp ok\n"
		// dash words redirection errors without strerror: "cannot create new: Read-only file system".
		if diff := cmp.Diff(want, got.Stdout); diff != "" {
			t.Errorf("(-want +got):\n%s\nstderr %q", diff, got.stderr)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			t.Errorf("the host's directory changed: %v, %v", entries, err)
		}
		if b, err := os.ReadFile(filepath.Join(dir, "f")); string(b) != "old\n" {
			t.Errorf("the host's file changed: %q, %v", b, err)
		}
	})
}

func TestWrite(t *testing.T) {
	forEachPlatform(t, func(t *testing.T, p string) {
		dir := t.TempDir()
		got := run(t, "", ringfence(p, "--write", "--bind", dir, "--", "/bin/sh", "-ec",
			`cd "$1"; echo one > a; mkdir d; mv a d/b; echo two >> d/b; ln -s d/b l; cat l; chmod 600 d/b; stat -c '%a %s' d/b; rmdir d 2>/dev/null || rm -r d; ls`, "sh", dir)...)
		if want := "one\ntwo\n600 8\nl\n"; got.Status != 0 || got.Stdout != want {
			t.Errorf("status %d, stdout %q, want %q; stderr %q", got.Status, got.Stdout, want, got.stderr)
		}
		if target, err := os.Readlink(filepath.Join(dir, "l")); target != "d/b" {
			t.Errorf("on the host: l -> %q, %v", target, err)
		}
	})
}

// Nothing leads out of --root.
func TestRootConfinement(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("outside\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	prog, err := goBuild("escape")
	if err != nil {
		t.Fatal(err)
	}
	forEachPlatform(t, func(t *testing.T, p string) {
		root := t.TempDir()
		for _, d := range []string{"dir", "proc", "tmp", "dev"} {
			if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		b, err := os.ReadFile(prog)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "escape"), b, 0o755); err != nil {
			t.Fatal(err)
		}
		ups := strings.Repeat("../", 40)
		for name, target := range map[string]string{
			"abs":      filepath.Join(outside, "secret"),
			"rel":      ups + outside[1:] + "/secret",
			"dir/rel":  ups + outside[1:] + "/secret",
			"absdir":   outside,
			"procroot": "/proc/self/root" + outside + "/secret",
			"procup":   "/proc/self/root/" + ups + outside[1:] + "/secret",
			"proccwd":  "/proc/self/cwd/" + ups + outside[1:] + "/secret",
			"loop":     "loop",
		} {
			if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
				t.Fatal(err)
			}
		}
		secret := filepath.Join(outside, "secret")
		args := []string{"/escape",
			secret, ups + secret[1:], "/dir/" + ups + secret[1:], "/abs", "/rel", "/dir/rel", "/absdir/secret",
			"/procroot", "/procup", "/proccwd", "/loop", "/proc/self/root" + secret, "/proc/self/root/" + ups + secret[1:],
			"/proc/1/root" + secret, "/proc/self/cwd/" + ups + secret[1:], "/proc/self/fd/../root" + secret}
		got := run(t, "", ringfence(p, append([]string{"--root", root, "--"}, args...)...)...)
		if got.Status != 0 || got.Stdout != "" {
			t.Errorf("status %d, stdout %q, stderr %q", got.Status, got.Stdout, got.stderr)
		}
	})
}

// goBuild returns a static program of testdata: one that a build system made, in
// the directory that it names, or a new one.
func goBuild(name string) (string, error) {
	if dir := os.Getenv("RINGFENCE_TESTDATA"); dir != "" {
		prog, err := filepath.Abs(filepath.Join(dir, name))
		if err != nil {
			return "", err
		}
		// A build system's link may lead to what a sandbox does not see.
		return filepath.EvalSymlinks(prog)
	}
	out := filepath.Join(tools, name)
	cmd := exec.Command("go", "build", "-o", out, "./testdata/"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build testdata/%s: %w\n%s", name, err, b)
	}
	return out, nil
}
