package syscalls

import (
	"encoding/binary"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
)

// Where clone(2) takes its last two arguments.
const (
	cloneChildTID = 3
	cloneTLS      = 4
)

// taskSizeMax is the end of user addresses with 4-level page tables.
const taskSizeMax = 1<<47 - 4096

// taskSyscallsArch are the calls that only amd64 has.
var taskSyscallsArch = []kernel.Syscall{
	unix.SYS_FORK:       {Name: "fork", Fn: sysFork},
	unix.SYS_VFORK:      {Name: "vfork", Fn: sysVfork},
	unix.SYS_GETPGRP:    {Name: "getpgrp", Fn: sysGetpgrp},
	unix.SYS_ARCH_PRCTL: {Name: "arch_prctl", Fn: sysArchPrctl},
	unix.SYS_ALARM:      {Name: "alarm", Fn: sysAlarm},
	unix.SYS_PAUSE:      {Name: "pause", Fn: sysPause},
	unix.SYS_SIGNALFD:   {Name: "signalfd", Fn: sysSignalfd},
	unix.SYS_TIME:       {Name: "time", Fn: sysTime},
}

func sysFork(t *kernel.Task, _ arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return clone(t, &linux.CloneArgs{ExitSignal: uint64(linux.SIGCHLD)})
}

func sysVfork(t *kernel.Task, _ arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return clone(t, &linux.CloneArgs{Flags: linux.CLONE_VM | linux.CLONE_VFORK, ExitSignal: uint64(linux.SIGCHLD)})
}

func sysGetpgrp(t *kernel.Task, _ arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return uintptr(t.PGID()), nil, nil
}

// sysArchPrctl sets the bases of FS and GS.
func sysArchPrctl(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	if err := t.PullFullState(); err != nil {
		return 0, nil, err
	}
	ac, addr := t.Arch(), args[1]
	switch args[0].Int() {
	case linux.ARCH_SET_FS:
		if !ac.SetTLS(addr.Value) {
			return 0, nil, unix.EPERM
		}
		t.FullStateChanged()
	case linux.ARCH_SET_GS:
		if addr.Value >= taskSizeMax {
			return 0, nil, unix.EPERM
		}
		ac.Regs.Gs, ac.Regs.Gs_base = 0, addr.Uint64()
		t.FullStateChanged()
	case linux.ARCH_GET_FS, linux.ARCH_GET_GS:
		v := ac.Regs.Fs_base
		if args[0].Int() == linux.ARCH_GET_GS {
			v = ac.Regs.Gs_base
		}
		var buf [8]byte
		binary.LittleEndian.PutUint64(buf[:], v)
		return 0, nil, t.CopyOut(addr.Pointer(), buf[:])
	default:
		return 0, nil, unix.EINVAL
	}
	return 0, nil, nil
}

func sysSignalfd(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return signalfd(t, args, 0)
}

func sysPause(t *kernel.Task, _ arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, noHandRestart(t.Block(nil))
}

func sysTime(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	now := uint64(hostNow(linux.CLOCK_REALTIME) / time.Second)
	if addr := args[0].Pointer(); addr != 0 {
		var buf [8]byte
		binary.LittleEndian.PutUint64(buf[:], now)
		if err := t.CopyOut(addr, buf[:]); err != nil {
			return 0, nil, err
		}
	}
	return uintptr(now), nil, nil
}

// sysAlarm is alarm(2): it returns seconds, and never 0 for a timer that runs.
func sysAlarm(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	d := time.Duration(args[0].Uint()) * time.Second
	old, _, err := t.ThreadGroup().SetIntervalTimer(linux.ITIMER_REAL, d, 0)
	left := old.Round(time.Second)
	if old > 0 && left == 0 {
		left = time.Second
	}
	return uintptr(left / time.Second), nil, err
}
