package kernel

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/cpuid"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/sentry/mm"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// Task is a thread of the application. It implements context.Context, for calls
// made on its behalf. Methods are for its own goroutine unless they say
// otherwise.
type Task struct {
	k  *Kernel
	tg *ThreadGroup
	// tid changes only in execve(2) of a thread that is not the leader.
	tid atomic.Int32

	ac *arch.Context64
	pc platform.Context

	// resMu is held to replace what follows, and by others to read it. All are
	// nil once the task has ended.
	resMu sync.Mutex
	mm    *mm.MemoryManager
	fdt   *vfs.FDTable
	fs    *vfs.FSContext
	name  string

	creds atomic.Pointer[Creds]

	// What the scheduling calls set, and nothing uses.
	nice     atomic.Int32
	policy   atomic.Int32
	affinity atomic.Pointer[unix.CPUSet]

	// work is set when there may be something to do before application code
	// runs on; inApp while the task is in Switch. See interrupt.
	work  atomic.Bool
	inApp atomic.Bool
	// wake holds a token when a blocked task should look for work.
	wake chan struct{}
	// state is what /proc shows: one of R, S, D, T, Z, X.
	state atomic.Uint32

	// userTicks and sysTicks are the times spent, in ticks.
	userTicks, sysTicks atomic.Int64
	startTime           time.Time

	// Of signals. pending, mask and what follows are protected by Kernel.mu; the
	// task itself may read mask and savedMask without.
	pending   pendingSignals
	mask      linux.SignalSet
	savedMask linux.SignalSet
	haveSaved bool
	// realMask is what was blocked before a wait for signals unblocked some.
	realMask linux.SignalSet
	stopped  bool
	ended    bool
	// exiting says that exit(2) was called.
	exiting  bool
	altStack linux.SignalStack
	// restorer is where handlers return to that do not say where.
	restorer hostarch.Addr

	// restart is the restart error of the system call that was interrupted,
	// until it is known whether it is made again.
	restart      restartError
	restartBlock func(*Task) (uintptr, error)

	// clearTID, robustList: set_tid_address(2), set_robust_list(2).
	clearTID   hostarch.Addr
	robustList hostarch.Addr

	// forked says that the task started with a copy of its parent's memory.
	forked bool
	// vfork is closed when the child of vfork(2) runs a program of its own.
	vfork chan struct{}

	// parentDeath is prctl(PR_SET_PDEATHSIG), protected by Kernel.mu.
	parentDeath linux.Signal

	// Prctl is for the task's own goroutine.
	Prctl PrctlState
}

// PrctlState is what prctl(2) remembers of a thread and nothing uses.
type PrctlState struct {
	// TimerSlack is PR_SET_TIMERSLACK, in nanoseconds.
	TimerSlack uint64
	// NoTHP is PR_SET_THP_DISABLE.
	NoTHP bool
}

// Kernel returns the Kernel that t belongs to.
func (t *Task) Kernel() *Kernel { return t.k }

// ThreadGroup returns the process that t belongs to.
func (t *Task) ThreadGroup() *ThreadGroup { return t.tg }

// MM returns the task's memory.
func (t *Task) MM() *mm.MemoryManager { return t.mm }

// Arch returns the task's registers. Call PullFullState before using more than
// the system call's number and arguments, FullStateChanged after changing more
// than its result.
func (t *Task) Arch() *arch.Context64 { return t.ac }

// PullFullState completes the registers (platform.Context.PullFullState).
func (t *Task) PullFullState() error { return t.pc.PullFullState(t.mm.AddressSpace(), t.ac) }

// FullStateChanged makes all registers be restored.
func (t *Task) FullStateChanged() { t.pc.FullStateChanged() }

// FDTable returns the task's descriptors.
func (t *Task) FDTable() *vfs.FDTable { return t.fdt }

// FS returns the task's root and working directory.
func (t *Task) FS() *vfs.FSContext { return t.fs }

// Nice returns the task's nice value. Any goroutine may call it.
func (t *Task) Nice() int32 { return t.nice.Load() }

// SetNice sets it. Any goroutine may call it.
func (t *Task) SetNice(v int32) { t.nice.Store(v) }

// Scheduler returns the policy, SCHED_*. Any goroutine may call it.
func (t *Task) Scheduler() int32 { return t.policy.Load() }

