package kvm

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/platform/platformtest"
)

// wantOfNull is what New says of /dev/null.
const wantOfNull = unix.ENOTTY

func conformance(t *testing.T, vcpus int) {
	platformtest.Run(t, platformtest.Config{Constructor: constructor{vcpus: vcpus}, NoStubProcesses: true})
}

func TestConformance(t *testing.T) { conformance(t, 0) }

// With fewer vCPUs than Contexts: these take turns.
func TestConformanceOneVCPU(t *testing.T) { conformance(t, 1) }

func TestConformanceTwoVCPUs(t *testing.T) { conformance(t, 2) }

func Benchmark(b *testing.B) {
	platformtest.Benchmark(b, platformtest.Config{Constructor: constructor{}, NoStubProcesses: true})
}
