// Package memmap describes what can be mapped into an application's address
// space, and how: files of memory, ranges in them, mappable objects and the
// options of a mapping.
//
// It depends on hostarch alone and holds no memory manager: that is the
// Sentry's.
package memmap

import (
	"context"
	"fmt"

	"github.com/ringfence/ringfence/pkg/hostarch"
)

// FileRange is the half-open range of byte offsets [Start, End) in a File.
type FileRange struct {
	Start uint64
	End   uint64
}

// Length returns the size of fr in bytes.
func (fr FileRange) Length() uint64 { return fr.End - fr.Start }

// WellFormed reports whether Start <= End.
func (fr FileRange) WellFormed() bool { return fr.Start <= fr.End }

// String returns fr as "[start, end)" in hexadecimal.
func (fr FileRange) String() string { return fmt.Sprintf("[%#x, %#x)", fr.Start, fr.End) }

// File is a host file whose pages a platform can map into an AddressSpace:
// usually the Sentry's memory file, or a host file opened for the application.
//
// Implementations must be comparable, safe for concurrent use, and the same
// File value must mean the same host file for as long as it is referenced.
type File interface {
	// IncRef adds a reference on every page of fr, so that they are not reused
	// while they are mapped.
	IncRef(fr FileRange)

	// DecRef drops a reference taken by IncRef.
	DecRef(fr FileRange)

	// MapInternal returns the memory of fr as the Sentry sees it, in one or more
	// blocks in order. The blocks stay valid while a reference is held on fr.
	// Memory backed by a file that can shrink may fault; access it through
	// usermem's fault-safe copies only.
	MapInternal(fr FileRange, at hostarch.AccessType) ([][]byte, error)

	// FD returns the host file descriptor that a platform maps. It stays owned
	// by the File and open while a reference is held.
	FD() int
}

// MappableRange is the half-open range of byte offsets [Start, End) in a
// Mappable.
type MappableRange struct {
	Start uint64
	End   uint64
}

// Length returns the size of mr in bytes.
func (mr MappableRange) Length() uint64 { return mr.End - mr.Start }

// Translation says that the offsets Source of a Mappable are the bytes of File
// from Offset on.
type Translation struct {
	Source MappableRange
	File   File
	Offset uint64

	// Perms is the most that the File's pages may be mapped with.
	Perms hostarch.AccessType
}

// FileRange returns the bytes of t.File that t.Source stands for.
func (t Translation) FileRange() FileRange {
	return FileRange{t.Offset, t.Offset + t.Source.Length()}
}

// MappingSpace is an address space in which a Mappable is mapped, as the
// Mappable needs to know it.
type MappingSpace interface {
	// Invalidate removes every translation cached for ar; the next access asks
	// the Mappable again. It is used when a file is truncated.
	Invalidate(ar hostarch.AddrRange)
}

// Mappable is an object that mmap(2) can map: an open file, shared anonymous
// memory, a device.
type Mappable interface {
	// AddMapping tells the Mappable that offsets from offset on are mapped at ar
	// of ms. writable says whether the mapping can ever be made writable and
	// shared. An error refuses the mapping.
	AddMapping(ms MappingSpace, ar hostarch.AddrRange, offset uint64, writable bool) error

	// RemoveMapping undoes a part or the whole of an AddMapping.
	RemoveMapping(ms MappingSpace, ar hostarch.AddrRange, offset uint64, writable bool)

	// CopyMapping tells the Mappable that a mapping at srcAR is now, or is as
	// well, at dstAR (mremap(2), fork(2)); ms may differ from that of the source.
	CopyMapping(ms MappingSpace, srcAR, dstAR hostarch.AddrRange, offset uint64, writable bool) error

	// Translate returns Translations that cover required, and may cover more up
	// to optional, in order and without gaps. Both are page-aligned, and
	// optional is a superset of required. Offsets beyond the end of the object
	// give a *BusError with the translations before it, if any.
	Translate(ctx context.Context, required, optional MappableRange, at hostarch.AccessType) ([]Translation, error)
}

// MappingIdentity names a mapped object for people: a path in /proc/PID/maps.
type MappingIdentity interface {
	// IncRef adds a reference on the identity.
	IncRef()
	// DecRef drops one.
	DecRef()
	// MappedName returns the name that /proc/PID/maps shows.
	MappedName() string
	// DeviceID and InodeID are what /proc/PID/maps and futex(2) keys use.
	DeviceID() uint64
	InodeID() uint64
	// Msync writes dirty pages of mr to storage (msync(2)).
	Msync(ctx context.Context, mr MappableRange) error
}

// BusError is returned when memory is mapped but has no page behind it: an
// access beyond the end of a mapped file. The application gets SIGBUS.
type BusError struct {
	Err error
}

// Error implements error.
func (b *BusError) Error() string { return "bus error: " + b.Err.Error() }

// Unwrap returns the cause.
func (b *BusError) Unwrap() error { return b.Err }

// MLockMode is the way in which a mapping is locked (mlock2(2)).
type MLockMode int

// The lock modes.
const (
	MLockNone MLockMode = iota
	MLockEager
	MLockLazy
)

// MMapOpts are the options of one memory mapping (mmap(2)).
type MMapOpts struct {
	// Length is the size of the mapping in bytes; it is rounded up to pages.
	Length uint64

	// Mappable is what is mapped; nil means anonymous memory.
	Mappable Mappable

	// MappingIdentity names the Mappable; it may be nil. A reference is taken.
	MappingIdentity MappingIdentity

	// Offset is the page-aligned offset into Mappable.
	Offset uint64

	// Addr is the suggested address, or with Fixed the required one.
	Addr hostarch.Addr

	// Fixed is MAP_FIXED; with Unmap, mappings in the way are replaced, without
	// it (MAP_FIXED_NOREPLACE) they make the call fail with EEXIST.
	Fixed bool
	Unmap bool

	// Map32Bit is MAP_32BIT.
	Map32Bit bool

	// Perms is the access that is allowed at first, MaxPerms the most that
	// mprotect(2) may allow later.
	Perms    hostarch.AccessType
	MaxPerms hostarch.AccessType

	// Private is MAP_PRIVATE: writes are copied on write.
	Private bool

	// GrowsDown is MAP_GROWSDOWN.
	GrowsDown bool

	// Stack marks the main stack for /proc/PID/maps.
	Stack bool

	// Precommit is MAP_POPULATE.
	Precommit bool

	// MLockMode is MAP_LOCKED or mlockall(2)'s MCL_FUTURE.
	MLockMode MLockMode

	// Hint is a name of the mapping for FindVMAByName, as in "[heap]".
	Hint string
}
