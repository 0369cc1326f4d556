package platform

import (
	"context"

	"github.com/ringfence/ringfence/pkg/arch"
)

// TryCPUIDEmulate returns false: arm64 has no such instruction.
func TryCPUIDEmulate(ctx context.Context, mm MemoryManager, ac *arch.Context64) bool {
	return false
}
