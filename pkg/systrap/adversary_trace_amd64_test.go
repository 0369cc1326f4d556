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
	{"OverwriteEverything", TestOverwriteEverything},
	{"ForgeStates", TestForgeStates},
	{"ForgeFrames", TestForgeFrames},
	{"ForgeCalls", TestForgeCalls},
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

// role is what a thread of a stub is for: what it may do depends on that.
type role int

const (
	unknown role = iota
	zygote       // clones stubs off itself and holds files
	leader       // the first thread of a stub, parks
	caller       // makes the system calls that the Sentry asks for
	app          // runs application code
)

func (r role) String() string {
	return [...]string{"unknown thread", "zygote", "first thread", "system call thread", "application thread"}[r]
}

// tracee is a thread that is traced.
type tracee struct {
	role  role
	tgid  int
	calls int // made so far
	// waits says that it is stopped until its role is known.
	waits bool
	// refused says what the thread is calling that the kernel must refuse;
	// mustSignal that it has to get SIGSYS for it next.
	refused    string
	nr         uint64
	mustSignal bool
	// Of a system call thread: the last request, and how many of its calls were
	// made.
	seq, done uint32
}

// tracer looks at every system call of the stubs of another process.
type tracer struct {
	t       *testing.T
	r       report
	threads map[int]*tracee
	count   map[string]int
	bad     map[string]int
}

// Numbers of system calls (arch/x86/entry/syscalls/syscall_64.tbl).
const (
	sysUretprobe = 335
	sysUprobe    = 336
)

func (tr *tracer) violation(format string, args ...any) {
	tr.bad[fmt.Sprintf(format, args...)]++
}

// readMem reads memory of a tracee.
func readMem(pid int, addr uint64, b []byte) error {
	n, err := unix.ProcessVMReadv(pid, []unix.Iovec{{Base: &b[0], Len: uint64(len(b))}}, []unix.RemoteIovec{{Base: uintptr(addr), Len: len(b)}}, 0)
	if err == nil && n != len(b) {
		err = unix.EFAULT
	}
	return err
}

