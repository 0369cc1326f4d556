package syscalls

import (
	"encoding/binary"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
)

// taskSyscalls make, end and wait for tasks, and change what they are.
var taskSyscalls = []kernel.Syscall{
	unix.SYS_CLONE:             {Name: "clone", Fn: sysClone},
	unix.SYS_CLONE3:            {Name: "clone3", Fn: sysClone3},
	unix.SYS_EXECVE:            {Name: "execve", Fn: sysExecve},
	unix.SYS_EXECVEAT:          {Name: "execveat", Fn: sysExecveat},
	unix.SYS_EXIT:              {Name: "exit", Fn: sysExit},
	unix.SYS_EXIT_GROUP:        {Name: "exit_group", Fn: sysExitGroup},
	unix.SYS_WAIT4:             {Name: "wait4", Fn: sysWait4},
	unix.SYS_WAITID:            {Name: "waitid", Fn: sysWaitid},
	unix.SYS_GETPID:            {Name: "getpid", Fn: sysGetpid},
	unix.SYS_GETPPID:           {Name: "getppid", Fn: sysGetppid},
	unix.SYS_GETTID:            {Name: "gettid", Fn: sysGettid},
	unix.SYS_GETPGID:           {Name: "getpgid", Fn: sysGetpgid},
	unix.SYS_SETPGID:           {Name: "setpgid", Fn: sysSetpgid},
	unix.SYS_GETSID:            {Name: "getsid", Fn: sysGetsid},
	unix.SYS_SETSID:            {Name: "setsid", Fn: sysSetsid},
	unix.SYS_SET_TID_ADDRESS:   {Name: "set_tid_address", Fn: sysSetTIDAddress},
	unix.SYS_SET_ROBUST_LIST:   {Name: "set_robust_list", Fn: sysSetRobustList},
	unix.SYS_GET_ROBUST_LIST:   {Name: "get_robust_list", Fn: sysGetRobustList},
	unix.SYS_UNSHARE:           {Name: "unshare", Fn: sysUnshare},
	unix.SYS_PRCTL:             {Name: "prctl", Fn: sysPrctl},
	unix.SYS_PERSONALITY:       {Name: "personality", Fn: sysPersonality},
	unix.SYS_PIDFD_OPEN:        {Name: "pidfd_open", Fn: sysPidfdOpen},
	unix.SYS_PIDFD_SEND_SIGNAL: {Name: "pidfd_send_signal", Fn: sysPidfdSendSignal},
}

// copyOutInt copies an int out.
func copyOutInt(t *kernel.Task, addr hostarch.Addr, v int32) error {
	var buf [4]byte
	binary.LittleEndian.PutUint32(buf[:], uint32(v))
	return t.CopyOut(addr, buf[:])
}

func clone(t *kernel.Task, args *linux.CloneArgs) (uintptr, *kernel.SyscallControl, error) {
	tid, err := t.Clone(args)
	return uintptr(tid), nil, err
}

func sysClone(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	flags := args[0].Uint64() & 0xffffffff // clone3 alone has more
	a := linux.CloneArgs{
		Flags:      flags &^ linux.CSIGNAL,
		ExitSignal: flags & linux.CSIGNAL,
		Stack:      args[1].Uint64(),
		ParentTID:  args[2].Uint64(),
		PidFD:      args[2].Uint64(),
		ChildTID:   args[cloneChildTID].Uint64(),
		TLS:        args[cloneTLS].Uint64(),
	}
	if flags&linux.CLONE_PIDFD != 0 && flags&linux.CLONE_PARENT_SETTID != 0 {
		return 0, nil, unix.EINVAL
	}
	return clone(t, &a)
}

// The sizes of struct clone_args (clone3(2)): its first version, and a page,
// beyond which no version goes.
const (
	cloneArgsMin = 64
	cloneArgsMax = 4096
)

