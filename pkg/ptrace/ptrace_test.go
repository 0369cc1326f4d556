package ptrace_test

import (
	"testing"

	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
	"github.com/ringfence/ringfence/pkg/ptrace"
)

func config(tb testing.TB) platformtest.Config {
	c, err := platform.Lookup(ptrace.Name)
	if err != nil {
		tb.Fatal(err)
	}
	return platformtest.Config{Constructor: c}
}

func TestConformance(t *testing.T) { platformtest.Run(t, config(t)) }
