// Package platforms links in every backend of this architecture: import it for
// its side effect, then use platform.Lookup.
//
// It depends on the backends. It must hold nothing but imports.
package platforms

import (
	_ "github.com/ringfence/ringfence/pkg/kvm"
	_ "github.com/ringfence/ringfence/pkg/ptrace"
	_ "github.com/ringfence/ringfence/pkg/systrap"
)
