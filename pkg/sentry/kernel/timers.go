package kernel

import (
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
)

// tick is the unit in which the time that tasks spend is counted (USER_HZ).
const tick = time.Second / linux.CLOCKS_PER_SEC

// ticker counts the time that tasks spend, and drives the timers that run on
// it. It sleeps while no task runs.
type ticker struct {
	k  *Kernel
	on atomic.Bool
}

// poke starts the ticker if it sleeps.
func (tk *ticker) poke() {
	if !tk.on.Load() && tk.on.CompareAndSwap(false, true) {
		go tk.run()
	}
}

func (tk *ticker) run() {
	timer := time.NewTicker(tick)
	defer timer.Stop()
	for range timer.C {
		if tk.tick() {
			continue
		}
		tk.on.Store(false)
		// A task that began to run just now may have seen it on.
		if !tk.anyRunning() || !tk.on.CompareAndSwap(false, true) {
			return
		}
	}
}

func (tk *ticker) anyRunning() bool {
	k := tk.k
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, t := range k.tasks {
		if t.state.Load() == 'R' {
			return true
		}
	}
	return false
}

// tick counts a tick for every task that runs, and reports whether any does.
func (tk *ticker) tick() bool {
	k := tk.k
	k.mu.Lock()
	defer k.mu.Unlock()
	any := false
	for _, t := range k.tasks {
		if t.state.Load() != 'R' {
			continue
		}
		any = true
		if t.inApp.Load() {
			t.userTicks.Add(1)
		} else {
			t.sysTicks.Add(1)
		}
		t.tg.timers.tickLocked()
	}
	return any
}

// CPUTime returns what a process has spent.
func (tg *ThreadGroup) CPUTime() (user, sys time.Duration) {
	tg.k.mu.Lock()
	defer tg.k.mu.Unlock()
	u, s := tg.ticksLocked()
	return time.Duration(u) * tick, time.Duration(s) * tick
}

// ChildCPUTime returns what the children have spent that were waited for.
func (tg *ThreadGroup) ChildCPUTime() (user, sys time.Duration) {
	tg.k.mu.Lock()
	defer tg.k.mu.Unlock()
	return time.Duration(tg.childUserTicks) * tick, time.Duration(tg.childSysTicks) * tick
}

// CPUTime returns what the thread has spent.
func (t *Task) CPUTime() (user, sys time.Duration) {
	return time.Duration(t.userTicks.Load()) * tick, time.Duration(t.sysTicks.Load()) * tick
}

// Usage returns the resources used by who, RUSAGE_*.
func (t *Task) Usage(who int32) (linux.Rusage, error) {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	switch who {
	case linux.RUSAGE_SELF, linux.RUSAGE_CHILDREN:
		return t.tg.usageLocked(who), nil
	case linux.RUSAGE_THREAD:
		return usage(t.userTicks.Load(), t.sysTicks.Load(), t.tg.peakLocked()), nil
	}
	return linux.Rusage{}, unix.EINVAL
}

func (tg *ThreadGroup) usageLocked(who int32) linux.Rusage {
	if who == linux.RUSAGE_CHILDREN {
		return usage(tg.childUserTicks, tg.childSysTicks, tg.childMaxRSS)
	}
	u, s := tg.ticksLocked()
	return usage(u, s, tg.peakLocked())
}

// peakLocked returns the most memory that the process has held, in bytes.
func (tg *ThreadGroup) peakLocked() uint64 {
	peak := tg.maxRSS
	for _, t := range tg.tasks {
		_, _, p := memoryOf(t.memory())
		peak = max(peak, p)
	}
	return peak
}

func usage(user, sys int64, rss uint64) linux.Rusage {
	return linux.Rusage{
		Utime:  linux.NsecToTimeval(user * int64(tick)),
		Stime:  linux.NsecToTimeval(sys * int64(tick)),
		Maxrss: int64(rss / 1024),
	}
}

