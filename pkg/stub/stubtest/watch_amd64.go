package stubtest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// Role is what a thread of a stub is for: what it may do depends on that.
type Role int

// Each makes those of the next role.
const (
	Unknown Role = iota
	Zygote       // clones stubs off itself and holds files
	Caller       // the first thread of a stub, makes the system calls that the Sentry asks for
	App          // runs application code
)

func (r Role) String() string {
	return [...]string{"unknown thread", "zygote", "system call thread", "application thread"}[r]
}

// Thread is one that is watched.
type Thread struct {
	Role Role
	// Calls are those made so far, with the one that is looked at; at least SetUp
	// if the thread was there before it was watched.
	Calls int
	// Seq and Done are for Watch.Permit: 0 at first.
	Seq, Done uint32

	// waits says that it is stopped until its role is known.
	waits bool
	// refused says what the thread is calling that the kernel must refuse;
	// mustSignal that it has to get SIGSYS for it next.
	refused    string
	nr         uint64
	mustSignal bool
}

// SetUp is more than the calls of a thread that sets itself up.
const SetUp = 100

// Watch watches the stubs of a process. All calls must come from one goroutine that
// is locked to its OS thread; a child of that thread other than those that are
// watched must be the one that Run is given.
type Watch struct {
	// Permit reports whether the thread tid may make the system call that regs say.
	Permit func(tid int, th *Thread, regs *unix.PtraceRegs) bool
	// Unfiltered reports whether no Syscall User Dispatch keeps application code from
	// making system calls at ip: the kernel lets uprobe(2) and uretprobe(2) pass every
	// filter there, and refuses them itself where no probe of its own has made the call.
	Unfiltered func(ip uint64) bool

	// Made counts system calls, refused ones too, by "role: system call N". Bad counts,
	// by what they are, those that were made and should not have been.
	Made, Bad map[string]int

	threads map[int]*Thread
}

const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_EXITKILL

// Numbers of system calls (arch/x86/entry/syscalls/syscall_64.tbl).
const (
	sysUretprobe = 335
	sysUprobe    = 336
)

func (w *Watch) violation(format string, args ...any) {
	w.Bad[fmt.Sprintf(format, args...)]++
}

// Attach begins to watch the zygote, and stubs that are there.
func (w *Watch) Attach(zygote int, stubs ...int) error {
	w.Made, w.Bad, w.threads = make(map[string]int), make(map[string]int), make(map[int]*Thread)
	if err := w.attach(zygote, Zygote); err != nil {
		return err
	}
	// From now on those that are new come by themselves.
	for _, pid := range stubs {
		tasks, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*")
		if err != nil {
			return err
		}
		var tids []int
		for _, task := range tasks {
			tid, err := strconv.Atoi(filepath.Base(task))
			if err != nil {
				return err
			}
			tids = append(tids, tid)
		}
		slices.Sort(tids)
		for i, tid := range tids {
			if w.threads[tid] != nil {
				continue
			}
			if err := w.attach(tid, min(Caller+Role(i), App)); err != nil {
				return err
			}
			w.threads[tid].Calls = SetUp
		}
	}
	return nil
}

func (w *Watch) attach(tid int, role Role) error {
	if err := unix.PtraceSeize(tid); err != nil {
		return fmt.Errorf("PTRACE_SEIZE of the %v %d: %w", role, tid, err)
	}
	if err := unix.PtraceInterrupt(tid); err != nil {
		return fmt.Errorf("PTRACE_INTERRUPT of %d: %w", tid, err)
	}
	var ws unix.WaitStatus
	if _, err := unix.Wait4(tid, &ws, unix.WALL, nil); err != nil || !ws.Stopped() {
		return fmt.Errorf("wait4 of %d: %v, %w", tid, ws, err)
	}
	if err := unix.PtraceSetOptions(tid, options); err != nil {
		return fmt.Errorf("PTRACE_SETOPTIONS of %d: %w", tid, err)
	}
	w.threads[tid] = &Thread{Role: role}
	return w.resume(tid, 0)
}

