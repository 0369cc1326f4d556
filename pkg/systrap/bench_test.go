package systrap

import (
	"context"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
)

// memFile is a memory file.
type memFile int

func newMemFile(tb testing.TB, size int64) memFile {
	tb.Helper()
	fd, err := unix.MemfdCreate("systrap-test", unix.MFD_CLOEXEC)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, size); err != nil {
		tb.Fatal(err)
	}
	return memFile(fd)
}

func (memFile) IncRef(memmap.FileRange) {}
func (memFile) DecRef(memmap.FileRange) {}
func (memFile) MapInternal(memmap.FileRange, hostarch.AccessType) ([][]byte, error) {
	return nil, unix.ENOSYS
}
func (f memFile) FD() int { return int(f) }

// manager is a MemoryManager with nothing but an AddressSpace.
type manager struct {
	platform.MemoryManager
	as *addressSpace
}

func (m *manager) AddressSpace() platform.AddressSpace { return m.as }

const codeAddr = 0x400000

// newManager returns an AddressSpace with code at codeAddr.
func newManager(tb testing.TB, code []byte) *manager {
	tb.Helper()
	p, err := constructor{}.New(nil)
	if err != nil {
		tb.Fatal(err)
	}
	as, _, err := p.NewAddressSpace(nil)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(as.Release)
	f := newMemFile(tb, hostarch.PageSize)
	if _, err := unix.Pwrite(f.FD(), code, 0); err != nil {
		tb.Fatal(err)
	}
	if err := as.MapFile(codeAddr, f, memmap.FileRange{End: hostarch.PageSize}, hostarch.ReadExec, false); err != nil {
		tb.Fatal(err)
	}
	return &manager{as: as.(*addressSpace)}
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
func BenchmarkSyscall(b *testing.B) {
	m := newManager(b, syscallLoop)
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
