package usermem

import (
	"runtime/debug"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The functions below touch Sentry mappings of memory that can fault under our
// hands: a page of a file that was truncated meanwhile raises SIGBUS. The
// runtime turns that into a panic of this goroutine, and we turn the panic into
// an error.

// guard runs f and returns EFAULT when it faulted. Other panics go on.
func guard(f func()) (err error) {
	old := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(old)
		if r := recover(); r != nil {
			if _, ok := r.(interface{ Addr() uintptr }); !ok {
				panic(r)
			}
			err = unix.EFAULT
		}
	}()
	f()
	return nil
}

// SafeCopy copies min(len(dst), len(src)) bytes. When either side faults it
// returns EFAULT; how much was copied is then not known.
func SafeCopy(dst, src []byte) (n int, err error) {
	if err := guard(func() { n = copy(dst, src) }); err != nil {
		return 0, err
	}
	return n, nil
}

// SafeZero sets b to zeros, or returns EFAULT.
func SafeZero(b []byte) error {
	return guard(func() { clear(b) })
}

func word(b []byte) *uint32 { return (*uint32)(unsafe.Pointer(&b[:4][0])) }

// SafeSwapUint32 atomically stores new in the first 4 bytes of b, which must be
// aligned, and returns what was there.
func SafeSwapUint32(b []byte, new uint32) (v uint32, err error) {
	err = guard(func() { v = atomic.SwapUint32(word(b), new) })
	return v, err
}

// SafeCompareAndSwapUint32 atomically replaces old in the first 4 bytes of b,
// which must be aligned, by new. It returns what was there before.
func SafeCompareAndSwapUint32(b []byte, old, new uint32) (prev uint32, err error) {
	err = guard(func() {
		for {
			if prev = atomic.LoadUint32(word(b)); prev != old {
				return
			}
			if atomic.CompareAndSwapUint32(word(b), old, new) {
				return
			}
		}
	})
	return prev, err
}

// SafeLoadUint32 atomically loads the first 4 bytes of b, which must be aligned.
func SafeLoadUint32(b []byte) (v uint32, err error) {
	err = guard(func() { v = atomic.LoadUint32(word(b)) })
	return v, err
}
