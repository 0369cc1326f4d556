package ptrace_test

import (
	"testing"

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
	platformtest.Run(t, platformtest.Config{Constructor: platformtest.Bound(constructor(t))})
}
