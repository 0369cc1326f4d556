//go:build qemu

// Package qemu runs tests of other packages, and programs in the sandbox, on hosts
// that are emulated: ordinary KVM with one and with two CPUs, arm64, arm64 with
// larger pages. It needs minutes, so it has a build tag of its own.
//
// It must not import what it runs.
package qemu

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ringfence/ringfence/tools/qemu/machine"
)

// inexact are subtests of the conformance suite that qemu's amd64 CPU cannot pass,
// whatever runs the code: it raises no #AC, no #XF and no #SS for addresses that are
// none.
const inexact = "/Fault/(NonCanonical|SIMDException|AlignmentCheck)$"

// bootTimeout is for everything that is not a program's run.
const bootTimeout = 5 * time.Minute

// guest is a machine with programs to run.
type guest struct {
	machine.Machine
	files    map[string]string
	programs []program
}

// program is something to run.
type program struct {
	name string
	machine.Program
	// status is what it ends with; output must be in what it prints.
	status int
	output string
}

// install puts the program that is built from a package into /test.
func (g *guest) install(t *testing.T, name string) string {
	t.Helper()
	if g.files == nil {
		g.files = map[string]string{}
	}
	g.files[name] = build(t, g.Arch, name)
	return "/test/" + name
}

// test adds the tests of a package.
func (g *guest) test(t *testing.T, pkg string, timeout time.Duration, env []string, args ...string) {
	t.Helper()
	path := g.install(t, pkg+".test")
	argv := []string{path, "-test.v", fmt.Sprint("-test.timeout=", timeout)}
	g.programs = append(g.programs, program{
		name:    pkg,
		Program: machine.Program{Argv: append(argv, args...), Env: append(env, "PLATFORMTEST_TIMEOUT=5m"), Timeout: timeout + 30*time.Second, Dir: "/tmp"},
		output:  "--- PASS: ",
	})
}

// e2e adds tests of test/e2e on a platform.
func (g *guest) e2e(t *testing.T, platform, run string, timeout time.Duration) {
	t.Helper()
	env := []string{"RINGFENCE=" + g.install(t, "cmd/ringfence"), "RINGFENCE_PLATFORM=" + platform, "RINGFENCE_TESTDATA=/test/test/e2e/testdata"}
	g.install(t, "test/e2e/testdata/escape")
	g.install(t, "test/e2e/testdata/goprog")
	g.test(t, "test/e2e", timeout, env, "-test.run="+run)
}

// build returns the path of the program that is built from a package of the
// workspace; .test means its tests. Bazel has built it already.
func build(t *testing.T, arch, name string) string {
	t.Helper()
	if dir := os.Getenv("RINGFENCE_QEMU_PROGRAMS"); dir != "" {
		path, err := filepath.Abs(filepath.Join(dir, arch, strings.ReplaceAll(name, "/", "_")))
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	out := filepath.Join(t.TempDir(), "program")
	argv := []string{"build"}
	pkg, isTest := strings.CutSuffix(name, ".test")
	if isTest {
		argv = []string{"test", "-c"}
	}
	cmd := exec.CommandContext(t.Context(), "go", append(argv, "-o", out, "../../"+pkg)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, b)
	}
	return out
}

// run boots the machine and makes a subtest of each program.
func (g *guest) run(t *testing.T) {
	t.Helper()
	timeout := bootTimeout
	var programs []machine.Program
	for _, p := range g.programs {
		timeout += p.Timeout
		programs = append(programs, p.Program)
	}
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	out := &output{}
	start := time.Now()
	err := g.Run(ctx, g.files, programs, out, func(i, status int) {
		p, b := g.programs[i], out.take()
		took := time.Since(start).Round(time.Second)
		start = time.Now()
		t.Run(strings.ReplaceAll(p.name, "/", "_"), func(t *testing.T) {
			t.Logf("%v, %d tests and subtests passed", took, bytes.Count(b, []byte("--- PASS: ")))
			if status != p.status || !bytes.Contains(b, []byte(p.output)) {
				t.Errorf("%q ends with %d, want %d and %q in what it prints:\n%s", p.Argv, status, p.status, p.output, digest(b))
			}
		})
	})
	if err != nil {
		t.Fatalf("%v\nlast output:\n%s", err, digest(out.take()))
	}
}