// permitted reports whether the thread may make the system call.
func (tr *tracer) permitted(tid int, th *tracee, regs *unix.PtraceRegs) bool {
	r, nr := &tr.r, regs.Orig_rax
	inImage := regs.Rip > r.Start && regs.Rip < r.Start+pageSize
	inText := regs.Rip > r.Text && regs.Rip < r.TextEnd
	inRO := func(addr uint64) bool { return addr >= r.RO && addr < r.RO+roSize }
	args := [6]uint64{regs.Rdi, regs.Rsi, regs.Rdx, regs.R10, regs.R8, regs.R9}
	switch th.role {
	case zygote:
		switch nr {
		case unix.SYS_RECVMSG, unix.SYS_CLOSE, unix.SYS_RESTART_SYSCALL:
			return inImage
		case unix.SYS_SENDTO:
			return inImage && args[0] == 0 && args[2] == 16
		case unix.SYS_CLONE:
			return inImage && args[0] == unix.CLONE_PARENT|unix.CLONE_FILES|uint64(unix.SIGCHLD)
		}
	case leader:
		switch nr {
		case unix.SYS_PRCTL:
			return inImage && args[0] == unix.PR_SET_PDEATHSIG && args[1] == uint64(unix.SIGKILL)
		case unix.SYS_GETPPID, unix.SYS_GETPID, unix.SYS_RT_SIGPROCMASK, unix.SYS_PAUSE:
			return inImage
		case unix.SYS_SENDTO:
			return inImage && args[0] == 0 && args[2] == 16
		case unix.SYS_CLONE:
			return inImage && args[0] == cloneThread
		}
	case caller:
		switch nr {
		case unix.SYS_GETTID:
			return inImage && th.calls < 3
		case unix.SYS_SENDTO:
			return inImage && th.calls < 3 && args[0] == 0 && args[2] == 16
		case unix.SYS_LSEEK:
			return inText && args[2] == unix.SEEK_SET
		case unix.SYS_FUTEX:
			return inText && (args[1] == futexWait && inRO(args[0]) || args[1] == futexWake && args[0] == r.Hint)
		case unix.SYS_MMAP:
			if inText && args[0] == r.RO && args[1] == roSize && args[2] == unix.PROT_READ && args[3] == unix.MAP_SHARED|unix.MAP_FIXED && args[5] == 0 {
				return th.calls < 4
			}
		}
		// All else is in the request, which only the Sentry can write, in this order
		// and once.
		var head [requestCalls]byte
		if !inText || readMem(tid, r.RO, head[:]) != nil {
			return false
		}
		seq, count := binary.LittleEndian.Uint32(head[requestSeq:]), binary.LittleEndian.Uint32(head[requestCount:])
		if seq != th.seq {
			th.seq, th.done = seq, 0
		}
		if th.done >= count || count > maxCalls {
			return false
		}
		var want [7]uint64
		var b [7 * 8]byte
		if readMem(tid, r.RO+requestCalls+uint64(th.done)*callSize, b[:]) != nil {
			return false
		}
		for i := range want {
			want[i] = binary.LittleEndian.Uint64(b[8*i:])
		}
		th.done++
		return want == [7]uint64{nr, args[0], args[1], args[2], args[3], args[4], args[5]}
	case app:
		switch th.calls {
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

// syscallStop looks at a system call that is being made or has returned.
func (tr *tracer) syscallStop(tid int, th *tracee) {
	var regs unix.PtraceRegs
	if unix.PtraceGetRegs(tid, &regs) != nil {
		return // killed meanwhile
	}
	msg, err := unix.PtraceGetEventMsg(tid)
	if err != nil {
		return
	}
	const entry, exit = 1, 2 // PTRACE_EVENTMSG_SYSCALL_ENTRY, PTRACE_EVENTMSG_SYSCALL_EXIT
	switch msg {
	case entry:
		th.calls++
		what := fmt.Sprintf("%v: system call %d", th.role, regs.Orig_rax)
		tr.count[what]++
		th.refused = ""
		if !tr.permitted(tid, th, &regs) {
			th.nr = regs.Orig_rax
			th.refused = fmt.Sprintf("%v's call %d, at %#x, is system call %d(%#x, %#x, %#x, %#x, %#x, %#x)", th.role, th.calls, regs.Rip, regs.Orig_rax, regs.Rdi, regs.Rsi, regs.Rdx, regs.R10, regs.R8, regs.R9)
		}
	case exit:
		if th.refused == "" {
			break
		}
		if th.role == app && regs.Rip > tr.r.Text && regs.Rip < tr.r.TextEnd &&
			(th.nr == sysUprobe && int64(regs.Rax) == -int64(unix.ENXIO) || th.nr == sysUretprobe) {
			// The kernel lets these pass every filter (kernel/seccomp.c), and
			// refuses them itself where no probe of its own has made the call.
			th.refused = ""
			break
		}
		if regs.Rax != th.nr {
			tr.violation("%s: the kernel has done it: %#x", th.refused, regs.Rax)
			th.refused = ""
			break
		}
		th.mustSignal = true
	}
}

// stopped looks at a thread that is stopped with status ws, and returns the signal
// to resume it with.
func (tr *tracer) stopped(tid int, th *tracee, ws unix.WaitStatus) (sig int) {
	stop := ws.StopSignal()
	if th.mustSignal {
		th.mustSignal = false
		if stop != unix.SIGSYS {
			tr.violation("%s: the kernel has not refused it", th.refused)
		}
		th.refused = ""
	}
	switch event := int(ws) >> 16; {
	case stop == unix.SIGTRAP|0x80:
		tr.syscallStop(tid, th)
	case event == unix.PTRACE_EVENT_FORK || event == unix.PTRACE_EVENT_VFORK || event == unix.PTRACE_EVENT_CLONE:
		msg, err := unix.PtraceGetEventMsg(tid)
		if err != nil {
			break
		}
		child := int(msg)
		c := tr.threads[child]
		if c == nil {
			c = &tracee{}
			tr.threads[child] = c
		}
		c.tgid = th.tgid
		switch th.role {
		case zygote:
			c.role, c.tgid = leader, child
		case leader:
			c.role = caller
		case caller:
			c.role = app
		default:
			tr.violation("%v makes a thread or process", th.role)
		}
		if c.waits {
			c.waits = false
			tr.resume(child, 0)
		}
	case event != 0: // the first stop, or that of a group
	default:
		return int(stop)
	}
	return 0
}

func (tr *tracer) resume(tid, sig int) {
	if err := unix.PtraceSyscall(tid, sig); err != nil && err != unix.ESRCH {
		tr.t.Errorf("PTRACE_SYSCALL of thread %d: %v", tid, err)
	}
}

// attach starts to trace the zygote.
func (tr *tracer) attach() error {
	pid := tr.r.Zygote
	if err := unix.PtraceSeize(pid); err != nil {
		return fmt.Errorf("PTRACE_SEIZE of the zygote %d: %w", pid, err)
	}
	if err := unix.PtraceInterrupt(pid); err != nil {
		return fmt.Errorf("PTRACE_INTERRUPT: %w", err)
	}
	var ws unix.WaitStatus
	if _, err := unix.Wait4(pid, &ws, unix.WALL, nil); err != nil || !ws.Stopped() {
		return fmt.Errorf("wait4 of the zygote: %v, %w", ws, err)
	}
	if err := unix.PtraceSetOptions(pid, unix.PTRACE_O_TRACESYSGOOD|unix.PTRACE_O_TRACEFORK|unix.PTRACE_O_TRACEVFORK|unix.PTRACE_O_TRACECLONE|unix.PTRACE_O_EXITKILL); err != nil {
		return fmt.Errorf("PTRACE_SETOPTIONS: %w", err)
	}
	tr.threads[pid] = &tracee{role: zygote, tgid: pid}
	tr.resume(pid, 0)
	return nil
}

// trace runs until the process sentry has ended, and with it all its stubs.
func (tr *tracer) trace(sentry int) (unix.WaitStatus, error) {
	var status unix.WaitStatus
	ended := false
	for !ended || len(tr.threads) > 0 {
		var ws unix.WaitStatus
		tid, err := unix.Wait4(-1, &ws, unix.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return status, fmt.Errorf("wait4: %w", err)
		}
		if tid == sentry {
			if ws.Exited() || ws.Signaled() {
				ended, status = true, ws
			}
			continue
		}
		th := tr.threads[tid]
		if !ws.Stopped() {
			delete(tr.threads, tid)
			continue
		}
		if th == nil {
			th = &tracee{waits: true}
			tr.threads[tid] = th
			continue
		}
		tr.resume(tid, tr.stopped(tid, th, ws))
	}
	return status, nil
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

	tr := &tracer{t: t, threads: map[int]*tracee{}, count: map[string]int{}, bad: map[string]int{}}
	line, err := bufio.NewReader(reportR).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &tr.r)
	}
	if err == nil {
		err = tr.attach()
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
	status, err := tr.trace(p.Pid)
	p.Release()
	text, _ := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(errors.Join(err), string(text))
	}
	if status != 0 || bytes.Count(text, []byte("\n    --- PASS: ")) != len(hostile) {
		t.Errorf("the hostile tests end with status %#x:\n%s", status, text)
	}
	for what, n := range tr.bad {
		t.Errorf("%d times: %s", n, what)
	}
	var counts []string
	for what, n := range tr.count {
		counts = append(counts, fmt.Sprintf("%s: %d", what, n))
	}
	slices.Sort(counts)
	t.Logf("seen, what was refused included:\n%s", strings.Join(counts, "\n"))
	for _, must := range []string{"system call thread: system call 9", "system call thread: system call 56", "application thread: system call 15", "application thread: system call 202"} {
		if tr.count[must] == 0 {
			t.Errorf("%s was never made: the tracer does not see what it should", must)
		}
	}
}
