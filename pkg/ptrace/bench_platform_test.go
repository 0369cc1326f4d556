package ptrace_test

import (
	"testing"

	"github.com/ringfence/ringfence/pkg/platform/platformtest"
)

func BenchmarkPlatform(b *testing.B) {
	platformtest.Benchmark(b, platformtest.Config{Constructor: constructor(b)})
}
