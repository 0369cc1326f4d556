// Package mm is the Sentry's memory manager: the mappings of one application
// address space, the pages behind them, and their copies on write. It gives the
// platform's AddressSpace what the application touches, when it touches it.
//
// It depends on platform, memmap, usermem and package pgalloc, which holds the
// memory. It must not know of tasks, files by name, or system calls.
//
// What the application has mapped stands in vmas (vma.go); the pages that it
// has used of them in pmas (pma.go); the AddressSpace is a cache of those. An
// AddressSpace that runs out of room is emptied and filled again by faults.
//
// Locks are taken in this order:
//
//	MemoryManager.mappingMu
//	  locks of Mappable.AddMapping, RemoveMapping and CopyMapping
//	    MemoryManager.activeMu
//	      locks of Mappable.Translate
//	        locks of AddressSpaces and memmap.Files
//
// Invalidate takes activeMu alone: a Mappable may call it with the locks of the
// second line held, and must not with those of Translate. A Mappable that
// shrinks makes Translate refuse first, then calls Invalidate, then frees its
// pages.
package mm

import (
	"context"
	"fmt"
	"math"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/sentry/pgalloc"
)

// Limits are the resource limits that bound an address space, in bytes
// (getrlimit(2)).
type Limits struct {
	AS      uint64
	Data    uint64
	Stack   uint64
	MemLock uint64
}

// DefaultLimits are those of an Options without any.
var DefaultLimits = Limits{AS: math.MaxUint64, Data: math.MaxUint64, Stack: 8 << 20, MemLock: 8 << 20}

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
func (e *FaultError) Error() string {
	if e.Mapped {
		return fmt.Sprintf("access to address %v is not allowed", e.Addr)
	}
	return fmt.Sprintf("nothing is mapped at address %v", e.Addr)
}

// Unwrap returns unix.EFAULT.
func (e *FaultError) Unwrap() error { return unix.EFAULT }

// Options are the choices of a new address space.
type Options struct {
	// NoRandomize places mappings, stack and heap at the same addresses each time
	// (personality(2), ADDR_NO_RANDOMIZE).
	NoRandomize bool

	// Limits are those at the start; the zero value means DefaultLimits.
	Limits Limits
}

// MemoryManager is the memory of one process. It implements
// platform.MemoryManager and memmap.MappingSpace. Methods are safe for
// concurrent use.
type MemoryManager struct {
	p      platform.Platform
	mf     *pgalloc.MemoryFile
	layout layout
	users  atomic.Int64
	// entered says that the application has run.
	entered atomic.Bool
	// cooperative is the platform's CooperativelySchedulesAddressSpace.
	cooperative bool

	// hot are the pages that are used most.
	hot *hotPages

	// as is the AddressSpace, nil when there is none. It is changed under
	// activeMu.
	as atomic.Pointer[platform.AddressSpace]

	metaMu sync.Mutex
	meta   Metadata

	// mappingMu protects the vmas and what follows.
	mappingMu sync.RWMutex
	vmas      set[vma]
	usage     uint64 // bytes in all vmas
	dataUsage uint64 // bytes in those that RLIMIT_DATA counts
	heap      hostarch.AddrRange
	limits    Limits

	// activeMu protects the pmas, and the AddressSpace's contents.
	activeMu sync.RWMutex
	pmas     set[pma]
	active   int64 // if cooperative: calls of Activate without Deactivate
	// expected are pages that are mapped with the next one that faults. Who holds
	// mappingMu for writing may change it, too.
	expected []expectation
	text     text
	resident atomic.Uint64
	peak     atomic.Uint64
}

// New returns an empty address space with one user. The error is that of
// Platform.NewAddressSpace.
func New(p platform.Platform, mf *pgalloc.MemoryFile, opts Options) (*MemoryManager, error) {
	if opts.Limits == (Limits{}) {
		opts.Limits = DefaultLimits
	}
	mm := newMM(p, mf)
	mm.limits = opts.Limits
	mm.layout = newLayout(p, opts)
	mm.hot = new(hotPages)
	if err := mm.prepare(); err != nil {
		return nil, err
	}
	return mm, nil
}

func newMM(p platform.Platform, mf *pgalloc.MemoryFile) *MemoryManager {
	mm := &MemoryManager{p: p, mf: mf, cooperative: p.CooperativelySchedulesAddressSpace()}
	mm.users.Store(1)
	mm.vmas = set[vma]{advance: (*vma).advance, merges: vmasMerge, drop: (*vma).release}
	mm.pmas = set[pma]{advance: (*pma).advance, merges: pmasMerge, drop: func(*pma) {}}
	return mm
}