func (w *Watch) resume(tid, sig int) error {
	if err := unix.PtraceSyscall(tid, sig); err != nil && err != unix.ESRCH {
		return fmt.Errorf("PTRACE_SYSCALL of thread %d: %w", tid, err)
	}
	return nil
}

// syscallStop looks at a system call that is being made or has returned.
func (w *Watch) syscallStop(tid int, th *Thread) {
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
		th.Calls++
		w.Made[fmt.Sprintf("%v: system call %d", th.Role, regs.Orig_rax)]++
		th.refused = ""
		if !w.Permit(tid, th, &regs) {
			th.nr = regs.Orig_rax
			th.refused = fmt.Sprintf("%v's call %d, at %#x, is system call %d(%#x, %#x, %#x, %#x, %#x, %#x)", th.Role, th.Calls, regs.Rip, regs.Orig_rax, regs.Rdi, regs.Rsi, regs.Rdx, regs.R10, regs.R8, regs.R9)
		}
	case exit:
		if th.refused == "" {
			break
		}
		if th.Role == App && w.Unfiltered(regs.Rip) &&
			(th.nr == sysUprobe && int64(regs.Rax) == -int64(unix.ENXIO) || th.nr == sysUretprobe) {
			th.refused = ""
			break
		}
		if regs.Rax != th.nr {
			w.violation("%s: the kernel has done it: %#x", th.refused, regs.Rax)
			th.refused = ""
			break
		}
		th.mustSignal = true
	}
}

// stopped looks at a thread that is stopped with status ws, and returns the signal
// to resume it with.
func (w *Watch) stopped(tid int, th *Thread, ws unix.WaitStatus) (sig int, err error) {
	stop := ws.StopSignal()
	if th.mustSignal {
		th.mustSignal = false
		if stop != unix.SIGSYS {
			w.violation("%s: the kernel has not refused it", th.refused)
		}
		th.refused = ""
	}
	switch event := int(ws) >> 16; {
	case stop == unix.SIGTRAP|0x80:
		w.syscallStop(tid, th)
	case event == unix.PTRACE_EVENT_FORK || event == unix.PTRACE_EVENT_VFORK || event == unix.PTRACE_EVENT_CLONE:
		msg, err := unix.PtraceGetEventMsg(tid)
		if err != nil {
			break
		}
		child := int(msg)
		c := w.threads[child]
		if c == nil {
			c = &Thread{}
			w.threads[child] = c
		}
		switch th.Role {
		case Zygote, Caller:
			c.Role = th.Role + 1
		default:
			w.violation("%v makes a thread or process", th.Role)
		}
		if c.waits {
			c.waits = false
			return 0, w.resume(child, 0)
		}
	case event != 0: // the first stop, or that of a group
	default:
		return int(stop), nil
	}
	return 0, nil
}

// Run watches until no stub is left; and until the process sentry has ended, a child
// of this thread, unless that is 0. It returns how that has ended.
func (w *Watch) Run(sentry int) (unix.WaitStatus, error) {
	var status unix.WaitStatus
	for sentry != 0 || len(w.threads) > 0 {
		var ws unix.WaitStatus
		tid, err := unix.Wait4(-1, &ws, unix.WALL|unix.WNOTHREAD, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return status, os.NewSyscallError("wait4", err)
		}
		if tid == sentry {
			if ws.Exited() || ws.Signaled() {
				sentry, status = 0, ws
			}
			continue
		}
		th := w.threads[tid]
		if !ws.Stopped() {
			delete(w.threads, tid)
			continue
		}
		if th == nil {
			w.threads[tid] = &Thread{waits: true}
			continue
		}
		sig, err := w.stopped(tid, th, ws)
		if err == nil {
			err = w.resume(tid, sig)
		}
		if err != nil {
			return status, err
		}
	}
	return status, nil
}