func sysClone3(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	size := args[1].SizeT()
	switch {
	case size < cloneArgsMin:
		return 0, nil, unix.EINVAL
	case size > cloneArgsMax:
		return 0, nil, unix.E2BIG
	}
	var a linux.CloneArgs
	buf := make([]byte, max(int(size), a.SizeBytes()))
	if err := t.CopyIn(args[0].Pointer(), buf[:size]); err != nil {
		return 0, nil, err
	}
	for _, b := range buf[a.SizeBytes():] {
		if b != 0 { // a version that we do not know
			return 0, nil, unix.E2BIG
		}
	}
	a.UnmarshalBytes(buf)
	const known = 1<<34 - 1
	switch {
	case a.Flags&^known != 0, a.Flags&(linux.CLONE_DETACHED|linux.CSIGNAL&^linux.CLONE_NEWTIME) != 0,
		(a.Stack == 0) != (a.StackSize == 0),
		a.Flags&(linux.CLONE_THREAD|linux.CLONE_PARENT) != 0 && a.ExitSignal != 0:
		return 0, nil, unix.EINVAL
	}
	return clone(t, &a)
}

func exec(t *kernel.Task, dir *vfs.FileDescription, path, filename string, argv, envv hostarch.Addr, flags int) (uintptr, *kernel.SyscallControl, error) {
	args := kernel.ExecArgs{Dir: dir, Path: path, Filename: filename, Flags: flags}
	var err error
	if args.Argv, err = t.CopyInVector(argv); err != nil {
		return 0, nil, err
	}
	if args.Envv, err = t.CopyInVector(envv); err != nil {
		return 0, nil, err
	}
	if len(args.Argv) == 0 {
		args.Argv = []string{""} // since Linux 5.18
	}
	ctl, err := t.Execve(&args)
	return 0, ctl, err
}

func sysExecve(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	path, err := t.CopyInPath(args[0].Pointer())
	if err != nil {
		return 0, nil, err
	}
	return exec(t, nil, path, path, args[1].Pointer(), args[2].Pointer(), 0)
}

func sysExecveat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	fd, flags := args[0].Int(), args[4].Uint()
	if flags&^(unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW) != 0 {
		return 0, nil, unix.EINVAL
	}
	path, err := t.CopyInPath(args[1].Pointer())
	if err != nil {
		return 0, nil, err
	}
	filename := path
	var dir *vfs.FileDescription
	if fd != unix.AT_FDCWD && (path == "" || path[0] != '/') {
		if dir, err = t.GetFile(fd); err != nil {
			return 0, nil, err
		}
		defer dir.DecRef()
		filename = "/dev/fd/" + strconv.Itoa(int(fd))
		if path != "" {
			filename += "/" + path
		}
	}
	return exec(t, dir, path, filename, args[2].Pointer(), args[3].Pointer(), int(flags))
}

func sysExit(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	t.Exit(args[0].Int())
	return 0, kernel.KeepRegisters, nil
}

func sysExitGroup(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	t.ExitGroup(linux.WaitStatusExited(args[0].Int()))
	return 0, kernel.KeepRegisters, nil
}

func sysWait4(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	pid, options := args[0].Int(), args[2].Uint()
	if options&^(linux.WNOHANG|linux.WUNTRACED|linux.WCONTINUED|linux.WNOTHREAD|linux.WALL|linux.WCLONE) != 0 {
		return 0, nil, unix.EINVAL
	}
	o := kernel.WaitOptions{Options: options | linux.WEXITED}
	switch {
	case pid > 0:
		o.PID = pid
	case pid == 0:
		o.PGID = t.PGID()
	case pid == -1<<31:
		return 0, nil, unix.ESRCH
	case pid < -1:
		o.PGID = -pid
	}
	r, err := t.Wait(o)
	if err != nil || r == nil {
		return 0, nil, err
	}
	if addr := args[1].Pointer(); addr != 0 {
		if err := copyOutInt(t, addr, int32(r.Status)); err != nil {
			return 0, nil, err
		}
	}
	if addr := args[3].Pointer(); addr != 0 {
		if err := t.CopyOutStruct(addr, &r.Usage); err != nil {
			return 0, nil, err
		}
	}
	return uintptr(r.PID), nil, nil
}

