package linux

// Clocks of clock_gettime(2).
const (
	CLOCK_REALTIME           = 0
	CLOCK_MONOTONIC          = 1
	CLOCK_PROCESS_CPUTIME_ID = 2
	CLOCK_THREAD_CPUTIME_ID  = 3
	CLOCK_MONOTONIC_RAW      = 4
	CLOCK_REALTIME_COARSE    = 5
	CLOCK_MONOTONIC_COARSE   = 6
	CLOCK_BOOTTIME           = 7
	CLOCK_REALTIME_ALARM     = 8
	CLOCK_BOOTTIME_ALARM     = 9
	CLOCK_TAI                = 11
)

// Parts of the negative clocks that stand for a process, thread or device
// (linux/posix-timers.h).
const (
	CPUCLOCK_PERTHREAD_MASK = 4
	CPUCLOCK_CLOCK_MASK     = 3
	CPUCLOCK_PROF           = 0
	CPUCLOCK_VIRT           = 1
	CPUCLOCK_SCHED          = 2
	CLOCKFD                 = 3
)

// Flags of timer_settime(2) and timers of setitimer(2).
const (
	TIMER_ABSTIME  = 1
	ITIMER_REAL    = 0
	ITIMER_VIRTUAL = 1
	ITIMER_PROF    = 2
)

// CLOCKS_PER_SEC is the unit of times(2), AT_CLKTCK and /proc/PID/stat.
const (
	CLOCKS_PER_SEC = 100
)

// Modes and results of adjtimex(2).
const (
	ADJ_OFFSET    = 1
	ADJ_FREQUENCY = 2
	ADJ_STATUS    = 16
	ADJ_TICK      = 16384
	ADJ_SETOFFSET = 256
	ADJ_NANO      = 8192
	STA_NANO      = 8192
	STA_UNSYNC    = 64
	TIME_OK       = 0
	TIME_ERROR    = 5
)

// Values of sigev_notify (sigevent(3type)).
const (
	SIGEV_SIGNAL    = 0
	SIGEV_NONE      = 1
	SIGEV_THREAD    = 2
	SIGEV_THREAD_ID = 4
)
