package systrap_test

import (
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/bpf"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
	"github.com/ringfence/ringfence/pkg/seccomp"
	"github.com/ringfence/ringfence/pkg/systrap"
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

// It needs no privilege, no ptrace(2), and no second CPU.
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
	for name, cpus := range map[string]*unix.CPUSet{"one CPU": &one, "all CPUs": &all} {
		t.Run(name, func(t *testing.T) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if err := unix.SchedSetaffinity(0, cpus); err != nil {
				t.Fatal(err)
			}
			defer unix.SchedSetaffinity(0, &all)
			cmd := exec.Command("/proc/self/exe", "-test.run=^TestConformance$/^(Syscall|Fault|Memory|Interrupt|Stub)$")
			cmd.Env = append(os.Environ(), confinedVar+"=1")
			cmd.Dir = "/"
			if os.Geteuid() == 0 {
				const nobody = 65534
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
			}
			if out, err := cmd.CombinedOutput(); err != nil {
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
