package platformtest

import (
	"bytes"
	"fmt"
	"sync/atomic"
	"unsafe"
)

// programMax is more than the size of the longest program, in bytes.
const programMax = 2048

// code returns the bytes of p in the text of this binary, without the END mark.
func code(p program) []byte {
	// The END mark is in the same symbol, so nothing beyond it is read.
	for n := 0; n < programMax; n++ {
		b := unsafe.Slice(p, n+len(programEnd))
		if bytes.Equal(b[n:], programEnd[:]) {
			return b[:n:n]
		}
	}
	panic(fmt.Sprintf("platformtest: a program has no END mark in %d bytes", programMax))
}

// word returns the word at off of b as an atomic; off is a multiple of 8.
func word(b []byte, off uint64) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&b[off : off+8][0]))
}
