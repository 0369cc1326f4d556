package linux

import (
	"encoding/binary"
	"fmt"
	"strconv"
)

// Signal is a signal number (signal(7)).
type Signal int

// The signals, the same on amd64 and arm64 (asm-generic/signal.h).
const (
	SIGHUP    Signal = 1
	SIGINT    Signal = 2
	SIGQUIT   Signal = 3
	SIGILL    Signal = 4
	SIGTRAP   Signal = 5
	SIGABRT   Signal = 6
	SIGBUS    Signal = 7
	SIGFPE    Signal = 8
	SIGKILL   Signal = 9
	SIGUSR1   Signal = 10
	SIGSEGV   Signal = 11
	SIGUSR2   Signal = 12
	SIGPIPE   Signal = 13
	SIGALRM   Signal = 14
	SIGTERM   Signal = 15
	SIGSTKFLT Signal = 16
	SIGCHLD   Signal = 17
	SIGCONT   Signal = 18
	SIGSTOP   Signal = 19
	SIGTSTP   Signal = 20
	SIGTTIN   Signal = 21
	SIGTTOU   Signal = 22
	SIGURG    Signal = 23
	SIGXCPU   Signal = 24
	SIGXFSZ   Signal = 25
	SIGVTALRM Signal = 26
	SIGPROF   Signal = 27
	SIGWINCH  Signal = 28
	SIGIO     Signal = 29
	SIGPWR    Signal = 30
	SIGSYS    Signal = 31
	SIGRTMIN  Signal = 32
	SIGRTMAX  Signal = 64

	// NSig is the number of signals; the highest one is NSig itself.
	NSig = 64
)

var signalNames = [...]string{
	1: "SIGHUP", "SIGINT", "SIGQUIT", "SIGILL", "SIGTRAP", "SIGABRT", "SIGBUS", "SIGFPE",
	"SIGKILL", "SIGUSR1", "SIGSEGV", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGTERM", "SIGSTKFLT",
	"SIGCHLD", "SIGCONT", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGXCPU",
	"SIGXFSZ", "SIGVTALRM", "SIGPROF", "SIGWINCH", "SIGIO", "SIGPWR", "SIGSYS",
}

// IsValid reports whether s is the number of a signal.
func (s Signal) IsValid() bool { return s >= 1 && s <= NSig }

// IsStandard reports whether s is one of the signals that do not queue.
func (s Signal) IsStandard() bool { return s >= 1 && s < SIGRTMIN }

// IsRealtime reports whether s is a real-time signal, which queues.
func (s Signal) IsRealtime() bool { return s >= SIGRTMIN && s <= SIGRTMAX }

// String returns the name of s as in signal(7).
func (s Signal) String() string {
	switch {
	case s.IsStandard():
		return signalNames[s]
	case s.IsRealtime():
		return "SIGRT" + strconv.Itoa(int(s))
	}
	return "signal " + strconv.Itoa(int(s))
}

// SignalSet is a set of signals as sigset_t holds it: bit s-1 stands for s.
type SignalSet uint64

// SignalSetSize is the size of a SignalSet in bytes, which rt_sigprocmask(2)
// and its kin demand.
const SignalSetSize = 8

// UnblockableSignals cannot be blocked, caught or ignored.
var UnblockableSignals = MakeSignalSet(SIGKILL, SIGSTOP)

// SignalSetOf returns the set with s alone. s must be valid.
func SignalSetOf(s Signal) SignalSet { return 1 << (s - 1) }

// MakeSignalSet returns the set of the given signals, all valid.
func MakeSignalSet(sigs ...Signal) SignalSet {
	var set SignalSet
	for _, s := range sigs {
		set |= SignalSetOf(s)
	}
	return set
}

// Has reports whether the valid signal s is in set.
func (set SignalSet) Has(s Signal) bool { return set&SignalSetOf(s) != 0 }

