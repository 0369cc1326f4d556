// Package kernel is the reference Sentry's view of tasks: threads, processes,
// process groups and sessions, signals, waiting, futexes, timers, credentials
// and resource limits. Each task is a goroutine that runs application code
// through its platform.Context and answers its system calls from a table.
//
// It depends on platform and arch, and on pgalloc, mm, loader and vfs of the
// Sentry. The system calls themselves are not here: package syscalls hands in
// the table. It must not know of one platform in particular.
package kernel

import (
	"fmt"
	"io"
	"log"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/cpuid"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/sentry/pgalloc"
)

// SyscallFn answers one system call. The error is a unix.Errno, or a restart
// error of this package; anything else that an errno can be unwrapped from is
// treated as that, and EIO otherwise. A nil SyscallControl means that the
// result goes to the application.
type SyscallFn func(t *Task, args arch.SyscallArguments) (uintptr, *SyscallControl, error)

// Syscall is an entry of the table of system calls.
type Syscall struct {
	// Name is that of the manual page.
	Name string
	// Fn answers the call.
	Fn SyscallFn
}

// SyscallControl says what is to happen after a system call other than handing
// its result to the application.
type SyscallControl struct{ keepRegisters bool }

// KeepRegisters leaves the registers as the call has set them (execve,
// rt_sigreturn), or the thread is about to end.
var KeepRegisters = &SyscallControl{keepRegisters: true}

// Config is what a Kernel is made of.
type Config struct {
	Platform   platform.Platform
	MemoryFile *pgalloc.MemoryFile

	// Syscalls is the table of system calls by number; those without Fn are not
	// supported. It must not be changed any more.
	Syscalls []Syscall

	// Hostname is what uname(2) shows.
	Hostname string

	// Trace gets a line per system call; nil for none.
	Trace io.Writer

	// Strict ends the sandbox at the first system call that is not in the table.
	Strict bool

	// Ignored are the signals that the first process ignores when it starts.
	Ignored []linux.Signal

	// Stopped is called, on a goroutine of its own, when the first process has
	// stopped for job control, and is to see that it gets SIGCONT again. If it is
	// nil, the first process is one that nobody can continue: the terminal's stop
	// signals have no effect on it (setpgid(2), "orphaned process group").
	Stopped func()

	// Log gets messages about the host failing a task. It must not be nil.
	Log *log.Logger
}

// Kernel holds the tasks of one sandbox and what they share.
type Kernel struct {
	cfg Config
	// features are what programs are told of the CPU; nil means all that it has.
	features *cpuid.FeatureSet
	bootTime time.Time
	release  string
	version  string
	cpus     unix.CPUSet

	futexes futexTable
	ticker  ticker

	// unknown counts the system calls that are not in the table, by number.
	unknownMu sync.Mutex
	unknown   map[uintptr]uint64

	// noProcesses is for the message that a fork has failed: once is enough.
	noProcesses sync.Once

	// traceMu makes lines of the trace whole.
	traceMu sync.Mutex

	// mu protects the tree of tasks and their signals: every field that says so.
	// It is a leaf of the Sentry's locks but for waiter queues.
	mu       sync.Mutex
	tasks    map[int32]*Task
	groups   map[int32]*ProcessGroup
	sessions map[int32]*Session
	lastPID  int32
	// queued counts the signals that are pending, for RLIMIT_SIGPENDING.
	queued int
	init   *ThreadGroup

	// lateReleases counts processes that have ended before their memory has.
	lateReleases atomic.Int32

	// live counts task goroutines.
	live sync.WaitGroup
	// fatal is why the sandbox ended before its program did.
	fatal atomic.Pointer[error]
}

// New returns a Kernel without tasks.
func New(cfg Config) *Kernel {
	k := &Kernel{
		cfg:      cfg,
		features: features(cfg.Platform),
		bootTime: time.Now(),
		unknown:  make(map[uintptr]uint64),
		tasks:    make(map[int32]*Task),
		groups:   make(map[int32]*ProcessGroup),
		sessions: make(map[int32]*Session),
	}
	// Taken now: a platform may bind threads to CPUs later.
	if unix.SchedGetaffinity(0, &k.cpus) != nil {
		k.cpus.Set(0)
	}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		k.release = unix.ByteSliceToString(uts.Release[:])
		k.version = unix.ByteSliceToString(uts.Version[:])
	}
	k.ticker.k = k
	for i := range k.futexes.buckets {
		k.futexes.buckets[i].index = i
	}
	return k
}

// Platform returns the platform that runs the tasks.
func (k *Kernel) Platform() platform.Platform { return k.cfg.Platform }

// BootTime implements vfs.ProcProvider.BootTime.
func (k *Kernel) BootTime() time.Time { return k.bootTime }

// Release implements vfs.ProcProvider.Release.
func (k *Kernel) Release() string { return k.release }

// Version implements vfs.ProcProvider.Version.
func (k *Kernel) Version() string { return k.version }

// Hostname implements vfs.ProcProvider.Hostname.
func (k *Kernel) Hostname() string { return k.cfg.Hostname }

// CPUs returns the CPUs that tasks may run on.
func (k *Kernel) CPUs() unix.CPUSet { return k.cpus }

// maxUnknown bounds the numbers that unknownSyscall counts: there are 2^64 that
// are none.
const maxUnknown = 1024

// UnknownSyscalls returns how often each system call was made that is not in
// the table, of the first maxUnknown numbers that were used.
func (k *Kernel) UnknownSyscalls() map[uintptr]uint64 {
	k.unknownMu.Lock()
	defer k.unknownMu.Unlock()
	m := make(map[uintptr]uint64, len(k.unknown))
	for nr, n := range k.unknown {
		m[nr] = n
	}
	return m
}

// unknownSyscall counts a call that is not in the table.
func (k *Kernel) unknownSyscall(t *Task, nr uintptr) error {
	k.unknownMu.Lock()
	if _, counted := k.unknown[nr]; counted || len(k.unknown) < maxUnknown {
		k.unknown[nr]++
	}
	k.unknownMu.Unlock()
	if k.cfg.Strict {
		k.Abort(fmt.Errorf("process %d (%s) made system call %d, which is not supported: run without --strict to let it see ENOSYS", t.TGID(), t.Name(), nr))
	}
	return unix.ENOSYS
}

// Abort ends the sandbox; Wait returns err.
func (k *Kernel) Abort(err error) {
	k.fatal.CompareAndSwap(nil, &err)
	k.KillAll()
}

// KillAll sends SIGKILL to every process.
func (k *Kernel) KillAll() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, t := range k.tasks {
		if t.tg.leader == t && !t.tg.exiting {
			k.exitGroupLocked(t.tg, nil, linux.WaitStatusKilled(linux.SIGKILL, false))
		}
	}
}

// Wait returns the status of the first program, as wait4(2) gives it, once it
// and every other task has ended. The error is that of Abort.
func (k *Kernel) Wait() (uint32, error) {
	k.live.Wait()
	if err := k.fatal.Load(); err != nil {
		return 0, *err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.init.exitStatus, nil
}

// hostMemory returns the size of the host's memory in bytes.
func hostMemory() uint64 {
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) != nil {
		return 1 << 30
	}
	return uint64(si.Totalram) * uint64(si.Unit)
}
