package loader

import "github.com/ringfence/ringfence/pkg/abi/linux"

const (
	elfMachine  = linux.EM_AARCH64
	elfPlatform = "aarch64"
)
