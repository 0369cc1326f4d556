// Package platform is the API of Ringfence: it runs native application code in
// address spaces of its own and hands every system call, fault and signal to
// the caller, the Sentry.
//
// A Platform makes AddressSpaces and Contexts. An AddressSpace holds mappings
// of host files; a Context is one thread of application code. Context.Switch
// runs the thread in an AddressSpace until it makes a system call, faults, gets
// a signal or is interrupted, and leaves its registers in an arch.Context64.
//
// Backends register a Constructor under a name; import package platforms for
// all of them, or one backend for it alone.
//
// It depends on hostarch, abi, arch, cpuid, fd, memmap, usermem and seccomp. It
// must never import a backend, nor a Sentry.
package platform

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// SignalInterrupt is the host signal that backends use to get a thread out of
// application code. A Sentry must ignore it when it reaches the Sentry itself
// or a Context, since it may be late. It is SIGCHLD because the Go runtime
// keeps that unblocked in every thread and attaches no meaning to it.
const SignalInterrupt = linux.SIGCHLD

var (
	// ErrNotSupported is wrapped by a Constructor's New when the platform cannot
	// work on this architecture or host; the error says why and what would help.
	ErrNotSupported = errors.New("platform not supported here")

	// ErrContextSignal is returned by Context.Switch when the thread got a
	// signal, most often from a fault of its own.
	ErrContextSignal = fmt.Errorf("interrupted by signal")

	// ErrContextInterrupt is returned by Context.Switch after Context.Interrupt.
	ErrContextInterrupt = fmt.Errorf("interrupted by platform.Context.Interrupt()")

	// ErrContextCPUPreempted is returned by Context.Switch, when the caller
	// passed a CPU, if state that belongs to that CPU may be stale: the thread
	// runs on another one, another Context may have run there since this one
	// last did, or Platform.PreemptAllCPUs was called since Switch last returned.
	ErrContextCPUPreempted = fmt.Errorf("interrupted by CPU preemption")
)

// Platform makes AddressSpaces and Contexts. All methods may be called
// concurrently.
type Platform interface {
	// SupportsAddressSpaceIO reports whether the AddressSpaceIO methods of this
	// platform's AddressSpaces work. It never changes.
	SupportsAddressSpaceIO() bool

	// CooperativelySchedulesAddressSpace reports whether AddressSpaces are so few
	// that a memory manager should Release its own whenever none of its threads
	// needs it. It never changes.
	CooperativelySchedulesAddressSpace() bool

	// DetectsCPUPreemption reports whether Contexts return
	// ErrContextCPUPreempted reliably.
	DetectsCPUPreemption() bool

	// HaveGlobalMemoryBarrier reports whether GlobalMemoryBarrier works.
	HaveGlobalMemoryBarrier() bool

	// OwnsPageTables reports whether the platform manages page tables itself
	// instead of through the host's mmap(2). Such a platform cannot map files
	// with a memory type of their own, as device drivers have.
	OwnsPageTables() bool

	// MapUnit returns the alignment, in bytes, to which a memory manager may
	// widen what it maps: the larger, the cheaper a page in a large MapFile. 0
	// means that the cost of MapFile does not depend on the number of pages.
	// Otherwise it is a power of two times hostarch.PageSize.
	MapUnit() uint64

	// MinUserAddress returns the lowest address that can be mapped.
	MinUserAddress() hostarch.Addr

	// MaxUserAddress returns the end of the addresses that can be mapped: the
	// first one beyond them.
	MaxUserAddress() hostarch.Addr

	// NewAddressSpace returns an empty AddressSpace.
	//
	// A mappingsID that is not nil stands for one set of mappings: the platform
	// may assume that calls with an equal mappingsID want the same mappings, and
	// that these did not change since the last AddressSpace made with it was
	// released.
	//
	// When none can be had now but one may be later, the AddressSpace and the
	// error are nil, and the channel is closed when it is worth trying again.
	// Errors wrap the host's errno and name the limit that was reached.
	NewAddressSpace(mappingsID any) (AddressSpace, <-chan struct{}, error)

	// NewContext returns a Context for one application thread. It cannot fail:
	// what the host refuses is reported by the first Switch.
	NewContext(context.Context) Context

	// PreemptAllCPUs makes every Switch that is under way, and the next one of
	// every other Context, return ErrContextCPUPreempted. It may panic unless
	// DetectsCPUPreemption returns true.
	PreemptAllCPUs() error

	// GlobalMemoryBarrier returns when every thread of application code and
	// every task goroutine has passed a point, after the call began, where its
	// memory accesses were in program order (membarrier(2)).
	//
	// Preconditions: HaveGlobalMemoryBarrier returns true.
	GlobalMemoryBarrier() error

	// SeccompInfo describes the host system calls that the platform makes.
	SeccompInfo() SeccompInfo
}

