package platformtest

import (
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// Benchmark measures what a Sentry pays for: one sub-benchmark per operation.
// Each also reports "x-getpid", its time in native getpid(2) calls measured in
// the same run, which compares across machines.
func Benchmark(b *testing.B, cfg Config) {
	s := newSuite(b, cfg)
	for _, bm := range []struct {
		name string
		// run returns the time of one operation in ns, or 0 if that is the loop's.
		run func(t *T, b *testing.B) float64
	}{
		{"Syscall", benchSyscall},
		{"SyscallFullState", benchSyscallFullState},
		{"SyscallTwoContexts", benchSyscallTwoContexts},
		{"Fault", benchFault},
		{"FaultMapResume", benchFaultMapResume},
		{"MapUnmap", benchMapUnmap},
		{"MapTouchUnmap", benchMapTouchUnmap},
		{"Interrupt", benchInterrupt},
		{"NewContext", benchNewContext},
		{"NewAddressSpace", benchNewAddressSpace},
	} {
		b.Run(bm.name, func(b *testing.B) {
			t := s.newT(b)
			t.s.cfg.Timeout = time.Hour
			t.run(func(t *T) {
				before := nativeGetpid()
				took := bm.run(t, b)
				b.StopTimer()
				if took == 0 {
					took = float64(b.Elapsed()) / float64(b.N)
				}
				b.ReportMetric(took/min(before, nativeGetpid()), "x-getpid")
			})
		})
	}
}

// nativeGetpid returns the time of getpid(2) in ns, the best of some batches.
func nativeGetpid() float64 {
	best := time.Duration(1 << 62)
	const calls = 2000
	for range 20 {
		start := time.Now()
		for range calls {
			unix.RawSyscall(unix.SYS_GETPID, 0, 0, 0)
		}
		best = min(best, time.Since(start))
	}
	return float64(best) / calls
}

// must is the fast path of a benchmark: Switch, and the result that is expected.
func (th *thread) must(want error) *linux.SignalInfo {
	for {
		info, _, err := th.c.Switch(th.t.ctx, th.sp, th.ac, -1)
		if err == want {
			return info
		}
		if err != platform.ErrContextInterrupt {
			th.t.Fatalf("got %v, want %v", event{info, hostarch.NoAccess, err}, want)
		}
	}
}

func benchSyscall(t *T, b *testing.B) float64 {
	th := t.newSpace().newThread(progSyscall)
	th.must(nil)
	for b.Loop() {
		th.ac.SetReturn(1)
		th.must(nil)
	}
	return 0
}

func benchSyscallFullState(t *T, b *testing.B) float64 {
	th := t.newSpace().newThread(progSyscall)
	th.must(nil)
	for b.Loop() {
		th.pull()
		th.ac.SetReturn(1)
		th.c.FullStateChanged()
		th.must(nil)
	}
	return 0
}

func benchSyscallTwoContexts(t *T, b *testing.B) float64 {
	sp := t.newSpace()
	x, y := sp.newThread(progSyscall), sp.newThread(progSyscall)
	x.must(nil)
	y.must(nil)
	for b.Loop() {
		x.must(nil)
		y.must(nil)
	}
	return 0
}

func benchFault(t *T, b *testing.B) float64 {
	th := t.newSpace().newThread(progLoad, uint64(dataBase))
	th.must(platform.ErrContextSignal)
	for b.Loop() {
		th.must(platform.ErrContextSignal)
	}
	return 0
}

// benchFaultMapResume is a page that the Sentry maps when it is touched.
func benchFaultMapResume(t *T, b *testing.B) float64 {
	sp := t.newSpace()
	th := sp.newThread(progLoad, uint64(dataBase))
	th.must(platform.ErrContextSignal)
	for b.Loop() {
		if err := sp.as.MapFile(dataBase, sp.data, fileRange(0, pageSize), hostarch.ReadWrite, false); err != nil {
			t.Fatal(err)
		}
		th.must(nil)
		sp.as.Unmap(dataBase, pageSize)
		th.must(platform.ErrContextSignal)
	}
	return 0
}

// benchSize is the size of the mappings below, in bytes.
const benchSize = 64 << 10

func benchMapUnmap(t *T, b *testing.B) float64 {
	sp := t.newSpace()
	sp.newThread(progCount).report()
	for b.Loop() {
		if err := sp.as.MapFile(dataBase, sp.data, fileRange(0, benchSize), hostarch.ReadWrite, false); err != nil {
			t.Fatal(err)
		}
		sp.as.Unmap(dataBase, benchSize)
	}
	return 0
}

// benchMapTouchUnmap maps 64 KiB, lets the application write to each page, and
// unmaps.
func benchMapTouchUnmap(t *T, b *testing.B) float64 {
	sp := t.newSpace()
	th := sp.newThread(progFill, uint64(dataBase), uint64(dataBase)+benchSize, pageSize)
	for b.Loop() {
		if err := sp.as.MapFile(dataBase, sp.data, fileRange(0, benchSize), hostarch.ReadWrite, false); err != nil {
			t.Fatal(err)
		}
		th.must(nil)
		sp.as.Unmap(dataBase, benchSize)
	}
	return 0
}

// benchInterrupt is the time from Interrupt to the return of Switch in another
// goroutine.
func benchInterrupt(t *T, b *testing.B) float64 {
	sp := t.newSpace()
	sp.mapData(1, hostarch.ReadWrite)
	th := sp.newThread(progBeat, uint64(dataBase))
	var seen atomic.Uint64
	var stopping atomic.Bool
	done := th.run(func(e event) bool {
		seen.Add(1)
		return stopping.Load()
	})
	var took time.Duration
	n := 0
	for b.Loop() {
		t.beating(sp.data, 0)
		before := seen.Load()
		start := time.Now()
		th.c.Interrupt()
		for seen.Load() == before && !t.over() {
		}
		took += time.Since(start)
		n++
	}
	stopping.Store(true)
	th.halt(done)
	perInterrupt := float64(took) / float64(n)
	b.ReportMetric(perInterrupt, "ns/interrupt")
	return perInterrupt
}

// benchNewContext is a Context's whole life, with one system call.
func benchNewContext(t *T, b *testing.B) float64 {
	sp := t.newSpace()
	sp.newThread(progCount).report()
	for b.Loop() {
		th := sp.newThread(progSyscall)
		th.must(nil)
		th.release()
		t.threads = t.threads[:len(t.threads)-1]
	}
	return 0
}

// benchNewAddressSpace is an AddressSpace's whole life, with one mapping and one
// system call.
func benchNewAddressSpace(t *T, b *testing.B) float64 {
	for b.Loop() {
		sp := t.newBareSpace()
		sp.mapText()
		th := sp.newThread(progSyscall)
		th.must(nil)
		th.release()
		sp.release()
		t.threads = t.threads[:len(t.threads)-1]
		t.spaces = t.spaces[:len(t.spaces)-1]
	}
	return 0
}
