package syscalls

import (
	"math"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
)

// timeSyscalls tell the time and wait for it.
var timeSyscalls = []kernel.Syscall{
	unix.SYS_CLOCK_GETTIME:    {Name: "clock_gettime", Fn: sysClockGettime},
	unix.SYS_CLOCK_GETRES:     {Name: "clock_getres", Fn: sysClockGetres},
	unix.SYS_CLOCK_SETTIME:    {Name: "clock_settime", Fn: sysEPERM},
	unix.SYS_CLOCK_ADJTIME:    {Name: "clock_adjtime", Fn: sysEPERM},
	unix.SYS_ADJTIMEX:         {Name: "adjtimex", Fn: sysEPERM},
	unix.SYS_SETTIMEOFDAY:     {Name: "settimeofday", Fn: sysEPERM},
	unix.SYS_GETTIMEOFDAY:     {Name: "gettimeofday", Fn: sysGettimeofday},
	unix.SYS_NANOSLEEP:        {Name: "nanosleep", Fn: sysNanosleep},
	unix.SYS_CLOCK_NANOSLEEP:  {Name: "clock_nanosleep", Fn: sysClockNanosleep},
	unix.SYS_GETITIMER:        {Name: "getitimer", Fn: sysGetitimer},
	unix.SYS_SETITIMER:        {Name: "setitimer", Fn: sysSetitimer},
	unix.SYS_TIMER_CREATE:     {Name: "timer_create", Fn: sysTimerCreate},
	unix.SYS_TIMER_SETTIME:    {Name: "timer_settime", Fn: sysTimerSettime},
	unix.SYS_TIMER_GETTIME:    {Name: "timer_gettime", Fn: sysTimerGettime},
	unix.SYS_TIMER_GETOVERRUN: {Name: "timer_getoverrun", Fn: sysTimerGetoverrun},
	unix.SYS_TIMER_DELETE:     {Name: "timer_delete", Fn: sysTimerDelete},
	unix.SYS_TIMES:            {Name: "times", Fn: sysTimes},
}

// clockTick is the resolution of the clocks of CPU time.
const clockTick = time.Second / linux.CLOCKS_PER_SEC

// hostClock reports whether a clock is the host's, and the same for all.
func hostClock(clock int32) bool {
	switch clock {
	case linux.CLOCK_REALTIME, linux.CLOCK_MONOTONIC, linux.CLOCK_MONOTONIC_RAW, linux.CLOCK_REALTIME_COARSE,
		linux.CLOCK_MONOTONIC_COARSE, linux.CLOCK_BOOTTIME, linux.CLOCK_REALTIME_ALARM, linux.CLOCK_BOOTTIME_ALARM,
		linux.CLOCK_TAI:
		return true
	}
	return false
}

// cpuClock returns the time on a clock of CPU time; EINVAL if it is none.
func cpuClock(t *kernel.Task, clock int32) (time.Duration, error) {
	switch {
	case clock == linux.CLOCK_PROCESS_CPUTIME_ID:
		u, s := t.ThreadGroup().CPUTime()
		return u + s, nil
	case clock == linux.CLOCK_THREAD_CPUTIME_ID:
		u, s := t.CPUTime()
		return u + s, nil
	case clock >= 0 || clock&linux.CPUCLOCK_CLOCK_MASK > linux.CPUCLOCK_SCHED:
		return 0, unix.EINVAL
	}
	// A negative clock holds the complement of a number (clock_getcpuclockid(3)).
	other := t
	if id := ^(clock >> 3); id != 0 {
		if other = t.Kernel().TaskByTID(id); other == nil {
			return 0, unix.EINVAL
		}
	}
	var u, s time.Duration
	if clock&linux.CPUCLOCK_PERTHREAD_MASK != 0 {
		if other.ThreadGroup() != t.ThreadGroup() {
			return 0, unix.EINVAL
		}
		u, s = other.CPUTime()
	} else {
		u, s = other.ThreadGroup().CPUTime()
	}
	if clock&linux.CPUCLOCK_CLOCK_MASK == linux.CPUCLOCK_VIRT {
		s = 0
	}
	return u + s, nil
}

// hostNow returns the time on a clock of the host.
func hostNow(clock int32) time.Duration {
	switch clock { // without a system call, by the vDSO
	case linux.CLOCK_REALTIME:
		return time.Duration(time.Now().UnixNano())
	case linux.CLOCK_MONOTONIC:
		e := epoch()
		return e.monotonic + time.Since(e.time)
	}
	return hostTime(clock)
}

// epoch is a moment on CLOCK_MONOTONIC, which package time does not show.
var epoch = sync.OnceValue(func() (e struct {
	time      time.Time
	monotonic time.Duration
}) {
	best := time.Duration(math.MaxInt64) // the shortest measurement was not interrupted
	for range 8 {
		begin := time.Now()
		now := hostTime(linux.CLOCK_MONOTONIC)
		if took := time.Since(begin); took < best {
			best = took
			e.time, e.monotonic = begin.Add(took/2), now
		}
	}
	return e
})