// Values of si_code (asm-generic/siginfo.h). Codes above 0 come from the
// kernel, the others from user code.
const (
	SI_USER   = 0
	SI_KERNEL = 0x80
	SI_QUEUE  = -1
	SI_TIMER  = -2
	SI_TKILL  = -6

	ILL_ILLOPC = 1
	ILL_ILLOPN = 2

	FPE_INTDIV = 1
	FPE_INTOVF = 2
	FPE_FLTDIV = 3
	FPE_FLTOVF = 4
	FPE_FLTUND = 5
	FPE_FLTRES = 6
	FPE_FLTINV = 7

	SEGV_MAPERR = 1
	SEGV_ACCERR = 2

	BUS_ADRALN = 1
	BUS_ADRERR = 2
	BUS_OBJERR = 3

	TRAP_BRKPT  = 1
	TRAP_TRACE  = 2
	TRAP_HWBKPT = 4

	CLD_EXITED    = 1
	CLD_KILLED    = 2
	CLD_DUMPED    = 3
	CLD_TRAPPED   = 4
	CLD_STOPPED   = 5
	CLD_CONTINUED = 6

	SYS_SECCOMP = 1
)

// SignalInfoSize is the size of siginfo_t in bytes.
const SignalInfoSize = 128

// SignalInfo is siginfo_t (sigaction(2)). Which of the accessors have a meaning
// depends on Signo and Code.
type SignalInfo struct {
	Signo int32
	Errno int32
	Code  int32
	_     uint32

	// Fields is the union that follows the first three members.
	Fields [SignalInfoSize - 16]byte
}

func (s *SignalInfo) u32(off int) uint32       { return binary.LittleEndian.Uint32(s.Fields[off:]) }
func (s *SignalInfo) setU32(off int, v uint32) { binary.LittleEndian.PutUint32(s.Fields[off:], v) }
func (s *SignalInfo) u64(off int) uint64       { return binary.LittleEndian.Uint64(s.Fields[off:]) }
func (s *SignalInfo) setU64(off int, v uint64) { binary.LittleEndian.PutUint64(s.Fields[off:], v) }

// PID returns si_pid: of signals sent by a process, and SIGCHLD.
func (s *SignalInfo) PID() int32 { return int32(s.u32(0)) }

// SetPID sets si_pid.
func (s *SignalInfo) SetPID(v int32) { s.setU32(0, uint32(v)) }

// UID returns si_uid: of signals sent by a process, and SIGCHLD.
func (s *SignalInfo) UID() int32 { return int32(s.u32(4)) }

// SetUID sets si_uid.
func (s *SignalInfo) SetUID(v int32) { s.setU32(4, uint32(v)) }

// Sigval returns si_value: of rt_sigqueueinfo(2) and POSIX timers.
func (s *SignalInfo) Sigval() uint64 { return s.u64(8) }

// SetSigval sets si_value.
func (s *SignalInfo) SetSigval(v uint64) { s.setU64(8, v) }

// TimerID returns si_timerid of a POSIX timer's signal.
func (s *SignalInfo) TimerID() int32 { return int32(s.u32(0)) }

// SetTimerID sets si_timerid.
func (s *SignalInfo) SetTimerID(v int32) { s.setU32(0, uint32(v)) }

// Overrun returns si_overrun of a POSIX timer's signal.
func (s *SignalInfo) Overrun() int32 { return int32(s.u32(4)) }

// SetOverrun sets si_overrun.
func (s *SignalInfo) SetOverrun(v int32) { s.setU32(4, uint32(v)) }

// Addr returns si_addr of SIGSEGV, SIGBUS, SIGILL, SIGFPE and SIGTRAP.
func (s *SignalInfo) Addr() uint64 { return s.u64(0) }

// SetAddr sets si_addr.
func (s *SignalInfo) SetAddr(v uint64) { s.setU64(0, v) }

// Status returns si_status of SIGCHLD.
func (s *SignalInfo) Status() int32 { return int32(s.u32(8)) }

// SetStatus sets si_status.
func (s *SignalInfo) SetStatus(v int32) { s.setU32(8, uint32(v)) }

// CallAddr returns si_call_addr of SIGSYS.
func (s *SignalInfo) CallAddr() uint64 { return s.u64(0) }

