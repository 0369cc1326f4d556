package platform

import (
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
)

// FileMapping is what AddressSpace.MapFile is called with.
type FileMapping struct {
	Addr      hostarch.Addr
	File      memmap.File
	Range     memmap.FileRange
	Access    hostarch.AccessType
	Precommit bool
}

// BatchMapper is implemented by AddressSpaces in which several mappings cost much
// less at a time than one by one.
type BatchMapper interface {
	// MapFiles does what MapFile does with each of ms, in order; MapFile's
	// preconditions hold for each. The error is MapFile's for the first that failed;
	// each range may then be as it was, as it was to be, or as MapFile leaves it.
	MapFiles(ms []FileMapping) error
}
