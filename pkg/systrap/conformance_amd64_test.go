package systrap_test

import (
	"bytes"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/bpf"
	"github.com/ringfence/ringfence/pkg/fd"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
	"github.com/ringfence/ringfence/pkg/seccomp"
	"github.com/ringfence/ringfence/pkg/systrap"
	"github.com/ringfence/ringfence/pkg/usertrap"
)

// confinedVar makes a child process of a test forbid itself ptrace(2).
const confinedVar = "RINGFENCE_SYSTRAP_CONFINED"

func TestMain(m *testing.M) {
	if os.Getenv(confinedVar) != "" {
		p := bpf.Program{
			bpf.Stmt(bpf.Ld|bpf.W|bpf.Abs, bpf.OffNr),
			bpf.JumpStmt(bpf.Jmp|bpf.Jeq|bpf.K, unix.SYS_PTRACE, 0, 1),
			bpf.Stmt(bpf.Ret|bpf.K, unix.SECCOMP_RET_KILL_PROCESS),
			bpf.Stmt(bpf.Ret|bpf.K, unix.SECCOMP_RET_ALLOW),
		}
		if err := seccomp.Install(p); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

func constructor(tb testing.TB) platform.Constructor {
	c, err := platform.Lookup(systrap.Name)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

func TestConformance(t *testing.T) {
	platformtest.Run(t, platformtest.Config{Constructor: constructor(t), Stubs: systrap.StubsOf})
}

// patching is a Constructor of platforms that patch code as soon as they can.
type patching struct {
	platform.Constructor
	platforms []platform.TextPatching
}

func (c *patching) New(device *fd.FD) (platform.Platform, error) {
	p, err := c.Constructor.New(device)
	if err == nil {
		t := p.(platform.TextPatching)
		t.SetTextPatching(true)
		c.platforms = append(c.platforms, t)
	}
	return p, err
}

func TestConformancePatched(t *testing.T) {
	defer func(old uint32) { usertrap.Threshold = old }(usertrap.Threshold)
	usertrap.Threshold = 2
	c := &patching{Constructor: constructor(t)}
	platformtest.Run(t, platformtest.Config{Constructor: c, Stubs: systrap.StubsOf})
	var all platform.TextPatches
	for _, p := range c.platforms {
		n := p.TextPatches()
		all.Patched += n.Patched
		for why, count := range n.Refused {
			t.Logf("%d refused: %s", count, string(why))
		}
		for why, count := range n.Stopped {
			t.Logf("%d stopped: %s", count, string(why))
		}
	}
	if all.Patched == 0 {
		t.Error("nothing was patched")
	}
	t.Logf("%d patched", all.Patched)
}

// It needs no privilege, no ptrace(2), and no second CPU, whether code is patched or not.
// One subtest, which takes 20 s when there is one CPU and code is patched, runs with all.
func TestConformanceConfined(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		t.Fatal(err)
	}
	for cpu := 0; one.Count() == 0; cpu++ {
		if all.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	for _, test := range []struct {
		name, skip string
		cpus       *unix.CPUSet
	}{
		{"one CPU", "^TestConformancePatched$/^Interrupt$/^NotLostInSyscalls$", &one},
		{"all CPUs", "", &all},
	} {
		t.Run(test.name, func(t *testing.T) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if err := unix.SchedSetaffinity(0, test.cpus); err != nil {
				t.Fatal(err)
			}
			defer unix.SchedSetaffinity(0, &all)
			cmd := exec.Command("/proc/self/exe", "-test.v", "-test.run=^TestConformance(Patched)?$", "-test.skip="+test.skip)
			cmd.Env = append(os.Environ(), confinedVar+"=1")
			cmd.Dir = "/"
			if os.Geteuid() == 0 {
				const nobody = 65534
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
			}
			if out, err := cmd.CombinedOutput(); err != nil || bytes.Count(out, []byte("\n--- PASS: TestConformance")) != 2 {
				t.Fatalf("%v\n%s", err, out)
			}
		})
	}
}

func TestConstructor(t *testing.T) {
	c := constructor(t)
	if _, err := c.OpenDevice("/dev/null"); err == nil {
		t.Error("OpenDevice takes a path")
	}
	if r := c.Requirements(); r != (platform.Requirements{}) {
		t.Errorf("Requirements: %+v", r)
	}
}

func BenchmarkPlatform(b *testing.B) {
	platformtest.Benchmark(b, platformtest.Config{Constructor: constructor(b)})
}
