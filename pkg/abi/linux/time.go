package linux

import "math"

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

// Timespec is struct timespec.
type Timespec struct {
	Sec  int64
	Nsec int64
}

func (s *Timespec) fields(c *codec) {
	c.i64(&s.Sec)
	c.i64(&s.Nsec)
}

// SizeBytes implements Struct.
func (s *Timespec) SizeBytes() int { return 16 }

// MarshalBytes implements Struct.
func (s *Timespec) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Timespec) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Timeval is struct timeval.
type Timeval struct {
	Sec  int64
	Usec int64
}

func (s *Timeval) fields(c *codec) {
	c.i64(&s.Sec)
	c.i64(&s.Usec)
}

// SizeBytes implements Struct.
func (s *Timeval) SizeBytes() int { return 16 }

// MarshalBytes implements Struct.
func (s *Timeval) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Timeval) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Itimerspec is struct itimerspec (timer_settime(2)).
type Itimerspec struct {
	Interval Timespec
	Value    Timespec
}

func (s *Itimerspec) fields(c *codec) {
	s.Interval.fields(c)
	s.Value.fields(c)
}

// SizeBytes implements Struct.
func (s *Itimerspec) SizeBytes() int { return 32 }

// MarshalBytes implements Struct.
func (s *Itimerspec) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Itimerspec) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Itimerval is struct itimerval (setitimer(2)).
type Itimerval struct {
	Interval Timeval
	Value    Timeval
}

func (s *Itimerval) fields(c *codec) {
	s.Interval.fields(c)
	s.Value.fields(c)
}

// SizeBytes implements Struct.
func (s *Itimerval) SizeBytes() int { return 32 }

// MarshalBytes implements Struct.
func (s *Itimerval) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Itimerval) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Timezone is struct timezone (gettimeofday(2)).
type Timezone struct {
	Minuteswest int32
	Dsttime     int32
}

func (s *Timezone) fields(c *codec) {
	c.i32(&s.Minuteswest)
	c.i32(&s.Dsttime)
}

// SizeBytes implements Struct.
func (s *Timezone) SizeBytes() int { return 8 }

// MarshalBytes implements Struct.
func (s *Timezone) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Timezone) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Tms is struct tms (times(2)), in units of 1/CLOCKS_PER_SEC s.
type Tms struct {
	Utime  int64
	Stime  int64
	Cutime int64
	Cstime int64
}

func (s *Tms) fields(c *codec) {
	c.i64(&s.Utime)
	c.i64(&s.Stime)
	c.i64(&s.Cutime)
	c.i64(&s.Cstime)
}

// SizeBytes implements Struct.
func (s *Tms) SizeBytes() int { return 32 }

// MarshalBytes implements Struct.
func (s *Tms) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Tms) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Timex is struct timex (adjtimex(2)).
type Timex struct {
	Modes     uint32
	_         [4]byte
	Offset    int64
	Freq      int64
	Maxerror  int64
	Esterror  int64
	Status    int32
	_         [4]byte
	Constant  int64
	Precision int64
	Tolerance int64
	Time      Timeval
	Tick      int64
	Ppsfreq   int64
	Jitter    int64
	Shift     int32
	_         [4]byte
	Stabil    int64
	Jitcnt    int64
	Calcnt    int64
	Errcnt    int64
	Stbcnt    int64
	Tai       int32
	_         [44]byte
}

func (s *Timex) fields(c *codec) {
	c.u32(&s.Modes)
	c.pad(4)
	c.i64(&s.Offset)
	c.i64(&s.Freq)
	c.i64(&s.Maxerror)
	c.i64(&s.Esterror)
	c.i32(&s.Status)
	c.pad(4)
	c.i64(&s.Constant)
	c.i64(&s.Precision)
	c.i64(&s.Tolerance)
	s.Time.fields(c)
	c.i64(&s.Tick)
	c.i64(&s.Ppsfreq)
	c.i64(&s.Jitter)
	c.i32(&s.Shift)
	c.pad(4)
	c.i64(&s.Stabil)
	c.i64(&s.Jitcnt)
	c.i64(&s.Calcnt)
	c.i64(&s.Errcnt)
	c.i64(&s.Stbcnt)
	c.i32(&s.Tai)
	c.pad(44)
}

// SizeBytes implements Struct.
func (s *Timex) SizeBytes() int { return 208 }

// MarshalBytes implements Struct.
func (s *Timex) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Timex) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Sigevent is struct sigevent (sigevent(3type)).
type Sigevent struct {
	Value  uint64
	Signo  int32
	Notify int32
	Tid    int32
	_      [44]byte
}

func (s *Sigevent) fields(c *codec) {
	c.u64(&s.Value)
	c.i32(&s.Signo)
	c.i32(&s.Notify)
	c.i32(&s.Tid)
	c.pad(44)
}

// SizeBytes implements Struct.
func (s *Sigevent) SizeBytes() int { return 64 }

// MarshalBytes implements Struct.
func (s *Sigevent) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Sigevent) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

const nsecPerSec = 1_000_000_000

// NsecToTimespec returns ns nanoseconds as a valid Timespec.
func NsecToTimespec(ns int64) Timespec {
	t := Timespec{ns / nsecPerSec, ns % nsecPerSec}
	if t.Nsec < 0 {
		t.Sec--
		t.Nsec += nsecPerSec
	}
	return t
}

// Valid reports whether t is a duration or time that the kernel accepts.
func (t Timespec) Valid() bool { return t.Sec >= 0 && t.Nsec >= 0 && t.Nsec < nsecPerSec }

// Nanoseconds returns the valid t in nanoseconds, or the most that an int64
// holds, as the kernel's KTIME_MAX does.
func (t Timespec) Nanoseconds() int64 {
	if t.Sec >= math.MaxInt64/nsecPerSec {
		return math.MaxInt64
	}
	return t.Sec*nsecPerSec + t.Nsec
}

// NsecToTimeval returns ns nanoseconds, rounded down to microseconds.
func NsecToTimeval(ns int64) Timeval {
	t := NsecToTimespec(ns)
	return Timeval{t.Sec, t.Nsec / 1000}
}

// Valid reports whether t is a duration or time that the kernel accepts.
func (t Timeval) Valid() bool { return t.Sec >= 0 && t.Usec >= 0 && t.Usec < nsecPerSec/1000 }

// Nanoseconds returns the valid t in nanoseconds, or the most that an int64
// holds.
func (t Timeval) Nanoseconds() int64 { return Timespec{t.Sec, t.Usec * 1000}.Nanoseconds() }