// hostTime is hostNow by a system call.
func hostTime(clock int32) time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(clock, &ts) != nil {
		return 0 // the clocks of hostClock exist on every Linux
	}
	return time.Duration(ts.Nano())
}

func sysClockGettime(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	clock := args[0].Int()
	if hostClock(clock) {
		return 0, nil, copyOutDuration(t, args[1].Pointer(), hostNow(clock))
	}
	now, err := cpuClock(t, clock)
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, copyOutDuration(t, args[1].Pointer(), now)
}

func sysClockGetres(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	clock, addr := args[0].Int(), args[1].Pointer()
	res := clockTick
	if hostClock(clock) {
		var ts unix.Timespec
		if err := unix.ClockGetres(clock, &ts); err != nil {
			return 0, nil, err
		}
		res = time.Duration(ts.Nano())
	} else if _, err := cpuClock(t, clock); err != nil {
		return 0, nil, err
	}
	if addr == 0 {
		return 0, nil, nil
	}
	return 0, nil, copyOutDuration(t, addr, res)
}

func sysGettimeofday(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	if addr := args[0].Pointer(); addr != 0 {
		tv := linux.NsecToTimeval(int64(hostNow(linux.CLOCK_REALTIME)))
		if err := t.CopyOutStruct(addr, &tv); err != nil {
			return 0, nil, err
		}
	}
	if addr := args[1].Pointer(); addr != 0 {
		return 0, nil, t.CopyOutStruct(addr, &linux.Timezone{})
	}
	return 0, nil, nil
}

// sleepUntil waits for a time, and writes what is left of it to rem when a
// signal comes first.
func sleepUntil(t *kernel.Task, end time.Time, rem hostarch.Addr) error {
	err := t.BlockUntil(nil, end)
	if err == unix.ETIMEDOUT {
		return nil
	}
	if rem != 0 {
		if err := copyOutDuration(t, rem, max(time.Until(end), 0)); err != nil {
			return err
		}
	}
	t.SetRestartBlock(func(t *kernel.Task) (uintptr, error) { return 0, sleepUntil(t, end, rem) })
	return kernel.ERESTART_RESTARTBLOCK
}

// sleep waits for d.
func sleep(t *kernel.Task, d time.Duration, rem hostarch.Addr) error {
	if d == maxDuration {
		return noHandRestart(t.Block(nil)) // 292 years
	}
	return sleepUntil(t, time.Now().Add(d), rem)
}

func sysNanosleep(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	d, err := copyInDuration(t, args[0].Pointer())
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, sleep(t, d, args[1].Pointer())
}

func sysClockNanosleep(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	clock, flags := args[0].Int(), args[1].Int()
	d, err := copyInDuration(t, args[2].Pointer())
	if err != nil {
		return 0, nil, err
	}
	switch clock {
	case linux.CLOCK_REALTIME, linux.CLOCK_MONOTONIC, linux.CLOCK_BOOTTIME, linux.CLOCK_TAI:
	case linux.CLOCK_REALTIME_ALARM, linux.CLOCK_BOOTTIME_ALARM:
		return 0, nil, unix.EPERM
	case linux.CLOCK_PROCESS_CPUTIME_ID:
		return 0, nil, sleepCPU(t, d, flags&linux.TIMER_ABSTIME != 0)
	case linux.CLOCK_THREAD_CPUTIME_ID:
		return 0, nil, unix.EINVAL
	default:
		if hostClock(clock) {
			return 0, nil, unix.EOPNOTSUPP
		}
		return 0, nil, unix.EINVAL
	}
	if flags&linux.TIMER_ABSTIME == 0 {
		return 0, nil, sleep(t, d, args[3].Pointer())
	}
	if d == maxDuration {
		return 0, nil, noHandRestart(t.Block(nil))
	}
	err = t.BlockUntil(nil, time.Now().Add(d-hostNow(clock)))
	if err == unix.ETIMEDOUT {
		return 0, nil, nil
	}
	return 0, nil, noHandRestart(err)
}

// sleepCPU waits until the process has spent d.
func sleepCPU(t *kernel.Task, d time.Duration, absolute bool) error {
	now := func() time.Duration {
		u, s := t.ThreadGroup().CPUTime()
		return u + s
	}
	if !absolute {
		if d += now(); d < 0 {
			d = maxDuration
		}
	}
	for left := d - now(); left > 0; left = d - now() {
		if err := t.BlockUntil(nil, time.Now().Add(max(left, clockTick))); err != unix.ETIMEDOUT {
			return noHandRestart(err)
		}
	}
	return nil
}

