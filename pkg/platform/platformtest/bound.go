package platformtest

import (
	"context"
	"runtime"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/fd"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// Bound returns c with Contexts that are bound to an OS thread each
// (platform.ThreadBinder), which those of c must be able to.
func Bound(c platform.Constructor) platform.Constructor { return boundConstructor{c} }

type boundConstructor struct{ platform.Constructor }

func (c boundConstructor) New(device *fd.FD) (platform.Platform, error) {
	p, err := c.Constructor.New(device)
	return boundPlatform{p}, err
}

type boundPlatform struct{ platform.Platform }

// NewContext returns a Context all of whose calls are made by a goroutine of its
// own.
func (p boundPlatform) NewContext(ctx context.Context) platform.Context {
	b := &boundContext{Context: p.Platform.NewContext(ctx), work: make(chan func()), done: make(chan struct{})}
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		b.Context.(platform.ThreadBinder).BindThread()
		for f := range b.work {
			f()
			b.done <- struct{}{}
		}
	}()
	return b
}

type boundContext struct {
	platform.Context
	work chan func()
	done chan struct{}
}

func (b *boundContext) do(f func()) {
	b.work <- f
	<-b.done
}

func (b *boundContext) Switch(ctx context.Context, mm platform.MemoryManager, ac *arch.Context64, cpu int32) (info *linux.SignalInfo, at hostarch.AccessType, err error) {
	b.do(func() { info, at, err = b.Context.Switch(ctx, mm, ac, cpu) })
	return info, at, err
}

func (b *boundContext) PullFullState(as platform.AddressSpace, ac *arch.Context64) (err error) {
	b.do(func() { err = b.Context.PullFullState(as, ac) })
	return err
}

func (b *boundContext) FullStateChanged() { b.do(b.Context.FullStateChanged) }

func (b *boundContext) PrepareSleep() { b.do(b.Context.PrepareSleep) }

func (b *boundContext) Release() {
	b.do(b.Context.Release)
	close(b.work)
}
