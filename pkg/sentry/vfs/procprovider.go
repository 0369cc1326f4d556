package vfs

import (
	"context"
	"time"
)

// ProcProvider is what /proc needs to know of the tasks. The kernel implements
// it. Methods may be called by any task at any time.
type ProcProvider interface {
	// Self returns the process and thread that ctx belongs to; 0 if none.
	Self(ctx context.Context) (tgid, tid int32)

	// Processes returns the IDs of all processes, zombies too, in order.
	Processes() []int32

	// Task returns the thread tid, which names the process as well if it is
	// that of its leader; nil if there is none.
	Task(tid int32) ProcTask

	// Hostname returns the name of uname(2), and Release and Version its fields.
	Hostname() string
	Release() string
	Version() string

	// BootTime is when the Sentry started.
	BootTime() time.Time

	// MemoryUsage returns the bytes of application memory in use, and the most
	// there can be.
	MemoryUsage() (used, total uint64)
}

// ProcTask is a thread as /proc/PID/task/TID shows it, and the process it
// belongs to.
type ProcTask interface {
	// Status returns what stat, statm and status show.
	Status() ProcStatus

	// Threads returns the threads of the process in order.
	Threads() []int32

	// Maps, Cmdline, Environ and Auxv return the contents of the files of these
	// names; empty for a zombie.
	Maps() string
	Cmdline() []byte
	Environ() []byte
	Auxv() []byte

	// Executable returns the path of the program; empty for a zombie.
	Executable() string

	// FDTable returns the descriptors with a reference, or nil for a zombie.
	FDTable() *FDTable

	// FSContext returns root and working directory with a reference, or nil for
	// a zombie.
	FSContext() *FSContext

	// SetComm changes the name of the thread.
	SetComm(name string)

	// Limits returns the soft and hard resource limits, indexed by RLIMIT_*.
	Limits() [16][2]uint64
}

// ProcStatus is the state of a thread and its process.
type ProcStatus struct {
	PID, TGID, PPID, PGID, SID int32
	Comm                       string
	State                      byte // R, S, T, Z, ... as in proc(5)
	Threads                    int
	UID, GID                   [4]uint32 // real, effective, saved, file system
	Groups                     []uint32
	VMSize, RSS, PeakRSS       uint64 // bytes
	UserTime, SystemTime       time.Duration
	ChildUser, ChildSystem     time.Duration
	Start                      time.Time
	ExitSignal                 int32
	Pending, SharedPending     uint64 // signal sets, bit 0 is signal 1
	Blocked, Ignored, Caught   uint64
	Umask                      uint32
}
