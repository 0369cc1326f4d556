package guest

import (
	"bytes"
	"unsafe"
)

// readText copies this program's instructions from start to end.
func readText(start, end uintptr) []byte {
	// The address is that of a symbol, which never moves.
	p := *(*unsafe.Pointer)(unsafe.Pointer(&start))
	return bytes.Clone(unsafe.Slice((*byte)(p), end-start))
}
