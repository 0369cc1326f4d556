package systrap

import (
	"errors"
	"testing"

	"github.com/ringfence/ringfence/pkg/platform"
)

func TestNotSupported(t *testing.T) {
	if _, err := (constructor{}).New(nil); !errors.Is(err, platform.ErrNotSupported) {
		t.Errorf("New: %v", err)
	}
}