// SetCallAddr sets si_call_addr.
func (s *SignalInfo) SetCallAddr(v uint64) { s.setU64(0, v) }

// Syscall returns si_syscall of SIGSYS.
func (s *SignalInfo) Syscall() int32 { return int32(s.u32(8)) }

// SetSyscall sets si_syscall.
func (s *SignalInfo) SetSyscall(v int32) { s.setU32(8, uint32(v)) }

// Arch returns si_arch of SIGSYS, an AUDIT_ARCH_ value.
func (s *SignalInfo) Arch() uint32 { return s.u32(12) }

// SetArch sets si_arch.
func (s *SignalInfo) SetArch(v uint32) { s.setU32(12, v) }

func (s *SignalInfo) fields(c *codec) {
	c.i32(&s.Signo)
	c.i32(&s.Errno)
	c.i32(&s.Code)
	c.pad(4)
	c.raw(s.Fields[:])
}

// SizeBytes implements Struct.
func (s *SignalInfo) SizeBytes() int { return SignalInfoSize }

// MarshalBytes implements Struct.
func (s *SignalInfo) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *SignalInfo) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Bytes returns s as the ABI lays it out.
func (s *SignalInfo) Bytes() []byte {
	b := make([]byte, SignalInfoSize)
	s.MarshalBytes(b)
	return b
}

// SetBytes is UnmarshalBytes.
func (s *SignalInfo) SetBytes(b []byte) { s.UnmarshalBytes(b) }

// String returns the parts of s that every signal has, and its address.
func (s *SignalInfo) String() string {
	return fmt.Sprintf("{%v code %d addr/pid %#x}", Signal(s.Signo), s.Code, s.Addr())
}

// Flags of SigAction (asm-generic/signal-defs.h).
const (
	SA_NOCLDSTOP = 0x00000001
	SA_NOCLDWAIT = 0x00000002
	SA_SIGINFO   = 0x00000004
	SA_RESTORER  = 0x04000000
	SA_ONSTACK   = 0x08000000
	SA_RESTART   = 0x10000000
	SA_NODEFER   = 0x40000000
	SA_RESETHAND = 0x80000000
)

// The handlers that are not functions.
const (
	SIG_DFL = 0
	SIG_IGN = 1
)

// SigAction is the kernel's struct sigaction (rt_sigaction(2)), on amd64 and
// arm64 alike.
type SigAction struct {
	Handler  uint64
	Flags    uint64
	Restorer uint64
	Mask     SignalSet
}

// Flags of SignalStack.
const (
	SS_ONSTACK    = 1
	SS_DISABLE    = 2
	SS_AUTODISARM = 1 << 31
)

// SignalStack is stack_t (sigaltstack(2)).
type SignalStack struct {
	Addr  uint64
	Flags uint32
	_     uint32
	Size  uint64
}

// Contains reports whether the stack pointer sp lies on s.
func (s *SignalStack) Contains(sp uint64) bool {
	return s.Flags&SS_DISABLE == 0 && s.Addr < sp && sp-s.Addr <= s.Size
}

// Values of rt_sigprocmask(2)'s how.
const (
	SIG_BLOCK   = 0
	SIG_UNBLOCK = 1
	SIG_SETMASK = 2
)

func (s *SigAction) fields(c *codec) {
	c.u64(&s.Handler)
	c.u64(&s.Flags)
	c.u64(&s.Restorer)
	c.u64((*uint64)(&s.Mask))
}

// SizeBytes implements Struct.
func (s *SigAction) SizeBytes() int { return 32 }

// MarshalBytes implements Struct.
func (s *SigAction) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *SigAction) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

func (s *SignalStack) fields(c *codec) {
	c.u64(&s.Addr)
	c.u32(&s.Flags)
	c.pad(4)
	c.u64(&s.Size)
}

// SizeBytes implements Struct.
func (s *SignalStack) SizeBytes() int { return 24 }

// MarshalBytes implements Struct.
func (s *SignalStack) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *SignalStack) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }
