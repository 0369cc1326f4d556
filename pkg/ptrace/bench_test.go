package ptrace

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/affinity"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
)

// manager is a MemoryManager with nothing but an AddressSpace.
type manager struct {
	*platformtest.Manager
	as *addressSpace
}

const codeAddr = platformtest.CodeAddr

// newManager returns an AddressSpace with code at codeAddr.
func newManager(tb testing.TB, code []byte) *manager {
	tb.Helper()
	m := platformtest.NewManager(tb, constructor{}, code)
	return &manager{m, m.AddressSpace().(*addressSpace)}
}

// nativeCall returns the time of getpid(2) in ns, the best of some batches.
func nativeCall() float64 {
	const calls = 1000
	best := time.Hour
	for range 20 {
		start := time.Now()
		for range calls {
			unix.RawSyscall(unix.SYS_GETPID, 0, 0, 0)
		}
		best = min(best, time.Since(start))
	}
	return float64(best) / calls
}

// BenchmarkSyscall measures a system call that the application makes and we
// answer, with and without what makes it fast: pinning tracer and tracee to one
// CPU, and BindThread. All four are measured in turns, so that the ratios do not
// depend on what else the machine does; the figures are those of the best batch.
func BenchmarkSyscall(b *testing.B) {
	m := newManager(b, syscallLoop)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer func() { affinity.Disabled = false }()
	modes := []struct {
		name        string
		bound, pins bool
	}{
		{"bound+pinned", true, true}, {"bound", true, false}, {"pinned", false, true}, {"plain", false, false},
	}
	const batch = 200
	best := []time.Duration{time.Hour, time.Hour, time.Hour, time.Hour}
	native := nativeCall()
	for b.Loop() {
		for i, mode := range modes {
			affinity.Disabled = !mode.pins
			c := &threadContext{}
			if mode.bound {
				c.BindThread()
			}
			ac := arch.New()
			ac.SetIP(codeAddr)
			call := func() {
				for {
					_, _, err := c.Switch(context.Background(), m, ac, -1)
					if err == nil {
						break
					}
					if err != platform.ErrContextInterrupt {
						b.Fatal(err)
					}
				}
				ac.SetReturn(1)
			}
			for range 2 * affinity.HotTurns {
				call()
			}
			start := time.Now()
			for range batch {
				call()
			}
			best[i] = min(best[i], time.Since(start))
			c.Release()
		}
	}
	native = min(native, nativeCall())
	for i, mode := range modes {
		per := float64(best[i]) / batch
		b.ReportMetric(per, "ns/"+mode.name)
		b.ReportMetric(per/native, fmt.Sprintf("x-getpid/%s", mode.name))
	}
	b.ReportMetric(native, "ns/getpid")
}
