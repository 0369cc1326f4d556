package syscalls

import (
	"encoding/binary"

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
var taskSyscallsArch = map[uintptr]kernel.Syscall{
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
