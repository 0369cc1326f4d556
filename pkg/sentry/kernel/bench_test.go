package kernel_test

import (
	"context"
	"io"
	"log"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
	"github.com/ringfence/ringfence/pkg/sentry/pgalloc"
	"github.com/ringfence/ringfence/pkg/sentry/syscalls"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/devfs"
)

// loopPlatform is a platform that costs nothing: step is the application, which
// does something n times.
type loopPlatform struct {
	fakePlatform
	n    int
	task *kernel.Task
	step func(p *loopPlatform, ac *arch.Context64) error
}

func (p *loopPlatform) NewContext(ctx context.Context) platform.Context {
	p.task = ctx.(*kernel.Task)
	return loopContext{nil, p}
}

type loopContext struct {
	platform.Context
	p *loopPlatform
}

func (c loopContext) Switch(_ context.Context, _ platform.MemoryManager, ac *arch.Context64, _ int32) (*linux.SignalInfo, hostarch.AccessType, error) {
	if c.p.n == 0 {
		return nil, hostarch.NoAccess, system(ac, unix.SYS_EXIT_GROUP, 0)
	}
	return nil, hostarch.NoAccess, c.p.step(c.p, ac)
}

func (loopContext) PullFullState(platform.AddressSpace, *arch.Context64) error { return nil }
func (loopContext) FullStateChanged()                                          {}
func (loopContext) PrepareSleep()                                              {}
func (loopContext) Interrupt()                                                 {}
func (loopContext) Release()                                                   {}

// system makes a system call.
func system(ac *arch.Context64, nr uintptr, args ...uintptr) error {
	enterSyscall(ac, nr, args)
	return nil
}

// loop measures the Sentry's part of what step does. Descriptor 0 is /dev/zero.
func loop(b *testing.B, step func(p *loopPlatform, ac *arch.Context64) error) {
	mf, err := pgalloc.New("test")
	if err != nil {
		b.Fatal(err)
	}
	defer mf.Destroy()
	k := kernel.New(kernel.Config{
		Platform: &loopPlatform{n: b.N, step: step}, MemoryFile: mf, Syscalls: syscalls.Table(), Hostname: "test", Log: log.New(io.Discard, "", 0),
	})
	fs := vfs.NewFSContext(vfs.NewNamespace(&vfs.Mount{Root: devfs.New(1, nil)}))
	zero, err := fs.OpenAt(b.Context(), nil, "/zero", unix.O_RDONLY, 0, 1<<20)
	if err != nil {
		b.Fatal(err)
	}
	fdt := vfs.NewFDTable()
	if _, err := fdt.NewFDAt(0, zero, false, 1); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	if err := k.StartBare(fdt, fs, memory, memorySize); err != nil {
		b.Fatal(err)
	}
	if status, err := k.Wait(); status != 0 || err != nil {
		b.Fatalf("status %#x, %v", status, err)
	}
}

// call measures a system call.
func call(b *testing.B, nr uintptr, args ...uintptr) {
	loop(b, func(p *loopPlatform, ac *arch.Context64) error {
		p.n--
		return system(ac, nr, args...)
	})
}

func BenchmarkGetpid(b *testing.B) { call(b, unix.SYS_GETPID) }
func BenchmarkRead(b *testing.B)   { call(b, unix.SYS_READ, 0, uintptr(scratch), 1) }
func BenchmarkClockGettime(b *testing.B) {
	call(b, unix.SYS_CLOCK_GETTIME, unix.CLOCK_MONOTONIC, uintptr(scratch))
}

// BenchmarkSignal is a signal that the thread sends to itself, its handler, and
// the return from that.
func BenchmarkSignal(b *testing.B) {
	ready := false
	loop(b, func(p *loopPlatform, ac *arch.Context64) error {
		switch {
		case !ready:
			ready = true
			act := linux.SigAction{Handler: handlers, Flags: linux.SA_RESTORER, Restorer: 0x30000000}
			if err := p.task.CopyOutStruct(scratch, &act); err != nil {
				b.Error(err)
			}
			return system(ac, unix.SYS_RT_SIGACTION, uintptr(linux.SIGUSR1), uintptr(scratch), 0, 8)
		case ac.IP() == handlers:
			handlerReturn(ac)
			return system(ac, unix.SYS_RT_SIGRETURN)
		}
		p.n--
		return system(ac, unix.SYS_TGKILL, 1, 1, uintptr(linux.SIGUSR1))
	})
}

// BenchmarkMap maps 64 KiB, has one fault there, and unmaps it.
func BenchmarkMap(b *testing.B) {
	const size = 16 * hostarch.PageSize
	touched := -1
	var addr hostarch.Addr
	loop(b, func(p *loopPlatform, ac *arch.Context64) error {
		switch {
		case touched < 0:
			touched++
			return system(ac, unix.SYS_MMAP, 0, size, 3, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE, ^uintptr(0), 0)
		case touched == 0:
			addr = hostarch.Addr(ac.Return())
		}
		if touched < 16 {
			err := p.task.MM().HandleUserFault(p.task, addr+hostarch.Addr(touched*hostarch.PageSize), hostarch.Write, 0)
			touched = 16
			if err != nil {
				b.Error(err)
			}
		}
		touched = -1
		p.n--
		return system(ac, unix.SYS_MUNMAP, uintptr(addr), size)
	})
}
