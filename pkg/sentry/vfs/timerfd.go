package vfs

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/waiter"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// timerFD is the file of timerfd_create(2).
type timerFD struct {
	anonFile
	waiter.Queue
	realtime bool

	mu sync.Mutex
	// timer runs while the timerfd is armed. generation tells its calls from
	// those of timers before it.
	timer      *time.Timer
	generation uint64
	next       time.Time // of the next expiration; zero when disarmed
	interval   time.Duration
	ticks      uint64
}

// NewTimerFD returns a timerfd. Absolute times are of CLOCK_REALTIME if
// realtime is set, otherwise of CLOCK_MONOTONIC. flags are status flags.
func NewTimerFD(realtime bool, flags uint32) *FileDescription {
	t := &timerFD{anonFile: newAnonFile(0o600), realtime: realtime}
	return NewFileDescription(t, unix.O_RDWR|flags, func() string { return "anon_inode:[timerfd]" })
}

// now returns now both as Go sees it and as the clock of t reads.
func (t *timerFD) now() (time.Time, time.Duration) {
	now := time.Now()
	if t.realtime {
		return now, time.Duration(now.UnixNano())
	}
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // cannot fail for this clock
	return now, time.Duration(ts.Nano())
}

// SetTimerFD arms f, or disarms it if value is 0 (timerfd_settime(2)), and
// returns what was left before. value is relative, or absolute by f's clock.
func SetTimerFD(f *FileDescription, value, interval time.Duration, absolute bool) (oldValue, oldInterval time.Duration, err error) {
	t, ok := f.Impl().(*timerFD)
	if !ok {
		return 0, 0, unix.EINVAL
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	oldValue, oldInterval = t.leftLocked()
	if t.timer != nil {
		t.timer.Stop()
		t.timer = nil
	}
	t.generation++
	t.ticks, t.interval, t.next = 0, interval, time.Time{}
	if value == 0 {
		return oldValue, oldInterval, nil
	}
	now, clock := t.now()
	if absolute {
		value -= clock
	}
	t.next = now.Add(value)
	generation := t.generation
	t.timer = time.AfterFunc(max(value, 0), func() { t.fire(generation) })
	return oldValue, oldInterval, nil
}

// GetTimerFD returns the time until f expires next, and its interval
// (timerfd_gettime(2)).
func GetTimerFD(f *FileDescription) (value, interval time.Duration, err error) {
	t, ok := f.Impl().(*timerFD)
	if !ok {
		return 0, 0, unix.EINVAL
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	value, interval = t.leftLocked()
	return value, interval, nil
}

func (t *timerFD) leftLocked() (value, interval time.Duration) {
	if t.next.IsZero() {
		return 0, t.interval
	}
	return max(time.Until(t.next), 1), t.interval
}

// fire counts the expirations that have passed and arms the timer again.
func (t *timerFD) fire(generation uint64) {
	t.mu.Lock()
	if generation != t.generation {
		t.mu.Unlock()
		return
	}
	if t.interval > 0 {
		n := max(1+int64(time.Since(t.next)/t.interval), 1)
		t.ticks += uint64(n)
		t.next = t.next.Add(time.Duration(n) * t.interval)
		t.timer = time.AfterFunc(time.Until(t.next), func() { t.fire(generation) })
	} else {
		t.ticks++
		t.next, t.timer = time.Time{}, nil
	}
	t.mu.Unlock()
	t.Notify(waiter.ReadableEvents)
}

// Stat implements Impl.
func (t *timerFD) Stat(context.Context) (unix.Stat_t, error) { return t.stat(), nil }

// Release implements Impl.
func (t *timerFD) Release() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.generation++
	if t.timer != nil {
		t.timer.Stop()
	}
}

// Read implements StreamReader.
func (t *timerFD) Read(_ context.Context, p []byte) (int, error) {
	if len(p) < 8 {
		return 0, unix.EINVAL
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ticks == 0 {
		return 0, unix.EAGAIN
	}
	usermem.ByteOrder.PutUint64(p, t.ticks)
	t.ticks = 0
	return 8, nil
}

// Readiness implements waiter.Waitable.
func (t *timerFD) Readiness(mask waiter.EventMask) waiter.EventMask {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ticks > 0 {
		return waiter.ReadableEvents & mask
	}
	return 0
}
