package sysmsg

import (
	"sync/atomic"
	"testing"
	"time"
)

// Two threads play both sides in memory.
func TestPingPong(t *testing.T) {
	for _, spins := range []uint32{0, 100} {
		var word atomic.Uint32
		w := NewWord(&word, time.Second)
		w.Init()
		const rounds = 2000
		data := 0
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range rounds {
				for s := SpinWhile(&word, Sentry, spins); s == Sentry || s == SentryStubWaits; s = word.Load() {
					word.CompareAndSwap(Sentry, SentryStubWaits)
					FutexWait(&word, SentryStubWaits, time.Second)
				}
				data++
				if word.Swap(Sentry) == StubSentryWaits {
					FutexWake(&word)
				}
			}
		}()
		for i := range rounds {
			data++
			w.Resume()
			o, err := w.Wait(spins)
			if err != nil || o == TimedOut {
				t.Fatalf("round %d: %v, %v", i, o, err)
			}
			if data != 2*(i+1) {
				t.Fatalf("round %d: %d", i, data)
			}
		}
		<-done
	}
}

func TestWaitTimesOut(t *testing.T) {
	var word atomic.Uint32
	w := NewWord(&word, time.Millisecond)
	w.Init()
	w.Resume()
	for range 2 {
		if o, err := w.Wait(10); o != TimedOut || err != nil {
			t.Errorf("Wait: %v, %v", o, err)
		}
	}
}

// Nor does it go on for ever when it is woken for nothing.
func TestWaitTimesOutAwake(t *testing.T) {
	var word atomic.Uint32
	w := NewWord(&word, 100*time.Millisecond)
	w.Init()
	w.Resume()
	returned, woken := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(woken)
		for {
			select {
			case <-returned:
				return
			default:
				FutexWake(&word)
			}
		}
	}()
	for range 2 {
		if o, err := w.Wait(0); o != TimedOut || err != nil {
			t.Errorf("Wait: %v, %v", o, err)
		}
	}
	close(returned)
	<-woken
}

func TestSpinWhile(t *testing.T) {
	var word atomic.Uint32
	word.Store(7)
	for _, n := range []uint32{0, 1, 1000} {
		if got := SpinWhile(&word, 7, n); got != 7 {
			t.Errorf("SpinWhile(7, %d) = %d", n, got)
		}
		if got := SpinWhile(&word, 6, n); got != 7 {
			t.Errorf("SpinWhile(6, %d) = %d", n, got)
		}
	}
	if Spins(time.Second) < 1000 {
		t.Errorf("a second has %d spins", Spins(time.Second))
	}
}

// After waits that were too long for spinning there is none, but for a try now
// and then; after one that was not there is again.
func TestSpinner(t *testing.T) {
	var s Spinner
	if got := s.Next(100); got != 100 {
		t.Errorf("at first: %d", got)
	}
	for range 10 {
		s.Next(100)
		s.Report(Slept)
	}
	spun := 0
	for range 10 * retryAfter {
		if s.Next(100) > 0 {
			spun++
		}
		s.Report(Slept)
	}
	if spun != 10 {
		t.Errorf("%d tries in %d waits, want 10", spun, 10*retryAfter)
	}
	s.Report(Spun)
	if got := s.Next(100); got != 100 {
		t.Errorf("after success: %d", got)
	}
}
