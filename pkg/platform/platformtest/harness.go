package platformtest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/platform"
)

// T is what a subtest is run with.
type T struct {
	testing.TB
	s   *suite
	ctx context.Context

	// failed is closed when the subtest has failed or its time is over: loops
	// and waits end.
	failed     chan struct{}
	failedOnce sync.Once

	mu      sync.Mutex
	threads []*thread
	spaces  []*space
	files   []*file

	workers sync.WaitGroup
}

func (s *suite) newT(tb testing.TB) *T {
	return &T{TB: tb, s: s, ctx: context.WithValue(context.Background(), platform.CtxPlatform, s.p), failed: make(chan struct{})}
}

func (t *T) end() { t.failedOnce.Do(func() { close(t.failed) }) }

// over reports whether the subtest has failed or is over.
func (t *T) over() bool {
	select {
	case <-t.failed:
		return true
	default:
		return false
	}
}

// Fatalf fails the subtest and ends the goroutine, which may be any of its own.
func (t *T) Fatalf(format string, args ...any) {
	t.Helper()
	t.Errorf(format, args...)
	t.end()
	runtime.Goexit()
}

// Fatal is Fatalf without a format.
func (t *T) Fatal(args ...any) {
	t.Helper()
	t.Fatalf("%s", fmt.Sprint(args...))
}

// run runs f and frees what it made. When f takes longer than the time it has,
// run fails the subtest with a dump of all goroutines, tries to get the hung
// goroutines out, and returns false if that did not help.
func (t *T) run(f func(t *T)) bool {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer t.end()
		defer func() {
			if r := recover(); r != nil {
				t.Errorf("panic: %v\n%s", r, debug.Stack())
			}
		}()
		f(t)
	}()
	timeout := time.NewTimer(t.s.cfg.Timeout)
	defer timeout.Stop()
	select {
	case <-done:
	case <-timeout.C:
		t.Errorf("not done after %v; all goroutines:\n%s", t.s.cfg.Timeout, goroutines())
		t.end()
	}
	joined := make(chan struct{})
	go func() {
		<-done
		t.workers.Wait()
		close(joined)
	}()
	if !t.shake(joined) {
		t.Errorf("goroutines of the subtest hang although their Contexts were interrupted")
		return false
	}
	t.free()
	return true
}

// goroutines returns the stacks of all goroutines.
func goroutines() []byte {
	buf := make([]byte, 1<<20)
	return buf[:runtime.Stack(buf, true)]
}

// shake interrupts all Contexts until joined is closed, for some seconds.
func (t *T) shake(joined chan struct{}) bool {
	for range 5000 {
		select {
		case <-joined:
			return true
		case <-time.After(time.Millisecond):
		}
		t.mu.Lock()
		for _, th := range t.threads {
			if th.busy.Load() {
				th.c.Interrupt()
			}
		}
		t.mu.Unlock()
	}
	return false
}

// free releases everything, in the order that package platform demands.
func (t *T) free() {
	t.Helper()
	for _, th := range t.threads {
		th.release()
	}
	for _, sp := range t.spaces {
		sp.release()
	}
	for _, f := range t.files {
		if err := f.close(); err != nil {
			t.Error(err)
		}
	}
}

// worker runs f in a goroutine that the subtest waits for when it is over. f
// must end once t.over returns true.
func (t *T) worker(f func()) (done chan struct{}) {
	done = make(chan struct{})
	t.workers.Add(1)
	go func() {
		defer t.workers.Done()
		defer close(done)
		defer func() {
			if r := recover(); r != nil {
				t.Errorf("panic: %v\n%s", r, debug.Stack())
				t.end()
			}
		}()
		f()
	}()
	return done
}

// wait waits for ch, or ends the goroutine when the subtest has failed.
func (t *T) wait(ch <-chan struct{}) {
	select {
	case <-ch:
	case <-t.failed:
		select {
		case <-ch:
		default:
			runtime.Goexit()
		}
	}
}

// until polls until cond holds. It ends the goroutine when the subtest has
// failed; the watchdog sees to it that it does.
func (t *T) until(cond func() bool) {
	for i := 0; !cond(); i++ {
		if t.over() {
			runtime.Goexit()
		}
		if i < 10 {
			runtime.Gosched()
		} else {
			time.Sleep(50 * time.Microsecond)
		}
	}
}

// newFile returns a memory file that lives as long as the subtest.
func (t *T) newFile(size uint64) *file {
	t.Helper()
	f, err := newFile(size)
	if err != nil {
		t.Fatal(err)
	}
	t.mu.Lock()
	t.files = append(t.files, f)
	t.mu.Unlock()
	return f
}

// random returns a source of numbers, the same in every run.
func random(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0x72696e67)) }

func isErrno(err error) bool {
	var errno unix.Errno
	return errors.As(err, &errno) && errno != 0
}

// lines joins what was found, each on a line of its own.
func lines(s []string) string { return strings.Join(s, "\n\t") }
