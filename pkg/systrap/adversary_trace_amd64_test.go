package systrap

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/stub/stubtest"
)

// The descriptors of the process whose stubs are traced: before the hostile tests it
// tells the tracer of its zygote, and waits for it.
const (
	reportFD = 3
	goFD     = 4
)

// report is what the tracer must know.
type report struct {
	Zygote          int
	Start, End      uint64 // of the image, without our text
	Text, TextEnd   uint64
	RO, Hint, Slots uint64
}

// hostile are the tests that are traced.
var hostile = []struct {
	name string
	f    func(*testing.T)
}{
	{"JumpIntoText", TestJumpIntoText},
	{"JumpIntoImage", TestJumpIntoImage},
	{"JumpWithGS", TestJumpWithGS},
	{"CallFromText", TestCallFromText},
	{"Scribble", TestScribble},
	{"InterruptBlocked", TestInterruptBlocked},
	{"InterruptBlockedAwake", TestInterruptBlockedAwake},
	{"ForgedErrand", TestForgedErrand},
	{"OverwriteEverything", TestOverwriteEverything},
	{"ForgeStates", TestForgeStates},
	{"ForgeFrames", TestForgeFrames},
	{"ForgeCalls", TestForgeCalls},
	{"ForgedCalls", TestForgedCalls},
	{"UnansweredCall", TestUnansweredCall},
	{"AllNumbers", TestAllNumbers},
	{"Oddities", TestOddities},
	{"MapOverStub", TestMapOverStub},
	{"KilledStub", TestKilledStub},
}

// TestTracee runs the hostile tests in the process that is traced, and nothing
// elsewhere.
func TestTracee(t *testing.T) {
	m := newManager(t, syscallLoop)
	as := m.as
	r := report{Start: uint64(as.zygote.Layout.Start), End: uint64(as.zygote.Layout.Extra),
		Text: uint64(as.at.text), TextEnd: uint64(as.at.textEnd), RO: uint64(as.at.ro), Hint: uint64(as.at.hint), Slots: uint64(as.at.slots)}
	r.Zygote = as.zygote.PID()
	if os.Getenv(tracedVar) == "" {
		return
	}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(reportFD, append(b, '\n')); err != nil {
		t.Fatal(err)
	}
	unix.Close(reportFD)
	if n, err := unix.Read(goFD, make([]byte, 1)); n != 1 {
		t.Fatalf("the tracer does not let us go on: %d, %v", n, err)
	}
	for _, test := range hostile {
		t.Run(test.name, test.f)
	}
}

// tracer has the rules for what the stubs of another process may do.
type tracer struct{ r report }

// readMem reads memory of a tracee.
func readMem(pid int, addr uint64, b []byte) error {
	n, err := unix.ProcessVMReadv(pid, []unix.Iovec{{Base: &b[0], Len: uint64(len(b))}}, []unix.RemoteIovec{{Base: uintptr(addr), Len: len(b)}}, 0)
	if err == nil && n != len(b) {
		err = unix.EFAULT
	}
	return err
}

