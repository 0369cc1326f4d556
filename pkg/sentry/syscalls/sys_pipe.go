package syscalls

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// pipeSyscalls make pipes and other files without a name.
var pipeSyscalls = []kernel.Syscall{
	unix.SYS_PIPE2:           {Name: "pipe2", Fn: sysPipe2},
	unix.SYS_EVENTFD2:        {Name: "eventfd2", Fn: sysEventfd2},
	unix.SYS_TIMERFD_CREATE:  {Name: "timerfd_create", Fn: sysTimerfdCreate},
	unix.SYS_TIMERFD_SETTIME: {Name: "timerfd_settime", Fn: sysTimerfdSettime},
	unix.SYS_TIMERFD_GETTIME: {Name: "timerfd_gettime", Fn: sysTimerfdGettime},
}

// addFD puts file, whose reference it takes over, at the lowest free number.
func addFD(t *kernel.Task, file *vfs.FileDescription, cloexec bool) (int32, error) {
	limit, _ := t.Limit(unix.RLIMIT_NOFILE)
	fd, err := t.FDTable().NewFD(0, file, cloexec, limit)
	if err != nil {
		file.DecRef()
		return -1, unix.EMFILE
	}
	return fd, nil
}

// addFDPair adds two files and copies their numbers, two ints, to addr. It adds
// both or none.
func addFDPair(t *kernel.Task, a, b *vfs.FileDescription, cloexec bool, addr hostarch.Addr) error {
	fdA, err := addFD(t, a, cloexec)
	if err != nil {
		b.DecRef()
		return err
	}
	fdB, err := addFD(t, b, cloexec)
	if err == nil {
		var buf [8]byte
		usermem.ByteOrder.PutUint32(buf[0:], uint32(fdA))
		usermem.ByteOrder.PutUint32(buf[4:], uint32(fdB))
		if err = t.CopyOut(addr, buf[:]); err == nil {
			return nil
		}
		closeFD(t, fdB)
	}
	closeFD(t, fdA)
	return err
}

func closeFD(t *kernel.Task, fd int32) {
	if f := t.FDTable().Remove(fd); f != nil {
		f.DecRef()
	}
}

func sysPipe2(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, pipe(t, args[0].Pointer(), args[1].Uint())
}

func pipe(t *kernel.Task, addr hostarch.Addr, flags uint32) error {
	if flags&^(unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_DIRECT) != 0 {
		return unix.EINVAL
	}
	r, w := vfs.NewPipeFiles(flags & unix.O_NONBLOCK)
	return addFDPair(t, r, w, flags&unix.O_CLOEXEC != 0, addr)
}

func sysEventfd2(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return eventfd(t, args[0].Uint(), args[1].Uint())
}

func eventfd(t *kernel.Task, initial, flags uint32) (uintptr, *kernel.SyscallControl, error) {
	if flags&^(unix.EFD_CLOEXEC|unix.EFD_NONBLOCK|unix.EFD_SEMAPHORE) != 0 {
		return 0, nil, unix.EINVAL
	}
	f := vfs.NewEventFD(uint64(initial), flags&unix.EFD_SEMAPHORE != 0, flags&unix.O_NONBLOCK)
	fd, err := addFD(t, f, flags&unix.EFD_CLOEXEC != 0)
	return uintptr(fd), nil, err
}

func sysTimerfdCreate(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	clock, flags := args[0].Int(), args[1].Uint()
	if flags&^(unix.TFD_CLOEXEC|unix.TFD_NONBLOCK) != 0 {
		return 0, nil, unix.EINVAL
	}
	switch clock {
	case unix.CLOCK_REALTIME, unix.CLOCK_MONOTONIC, unix.CLOCK_BOOTTIME:
	default: // the ALARM clocks need CAP_WAKE_ALARM
		return 0, nil, unix.EINVAL
	}
	fd, err := addFD(t, vfs.NewTimerFD(clock == unix.CLOCK_REALTIME, flags&unix.O_NONBLOCK), flags&unix.TFD_CLOEXEC != 0)
	return uintptr(fd), nil, err
}

func sysTimerfdSettime(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	flags := args[1].Uint()
	if flags&^(unix.TFD_TIMER_ABSTIME|unix.TFD_TIMER_CANCEL_ON_SET) != 0 {
		return 0, nil, unix.EINVAL
	}
	file, err := t.GetFile(args[0].Int())
	if err != nil {
		return 0, nil, err
	}
	defer file.DecRef()
	interval, err := copyInDuration(t, args[2].Pointer())
	if err != nil {
		return 0, nil, err
	}
	value, err := copyInDuration(t, args[2].Pointer()+timespecSize)
	if err != nil {
		return 0, nil, err
	}
	oldValue, oldInterval, err := vfs.SetTimerFD(file, value, interval, flags&unix.TFD_TIMER_ABSTIME != 0)
	if err != nil || args[3].Value == 0 {
		return 0, nil, err
	}
	return 0, nil, copyOutItimerspec(t, args[3].Pointer(), oldValue, oldInterval)
}

func sysTimerfdGettime(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	file, err := t.GetFile(args[0].Int())
	if err != nil {
		return 0, nil, err
	}
	defer file.DecRef()
	value, interval, err := vfs.GetTimerFD(file)
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, copyOutItimerspec(t, args[1].Pointer(), value, interval)
}

// timespecSize is the size of struct timespec in bytes.
const timespecSize = 16

// maxDuration is what a timespec too large for a Duration counts as: 292 years.
const maxDuration = time.Duration(1<<63 - 1)

// copyInDuration copies a struct timespec in. Times that do not fit are cut to
// maxDuration; EINVAL if it is negative or not normal.
func copyInDuration(t *kernel.Task, addr hostarch.Addr) (time.Duration, error) {
	var buf [timespecSize]byte
	if err := t.CopyIn(addr, buf[:]); err != nil {
		return 0, err
	}
	sec, nsec := int64(usermem.ByteOrder.Uint64(buf[0:])), int64(usermem.ByteOrder.Uint64(buf[8:]))
	if sec < 0 || nsec < 0 || nsec >= 1e9 {
		return 0, unix.EINVAL
	}
	if sec >= int64(maxDuration/time.Second) {
		return maxDuration, nil
	}
	return time.Duration(sec)*time.Second + time.Duration(nsec), nil
}

func copyOutDuration(t *kernel.Task, addr hostarch.Addr, d time.Duration) error {
	var buf [timespecSize]byte
	usermem.ByteOrder.PutUint64(buf[0:], uint64(d/time.Second))
	usermem.ByteOrder.PutUint64(buf[8:], uint64(d%time.Second))
	return t.CopyOut(addr, buf[:])
}

// copyOutItimerspec copies a struct itimerspec out.
func copyOutItimerspec(t *kernel.Task, addr hostarch.Addr, value, interval time.Duration) error {
	if err := copyOutDuration(t, addr, interval); err != nil {
		return err
	}
	return copyOutDuration(t, addr+timespecSize, value)
}
