package systrap

import (
	"context"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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

// best returns the time of f in ns, the best of some batches.
func best(batches, calls int, f func()) float64 {
	best := time.Hour
	for range batches {
		start := time.Now()
		for range calls {
			f()
		}
		best = min(best, time.Since(start))
	}
	return float64(best) / float64(calls)
}

// nativeCall returns the time of getpid(2) in ns.
func nativeCall() float64 {
	return best(20, 1000, func() { unix.RawSyscall(unix.SYS_GETPID, 0, 0, 0) })
}

// BenchmarkSyscall measures a system call that the application makes and we
// answer, and how many getpid(2) it takes. The figures are those of the best
// batch, so that what else the machine does counts little.
func BenchmarkSyscall(b *testing.B) { benchCalls(b, newManager(b, syscallLoop)) }

// benchCalls answers the calls of the code in m.
func benchCalls(b *testing.B, m *manager) {
	c := &threadContext{}
	defer c.Release()
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
	native, ours := nativeCall(), float64(time.Hour)
	for b.Loop() {
		ours = min(ours, best(10, 20, call))
	}
	native = min(native, nativeCall())
	b.ReportMetric(ours, "ns/call")
	b.ReportMetric(native, "ns/getpid")
	b.ReportMetric(ours/native, "x-getpid")
}

// BenchmarkAddressSpace measures a new AddressSpace, with a thread, and its Release.
func BenchmarkAddressSpace(b *testing.B) {
	newManager(b, syscallLoop) // Others are live.
	for b.Loop() {
		as, err := stubs.take()
		if err != nil {
			b.Fatal(err)
		}
		c := &threadContext{}
		if err := c.bind(as); err != nil {
			b.Fatal(err)
		}
		c.Release()
		as.Release()
	}
}
