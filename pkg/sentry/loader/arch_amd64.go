package loader

import "github.com/ringfence/ringfence/pkg/abi/linux"

const (
	elfMachine  = linux.EM_X86_64
	elfPlatform = "x86_64"
)