// prepare makes the AddressSpace early, so that it is the fork or execve that
// fails if there can be none.
func (mm *MemoryManager) prepare() error {
	if mm.cooperative {
		return nil
	}
	return mm.Activate()
}

// IncUsers adds a user.
func (mm *MemoryManager) IncUsers() { mm.users.Add(1) }

// Shared reports whether there is more than one user.
func (mm *MemoryManager) Shared() bool { return mm.users.Load() > 1 }

// Kill ends what application code runs in the memory, if there are not more than users
// users, and if it can be ended.
func (mm *MemoryManager) Kill(users int) {
	if k, ok := mm.AddressSpace().(platform.Killer); ok && mm.users.Load() <= int64(users) {
		k.Kill()
	}
}

// DecUsers drops one; the last unmaps everything and releases the AddressSpace.
func (mm *MemoryManager) DecUsers(context.Context) {
	if n := mm.users.Add(-1); n > 0 {
		return
	} else if n < 0 {
		panic("mm: DecUsers without a user")
	}
	all := hostarch.AddrRange{End: math.MaxUint64}
	mm.mappingMu.Lock()
	mm.activeMu.Lock()
	mm.releaseAddressSpaceLocked()
	mm.dropLocked(all)
	mm.activeMu.Unlock()
	removed := mm.takeVMAs(all)
	mm.mappingMu.Unlock()
	releaseVMAs(removed)
}

// Activate makes sure that there is an AddressSpace, and that it stays until
// Deactivate. Where AddressSpaces are few it waits for one. A task calls it
// before it runs application code.
func (mm *MemoryManager) Activate() error {
	if !mm.cooperative && mm.as.Load() != nil {
		return nil
	}
	mm.activeMu.Lock()
	defer mm.activeMu.Unlock()
	for mm.AddressSpace() == nil {
		as, wait, err := mm.p.NewAddressSpace(nil)
		if err != nil {
			return err
		}
		if as != nil {
			mm.as.Store(&as)
			break
		}
		mm.activeMu.Unlock()
		<-wait
		mm.activeMu.Lock()
	}
	mm.active++
	return nil
}

// Deactivate undoes one Activate: the task is not going to run application code
// soon.
func (mm *MemoryManager) Deactivate() {
	if !mm.cooperative {
		return
	}
	mm.activeMu.Lock()
	defer mm.activeMu.Unlock()
	if mm.active--; mm.active == 0 {
		mm.releaseAddressSpaceLocked()
	}
}

// releaseAddressSpaceLocked gives the AddressSpace back.
//
// Preconditions: mm.activeMu is locked for writing.
func (mm *MemoryManager) releaseAddressSpaceLocked() {
	if as := mm.as.Swap(nil); as != nil {
		(*as).Release()
	}
	mm.forgetMappedLocked()
}

// AddressSpace implements platform.MemoryManager.AddressSpace.
func (mm *MemoryManager) AddressSpace() platform.AddressSpace {
	if as := mm.as.Load(); as != nil {
		return *as
	}
	return nil
}

// SetLimits changes the limits. What exceeds them stays.
func (mm *MemoryManager) SetLimits(l Limits) {
	mm.mappingMu.Lock()
	mm.limits = l
	mm.mappingMu.Unlock()
}

// VirtualMemorySize returns the size of all mappings in bytes.
func (mm *MemoryManager) VirtualMemorySize() uint64 {
	mm.mappingMu.RLock()
	defer mm.mappingMu.RUnlock()
	return mm.usage
}

// ResidentSize returns the size in bytes of the pages that the application can
// use without asking the Sentry for more. The host may hold less.
func (mm *MemoryManager) ResidentSize() uint64 { return mm.resident.Load() }

// PeakResidentSize returns the most that ResidentSize was.
func (mm *MemoryManager) PeakResidentSize() uint64 { return mm.peak.Load() }

// Metadata is what the loader leaves for /proc and prctl(PR_SET_MM).
type Metadata struct {
	// Args and Env are where the argument and environment strings lie.
	Args, Env hostarch.AddrRange
	// Auxv is the auxiliary vector as the program got it; not to be changed.
	Auxv []byte
	// Executable is the absolute path of the program.
	Executable string
}

// Metadata returns what SetMetadata was given.
func (mm *MemoryManager) Metadata() Metadata {
	mm.metaMu.Lock()
	defer mm.metaMu.Unlock()
	return mm.meta
}

// SetMetadata replaces it.
func (mm *MemoryManager) SetMetadata(m Metadata) {
	mm.metaMu.Lock()
	mm.meta = m
	mm.metaMu.Unlock()
}

var (
	_ platform.MemoryManager = (*MemoryManager)(nil)
	_ memmap.MappingSpace    = (*MemoryManager)(nil)
)
