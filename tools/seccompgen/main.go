// Command seccompgen writes the Go files of package programs
// (pkg/sentry/filter/programs): the Sentry's rules with those of every platform's
// every configuration. It depends on package filter and every backend, and must not
// depend on what it makes.
package main

import (
	_ "github.com/ringfence/ringfence/pkg/platform/platforms"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled/gen"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
	"github.com/ringfence/ringfence/pkg/sentry/filter"
)

func main() {
	gen.Main(func(a sysno.Arch) ([]precompiled.Source, error) { return filter.Sources(filter.Platforms(), a) })
}