func addUsage(u, v *linux.Rusage) {
	u.Utime = linux.NsecToTimeval(u.Utime.Nanoseconds() + v.Utime.Nanoseconds())
	u.Stime = linux.NsecToTimeval(u.Stime.Nanoseconds() + v.Stime.Nanoseconds())
	u.Maxrss = max(u.Maxrss, v.Maxrss)
}

// A timer is one of setitimer(2) or timer_create(2). It is protected by
// Kernel.mu.
type timer struct {
	tg *ThreadGroup
	// fire is called with the number of expirations, at least 1.
	fire func(n int64)
	// clock returns the time that a CPU timer runs on; nil for real time.
	clock func() time.Duration

	armed    bool
	interval time.Duration
	// end is the next expiration: endTime of a timer in real time.
	end     time.Duration
	endTime time.Time
	host    *time.Timer
	// generation tells a late call of host from one that counts.
	generation int
}

// setLocked arms the timer to expire in value, and every interval from then on;
// value 0 disarms it. It returns what was set before.
func (tm *timer) setLocked(value, interval time.Duration) (oldValue, oldInterval time.Duration) {
	oldValue, oldInterval = tm.leftLocked(), tm.interval
	tm.stopLocked()
	tm.interval = interval
	if value <= 0 {
		return oldValue, oldInterval
	}
	tm.armed = true
	if tm.clock != nil {
		tm.end = tm.clock() + value
	} else {
		tm.endTime = time.Now().Add(value)
		tm.startLocked(value)
	}
	return oldValue, oldInterval
}

func (tm *timer) stopLocked() {
	tm.armed = false
	tm.generation++
	if tm.host != nil {
		tm.host.Stop()
		tm.host = nil
	}
}

func (tm *timer) startLocked(d time.Duration) {
	tm.generation++
	generation := tm.generation
	tm.host = time.AfterFunc(d, func() {
		k := tm.tg.k
		k.mu.Lock()
		defer k.mu.Unlock()
		if tm.armed && tm.generation == generation {
			tm.expireLocked()
		}
	})
}

// expireLocked does what is to be done at the end of a period.
func (tm *timer) expireLocked() {
	n := int64(1)
	if tm.interval == 0 {
		tm.armed = false
	} else {
		var late time.Duration
		if tm.clock != nil {
			late = tm.clock() - tm.end
		} else {
			late = time.Since(tm.endTime)
		}
		if late > 0 {
			n += int64(late / tm.interval)
		}
		step := time.Duration(n) * tm.interval
		tm.end += step
		tm.endTime = tm.endTime.Add(step)
		if tm.clock == nil {
			tm.startLocked(max(time.Until(tm.endTime), tm.pauseLocked()))
		}
	}
	tm.fire(n)
}

// pausePerTimer is the time between two expirations of a process's timers in real
// time that is the least if all of them expire all the time: the Sentry must have
// time for others. What is left out is counted as overruns.
const pausePerTimer = 20 * time.Microsecond

func (tm *timer) pauseLocked() time.Duration {
	return pausePerTimer * time.Duration(1+len(tm.tg.timers.posix))
}

// leftLocked returns the time until the timer expires, 0 if it is not armed.
func (tm *timer) leftLocked() time.Duration {
	if !tm.armed {
		return 0
	}
	left := time.Until(tm.endTime)
	if tm.clock != nil {
		left = tm.end - tm.clock()
	}
	return max(left, 1)
}

// posixTimer is a timer of timer_create(2).
type posixTimer struct {
	timer
	id     int32
	clock  int32
	notify int32
	signo  linux.Signal
	value  uint64
	// target is the thread that SIGEV_THREAD_ID names, or nil.
	target *Task
	// queued says that the signal of an expiration is pending; overruns are
	// those since, and lastOverrun what they were when it was delivered.
	queued      bool
	overruns    int64
	lastOverrun int32
}

func (p *posixTimer) expired(n int64) {
	if p.notify == linux.SIGEV_NONE {
		return
	}
	if p.queued {
		p.overruns += n
		return
	}
	p.overruns = n - 1
	info := &linux.SignalInfo{Signo: int32(p.signo), Code: linux.SI_TIMER}
	info.SetTimerID(p.id)
	info.SetSigval(p.value)
	p.tg.k.sendLocked(p.tg, p.target, info, p)
}