// AddressSpace is a virtual address space in which Contexts run. All methods
// may be called concurrently, also while application code runs in it.
type AddressSpace interface {
	// MapFile maps the bytes fr of f at addr, shared, with access at, in place of
	// whatever was mapped there. With precommit the platform may make all pages
	// present at once; without, faults on present pages of f are the host's to
	// solve and the Sentry does not see them.
	//
	// Errors wrap the host's errno: ENOMEM when memory or mappings (sysctl
	// vm.max_map_count) are used up. After an error the range may be mapped in
	// part, or unmapped.
	//
	// Preconditions: addr and fr are page-aligned, fr is not empty and lies with
	// addr in [MinUserAddress, MaxUserAddress); at.Any(); a reference on every
	// page of fr is held until it is unmapped.
	MapFile(addr hostarch.Addr, f memmap.File, fr memmap.FileRange, at hostarch.AccessType, precommit bool) error

	// Unmap removes all mappings in [addr, addr+length). When it returns no
	// thread can reach the pages any more. A platform whose host refuses to unmap
	// gives up the whole AddressSpace instead: the next Switch in it fails with a
	// ContextError.
	//
	// Preconditions: addr and length are page-aligned, length > 0.
	Unmap(addr hostarch.Addr, length uint64)

	// Release frees the AddressSpace and everything that the host holds for it.
	// Switches still running in it return with a ContextError. It must be called
	// once, and nothing after it.
	Release()

	// PreFork is called before the mappings are copied for a fork, PostFork
	// after. In between, the memory manager is write-locked by the caller, and
	// the platform keeps the application's code in a state that can be copied.
	PreFork()
	PostFork()

	// The methods of AddressSpaceIO work if the platform's
	// SupportsAddressSpaceIO returns true; otherwise they may panic.
	AddressSpaceIO
}

// AddressSpaceIO reads and writes memory through the mappings of an
// AddressSpace. The caller makes sure that the addresses are the application's.
// Methods return a SegmentationFault for memory that is not mapped, or not
// mapped for that access.
type AddressSpaceIO interface {
	// CopyOut copies src to addr. It returns the number of bytes copied, and an
	// error whenever that is less than len(src).
	CopyOut(addr hostarch.Addr, src []byte) (int, error)

	// CopyIn copies the memory at addr to dst, with CopyOut's results.
	CopyIn(addr hostarch.Addr, dst []byte) (int, error)

	// ZeroOut sets toZero bytes at addr to 0, with CopyOut's results.
	ZeroOut(addr hostarch.Addr, toZero uintptr) (uintptr, error)

	// SwapUint32 atomically stores new at addr and returns what was there.
	//
	// Preconditions: addr is a multiple of 4.
	SwapUint32(addr hostarch.Addr, new uint32) (uint32, error)

	// CompareAndSwapUint32 atomically replaces old at addr by new. It returns
	// what was there before, whether that was old or not.
	//
	// Preconditions: addr is a multiple of 4.
	CompareAndSwapUint32(addr hostarch.Addr, old, new uint32) (uint32, error)

	// LoadUint32 atomically loads the value at addr.
	//
	// Preconditions: addr is a multiple of 4.
	LoadUint32(addr hostarch.Addr) (uint32, error)
}

// Context runs one thread of application code. Switch, PullFullState,
// FullStateChanged, PrepareSleep and Release are called from one goroutine at a
// time; Interrupt from any.
type Context interface {
	// Switch runs the thread whose state is ac in mm's AddressSpace, until
	// something happens that the caller must see. ac then holds the state; see
	// PullFullState for what may be missing.
	//
	// cpu is the CPU whose state the caller relies on, or negative for none; it
	// may be non-negative only if the platform's DetectsCPUPreemption returns
	// true.
	//
	// The error says what happened:
	//
	//   - nil: the thread made a system call. ac's SyscallNo and SyscallArgs
	//     describe it, and IP is the instruction after it.
	//   - ErrContextSignal: the thread got the signal in the SignalInfo, which is
	//     the caller's. For SIGSEGV and SIGBUS the AccessType says what kind of
	//     access faulted, and ac.Fault holds what the CPU reported.
	//   - ErrContextInterrupt: Interrupt was called. It may come without cause.
	//   - ErrContextCPUPreempted: see there.
	//   - a *ContextError: the host failed this thread. The thread cannot go on in
	//     this AddressSpace; others can.
	Switch(ctx context.Context, mm MemoryManager, ac *arch.Context64, cpu int32) (*linux.SignalInfo, hostarch.AccessType, error)

	// PullFullState completes ac. After a system call a platform may have filled
	// in no more than the number, the arguments, IP and the stack pointer; before
	// the caller uses anything else, or hands ac to others (signal frames, fork,
	// ptrace), it calls PullFullState. as is the AddressSpace of the last Switch.
	PullFullState(as AddressSpace, ac *arch.Context64) error

	// FullStateChanged says that the caller replaced state beyond a system call's
	// result (rt_sigreturn, execve, ...): the next Switch restores all of ac, and
	// PullFullState has nothing left to do.
	FullStateChanged()

	// Interrupt makes a Switch that is under way return ErrContextInterrupt; if
	// there is none, the next one does.
	Interrupt()

	// Release frees what the platform holds for the thread. No Switch may be
	// under way, and none may follow.
	Release()

	// PrepareSleep says that the thread is about to block in the Sentry for a
	// time not known, so that the platform can give up what it spins on.
	PrepareSleep()
}

