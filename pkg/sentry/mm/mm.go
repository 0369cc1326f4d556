// Package mm is the Sentry's memory manager: the mappings of one application
// address space, the pages behind them, and their copies on write. It gives the
// platform's AddressSpace what the application touches, when it touches it.
//
// It depends on platform, memmap, usermem and package pgalloc, which holds the
// memory. It must not know of tasks, files by name, or system calls.
package mm

import (
	"context"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/sentry/pgalloc"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// Limits are the resource limits that bound an address space, in bytes
// (getrlimit(2)).
type Limits struct {
	AS    uint64
	Data  uint64
	Stack uint64
}

// FaultError says why an access to application memory failed. errors.Is finds
// unix.EFAULT in it.
type FaultError struct {
	// Addr is the address that was accessed.
	Addr hostarch.Addr

	// Mapped says that something is mapped there which does not allow the
	// access (SEGV_ACCERR); otherwise there is nothing (SEGV_MAPERR).
	Mapped bool
}

// Error implements error.
func (e *FaultError) Error() string { return "" }

// Unwrap returns unix.EFAULT.
func (e *FaultError) Unwrap() error { return unix.EFAULT }

// Options are the choices of a new address space.
type Options struct {
	// NoRandomize places mappings, stack and heap at the same addresses each time
	// (personality(2), ADDR_NO_RANDOMIZE).
	NoRandomize bool

	// Limits are those at the start.
	Limits Limits
}

// MemoryManager is the memory of one process.
type MemoryManager struct {
}

// New returns an empty address space with one user, and its AddressSpace.
func New(p platform.Platform, mf *pgalloc.MemoryFile, opts Options) (*MemoryManager, error) {
	return nil, unix.ENOSYS
}

// Fork returns a copy of mm with one user (fork(2)).
func (mm *MemoryManager) Fork(ctx context.Context) (*MemoryManager, error) { return nil, unix.ENOSYS }

// IncUsers adds a user.
func (mm *MemoryManager) IncUsers() {}

// DecUsers drops one; the last unmaps everything and releases the AddressSpace.
func (mm *MemoryManager) DecUsers(ctx context.Context) {}

// Activate makes the AddressSpace be there; it must be called before each
// Switch, and Deactivate after it. It may wait for another address space to
// become idle.
func (mm *MemoryManager) Activate() error { return unix.ENOSYS }

// Deactivate undoes Activate.
func (mm *MemoryManager) Deactivate() {}

// AddressSpace implements platform.MemoryManager.
func (mm *MemoryManager) AddressSpace() platform.AddressSpace { return nil }

// SetLimits changes the limits.
func (mm *MemoryManager) SetLimits(l Limits) {}

// HandleUserFault makes the page at addr accessible after a fault. nil means
// that the access can be tried again; *FaultError is SIGSEGV, *memmap.BusError
// SIGBUS; anything else wraps an errno: there is no memory.
func (mm *MemoryManager) HandleUserFault(ctx context.Context, addr hostarch.Addr, at hostarch.AccessType, sp hostarch.Addr) error {
	return unix.ENOSYS
}

// MMap implements platform.MemoryManager.
func (mm *MemoryManager) MMap(ctx context.Context, opts memmap.MMapOpts) (hostarch.Addr, error) {
	return 0, unix.ENOSYS
}

// MUnmap is munmap(2).
func (mm *MemoryManager) MUnmap(ctx context.Context, addr hostarch.Addr, length uint64) error {
	return unix.ENOSYS
}

// MProtect is mprotect(2); growsDown is PROT_GROWSDOWN.
func (mm *MemoryManager) MProtect(ctx context.Context, addr hostarch.Addr, length uint64, perms hostarch.AccessType, growsDown bool) error {
	return unix.ENOSYS
}

// MRemapMove says whether mremap(2) may move a mapping.
type MRemapMove int

// The values of MRemapMove: no flag, MREMAP_MAYMOVE, and that with MREMAP_FIXED.
const (
	MRemapNoMove MRemapMove = iota
	MRemapMayMove
	MRemapFixed
)

// MRemapOpts are the options of MRemap.
type MRemapOpts struct {
	Move MRemapMove
	// NewAddr is where to, with MRemapFixed.
	NewAddr hostarch.Addr
	// DontUnmap is MREMAP_DONTUNMAP.
	DontUnmap bool
}

// MRemap is mremap(2).
func (mm *MemoryManager) MRemap(ctx context.Context, old hostarch.Addr, oldSize, newSize uint64, opts MRemapOpts) (hostarch.Addr, error) {
	return 0, unix.ENOSYS
}

// BrkSetup places the empty heap at addr, which is rounded up.
func (mm *MemoryManager) BrkSetup(ctx context.Context, addr hostarch.Addr) error { return unix.ENOSYS }

// Brk is brk(2): it returns the end of the heap, changed or not.
func (mm *MemoryManager) Brk(ctx context.Context, addr hostarch.Addr) (hostarch.Addr, error) {
	return 0, unix.ENOSYS
}

// Madvise is madvise(2).
func (mm *MemoryManager) Madvise(ctx context.Context, addr hostarch.Addr, length uint64, advice int32) error {
	return unix.ENOSYS
}

// MSync is msync(2).
func (mm *MemoryManager) MSync(ctx context.Context, addr hostarch.Addr, length uint64, flags int32) error {
	return unix.ENOSYS
}

// Mincore is mincore(2): it returns a byte per page.
func (mm *MemoryManager) Mincore(ctx context.Context, addr hostarch.Addr, length uint64) ([]byte, error) {
	return nil, unix.ENOSYS
}

// MLock is mlock2(2); MLockNone is munlock(2). Nothing is ever paged out by the
// Sentry, so that only the checks are made.
func (mm *MemoryManager) MLock(ctx context.Context, addr hostarch.Addr, length uint64, mode memmap.MLockMode) error {
	return unix.ENOSYS
}

// Key names a futex: keys are equal when they mean the same word of memory.
type Key struct {
	kind uint8
	obj  any
	off  uint64
}

// FutexKey returns the key of the futex at addr; private is
// FUTEX_PRIVATE_FLAG. The error is EINVAL if addr is not a multiple of 4, and
// EFAULT if it cannot be an address or, unless private, nothing is mapped there.
func (mm *MemoryManager) FutexKey(ctx context.Context, addr hostarch.Addr, private bool) (Key, error) {
	return Key{}, unix.ENOSYS
}

// ReadMaps returns the contents of /proc/PID/maps.
func (mm *MemoryManager) ReadMaps() string { return "" }

// VirtualMemorySize returns the size of all mappings in bytes.
func (mm *MemoryManager) VirtualMemorySize() uint64 { return 0 }

// ResidentSize returns the size of all pages in bytes.
func (mm *MemoryManager) ResidentSize() uint64 { return 0 }

// PeakResidentSize returns the most that ResidentSize was.
func (mm *MemoryManager) PeakResidentSize() uint64 { return 0 }

// FindVMAByName implements platform.MemoryManager.
func (mm *MemoryManager) FindVMAByName(ar hostarch.AddrRange, hint string) (hostarch.Addr, uint64, error) {
	return 0, 0, unix.ENOSYS
}

// Invalidate implements memmap.MappingSpace.
func (mm *MemoryManager) Invalidate(ar hostarch.AddrRange) {}

// CopyOut implements usermem.IO.
func (mm *MemoryManager) CopyOut(ctx context.Context, addr hostarch.Addr, src []byte, opts usermem.IOOpts) (int, error) {
	return 0, unix.ENOSYS
}

// CopyIn implements usermem.IO.
func (mm *MemoryManager) CopyIn(ctx context.Context, addr hostarch.Addr, dst []byte, opts usermem.IOOpts) (int, error) {
	return 0, unix.ENOSYS
}

// ZeroOut implements usermem.IO.
func (mm *MemoryManager) ZeroOut(ctx context.Context, addr hostarch.Addr, toZero int64, opts usermem.IOOpts) (int64, error) {
	return 0, unix.ENOSYS
}

// SwapUint32 implements usermem.IO.
func (mm *MemoryManager) SwapUint32(ctx context.Context, addr hostarch.Addr, new uint32, opts usermem.IOOpts) (uint32, error) {
	return 0, unix.ENOSYS
}

// CompareAndSwapUint32 implements usermem.IO.
func (mm *MemoryManager) CompareAndSwapUint32(ctx context.Context, addr hostarch.Addr, old, new uint32, opts usermem.IOOpts) (uint32, error) {
	return 0, unix.ENOSYS
}

// LoadUint32 implements usermem.IO.
func (mm *MemoryManager) LoadUint32(ctx context.Context, addr hostarch.Addr, opts usermem.IOOpts) (uint32, error) {
	return 0, unix.ENOSYS
}

// Metadata is what the loader leaves for /proc and prctl(PR_SET_MM).
type Metadata struct {
	// Args and Env are where the argument and environment strings lie.
	Args, Env hostarch.AddrRange
	// Auxv is the auxiliary vector as the program got it.
	Auxv []byte
	// Executable is the absolute path of the program.
	Executable string
}

// Metadata returns what SetMetadata was given.
func (mm *MemoryManager) Metadata() Metadata { return Metadata{} }

// SetMetadata replaces it.
func (mm *MemoryManager) SetMetadata(m Metadata) {}

var _ platform.MemoryManager = (*MemoryManager)(nil)
var _ memmap.MappingSpace = (*MemoryManager)(nil)
