package mm

import (
	"unsafe"

	"github.com/ringfence/ringfence/pkg/hostarch"
)

// pageRest returns how far it is from the start of b, which is not empty, to the
// next page boundary, in bytes.
func pageRest(b []byte) int {
	return hostarch.PageSize - int(uintptr(unsafe.Pointer(&b[0]))%hostarch.PageSize)
}
