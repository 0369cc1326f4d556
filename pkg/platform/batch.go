package platform

import (
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
)

// FileMapping is what AddressSpace.MapFile is called with, and more.
type FileMapping struct {
	Addr      hostarch.Addr
	File      memmap.File
	Range     memmap.FileRange
	Access    hostarch.AccessType
	Precommit bool

	// Mapped says that Range of File is what is mapped at Addr, all of it, with another
	// access: to change that may cost less, and leaves what is present.
	Mapped bool
}

// BatchMapper is implemented by AddressSpaces in which several mappings cost much
// less at a time than one by one.
type BatchMapper interface {
	// MapFiles does what MapFile does with each of ms, in order; MapFile's
	// preconditions hold for each. The error is MapFile's for the first that failed;
	// each range may then be as it was, as it was to be, or as MapFile leaves it.
	MapFiles(ms []FileMapping) error
}
