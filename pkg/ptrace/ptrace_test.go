package ptrace_test

import (
	"context"
	"runtime"
	"testing"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/fd"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
	"github.com/ringfence/ringfence/pkg/ptrace"
)

func constructor(tb testing.TB) platform.Constructor {
	c, err := platform.Lookup(ptrace.Name)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

func TestConformance(t *testing.T) {
	platformtest.Run(t, platformtest.Config{Constructor: constructor(t)})
}

// The same with Contexts that are bound to an OS thread each.
func TestConformanceBound(t *testing.T) {
	platformtest.Run(t, platformtest.Config{Constructor: bindingConstructor{constructor(t)}})
}

type bindingConstructor struct{ platform.Constructor }

func (c bindingConstructor) New(device *fd.FD) (platform.Platform, error) {
	p, err := c.Constructor.New(device)
	return bindingPlatform{p}, err
}

type bindingPlatform struct{ platform.Platform }

// NewContext returns a Context all of whose calls are made by a goroutine of its
// own.
func (p bindingPlatform) NewContext(ctx context.Context) platform.Context {
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
