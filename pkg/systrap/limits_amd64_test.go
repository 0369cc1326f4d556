package systrap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/bpf"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
	"github.com/ringfence/ringfence/pkg/seccomp"
)

// limitVar makes TestLimited reach a limit.
const limitVar = "RINGFENCE_SYSTRAP_LIMIT"

// limits are what a host may refuse: each is an error that names it, and what runs
// already goes on. They are reached in a process of their own.
var limits = map[string]struct {
	reach func(t *testing.T) error
	want  []string
	// change changes how the process is started.
	change func(t *testing.T, cmd *exec.Cmd)
}{
	// No seccomp(2), as without CONFIG_SECCOMP_FILTER.
	"seccomp": {
		func(t *testing.T) error { return refuse(t, unix.SYS_SECCOMP, 0, 0, 0, unix.ENOSYS) },
		[]string{"seccomp"}, nil,
	},
	// vm.memfd_noexec=2.
	"memfd": {
		func(t *testing.T) error {
			const mfdExec = 0x10
			return refuse(t, unix.SYS_MEMFD_CREATE, 1, mfdExec, mfdExec, unix.EACCES)
		},
		[]string{"vm.memfd_noexec"}, nil,
	},
	// A full control group, at the first stub.
	"pids": {
		func(t *testing.T) error {
			const flags = 0x8411 // those of a stub's clone(2)
			return refuse(t, unix.SYS_CLONE, 0, ^uint32(0), flags, unix.EAGAIN)
		},
		[]string{"RLIMIT_NPROC", "pids.max"}, nil,
	},
	"no /proc": {
		func(t *testing.T) error { return newPlatform() }, []string{"mount /proc"},
		func(t *testing.T, cmd *exec.Cmd) {
			root := t.TempDir()
			if err := copyFile(filepath.Join(root, "test"), "/proc/self/exe"); err != nil {
				t.Fatal(err)
			}
			cmd.Path, cmd.SysProcAttr = "/test", &syscall.SysProcAttr{Chroot: root}
			if id := os.Geteuid(); id != 0 {
				cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
				cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: id, Size: 1}}
			}
		},
	},
	"processes": {reachProcesses, []string{"RLIMIT_NPROC", "pids.max"}, asNobody},
	"threads":   {reachThreads, []string{"RLIMIT_NPROC", "pids.max"}, asNobody},
	"files":     {reachFiles, []string{"RLIMIT_NOFILE"}, nil},
	"mappings":  {reachMappings, []string{"vm.max_map_count"}, nil},
}

func TestLimits(t *testing.T) {
	for name, limit := range limits {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("/proc/self/exe", "-test.run=^TestLimited$", "-test.timeout=60s")
			cmd.Env = append(os.Environ(), limitVar+"="+name, "TMPDIR=/")
			cmd.Dir = "/"
			if limit.change != nil {
				limit.change(t, cmd)
			}
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
		})
	}
}

// TestLimited is the process of TestLimits, and nothing without it.
func TestLimited(t *testing.T) {
	limit, ok := limits[os.Getenv(limitVar)]
	if !ok {
		return
	}
	err := limit.reach(t)
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range limit.want {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v: does not say %s", err, want)
		}
	}
}

func newPlatform() error {
	_, err := constructor{}.New(nil)
	return err
}

// refuse makes a system call fail with errno if the low half of an argument has the
// bits of value among those of mask, and returns what New says to that.
func refuse(t *testing.T, nr uint32, arg int, mask, value uint32, errno unix.Errno) error {
	err := seccomp.Install(bpf.Program{
		bpf.Stmt(bpf.Ld|bpf.W|bpf.Abs, bpf.OffNr),
		bpf.JumpStmt(bpf.Jmp|bpf.Jeq|bpf.K, nr, 0, 4),
		bpf.Stmt(bpf.Ld|bpf.W|bpf.Abs, bpf.OffLow(bpf.OffArg(arg))),
		bpf.Stmt(bpf.Alu|bpf.And|bpf.K, mask),
		bpf.JumpStmt(bpf.Jmp|bpf.Jeq|bpf.K, value, 0, 1),
		bpf.Stmt(bpf.Ret|bpf.K, unix.SECCOMP_RET_ERRNO|uint32(errno)),
		bpf.Stmt(bpf.Ret|bpf.K, unix.SECCOMP_RET_ALLOW),
	})
	if err != nil {
		t.Fatal(err)
	}
	return newPlatform()
}

