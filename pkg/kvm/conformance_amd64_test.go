package kvm

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
	conformance(t, platformtest.Bound(constructor{options{spin: patient}}))
}

func TestConformanceBoundOneVCPU(t *testing.T) {
	conformance(t, platformtest.Bound(constructor{options{vcpus: 1, spin: patient}}))
}

const patient = 5 * time.Millisecond

func Benchmark(b *testing.B) {
	platformtest.Benchmark(b, platformtest.Config{Constructor: constructor{}, NoStubProcesses: true})
}