// copyInTimeval copies a struct timeval in; EINVAL if it is not normal.
func copyInTimeval(t *kernel.Task, addr hostarch.Addr) (time.Duration, error) {
	var tv linux.Timeval
	if err := t.CopyInStruct(addr, &tv); err != nil {
		return 0, err
	}
	if !tv.Valid() {
		return 0, unix.EINVAL
	}
	if tv.Sec >= int64(maxDuration/time.Second) {
		return maxDuration, nil
	}
	return time.Duration(tv.Nanoseconds()), nil
}

func itimerval(value, interval time.Duration) *linux.Itimerval {
	return &linux.Itimerval{
		Value:    linux.NsecToTimeval(int64((value + time.Microsecond - 1).Truncate(time.Microsecond))),
		Interval: linux.NsecToTimeval(int64(interval)),
	}
}

func sysGetitimer(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	value, interval, err := t.ThreadGroup().IntervalTimer(args[0].Int())
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, t.CopyOutStruct(args[1].Pointer(), itimerval(value, interval))
}

func sysSetitimer(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	var value, interval time.Duration
	if addr := args[1].Pointer(); addr != 0 {
		var err error
		if interval, err = copyInTimeval(t, addr); err != nil {
			return 0, nil, err
		}
		if value, err = copyInTimeval(t, addr+16); err != nil {
			return 0, nil, err
		}
	}
	oldValue, oldInterval, err := t.ThreadGroup().SetIntervalTimer(args[0].Int(), value, interval)
	if err != nil {
		return 0, nil, err
	}
	if addr := args[2].Pointer(); addr != 0 {
		return 0, nil, t.CopyOutStruct(addr, itimerval(oldValue, oldInterval))
	}
	return 0, nil, nil
}

func sysTimerCreate(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	clock := args[0].Int()
	switch {
	case clock == linux.CLOCK_PROCESS_CPUTIME_ID, clock == linux.CLOCK_THREAD_CPUTIME_ID:
	case clock == linux.CLOCK_REALTIME_ALARM, clock == linux.CLOCK_BOOTTIME_ALARM:
		return 0, nil, unix.EPERM
	case clock == linux.CLOCK_REALTIME, clock == linux.CLOCK_MONOTONIC, clock == linux.CLOCK_BOOTTIME, clock == linux.CLOCK_TAI:
	case clock < 0: // another process's or thread's
		return 0, nil, unix.EOPNOTSUPP
	default:
		return 0, nil, unix.EINVAL
	}
	var ev *linux.Sigevent
	if addr := args[1].Pointer(); addr != 0 {
		ev = &linux.Sigevent{}
		if err := t.CopyInStruct(addr, ev); err != nil {
			return 0, nil, err
		}
		switch ev.Notify {
		case linux.SIGEV_NONE, linux.SIGEV_SIGNAL, linux.SIGEV_THREAD, linux.SIGEV_THREAD_ID:
		default:
			return 0, nil, unix.EINVAL
		}
	}
	id, err := t.CreateTimer(clock, ev)
	if err != nil {
		return 0, nil, err
	}
	if err := copyOutInt(t, args[2].Pointer(), id); err != nil {
		t.DeleteTimer(id)
		return 0, nil, err
	}
	return 0, nil, nil
}

func sysTimerSettime(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	addr := args[2].Pointer()
	if addr == 0 {
		return 0, nil, unix.EINVAL
	}
	interval, err := copyInDuration(t, addr)
	if err != nil {
		return 0, nil, err
	}
	value, err := copyInDuration(t, addr+timespecSize)
	if err != nil {
		return 0, nil, err
	}
	oldValue, oldInterval, err := t.SetTimer(args[0].Int(), value, interval, args[1].Int()&linux.TIMER_ABSTIME != 0, hostNow)
	if err != nil {
		return 0, nil, err
	}
	if old := args[3].Pointer(); old != 0 {
		return 0, nil, copyOutItimerspec(t, old, oldValue, oldInterval)
	}
	return 0, nil, nil
}

func sysTimerGettime(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	value, interval, err := t.Timer(args[0].Int())
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, copyOutItimerspec(t, args[1].Pointer(), value, interval)
}

func sysTimerGetoverrun(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	n, err := t.TimerOverrun(args[0].Int())
	return uintptr(n), nil, err
}

func sysTimerDelete(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, t.DeleteTimer(args[0].Int())
}

func sysTimes(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	if addr := args[0].Pointer(); addr != 0 {
		u, s := t.ThreadGroup().CPUTime()
		cu, cs := t.ThreadGroup().ChildCPUTime()
		tms := linux.Tms{
			Utime: int64(u / clockTick), Stime: int64(s / clockTick),
			Cutime: int64(cu / clockTick), Cstime: int64(cs / clockTick),
		}
		if err := t.CopyOutStruct(addr, &tms); err != nil {
			return 0, nil, err
		}
	}
	return uintptr(hostNow(linux.CLOCK_BOOTTIME) / clockTick), nil, nil
}