// ThreadBinder is implemented by Contexts that are faster if they stay on one OS
// thread.
type ThreadBinder interface {
	// BindThread promises that the calling goroutine is locked to its OS thread
	// (runtime.LockOSThread) and makes all further calls to the Context, Interrupt
	// aside, up to and with Release; and that it calls PrepareSleep before it blocks.
	BindThread()
}

// ContextError is returned by Context.Switch when the host failed: a stub was
// killed, a vCPU could not run, memory ran out.
type ContextError struct {
	// Err says what failed.
	Err error

	// Errno is the host's error, or the nearest to it.
	Errno unix.Errno
}

// Error implements error.
func (e *ContextError) Error() string {
	return fmt.Sprintf("context: %v (errno %d: %v)", e.Err, int(e.Errno), e.Errno)
}

// Unwrap returns the cause.
func (e *ContextError) Unwrap() error { return e.Err }

// MemoryManager is the Sentry's view of an application's memory, as far as
// platforms need it.
type MemoryManager interface {
	// IO reads and writes the application's memory.
	usermem.IO

	// MMap makes a mapping (mmap(2)) and returns its address.
	MMap(ctx context.Context, opts memmap.MMapOpts) (hostarch.Addr, error)

	// AddressSpace returns the AddressSpace in which the application runs.
	AddressSpace() AddressSpace

	// FindVMAByName returns the start of a mapping in ar whose hint or name is
	// hint, and the offset of that mapping in its file. The error is ENOENT when
	// there is none.
	FindVMAByName(ar hostarch.AddrRange, hint string) (hostarch.Addr, uint64, error)
}

// SegmentationFault is returned by AddressSpaceIO for memory that is not mapped
// with the permission that the access needs.
type SegmentationFault struct {
	// Addr is the address that could not be accessed.
	Addr hostarch.Addr
}

// Error implements error.
func (f SegmentationFault) Error() string {
	return fmt.Sprintf("segmentation fault at %v", f.Addr)
}

// NoAddressSpaceIO is embedded by AddressSpaces without AddressSpaceIO: all its
// methods panic.
type NoAddressSpaceIO struct{}

const noAddressSpaceIO = "platform does not support AddressSpaceIO"

// CopyOut implements AddressSpaceIO.CopyOut by panicking.
func (NoAddressSpaceIO) CopyOut(addr hostarch.Addr, src []byte) (int, error) {
	panic(noAddressSpaceIO)
}

// CopyIn implements AddressSpaceIO.CopyIn by panicking.
func (NoAddressSpaceIO) CopyIn(addr hostarch.Addr, dst []byte) (int, error) {
	panic(noAddressSpaceIO)
}

// ZeroOut implements AddressSpaceIO.ZeroOut by panicking.
func (NoAddressSpaceIO) ZeroOut(addr hostarch.Addr, toZero uintptr) (uintptr, error) {
	panic(noAddressSpaceIO)
}

// SwapUint32 implements AddressSpaceIO.SwapUint32 by panicking.
func (NoAddressSpaceIO) SwapUint32(addr hostarch.Addr, new uint32) (uint32, error) {
	panic(noAddressSpaceIO)
}

// CompareAndSwapUint32 implements AddressSpaceIO.CompareAndSwapUint32 by
// panicking.
func (NoAddressSpaceIO) CompareAndSwapUint32(addr hostarch.Addr, old, new uint32) (uint32, error) {
	panic(noAddressSpaceIO)
}

// LoadUint32 implements AddressSpaceIO.LoadUint32 by panicking.
func (NoAddressSpaceIO) LoadUint32(addr hostarch.Addr) (uint32, error) {
	panic(noAddressSpaceIO)
}

// NoCPUPreemptionDetection is embedded by Platforms that do not track CPUs.
type NoCPUPreemptionDetection struct{}

// DetectsCPUPreemption implements Platform.DetectsCPUPreemption.
func (NoCPUPreemptionDetection) DetectsCPUPreemption() bool { return false }

// PreemptAllCPUs implements Platform.PreemptAllCPUs by panicking.
func (NoCPUPreemptionDetection) PreemptAllCPUs() error {
	panic("platform does not detect CPU preemption")
}

// DoesOwnPageTables is embedded by Platforms that manage page tables.
type DoesOwnPageTables struct{}

// OwnsPageTables implements Platform.OwnsPageTables.
func (DoesOwnPageTables) OwnsPageTables() bool { return true }

// DoesNotOwnPageTables is embedded by Platforms that use the host's.
type DoesNotOwnPageTables struct{}

// OwnsPageTables implements Platform.OwnsPageTables.
func (DoesNotOwnPageTables) OwnsPageTables() bool { return false }

// contextID is the type of this package's context keys.
type contextID int

// CtxPlatform is the context.Context key of the Platform that runs the
// application code of a task.
const CtxPlatform contextID = iota

// FromContext returns ctx's Platform, or nil when it has none.
func FromContext(ctx context.Context) Platform {
	p, _ := ctx.Value(CtxPlatform).(Platform)
	return p
}