// permitted reports whether the thread may make the system call.
func (tr *tracer) permitted(tid int, th *stubtest.Thread, regs *unix.PtraceRegs) bool {
	r, nr := &tr.r, regs.Orig_rax
	inImage := regs.Rip > r.Start && regs.Rip < r.Start+pageSize
	inText := regs.Rip > r.Text && regs.Rip < r.TextEnd
	inRO := func(addr uint64) bool { return addr >= r.RO && addr < r.RO+roSize }
	args := [6]uint64{regs.Rdi, regs.Rsi, regs.Rdx, regs.R10, regs.R8, regs.R9}
	switch th.Role {
	case stubtest.Zygote:
		switch nr {
		case unix.SYS_RECVMSG, unix.SYS_CLOSE, unix.SYS_RESTART_SYSCALL:
			return inImage
		case unix.SYS_SENDTO:
			return inImage && args[0] == 0 && args[2] == 16
		case unix.SYS_CLONE:
			return inImage && args[0] == unix.CLONE_PARENT|unix.CLONE_FILES|uint64(unix.SIGCHLD)
		}
	case stubtest.Caller:
		const birth = 6 // calls in the image's own text
		switch nr {
		case unix.SYS_PRCTL:
			if inImage {
				return th.Calls < birth && args[0] == unix.PR_SET_PDEATHSIG && args[1] == uint64(unix.SIGKILL)
			}
		case unix.SYS_GETPPID, unix.SYS_GETPID, unix.SYS_RT_SIGPROCMASK, unix.SYS_GETTID:
			return inImage && th.Calls < birth
		case unix.SYS_SENDTO:
			return inImage && th.Calls == birth && args[0] == 0 && args[2] == 16
		case unix.SYS_LSEEK:
			return inText && args[2] == unix.SEEK_SET
		case unix.SYS_FUTEX:
			return inText && (args[1] == futexWait && inRO(args[0]) || args[1] == futexWake && args[0] == r.Hint)
		case unix.SYS_MMAP:
			if inText && args[0] == r.RO && args[1] == roSize && args[2] == unix.PROT_READ && args[3] == unix.MAP_SHARED|unix.MAP_FIXED && args[5] == 0 {
				return th.Calls == birth+1
			}
		}
		// All else is in the request, which only the Sentry can write, in this order
		// and once.
		var head [requestCalls]byte
		if !inText || readMem(tid, r.RO, head[:]) != nil {
			return false
		}
		seq, count := binary.LittleEndian.Uint32(head[requestSeq:]), binary.LittleEndian.Uint32(head[requestCount:])
		if seq != th.Seq {
			th.Seq, th.Done = seq, 0
		}
		if th.Done >= count || count > maxCalls {
			return false
		}
		var want [7]uint64
		var b [7 * 8]byte
		if readMem(tid, r.RO+requestCalls+uint64(th.Done)*callSize, b[:]) != nil {
			return false
		}
		for i := range want {
			want[i] = binary.LittleEndian.Uint64(b[8*i:])
		}
		th.Done++
		return want == [7]uint64{nr, args[0], args[1], args[2], args[3], args[4], args[5]}
	case stubtest.App:
		switch th.Calls {
		case 1:
			return nr == unix.SYS_SIGALTSTACK && inText && inRO(args[0]) && args[1] == 0
		case 2:
			return nr == unix.SYS_PRCTL && inText && args[0] == unix.PR_SET_SYSCALL_USER_DISPATCH && args[2] == r.Text && args[3] == r.TextEnd-r.Text
		case 3:
			return nr == unix.SYS_SECCOMP && inText && args[0] == unix.SECCOMP_SET_MODE_FILTER && inRO(args[2])
		}
		switch nr {
		case unix.SYS_RT_SIGRETURN:
			return inText
		case unix.SYS_FUTEX:
			return inText && (uint32(args[1]) == futexWait || uint32(args[1]) == futexWake)
		}
	}
	return false
}

// Whatever the hostile tests do, no system call of the host but the permitted ones
// is made in a stub. Another process, this one, sees to it with ptrace(2): threads
// stop at every system call that has got past Syscall User Dispatch, before seccomp
// has its say, and after it.
func TestTraced(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	reportR, reportW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer reportR.Close()
	goR, goW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer goW.Close()
	out, err := os.CreateTemp(t.TempDir(), "out")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	p, err := os.StartProcess("/proc/self/exe", []string{"systrap.test", "-test.v", "-test.run=^TestTracee$", "-test.timeout=5m"}, &os.ProcAttr{
		Env:   append(os.Environ(), tracedVar+"=1"),
		Files: []*os.File{nil, out, out, reportFD: reportW, goFD: goR},
	})
	if err != nil {
		t.Fatal(err)
	}
	reportW.Close()
	goR.Close()
	watchdog := time.AfterFunc(6*time.Minute, func() { p.Signal(unix.SIGKILL) })
	defer watchdog.Stop()

	tr := &tracer{}
	w := &stubtest.Watch{Permit: tr.permitted, Unfiltered: func(ip uint64) bool { return ip > tr.r.Text && ip < tr.r.TextEnd }}
	line, err := bufio.NewReader(reportR).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &tr.r)
	}
	if err == nil {
		err = w.Attach(tr.r.Zygote)
	}
	if err == nil {
		_, err = goW.Write([]byte{'\n'})
	}
	if err != nil {
		p.Kill()
		p.Wait()
		text, _ := os.ReadFile(out.Name())
		t.Fatalf("%v\n%s", err, text)
	}
	status, err := w.Run(p.Pid)
	p.Release()
	text, _ := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(errors.Join(err), string(text))
	}
	if status != 0 || bytes.Count(text, []byte("\n    --- PASS: ")) != len(hostile) {
		t.Errorf("the hostile tests end with status %#x:\n%s", status, text)
	}
	for what, n := range w.Bad {
		t.Errorf("%d times: %s", n, what)
	}
	var counts []string
	for what, n := range w.Made {
		counts = append(counts, fmt.Sprintf("%s: %d", what, n))
	}
	slices.Sort(counts)
	t.Logf("seen, what was refused included:\n%s", strings.Join(counts, "\n"))
	for _, must := range []string{"system call thread: system call 9", "system call thread: system call 56", "application thread: system call 15", "application thread: system call 202"} {
		if w.Made[must] == 0 {
			t.Errorf("%s was never made: the tracer does not see what it should", must)
		}
	}
}
