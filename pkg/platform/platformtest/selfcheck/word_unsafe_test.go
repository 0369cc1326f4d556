package selfcheck

import (
	"sync/atomic"
	"unsafe"
)

// word32 returns the first 4 bytes of b as an atomic.
func word32(b []byte) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&b[:4][0])) }
