package mm

import (
	"context"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
)

// Key names a futex: keys are equal when they mean the same word of memory in
// the same way (futex(2)). It keeps no reference on the memory.
type Key struct {
	kind keyKind
	obj  any // a *MemoryManager or a memmap.Mappable
	off  uint64
}

type keyKind uint8

const (
	keyPrivate       keyKind = iota + 1 // FUTEX_PRIVATE_FLAG
	keySharedPrivate                    // without the flag, in private memory
	keyShared
)

// FutexKey returns the key of the futex at addr; private is
// FUTEX_PRIVATE_FLAG. The error is EINVAL if addr is not a multiple of 4, and
// wraps EFAULT if it cannot be an address or, unless private, nothing is mapped
// there.
func (mm *MemoryManager) FutexKey(_ context.Context, addr hostarch.Addr, private bool) (Key, error) {
	if addr%4 != 0 {
		return Key{}, unix.EINVAL
	}
	if addr >= mm.layout.max {
		return Key{}, &FaultError{Addr: addr}
	}
	if private {
		return Key{keyPrivate, mm, uint64(addr)}, nil
	}
	var key Key
	err := mm.withVMA(addr, hostarch.Read, false, func(v *segment[vma]) error {
		if v.v.private {
			key = Key{keySharedPrivate, mm, uint64(addr)}
		} else {
			key = Key{keyShared, v.v.mappable, v.v.off + uint64(addr-v.Start)}
		}
		return nil
	})
	return key, err
}
