package kvm

import (
	"fmt"

	"github.com/ringfence/ringfence/pkg/platform"
)

// options are those that tests set.
type options struct{}

func newPlatform(device int, _ options) (platform.Platform, error) {
	return nil, fmt.Errorf("not there on arm64 yet: use another platform: %w", platform.ErrNotSupported)
}
