package systrap

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
	"github.com/ringfence/ringfence/pkg/sysmsg"
	"github.com/ringfence/ringfence/pkg/usertrap"
)

// forCalls runs f with a Context that makes system calls by signal, and one that makes
// them as patched code does. next makes one.
func forCalls(t *testing.T, f func(t *testing.T, m *manager, c *threadContext, ac *arch.Context64, next func())) {
	for _, name := range []string{"Signal", "Call"} {
		t.Run(name, func(t *testing.T) {
			m := newManager(t, syscallLoop)
			if name == "Call" {
				m = newManager(t, callLoop(m.as))
				m.as.table.Store(usertrap.NewTable(uint64(m.as.at.call), &usertrap.Stats{}))
			}
			c, ac := &threadContext{}, arch.New()
			defer c.Release()
			ac.SetIP(codeAddr)
			f(t, m, c, ac, func() {
				t.Helper()
				for {
					_, _, err := c.Switch(context.Background(), m, ac, -1)
					if err == nil {
						ac.SetReturn(1)
						return
					}
					if err != platform.ErrContextInterrupt {
						t.Fatal(err)
					}
				}
			})
		})
	}
}

// untilLooks calls next until a thread looks at its slot, and f returns true then.
func untilLooks(t *testing.T, as *addressSpace, next func(), f func(*thread) bool) {
	t.Helper()
	for start := time.Now(); time.Since(start) < time.Minute; {
		next()
		if th := as.looker.Load(); th != nil && f(th) {
			return
		}
	}
	t.Fatal("it does not happen")
}

// isMapped reports whether there is a mapping in the stub that begins at addr.
func isMapped(t *testing.T, as *addressSpace, addr uint64) bool {
	t.Helper()
	maps, err := os.ReadFile("/proc/" + strconv.Itoa(as.pid) + "/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains("\n"+string(maps), fmt.Sprintf("\n%08x-", addr))
}

// A thread that looks at its slot has the system call thread do a request. With one CPU
// none looks.
func TestErrand(t *testing.T) {
	forCalls(t, func(t *testing.T, m *manager, c *threadContext, ac *arch.Context64, next func()) {
		as := m.as
		if runtime.NumCPU() < 2 {
			for range 10 * maxPace {
				if next(); as.looker.Load() != nil {
					t.Fatal("a thread looks at its slot")
				}
			}
			return
		}
		const at = 0x10000000
		f := platformtest.NewMemFile(t, hostarch.PageSize)
		untilLooks(t, as, next, func(*thread) bool {
			if err := as.MapFile(at, f, memmap.FileRange{End: hostarch.PageSize}, hostarch.Read, false); err != nil {
				t.Fatal(err)
			}
			if !isMapped(t, as, at) {
				t.Fatal("MapFile has no effect")
			}
			as.reqMu.Lock()
			defer as.reqMu.Unlock()
			as.post([]call{{unix.SYS_MUNMAP, [6]uint64{at, hostarch.PageSize}}})
			done := as.errand()
			if !done {
				sysmsg.FutexWake(word32(as.mem.region, requestSeq))
			}
			if _, err := as.finish(0); err != nil {
				t.Fatal(err)
			}
			if isMapped(t, as, at) {
				t.Fatal("munmap has no effect")
			}
			return done
		})
		for range 10 {
			next()
		}
	})
}

// An application that makes a thread wait for ever on an errand is interrupted there.
func TestForgedErrand(t *testing.T) {
	forCalls(t, func(t *testing.T, m *manager, c *threadContext, ac *arch.Context64, next func()) {
		next()
		th := c.thread
		state := word32(th.slot, stackSize+headerState)
		header := th.slot[stackSize:]
		for sent := false; !sent; {
			binary.LittleEndian.PutUint64(header[headerUntil:], th.addr+stackSize+headerWhile)
			binary.LittleEndian.PutUint32(header[headerWhile:], 1)
			// Asleep it has to be woken to see it.
			sent = th.word.Errand() || state.CompareAndSwap(sysmsg.SentryStubWaits, sysmsg.Errand)
		}
		sysmsg.FutexWake(state)
		for state.Load() != sysmsg.Sentry {
			time.Sleep(time.Millisecond)
		}
		for range 3 {
			if err := bounded(t, c, m, ac); err != platform.ErrContextInterrupt && err != nil {
				t.Fatal(err)
			}
			if err := m.as.check(); err != nil {
				t.Fatal(err)
			}
		}
		next()
	})
}