func sysWaitid(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	which, id, options := args[0].Int(), args[1].Int(), args[3].Uint()
	const events = linux.WEXITED | linux.WSTOPPED | linux.WCONTINUED
	if options&^(events|linux.WNOHANG|linux.WNOWAIT|linux.WNOTHREAD|linux.WALL|linux.WCLONE) != 0 || options&events == 0 {
		return 0, nil, unix.EINVAL
	}
	o := kernel.WaitOptions{Options: options}
	switch which {
	case linux.P_ALL:
	case linux.P_PID:
		if o.PID = id; id <= 0 {
			return 0, nil, unix.EINVAL
		}
	case linux.P_PGID:
		if o.PGID = id; id < 0 {
			return 0, nil, unix.EINVAL
		}
		if id == 0 {
			o.PGID = t.PGID()
		}
	case linux.P_PIDFD:
		tg, file, err := processOf(t, id)
		if err != nil {
			return 0, nil, err
		}
		o.PID = tg.ID()
		if file.StatusFlags()&unix.O_NONBLOCK != 0 {
			o.Options |= linux.WNOHANG
		}
		file.DecRef()
		r, err := waitid(t, o, args)
		if err == nil && r == nil && options&linux.WNOHANG == 0 {
			err = unix.EAGAIN
		}
		return 0, nil, err
	default:
		return 0, nil, unix.EINVAL
	}
	_, err := waitid(t, o, args)
	return 0, nil, err
}