// SetScheduler sets it. Any goroutine may call it.
func (t *Task) SetScheduler(policy int32) { t.policy.Store(policy) }

// Affinity returns the CPUs that the task asked for. Any goroutine may call it.
func (t *Task) Affinity() unix.CPUSet { return *t.affinity.Load() }

// SetAffinity sets them. Any goroutine may call it.
func (t *Task) SetAffinity(set unix.CPUSet) { t.affinity.Store(&set) }

// SetClearTID is set_tid_address(2).
func (t *Task) SetClearTID(addr hostarch.Addr) { t.clearTID = addr }

// RobustList is get_robust_list(2) of the task itself.
func (t *Task) RobustList() hostarch.Addr { return t.robustList }

// SetRobustList is set_robust_list(2).
func (t *Task) SetRobustList(addr hostarch.Addr) { t.robustList = addr }

// ClearTID returns what SetClearTID was given.
func (t *Task) ClearTID() hostarch.Addr { return t.clearTID }

// ParentDeathSignal is prctl(PR_GET_PDEATHSIG).
func (t *Task) ParentDeathSignal() linux.Signal {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	return t.parentDeath
}

// SetParentDeathSignal is prctl(PR_SET_PDEATHSIG).
func (t *Task) SetParentDeathSignal(sig linux.Signal) {
	t.k.mu.Lock()
	t.parentDeath = sig
	t.k.mu.Unlock()
}

// TID returns the thread's number. Any goroutine may call it.
func (t *Task) TID() int32 { return t.tid.Load() }

// TGID returns the number of the process. Any goroutine may call it.
func (t *Task) TGID() int32 { return t.tg.id }

// Creds returns the task's credentials, not to be changed. Any goroutine may
// call it.
func (t *Task) Creds() *Creds { return t.creds.Load() }

// SetCreds installs c, which must not be changed any more.
func (t *Task) SetCreds(c *Creds) { t.creds.Store(c.finish()) }

// memory returns t's memory, or nil. Any goroutine may call it.
func (t *Task) memory() *mm.MemoryManager {
	t.resMu.Lock()
	defer t.resMu.Unlock()
	return t.mm
}

// Name returns the thread's name (comm). Any goroutine may call it.
func (t *Task) Name() string {
	t.resMu.Lock()
	defer t.resMu.Unlock()
	return t.name
}

// SetName sets the thread's name, cut to 15 bytes. Any goroutine may call it.
func (t *Task) SetName(name string) {
	if len(name) > 15 {
		name = name[:15]
	}
	t.resMu.Lock()
	t.name = name
	t.resMu.Unlock()
}

// Deadline implements context.Context: there is none.
func (t *Task) Deadline() (time.Time, bool) { return time.Time{}, false }

// Done implements context.Context: tasks are not cancelled; see BlockUntil.
func (t *Task) Done() <-chan struct{} { return nil }

// Err implements context.Context.
func (t *Task) Err() error { return nil }

type ctxKey int

// ctxTask is the key of the Task that a context belongs to.
const ctxTask ctxKey = iota

// TaskFromContext returns the Task that ctx belongs to, or nil.
func TaskFromContext(ctx context.Context) *Task {
	t, _ := ctx.Value(ctxTask).(*Task)
	return t
}

// Value implements context.Context.
func (t *Task) Value(key any) any {
	switch key {
	case ctxTask:
		return t
	case cpuid.CtxFeatureSet:
		return t.k.features
	case platform.CtxPlatform:
		return t.k.cfg.Platform
	case vfs.CtxCreds:
		return &t.Creds().file
	}
	return nil
}

// CopyIn copies application memory to all of dst.
func (t *Task) CopyIn(addr hostarch.Addr, dst []byte) error {
	_, err := t.mm.CopyIn(t, addr, dst, usermem.IOOpts{})
	return err
}

// CopyOut copies all of src to application memory.
func (t *Task) CopyOut(addr hostarch.Addr, src []byte) error {
	_, err := t.mm.CopyOut(t, addr, src, usermem.IOOpts{})
	return err
}

// CopyInStruct copies a structure in.
func (t *Task) CopyInStruct(addr hostarch.Addr, s linux.Struct) error {
	buf := make([]byte, s.SizeBytes())
	if err := t.CopyIn(addr, buf); err != nil {
		return err
	}
	s.UnmarshalBytes(buf)
	return nil
}

