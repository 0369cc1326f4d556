package systrap_test

import (
	"testing"

	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
	"github.com/ringfence/ringfence/pkg/systrap"
)

func constructor(tb testing.TB) platform.Constructor {
	c, err := platform.Lookup(systrap.Name)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

func TestConformance(t *testing.T) {
	platformtest.Run(t, platformtest.Config{Constructor: constructor(t)})
}

func BenchmarkPlatform(b *testing.B) {
	platformtest.Benchmark(b, platformtest.Config{Constructor: constructor(b)})
}
