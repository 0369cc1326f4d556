package freestanding

import (
	"bytes"
	"unsafe"
)

// Text copies this program's instructions from the symbol at start to the one at end.
func Text(start, end uintptr) []byte {
	// A symbol never moves.
	p := *(*unsafe.Pointer)(unsafe.Pointer(&start))
	return bytes.Clone(unsafe.Slice((*byte)(p), end-start))
}