// deliveredLocked is called when the signal of the timer is taken.
func (p *posixTimer) deliveredLocked(info *linux.SignalInfo) {
	p.queued = false
	p.lastOverrun = int32(min(p.overruns, 1<<31-1))
	p.overruns = 0
	info.SetOverrun(p.lastOverrun)
}

// processTimers are the timers of a process, protected by Kernel.mu.
type processTimers struct {
	tg *ThreadGroup
	// interval are those of setitimer(2), made when they are first used.
	interval [3]*timer
	posix    map[int32]*posixTimer
	nextID   int32
	// cpu are the timers that run on CPU time.
	cpu []*timer
	// overCPU is when RLIMIT_CPU was last acted on.
	overCPU time.Duration
}

func (p *processTimers) stopLocked() {
	for _, tm := range p.interval {
		if tm != nil {
			tm.stopLocked()
		}
	}
	p.stopPOSIXLocked()
}

// stopPOSIXLocked deletes the timers of timer_create(2), as execve(2) does.
func (p *processTimers) stopPOSIXLocked() {
	for _, tm := range p.posix {
		tm.stopLocked()
	}
	p.posix = nil
	p.cpu = slices.DeleteFunc(p.cpu, func(tm *timer) bool { return !slices.Contains(p.interval[:], tm) })
}

// tickLocked is called when a tick has been counted for the process.
func (p *processTimers) tickLocked() {
	for _, tm := range p.cpu {
		if tm.armed && tm.clock() >= tm.end {
			tm.expireLocked()
		}
	}
	if cur, hard := p.tg.limitLocked(linux.RLIMIT_CPU); cur != linux.RLIM_INFINITY {
		used := p.cpuLocked()
		switch seconds := uint64(used / time.Second); {
		case seconds >= hard:
			p.tg.k.sendLocked(p.tg, nil, KernelSignal(linux.SIGKILL), nil)
		case seconds >= cur && used-p.overCPU >= time.Second:
			p.overCPU = used
			p.tg.k.sendLocked(p.tg, nil, KernelSignal(linux.SIGXCPU), nil)
		}
	}
}

func (p *processTimers) cpuLocked() time.Duration {
	u, s := p.tg.ticksLocked()
	return time.Duration(u+s) * tick
}

// SetIntervalTimer is setitimer(2) of which, ITIMER_*.
func (tg *ThreadGroup) SetIntervalTimer(which int32, value, interval time.Duration) (oldValue, oldInterval time.Duration, err error) {
	tm, err := tg.lockIntervalTimer(which)
	if err != nil {
		return 0, 0, err
	}
	defer tg.k.mu.Unlock()
	oldValue, oldInterval = tm.setLocked(value, interval)
	return oldValue, oldInterval, nil
}

// IntervalTimer is getitimer(2).
func (tg *ThreadGroup) IntervalTimer(which int32) (value, interval time.Duration, err error) {
	tm, err := tg.lockIntervalTimer(which)
	if err != nil {
		return 0, 0, err
	}
	defer tg.k.mu.Unlock()
	return tm.leftLocked(), tm.interval, nil
}

// lockIntervalTimer returns a timer of setitimer(2) with Kernel.mu held.
func (tg *ThreadGroup) lockIntervalTimer(which int32) (*timer, error) {
	var sig linux.Signal
	var clock func() time.Duration
	p := &tg.timers
	switch which {
	case linux.ITIMER_REAL:
		sig = linux.SIGALRM
	case linux.ITIMER_VIRTUAL:
		sig = linux.SIGVTALRM
		clock = func() time.Duration {
			u, _ := tg.ticksLocked()
			return time.Duration(u) * tick
		}
	case linux.ITIMER_PROF:
		sig, clock = linux.SIGPROF, p.cpuLocked
	default:
		return nil, unix.EINVAL
	}
	tg.k.mu.Lock()
	if p.interval[which] == nil {
		tm := &timer{tg: tg, clock: clock, fire: func(int64) { tg.k.sendLocked(tg, nil, KernelSignal(sig), nil) }}
		p.interval[which] = tm
		if clock != nil {
			p.cpu = append(p.cpu, tm)
		}
	}
	return p.interval[which], nil
}

