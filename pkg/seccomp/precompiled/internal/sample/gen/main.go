// Command gen writes the precompiled programs of package sample.
package main

import (
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled/gen"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled/internal/sample/rules"
)

func main() { gen.Main(rules.Sources) }
