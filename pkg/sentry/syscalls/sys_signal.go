package syscalls

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
)

// signalSyscalls send, take and block signals.
var signalSyscalls = []kernel.Syscall{
	unix.SYS_KILL:              {Name: "kill", Fn: sysKill},
	unix.SYS_TKILL:             {Name: "tkill", Fn: sysTkill},
	unix.SYS_TGKILL:            {Name: "tgkill", Fn: sysTgkill},
	unix.SYS_RT_SIGACTION:      {Name: "rt_sigaction", Fn: sysRtSigaction},
	unix.SYS_RT_SIGPROCMASK:    {Name: "rt_sigprocmask", Fn: sysRtSigprocmask},
	unix.SYS_RT_SIGPENDING:     {Name: "rt_sigpending", Fn: sysRtSigpending},
	unix.SYS_RT_SIGTIMEDWAIT:   {Name: "rt_sigtimedwait", Fn: sysRtSigtimedwait},
	unix.SYS_RT_SIGQUEUEINFO:   {Name: "rt_sigqueueinfo", Fn: sysRtSigqueueinfo},
	unix.SYS_RT_TGSIGQUEUEINFO: {Name: "rt_tgsigqueueinfo", Fn: sysRtTgsigqueueinfo},
	unix.SYS_RT_SIGSUSPEND:     {Name: "rt_sigsuspend", Fn: sysRtSigsuspend},
	unix.SYS_RT_SIGRETURN:      {Name: "rt_sigreturn", Fn: sysRtSigreturn},
	unix.SYS_SIGALTSTACK:       {Name: "sigaltstack", Fn: sysSigaltstack},
	unix.SYS_SIGNALFD4:         {Name: "signalfd4", Fn: sysSignalfd4},
	unix.SYS_RESTART_SYSCALL:   {Name: "restart_syscall", Fn: sysRestartSyscall},
}

// copyInSignalSet copies a sigset_t in, and checks its size.
func copyInSignalSet(t *kernel.Task, addr hostarch.Addr, size uint) (linux.SignalSet, error) {
	if size != linux.SignalSetSize {
		return 0, unix.EINVAL
	}
	var buf [linux.SignalSetSize]byte
	if err := t.CopyIn(addr, buf[:]); err != nil {
		return 0, err
	}
	return linux.SignalSet(binary.LittleEndian.Uint64(buf[:])), nil
}

func copyOutSignalSet(t *kernel.Task, addr hostarch.Addr, set linux.SignalSet, size uint) error {
	var buf [linux.SignalSetSize]byte
	binary.LittleEndian.PutUint64(buf[:], uint64(set))
	return t.CopyOut(addr, buf[:min(size, linux.SignalSetSize)])
}

// signalNumber returns the argument of kill(2) and its kin; 0 is valid.
func signalNumber(a arch.SyscallArgument) (linux.Signal, error) {
	sig := linux.Signal(a.Int())
	if sig != 0 && !sig.IsValid() {
		return 0, unix.EINVAL
	}
	return sig, nil
}

func sysKill(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	sig, err := signalNumber(args[1])
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, t.Kill(args[0].Int(), t.UserSignal(sig, linux.SI_USER))
}

func sysTkill(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return tgkill(t, -1, args[0].Int(), args[1])
}

func sysTgkill(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	tgid := args[0].Int()
	if tgid <= 0 {
		return 0, nil, unix.EINVAL
	}
	return tgkill(t, tgid, args[1].Int(), args[2])
}

func tgkill(t *kernel.Task, tgid, tid int32, signo arch.SyscallArgument) (uintptr, *kernel.SyscallControl, error) {
	sig, err := signalNumber(signo)
	if err != nil {
		return 0, nil, err
	}
	if tid <= 0 {
		return 0, nil, unix.EINVAL
	}
	return 0, nil, t.KillThread(tgid, tid, t.UserSignal(sig, linux.SI_TKILL))
}

// copyInSignalInfo copies a siginfo_t in for pid. What only the kernel may say
// cannot be said of others.
func copyInSignalInfo(t *kernel.Task, addr hostarch.Addr, sig linux.Signal, pid int32) (*linux.SignalInfo, error) {
	info := &linux.SignalInfo{}
	if err := t.CopyInStruct(addr, info); err != nil {
		return nil, err
	}
	info.Signo = int32(sig)
	if (info.Code >= 0 || info.Code == linux.SI_TKILL) && pid != t.TGID() {
		return nil, unix.EPERM
	}
	return info, nil
}

func sysRtSigqueueinfo(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	pid := args[0].Int()
	sig, err := signalNumber(args[1])
	if err != nil {
		return 0, nil, err
	}
	if pid <= 0 {
		return 0, nil, unix.ESRCH
	}
	info, err := copyInSignalInfo(t, args[2].Pointer(), sig, pid)
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, t.Kill(pid, info)
}

