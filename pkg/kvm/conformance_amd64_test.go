package kvm

import (
	"context"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/fd"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
)

// wantOfNull is what New says of /dev/null.
const wantOfNull = unix.ENOTTY

func conformance(t *testing.T, c platform.Constructor) {
	platformtest.Run(t, platformtest.Config{Constructor: c, NoStubProcesses: true})
}

func TestConformance(t *testing.T) { conformance(t, constructor{}) }

// With fewer vCPUs than Contexts: these take turns.
func TestConformanceOneVCPU(t *testing.T) { conformance(t, constructor{options{vcpus: 1}}) }

func TestConformanceTwoVCPUs(t *testing.T) { conformance(t, constructor{options{vcpus: 2}}) }

// With Contexts that are bound to an OS thread each, and so wait in the shim where
// there is one; and for so long that it is seldom left.
func TestConformanceBound(t *testing.T) {
	conformance(t, bindingConstructor{constructor{options{spin: patient}}})
}

func TestConformanceBoundOneVCPU(t *testing.T) {
	conformance(t, bindingConstructor{constructor{options{vcpus: 1, spin: patient}}})
}

const patient = 5 * time.Millisecond

type bindingConstructor struct{ platform.Constructor }

func (c bindingConstructor) New(device *fd.FD) (platform.Platform, error) {
	p, err := c.Constructor.New(device)
	return bindingPlatform{p}, err
}

type bindingPlatform struct{ platform.Platform }

// NewContext returns a Context all of whose calls are made by a goroutine of its own.
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

func Benchmark(b *testing.B) {
	platformtest.Benchmark(b, platformtest.Config{Constructor: constructor{}, NoStubProcesses: true})
}
