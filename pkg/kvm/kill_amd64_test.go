package kvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
)

// victimEnv makes this test the process of TestSuddenEnds that ends as it says.
const victimEnv = "RINGFENCE_KVM_TEST_VICTIM"

func TestMain(m *testing.M) {
	if how := os.Getenv(victimEnv); how != "" {
		victim(how)
	}
	os.Exit(m.Run())
}

// ends are ways in which a process with running vCPUs ends. "close" and "munmap" take
// from them what they run on, and then end.
var ends = []string{"kill", "exit", "segv", "exec", "fork", "close", "munmap"}

// victim has two vCPUs run, and ends after a line on standard input.
func victim(how string) {
	fail := func(err error) {
		fmt.Println(err)
		os.Exit(1)
	}
	c := constructor{options{vcpus: 2}}
	dev, err := c.OpenDevice("")
	if err != nil {
		fail(err)
	}
	p, err := c.New(dev)
	if err != nil {
		fail(err)
	}
	m := p.(*kvm).m
	fd, err := unix.MemfdCreate("victim", unix.MFD_CLOEXEC)
	if err != nil {
		fail(err)
	}
	file := testFile{os.NewFile(uintptr(fd), "victim")}
	// incq (%rdi); jmp to it; and with a system call between.
	for _, code := range [][]byte{{0x48, 0xff, 0x07, 0xeb, 0xfb}, {0x48, 0xff, 0x07, 0x0f, 0x05, 0xeb, 0xf9}} {
		if _, err := file.WriteAt(append(code, make([]byte, 2*page)...), 0); err != nil {
			fail(err)
		}
		as, _, err := p.NewAddressSpace(nil)
		if err != nil {
			fail(err)
		}
		if err := as.MapFile(codeAddr, file, memmap.FileRange{End: 2 * page}, hostarch.AnyAccess, false); err != nil {
			fail(err)
		}
		go func() {
			runtime.LockOSThread()
			c := newContext(m)
			c.BindThread()
			ac := arch.New()
			ac.SetIP(codeAddr)
			ac.Regs.Rdi = codeAddr + page
			for {
				c.Switch(context.Background(), probeMemory{as: as.(*addressSpace)}, ac, -1)
			}
		}()
	}
	fmt.Println("ready")
	var line [1]byte
	if _, err := os.Stdin.Read(line[:]); err != nil && how != "kill" {
		fail(err)
	}
	switch how {
	case "kill":
		select {}
	case "segv":
		signal := make(chan struct{})
		go func() { unix.Kill(os.Getpid(), unix.SIGSEGV); close(signal) }()
		<-signal
		select {}
	case "exec":
		fail(unix.Exec("/proc/self/exe", []string{"x", "-test.run=^$"}, []string{}))
	case "fork":
		// The child has no descriptor of ours, and a copy of our memory until it executes.
		exec.Command("/proc/self/exe", "-test.run=^$").Run()
	case "close":
		for _, v := range m.pool.all {
			unix.Close(v.fd)
		}
		unix.Close(m.vm)
		time.Sleep(time.Millisecond)
	case "munmap":
		for _, r := range m.regions.byKey {
			unix.Munmap(r.mem)
		}
		time.Sleep(time.Millisecond)
	}
	os.Exit(0)
}

// kernelLog returns the kernel's messages.
func kernelLog(t *testing.T) string {
	t.Helper()
	const readAll, sizeBuffer = 3, 10
	size, err := unix.Klogctl(sizeBuffer, nil)
	if err != nil {
		t.Fatalf("syslog(2): %v: be root, or set the sysctl kernel.dmesg_restrict to 0", err)
	}
	b := make([]byte, size)
	n, err := unix.Klogctl(readAll, b)
	if err != nil {
		t.Fatalf("syslog(2): %v: be root, or set the sysctl kernel.dmesg_restrict to 0", err)
	}
	return string(b[:n])
}

var kernelComplaint = regexp.MustCompile(`WARNING|BUG|Oops|Call Trace|leak|hung task|use-after-free|livelock`)

// virtualMachines returns how many VMs and vCPUs victims have.
func virtualMachines(t *testing.T) int {
	t.Helper()
	out := 0
	procs, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, proc := range procs {
		fds, err := os.ReadDir("/proc/" + proc.Name() + "/fd")
		if err != nil {
			continue // not a process, or gone
		}
		if env, _ := os.ReadFile("/proc/" + proc.Name() + "/environ"); !bytes.Contains(env, []byte(victimEnv+"=")) {
			continue
		}
		for _, fd := range fds {
			if what, _ := os.Readlink("/proc/" + proc.Name() + "/fd/" + fd.Name()); strings.HasPrefix(what, "anon_inode:kvm-v") {
				out++
			}
		}
	}
	return out
}

// A process with running vCPUs ends in every way and at any moment: its virtual
// machine goes with it. RINGFENCE_KVM_KILLS is how often; 1000 takes some minutes. With
// it the kernel's log is read as well, which needs privilege: it has nothing to say.
func TestSuddenEnds(t *testing.T) {
	n, log := 3*len(ends), ""
	kills := os.Getenv("RINGFENCE_KVM_KILLS")
	if kills != "" {
		var err error
		if n, err = strconv.Atoi(kills); err != nil {
			t.Fatalf("RINGFENCE_KVM_KILLS: %v", err)
		}
		log = kernelLog(t)
	}
	before := virtualMachines(t)
	rng := rand.New(rand.NewPCG(uint64(n), 0))
	for i := range n {
		how := ends[i%len(ends)]
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
		cmd.Env = append(os.Environ(), victimEnv+"="+how)
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		hang := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
		if how == "kill" && i%2 == 0 {
			// While it is being made, too.
			time.Sleep(time.Duration(rng.Int64N(int64(30 * time.Millisecond))))
		} else {
			said := make([]byte, 100)
			if n, err := stdout.Read(said); err != nil || string(said[:n]) != "ready\n" {
				t.Errorf("%s: %q, %v", how, said[:n], err)
			}
			time.Sleep(time.Duration(rng.Int64N(int64(2 * time.Millisecond))))
		}
		if how == "kill" {
			cmd.Process.Kill()
		} else {
			stdin.Write([]byte{'\n'})
		}
		err = cmd.Wait()
		if !hang.Stop() {
			t.Fatalf("%s: it did not end", how)
		}
		ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
		switch how {
		case "kill":
			if ws.Signal() != unix.SIGKILL {
				t.Errorf("%s: %v", how, err)
			}
		case "segv":
			if err == nil {
				t.Errorf("%s: it ended well", how)
			}
		default:
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				t.Errorf("%s: %v, %s", how, err, stderr.String())
			}
		}
	}
	for deadline := time.Now().Add(20 * time.Second); virtualMachines(t) > before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d VMs and vCPUs, %d before", virtualMachines(t), before)
		}
	}
	if kills == "" {
		return
	}
	after := kernelLog(t)
	if len(log) > 200 {
		// The beginning may be lost by now.
		if _, news, ok := strings.Cut(after, log[len(log)-200:]); ok {
			after = news
		}
	}
	for line := range strings.Lines(after) {
		if kernelComplaint.MatchString(line) {
			t.Errorf("the kernel says %s", line)
		}
	}
}
