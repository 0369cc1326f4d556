package kvm

import "github.com/ringfence/ringfence/pkg/platform"

// wantOfNull is what New says of /dev/null.
var wantOfNull = platform.ErrNotSupported