// CopyOutStruct copies a structure out.
func (t *Task) CopyOutStruct(addr hostarch.Addr, s linux.Struct) error {
	buf := make([]byte, s.SizeBytes())
	s.MarshalBytes(buf)
	return t.CopyOut(addr, buf)
}

// CopyInString copies a string of less than max bytes in; ENAMETOOLONG if it is
// longer.
func (t *Task) CopyInString(addr hostarch.Addr, max int) (string, error) {
	return usermem.CopyStringIn(t, t.mm, addr, max, usermem.IOOpts{})
}

// CopyInPath copies the name of a file in.
func (t *Task) CopyInPath(addr hostarch.Addr) (string, error) {
	return t.CopyInString(addr, unix.PathMax)
}

// maxVector bounds the strings of execve(2), in bytes with their pointers, as
// the largest RLIMIT_STACK that counts does (three quarters of 8 MiB).
const maxVector = 6 << 20

// CopyInVector copies a list of strings in that ends with a null pointer, as
// execve(2) takes it; E2BIG if it is too long. A null list is empty.
func (t *Task) CopyInVector(addr hostarch.Addr) ([]string, error) {
	if addr == 0 {
		return nil, nil
	}
	var v []string
	for size := 0; ; {
		p, err := usermem.CopyUint64In(t, t.mm, addr, usermem.IOOpts{})
		if err != nil {
			return nil, err
		}
		if p == 0 {
			return v, nil
		}
		s, err := t.CopyInString(hostarch.Addr(p), maxArgString)
		if err == unix.ENAMETOOLONG {
			err = unix.E2BIG
		}
		if err != nil {
			return nil, err
		}
		if size += len(s) + 1 + 8; size > maxVector {
			return nil, unix.E2BIG
		}
		v = append(v, s)
		addr += 8
	}
}

// maxArgString is MAX_ARG_STRLEN: 32 pages of 4 KiB.
const maxArgString = 32 * 4096

// GetFile returns the file open as fd with a reference for the caller; EBADF if
// there is none.
func (t *Task) GetFile(fd int32) (*vfs.FileDescription, error) {
	if f := t.fdt.Get(fd); f != nil {
		return f, nil
	}
	return nil, unix.EBADF
}

// Limit returns the soft and hard value of a resource limit, RLIMIT_*.
func (t *Task) Limit(resource int) (cur, max uint64) { return t.tg.Limit(resource) }

// Block waits until ready gets a value or is closed. It returns ERESTARTSYS
// when the task must see to a signal first.
func (t *Task) Block(ready <-chan struct{}) error { return t.BlockUntil(ready, time.Time{}) }

// BlockUntil is Block, and returns ETIMEDOUT at deadline; the zero Time is none.
func (t *Task) BlockUntil(ready <-chan struct{}, deadline time.Time) error {
	select {
	case <-ready:
		return nil
	default:
	}
	var timeout <-chan time.Time
	if !deadline.IsZero() {
		timer := time.NewTimer(time.Until(deadline))
		defer timer.Stop()
		timeout = timer.C
	}
	t.pc.PrepareSleep()
	t.state.Store('S')
	defer t.running()
	for {
		if t.work.Load() && t.interrupted() {
			return ERESTARTSYS
		}
		select {
		case <-ready:
			return nil
		case <-timeout:
			return unix.ETIMEDOUT
		case <-t.wake:
		}
	}
}

// blockKillable is Block that only the end of the task interrupts.
func (t *Task) blockKillable(ready <-chan struct{}) error {
	t.pc.PrepareSleep()
	t.state.Store('D')
	defer t.running()
	for {
		if t.work.Load() && t.dying() {
			return ERESTARTNOINTR
		}
		select {
		case <-ready:
			return nil
		case <-t.wake:
		}
	}
}

// running marks the task as running.
func (t *Task) running() {
	t.state.Store('R')
	t.k.ticker.poke()
}

// interrupt makes the task look for work soon, wherever it is. Any goroutine
// may call it.
//
// The task sets inApp before it looks at work, and work is set before inApp is
// looked at here: one of both sees the other.
func (t *Task) interrupt() {
	t.work.Store(true)
	select {
	case t.wake <- struct{}{}:
	default:
	}
	if t.inApp.Load() {
		t.pc.Interrupt()
	}
}