// asNobody makes the process one of a user whom limits count for.
func asNobody(t *testing.T, cmd *exec.Cmd) {
	if os.Geteuid() == 0 {
		const nobody = 65534
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
}

func copyFile(to, from string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	defer dst.Close()
	_, err = io.Copy(dst, src)
	return err
}

// runner returns an AddressSpace, and a function that runs a thread in it.
func runner(t *testing.T) (*addressSpace, func()) {
	m := newManager(t, syscallLoop)
	c, ac := &threadContext{}, arch.New()
	ac.SetIP(codeAddr)
	t.Cleanup(c.Release)
	run := func() {
		t.Helper()
		for range 10 {
			switch _, _, err := c.Switch(context.Background(), m, ac, -1); err {
			case nil:
				return
			case platform.ErrContextInterrupt:
			default:
				t.Fatalf("what ran before the limit was reached gets %v", err)
			}
		}
		t.Fatal("nothing but interrupts")
	}
	run()
	return m.as, run
}

// setLimit changes a limit of a process, and returns a function that undoes it.
func setLimit(t *testing.T, pid, resource int, value uint64) (undo func()) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Prlimit(pid, resource, nil, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Prlimit(pid, resource, &unix.Rlimit{Cur: value, Max: old.Max}, nil); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := unix.Prlimit(pid, resource, &old, nil); err != nil {
			t.Fatal(err)
		}
	}
}

func reachProcesses(t *testing.T) error {
	as, run := runner(t)
	undo := setLimit(t, as.zygote.PID(), unix.RLIMIT_NPROC, 1)
	_, err := newAddressSpace()
	run()
	undo()
	again, e := newAddressSpace()
	if e != nil {
		t.Fatalf("with the limit as before: %v", e)
	}
	again.destroy()
	return err
}

func reachThreads(t *testing.T) error {
	as, run := runner(t)
	undo := setLimit(t, as.pid, unix.RLIMIT_NPROC, 1)
	_, err := as.thread()
	run()
	undo()
	if th, e := as.thread(); e != nil {
		t.Errorf("with the limit as before: %v", e)
	} else {
		as.putIdle(th)
	}
	return err
}

func reachFiles(t *testing.T) error {
	_, run := runner(t)
	next, err := unix.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(next)
	undo := setLimit(t, 0, unix.RLIMIT_NOFILE, uint64(next))
	_, err = newAddressSpace()
	run()
	undo()
	again, e := newAddressSpace()
	if e != nil {
		t.Fatalf("with the limit as before: %v", e)
	}
	again.destroy()
	return err
}

func reachMappings(t *testing.T) error {
	as, run := runner(t)
	var max int
	b, err := os.ReadFile("/proc/sys/vm/max_map_count")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Sscan(string(b), &max)
	f := platformtest.NewMemFile(t, hostarch.PageSize)
	at := func(i int) hostarch.Addr { return hostarch.Addr(0x1000_0000 + 2*i*hostarch.PageSize) }
	// The kernel's default is 65530; mapping a million is as well.
	for i := range min(max, 1<<20) {
		if err = as.MapFile(at(i), f, memmap.FileRange{End: hostarch.PageSize}, hostarch.Read, false); err != nil {
			break
		}
	}
	if !errors.Is(err, unix.ENOMEM) {
		t.Errorf("mapping %d pages: %v, want ENOMEM", max, err)
	}
	run()
	as.Unmap(at(0), uint64(at(max)-at(0)))
	if e := as.MapFile(at(0), f, memmap.FileRange{End: hostarch.PageSize}, hostarch.Read, false); e != nil {
		t.Errorf("after all was unmapped: %v", e)
	}
	run()
	return err
}