// waitid waits, and copies out what waitid(2) does.
func waitid(t *kernel.Task, o kernel.WaitOptions, args arch.SyscallArguments) (*kernel.WaitResult, error) {
	r, err := t.Wait(o)
	if err != nil {
		return nil, err
	}
	if addr := args[2].Pointer(); addr != 0 {
		info := &linux.SignalInfo{}
		if r != nil {
			info.Signo, info.Code = int32(linux.SIGCHLD), r.Code
			info.SetPID(r.PID)
			info.SetUID(int32(r.UID))
			info.SetStatus(r.Value)
		}
		// Linux writes no more than these fields.
		if err := t.CopyOut(addr, info.Bytes()[:28]); err != nil {
			return nil, err
		}
	}
	if addr := args[4].Pointer(); addr != 0 && r != nil {
		if err := t.CopyOutStruct(addr, &r.Usage); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func sysGetpid(t *kernel.Task, _ arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return uintptr(t.TGID()), nil, nil
}

func sysGetppid(t *kernel.Task, _ arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return uintptr(t.ThreadGroup().PPID()), nil, nil
}

func sysGettid(t *kernel.Task, _ arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return uintptr(t.TID()), nil, nil
}

func sysGetpgid(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	pgid, _, err := t.GetPGID(args[0].Int())
	return uintptr(pgid), nil, err
}

func sysSetpgid(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, t.SetPGID(args[0].Int(), args[1].Int())
}

func sysGetsid(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	_, sid, err := t.GetPGID(args[0].Int())
	return uintptr(sid), nil, err
}

func sysSetsid(t *kernel.Task, _ arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	sid, err := t.SetSID()
	return uintptr(sid), nil, err
}

func sysSetTIDAddress(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	t.SetClearTID(args[0].Pointer())
	return uintptr(t.TID()), nil, nil
}

func sysSetRobustList(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	if args[1].SizeT() != uint((&linux.RobustListHead{}).SizeBytes()) {
		return 0, nil, unix.EINVAL
	}
	t.SetRobustList(args[0].Pointer())
	return 0, nil, nil
}

func sysGetRobustList(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	if tid := args[0].Int(); tid != 0 && tid != t.TID() {
		if t.Kernel().TaskByTID(tid) == nil {
			return 0, nil, unix.ESRCH
		}
		return 0, nil, unix.EPERM
	}
	var buf [8]byte
	binary.LittleEndian.PutUint64(buf[:], uint64((&linux.RobustListHead{}).SizeBytes()))
	if err := t.CopyOut(args[2].Pointer(), buf[:]); err != nil {
		return 0, nil, err
	}
	binary.LittleEndian.PutUint64(buf[:], uint64(t.RobustList()))
	return 0, nil, t.CopyOut(args[1].Pointer(), buf[:])
}

func sysUnshare(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	flags := args[0].Uint()
	const nothing = linux.CLONE_VM | linux.CLONE_SIGHAND | linux.CLONE_THREAD | linux.CLONE_SYSVSEM
	switch {
	case flags&^(nothing|linux.CLONE_FILES|linux.CLONE_FS|linux.CLONE_NEWTIME|linux.CLONE_NEWNS|linux.CLONE_NEWCGROUP|
		linux.CLONE_NEWUTS|linux.CLONE_NEWIPC|linux.CLONE_NEWUSER|linux.CLONE_NEWPID|linux.CLONE_NEWNET) != 0:
		return 0, nil, unix.EINVAL
	case flags&^(nothing|linux.CLONE_FILES|linux.CLONE_FS) != 0:
		return 0, nil, unix.EPERM
	case flags&(linux.CLONE_VM|linux.CLONE_SIGHAND|linux.CLONE_THREAD) != 0 && t.ThreadGroup().Threads() > 1:
		return 0, nil, unix.EINVAL
	}
	if flags&linux.CLONE_FILES != 0 {
		t.UnshareFiles()
	}
	if flags&linux.CLONE_FS != 0 {
		t.UnshareFS()
	}
	return 0, nil, nil
}

func sysPersonality(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	if p := args[0].Uint(); p != 0xffffffff {
		return uintptr(t.ThreadGroup().SetPersonality(p)), nil, nil
	}
	return uintptr(t.ThreadGroup().Personality()), nil, nil
}

// processOf returns the process of a pidfd, and the file with a reference.
func processOf(t *kernel.Task, fd int32) (*kernel.ThreadGroup, *vfs.FileDescription, error) {
	file, err := t.GetFile(fd)
	if err != nil {
		return nil, nil, err
	}
	tg := kernel.ProcessOfPidFD(file)
	if tg == nil {
		file.DecRef()
		return nil, nil, unix.EBADF
	}
	return tg, file, nil
}

func sysPidfdOpen(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	pid, flags := args[0].Int(), args[1].Uint()
	if pid <= 0 || flags&^unix.O_NONBLOCK != 0 {
		return 0, nil, unix.EINVAL
	}
	tg := t.Kernel().ProcessByID(pid)
	if tg == nil {
		if t.Kernel().TaskByTID(pid) != nil {
			return 0, nil, unix.EINVAL // not the leader
		}
		return 0, nil, unix.ESRCH
	}
	fd, err := addFD(t, kernel.NewPidFD(tg, flags), true)
	return uintptr(fd), nil, err
}

func sysPidfdSendSignal(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	if args[3].Uint() != 0 {
		return 0, nil, unix.EINVAL
	}
	tg, file, err := processOf(t, args[0].Int())
	if err != nil {
		return 0, nil, err
	}
	defer file.DecRef()
	sig := linux.Signal(args[1].Int())
	if sig != 0 && !sig.IsValid() {
		return 0, nil, unix.EINVAL
	}
	info := t.UserSignal(sig, linux.SI_USER)
	if addr := args[2].Pointer(); addr != 0 {
		if info, err = copyInSignalInfo(t, addr, sig, tg.ID()); err != nil {
			return 0, nil, err
		}
	}
	if t.Kernel().ProcessByID(tg.ID()) != tg {
		return 0, nil, unix.ESRCH
	}
	return 0, nil, t.Kill(tg.ID(), info)
}

func sysPrctl(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	tg, arg := t.ThreadGroup(), args[1]
	switch args[0].Int() {
	case linux.PR_SET_PDEATHSIG:
		sig := linux.Signal(arg.Int())
		if sig != 0 && !sig.IsValid() {
			return 0, nil, unix.EINVAL
		}
		t.SetParentDeathSignal(sig)
	case linux.PR_GET_PDEATHSIG:
		return 0, nil, copyOutInt(t, arg.Pointer(), int32(t.ParentDeathSignal()))
	case linux.PR_GET_DUMPABLE:
		return uintptr(tg.Dumpable()), nil, nil
	case linux.PR_SET_DUMPABLE:
		if arg.Value > 1 {
			return 0, nil, unix.EINVAL
		}
		tg.SetDumpable(arg.Int())
	case linux.PR_SET_NAME:
		var buf [linux.TASK_COMM_LEN]byte
		name, err := t.CopyInString(arg.Pointer(), len(buf))
		if err == unix.ENAMETOOLONG {
			err = t.CopyIn(arg.Pointer(), buf[:])
			name = string(buf[:])
		}
		if err != nil {
			return 0, nil, err
		}
		t.SetName(name)
	case linux.PR_GET_NAME:
		var buf [linux.TASK_COMM_LEN]byte
		copy(buf[:], t.Name())
		return 0, nil, t.CopyOut(arg.Pointer(), buf[:])
	case linux.PR_SET_CHILD_SUBREAPER:
		tg.SetSubreaper(arg.Value != 0)
	case linux.PR_GET_CHILD_SUBREAPER:
		var v int32
		if tg.Subreaper() {
			v = 1
		}
		return 0, nil, copyOutInt(t, arg.Pointer(), v)
	case linux.PR_SET_NO_NEW_PRIVS:
		if arg.Value != 1 || args[2].Value|args[3].Value|args[4].Value != 0 {
			return 0, nil, unix.EINVAL
		}
		c := t.Creds().Clone()
		c.NoNewPrivs = true
		t.SetCreds(c)
	case linux.PR_GET_NO_NEW_PRIVS:
		if t.Creds().NoNewPrivs {
			return 1, nil, nil
		}
	case linux.PR_SET_TIMERSLACK:
		t.Prctl.TimerSlack = arg.Uint64()
		if arg.Int64() <= 0 {
			t.Prctl.TimerSlack = 50000
		}
	case linux.PR_GET_TIMERSLACK:
		return uintptr(t.Prctl.TimerSlack), nil, nil
	case linux.PR_SET_THP_DISABLE:
		t.Prctl.NoTHP = arg.Value != 0
	case linux.PR_GET_THP_DISABLE:
		if t.Prctl.NoTHP {
			return 1, nil, nil
		}
	case linux.PR_GET_TID_ADDRESS:
		var buf [8]byte
		binary.LittleEndian.PutUint64(buf[:], uint64(t.ClearTID()))
		return 0, nil, t.CopyOut(arg.Pointer(), buf[:])
	case linux.PR_GET_SECCOMP:
		return linux.SECCOMP_MODE_DISABLED, nil, nil
	case linux.PR_SET_PTRACER:
		// Nothing can trace.
	case linux.PR_SET_VMA:
		// Names of anonymous mappings are for people; Linux may lack them too.
		return 0, nil, unix.EINVAL
	case linux.PR_GET_KEEPCAPS, linux.PR_SET_KEEPCAPS, linux.PR_GET_SECUREBITS, linux.PR_SET_SECUREBITS,
		linux.PR_CAPBSET_READ, linux.PR_CAPBSET_DROP, linux.PR_CAP_AMBIENT:
		return prctlCreds(t, args)
	default:
		return 0, nil, unix.EINVAL
	}
	return 0, nil, nil
}