// maxPOSIXTimers bounds the timers of a process.
const maxPOSIXTimers = 4096

// CreateTimer makes a timer (timer_create(2)) on a clock that the caller has
// checked: CLOCK_*_CPUTIME_ID, or any other for real time. ev.Notify is
// SIGEV_NONE, or anything else for a signal.
func (t *Task) CreateTimer(clock int32, ev *linux.Sigevent) (int32, error) {
	k := t.k
	k.mu.Lock()
	defer k.mu.Unlock()
	p := &t.tg.timers
	if len(p.posix) >= maxPOSIXTimers {
		return 0, unix.EAGAIN
	}
	tm := &posixTimer{id: p.nextID, clock: clock}
	tm.timer.tg = t.tg
	tm.fire = tm.expired
	if ev == nil {
		tm.signo, tm.value = linux.SIGALRM, uint64(tm.id)
	} else {
		tm.notify, tm.signo, tm.value = ev.Notify, linux.Signal(ev.Signo), ev.Value
		if ev.Notify == linux.SIGEV_THREAD_ID {
			other := k.tasks[ev.Tid]
			if other == nil || other.tg != t.tg {
				return 0, unix.EINVAL
			}
			tm.target = other
		}
		if ev.Notify != linux.SIGEV_NONE && !tm.signo.IsValid() {
			return 0, unix.EINVAL
		}
	}
	switch clock {
	case linux.CLOCK_PROCESS_CPUTIME_ID:
		tm.timer.clock = p.cpuLocked
	case linux.CLOCK_THREAD_CPUTIME_ID:
		tm.timer.clock = func() time.Duration {
			u, s := t.CPUTime()
			return u + s
		}
	}
	if tm.timer.clock != nil {
		p.cpu = append(p.cpu, &tm.timer)
	}
	if p.posix == nil {
		p.posix = make(map[int32]*posixTimer)
	}
	p.posix[tm.id] = tm
	p.nextID++
	return tm.id, nil
}

// SetTimer arms or disarms a timer (timer_settime(2)). With absolute, value is a
// time on the timer's clock.
func (t *Task) SetTimer(id int32, value, interval time.Duration, absolute bool, now func(clock int32) time.Duration) (oldValue, oldInterval time.Duration, err error) {
	k := t.k
	k.mu.Lock()
	defer k.mu.Unlock()
	tm := t.tg.timers.posix[id]
	if tm == nil {
		return 0, 0, unix.EINVAL
	}
	if absolute && value != 0 {
		at := value
		if tm.timer.clock != nil {
			value -= tm.timer.clock()
		} else {
			value -= now(tm.clock)
		}
		if at > 0 {
			value = max(value, 1) // in the past: at once
		}
	}
	tm.overruns = 0
	oldValue, oldInterval = tm.setLocked(value, interval)
	return oldValue, oldInterval, nil
}

// Timer returns what is left of a timer (timer_gettime(2)).
func (t *Task) Timer(id int32) (value, interval time.Duration, err error) {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	tm := t.tg.timers.posix[id]
	if tm == nil {
		return 0, 0, unix.EINVAL
	}
	return tm.leftLocked(), tm.interval, nil
}

// TimerOverrun is timer_getoverrun(2).
func (t *Task) TimerOverrun(id int32) (int32, error) {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	tm := t.tg.timers.posix[id]
	if tm == nil {
		return 0, unix.EINVAL
	}
	return tm.lastOverrun, nil
}

// DeleteTimer is timer_delete(2).
func (t *Task) DeleteTimer(id int32) error {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	p := &t.tg.timers
	tm := p.posix[id]
	if tm == nil {
		return unix.EINVAL
	}
	tm.stopLocked()
	delete(p.posix, id)
	p.cpu = slices.DeleteFunc(p.cpu, func(c *timer) bool { return c == &tm.timer })
	return nil
}
