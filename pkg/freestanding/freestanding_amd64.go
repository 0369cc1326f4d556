package freestanding

import "github.com/ringfence/ringfence/pkg/abi/linux"

const machine = linux.EM_X86_64