func sysRtTgsigqueueinfo(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	tgid, tid := args[0].Int(), args[1].Int()
	sig, err := signalNumber(args[2])
	if err != nil {
		return 0, nil, err
	}
	if tgid <= 0 || tid <= 0 {
		return 0, nil, unix.EINVAL
	}
	info, err := copyInSignalInfo(t, args[3].Pointer(), sig, tgid)
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, t.KillThread(tgid, tid, info)
}

func sysRtSigaction(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	if args[3].SizeT() != linux.SignalSetSize {
		return 0, nil, unix.EINVAL
	}
	var act *linux.SigAction
	if addr := args[1].Pointer(); addr != 0 {
		act = &linux.SigAction{}
		if err := t.CopyInStruct(addr, act); err != nil {
			return 0, nil, err
		}
	}
	old, err := t.SignalAction(linux.Signal(args[0].Int()), act)
	if err != nil {
		return 0, nil, err
	}
	if addr := args[2].Pointer(); addr != 0 {
		return 0, nil, t.CopyOutStruct(addr, &old)
	}
	return 0, nil, nil
}

func sysRtSigprocmask(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	size := args[3].SizeT()
	if size != linux.SignalSetSize {
		return 0, nil, unix.EINVAL
	}
	old := t.SignalMask()
	if addr := args[1].Pointer(); addr != 0 {
		set, err := copyInSignalSet(t, addr, size)
		if err != nil {
			return 0, nil, err
		}
		switch args[0].Int() {
		case linux.SIG_BLOCK:
			set |= old
		case linux.SIG_UNBLOCK:
			set = old &^ set
		case linux.SIG_SETMASK:
		default:
			return 0, nil, unix.EINVAL
		}
		t.SetSignalMask(set)
	}
	if addr := args[2].Pointer(); addr != 0 {
		return 0, nil, copyOutSignalSet(t, addr, old, size)
	}
	return 0, nil, nil
}

func sysRtSigpending(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	size := args[1].SizeT()
	if size > linux.SignalSetSize {
		return 0, nil, unix.EINVAL
	}
	return 0, nil, copyOutSignalSet(t, args[0].Pointer(), t.PendingSignals()&t.SignalMask(), size)
}

func sysRtSigtimedwait(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	set, err := copyInSignalSet(t, args[0].Pointer(), args[3].SizeT())
	if err != nil {
		return 0, nil, err
	}
	timeout, err := optionalTimeout(t, args[2].Pointer())
	if err != nil {
		return 0, nil, err
	}
	info, err := t.WaitSignal(set, timeout)
	if err != nil {
		return 0, nil, err
	}
	if addr := args[1].Pointer(); addr != 0 {
		if err := t.CopyOutStruct(addr, info); err != nil {
			return 0, nil, err
		}
	}
	return uintptr(info.Signo), nil, nil
}

func sysRtSigsuspend(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	set, err := copyInSignalSet(t, args[0].Pointer(), args[1].SizeT())
	if err != nil {
		return 0, nil, err
	}
	t.SetTemporarySignalMask(set)
	return 0, nil, noHandRestart(t.Block(nil))
}

func sysRtSigreturn(t *kernel.Task, _ arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	ctl, err := t.SignalReturn()
	return 0, ctl, err
}

func sysSigaltstack(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	old := t.AltStack()
	if addr := args[0].Pointer(); addr != 0 {
		var s linux.SignalStack
		if err := t.CopyInStruct(addr, &s); err != nil {
			return 0, nil, err
		}
		if err := t.SetAltStack(s); err != nil {
			return 0, nil, err
		}
	}
	if addr := args[1].Pointer(); addr != 0 {
		return 0, nil, t.CopyOutStruct(addr, &old)
	}
	return 0, nil, nil
}

func sysRestartSyscall(t *kernel.Task, _ arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	n, err := t.RestartSyscall()
	return n, nil, err
}

func sysSignalfd4(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return signalfd(t, args, args[3].Uint())
}

func signalfd(t *kernel.Task, args arch.SyscallArguments, flags uint32) (uintptr, *kernel.SyscallControl, error) {
	if flags&^(unix.SFD_CLOEXEC|unix.SFD_NONBLOCK) != 0 {
		return 0, nil, unix.EINVAL
	}
	set, err := copyInSignalSet(t, args[1].Pointer(), args[2].SizeT())
	if err != nil {
		return 0, nil, err
	}
	fd := args[0].Int()
	if fd == -1 {
		fd, err = addFD(t, t.NewSignalFD(set, flags&unix.O_NONBLOCK), flags&unix.SFD_CLOEXEC != 0)
		return uintptr(fd), nil, err
	}
	file, err := t.GetFile(fd)
	if err != nil {
		return 0, nil, err
	}
	defer file.DecRef()
	return uintptr(fd), nil, kernel.SetSignalFD(file, set)
}