// output keeps what a program prints, and shows it as it comes.
type output struct {
	mu sync.Mutex
	b  []byte
}

// Write implements io.Writer.
func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.b = append(o.b, b...)
	if testing.Verbose() {
		// Not on stdout: there, it would be taken for this test's own results.
		os.Stderr.Write(b)
	}
	return len(b), nil
}

// take returns what was printed since it was last called.
func (o *output) take() []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	b := o.b
	o.b = nil
	return b
}

var success = regexp.MustCompile(`(?m)^ *(=== (RUN|PAUSE|CONT)|--- PASS: ).*\n`)

// digest returns what is of interest if a test failed.
func digest(b []byte) []byte {
	const most = 20 << 10
	b = success.ReplaceAll(b, nil)
	return b[max(0, len(b)-most):]
}

// The kvm platform on ordinary KVM, where ring 0 is real and the hardware walks two
// levels of page tables.
func TestSVM(t *testing.T) {
	for _, cpus := range []int{1, 2} {
		t.Run(fmt.Sprintf("cpus=%d", cpus), func(t *testing.T) {
			g := guest{Machine: machine.Machine{Arch: "amd64", KVM: true, CPUs: cpus}}
			// The quickest programs.
			g.e2e(t, "kvm", "TestPrograms/kvm/(true|false|echo|env|id|uname)$|TestGoProgram|TestKill9", 10*time.Minute)
			// Of the suite with other pools of vCPUs, and with threads that are bound, one here
			// and one there.
			other := map[int]string{1: "OneVCPU", 2: "Bound"}[cpus]
			g.test(t, "pkg/kvm", time.Hour, nil, "-test.run=^TestConformance("+other+")?$|^Test([^C]|C[^o])", "-test.skip="+inexact)
			g.test(t, "pkg/pagetables", 15*time.Minute, nil)
			g.run(t)
		})
	}
}

// Everything on arm64: the suite on ptrace, the Sentry with programs, and what has
// code for the architecture.
func TestARM64(t *testing.T) {
	g := guest{Machine: machine.Machine{Arch: "arm64"}}
	g.e2e(t, "ptrace", "TestPrograms/ptrace/(true|false|echo|ls-l|pipeline|redirections|kill-segv|kill-child|bash-traps|find|env|id|uname|stat-dev)$|TestGoProgram|TestKill9|TestSignalForwarding|TestReadOnly|TestWrite|TestRootConfinement", 20*time.Minute)
	g.test(t, "pkg/ptrace", 30*time.Minute, nil)
	// What only computes is left out: it takes long here, and is the same everywhere.
	for pkg, args := range map[string][]string{
		"arch":              nil,
		"bpf":               {"-test.run=Kernel"},
		"cpuid":             nil,
		"hostarch":          nil,
		"seccomp":           {"-test.run=Kernel|Install|Features"},
		"sentry":            nil,
		"sentry/filter":     nil,
		"sentry/kernel":     nil,
		"sentry/loader":     nil,
		"sentry/mm":         {"-test.skip=Model"},
		"sentry/syscalls":   nil,
		"sentry/vfs/rootfs": nil,
		"stub":              nil,
		"sysmsg":            nil,
	} {
		g.test(t, "pkg/"+pkg, 10*time.Minute, []string{"RINGFENCE_PLATFORM=ptrace"}, args...)
	}
	g.run(t)
}

// A kernel with larger pages than applications expect: an error that says so.
func TestARM64Pages16K(t *testing.T) {
	g := guest{Machine: machine.Machine{Arch: "arm64", Kernel: "linux-image-arm64-16k"}}
	ringfence := g.install(t, "cmd/ringfence")
	for _, platform := range []string{"ptrace", "auto"} {
		g.programs = append(g.programs, program{
			name:    platform,
			Program: machine.Program{Argv: []string{ringfence, "run", "--platform=" + platform, "--", "/bin/true"}, Timeout: time.Minute},
			status:  125,
			output:  "the kernel's pages have 16 KiB, an application's 4: boot a kernel with pages of 4 KiB",
		})
	}
	g.run(t)
}
