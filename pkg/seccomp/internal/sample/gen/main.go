// Command gen writes the precompiled programs of package sample.
package main

import (
	"github.com/ringfence/ringfence/pkg/seccomp/internal/sample/rules"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled/gen"
)

func main() { gen.Main(rules.Sources) }
