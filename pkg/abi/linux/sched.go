package linux

// Flags of clone(2) and clone3(2). CSIGNAL masks the exit signal in those of clone.
const (
	CSIGNAL              = 0xff
	CLONE_NEWTIME        = 0x80
	CLONE_VM             = 0x100
	CLONE_FS             = 0x200
	CLONE_FILES          = 0x400
	CLONE_SIGHAND        = 0x800
	CLONE_PIDFD          = 0x1000
	CLONE_PTRACE         = 0x2000
	CLONE_VFORK          = 0x4000
	CLONE_PARENT         = 0x8000
	CLONE_THREAD         = 0x10000
	CLONE_NEWNS          = 0x20000
	CLONE_SYSVSEM        = 0x40000
	CLONE_SETTLS         = 0x80000
	CLONE_PARENT_SETTID  = 0x100000
	CLONE_CHILD_CLEARTID = 0x200000
	CLONE_DETACHED       = 0x400000
	CLONE_UNTRACED       = 0x800000
	CLONE_CHILD_SETTID   = 0x1000000
	CLONE_NEWCGROUP      = 0x2000000
	CLONE_NEWUTS         = 0x4000000
	CLONE_NEWIPC         = 0x8000000
	CLONE_NEWUSER        = 0x10000000
	CLONE_NEWPID         = 0x20000000
	CLONE_NEWNET         = 0x40000000
	CLONE_IO             = 0x80000000
	CLONE_CLEAR_SIGHAND  = 0x100000000
	CLONE_INTO_CGROUP    = 0x200000000
)

// Policies of sched_setscheduler(2).
const (
	SCHED_NORMAL        = 0
	SCHED_FIFO          = 1
	SCHED_RR            = 2
	SCHED_BATCH         = 3
	SCHED_IDLE          = 5
	SCHED_DEADLINE      = 6
	SCHED_RESET_ON_FORK = 0x40000000
)

// Values of getpriority(2)'s which.
const (
	PRIO_PROCESS = 0
	PRIO_PGRP    = 1
	PRIO_USER    = 2
)

// Options of wait4(2) and waitid(2). WNOTHREAD, WALL and WCLONE are __WNOTHREAD,
// __WALL and __WCLONE.
const (
	WNOHANG    = 1
	WUNTRACED  = 2
	WSTOPPED   = 2
	WEXITED    = 4
	WCONTINUED = 8
	WNOWAIT    = 0x1000000
	WNOTHREAD  = 0x20000000
	WALL       = 0x40000000
	WCLONE     = 0x80000000
)

// Values of waitid(2)'s idtype.
const (
	P_ALL   = 0
	P_PID   = 1
	P_PGID  = 2
	P_PIDFD = 3
)

// Operations of futex(2).
const (
	FUTEX_WAIT            = 0
	FUTEX_WAKE            = 1
	FUTEX_FD              = 2
	FUTEX_REQUEUE         = 3
	FUTEX_CMP_REQUEUE     = 4
	FUTEX_WAKE_OP         = 5
	FUTEX_LOCK_PI         = 6
	FUTEX_UNLOCK_PI       = 7
	FUTEX_TRYLOCK_PI      = 8
	FUTEX_WAIT_BITSET     = 9
	FUTEX_WAKE_BITSET     = 10
	FUTEX_WAIT_REQUEUE_PI = 11
	FUTEX_CMP_REQUEUE_PI  = 12
	FUTEX_LOCK_PI2        = 13

	FUTEX_PRIVATE_FLAG   = 0x80
	FUTEX_CLOCK_REALTIME = 0x100
	FUTEX_CMD_MASK       = -385
)

// Parts of a futex word and bitset (linux/futex.h).
const (
	FUTEX_WAITERS          = 0x80000000
	FUTEX_OWNER_DIED       = 0x40000000
	FUTEX_TID_MASK         = 0x3fffffff
	FUTEX_BITSET_MATCH_ANY = 0xffffffff
)

// Operations and comparisons of FUTEX_WAKE_OP.
const (
	FUTEX_OP_SET         = 0
	FUTEX_OP_ADD         = 1
	FUTEX_OP_OR          = 2
	FUTEX_OP_ANDN        = 3
	FUTEX_OP_XOR         = 4
	FUTEX_OP_OPARG_SHIFT = 8

	FUTEX_OP_CMP_EQ = 0
	FUTEX_OP_CMP_NE = 1
	FUTEX_OP_CMP_LT = 2
	FUTEX_OP_CMP_LE = 3
	FUTEX_OP_CMP_GT = 4
	FUTEX_OP_CMP_GE = 5
)

// Flags of rseq(2).
const (
	RSEQ_FLAG_UNREGISTER = 1
)

// Commands of kcmp(2).
const (
	KCMP_FILE    = 0
	KCMP_VM      = 1
	KCMP_FILES   = 2
	KCMP_FS      = 3
	KCMP_SIGHAND = 4
)

// CloneArgs is struct clone_args (clone3(2)), version 2. Older versions end after
// TLS and SetTidSize.
type CloneArgs struct {
	Flags      uint64
	PidFD      uint64
	ChildTID   uint64
	ParentTID  uint64
	ExitSignal uint64
	Stack      uint64
	StackSize  uint64
	TLS        uint64
	SetTid     uint64
	SetTidSize uint64
	Cgroup     uint64
}

func (s *CloneArgs) fields(c *codec) {
	c.u64(&s.Flags)
	c.u64(&s.PidFD)
	c.u64(&s.ChildTID)
	c.u64(&s.ParentTID)
	c.u64(&s.ExitSignal)
	c.u64(&s.Stack)
	c.u64(&s.StackSize)
	c.u64(&s.TLS)
	c.u64(&s.SetTid)
	c.u64(&s.SetTidSize)
	c.u64(&s.Cgroup)
}

// SizeBytes implements Struct.
func (s *CloneArgs) SizeBytes() int { return 88 }

// MarshalBytes implements Struct.
func (s *CloneArgs) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *CloneArgs) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// SchedParam is struct sched_param (sched_setparam(2)).
type SchedParam struct {
	Priority int32
}

func (s *SchedParam) fields(c *codec) {
	c.i32(&s.Priority)
}

// SizeBytes implements Struct.
func (s *SchedParam) SizeBytes() int { return 4 }

// MarshalBytes implements Struct.
func (s *SchedParam) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *SchedParam) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// SchedAttr is struct sched_attr (sched_setattr(2)), with utilisation clamps.
type SchedAttr struct {
	Size     uint32
	Policy   uint32
	Flags    uint64
	Nice     int32
	Priority uint32
	Runtime  uint64
	Deadline uint64
	Period   uint64
	UtilMin  uint32
	UtilMax  uint32
}

func (s *SchedAttr) fields(c *codec) {
	c.u32(&s.Size)
	c.u32(&s.Policy)
	c.u64(&s.Flags)
	c.i32(&s.Nice)
	c.u32(&s.Priority)
	c.u64(&s.Runtime)
	c.u64(&s.Deadline)
	c.u64(&s.Period)
	c.u32(&s.UtilMin)
	c.u32(&s.UtilMax)
}

// SizeBytes implements Struct.
func (s *SchedAttr) SizeBytes() int { return 56 }

// MarshalBytes implements Struct.
func (s *SchedAttr) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *SchedAttr) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// RobustListHead is struct robust_list_head (get_robust_list(2)).
type RobustListHead struct {
	List          uint64
	FutexOffset   int64
	ListOpPending uint64
}

func (s *RobustListHead) fields(c *codec) {
	c.u64(&s.List)
	c.i64(&s.FutexOffset)
	c.u64(&s.ListOpPending)
}

// SizeBytes implements Struct.
func (s *RobustListHead) SizeBytes() int { return 24 }

// MarshalBytes implements Struct.
func (s *RobustListHead) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *RobustListHead) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Rseq is struct rseq (linux/rseq.h) as of its first version.
type Rseq struct {
	CPUIDStart uint32
	CPUID      uint32
	RseqCS     uint64
	Flags      uint32
	NodeID     uint32
	MMCID      uint32
	_          [4]byte
}

func (s *Rseq) fields(c *codec) {
	c.u32(&s.CPUIDStart)
	c.u32(&s.CPUID)
	c.u64(&s.RseqCS)
	c.u32(&s.Flags)
	c.u32(&s.NodeID)
	c.u32(&s.MMCID)
	c.pad(4)
}

// SizeBytes implements Struct.
func (s *Rseq) SizeBytes() int { return 32 }

// MarshalBytes implements Struct.
func (s *Rseq) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Rseq) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// WaitStatusContinued is the status of a child that SIGCONT resumed.
const WaitStatusContinued = 0xffff

// WaitStatusExited returns wait4(2)'s status of a process that called exit(code).
func WaitStatusExited(code int32) uint32 { return uint32(code) & 0xff << 8 }

// WaitStatusKilled returns the status of a process that s ended.
func WaitStatusKilled(s Signal, core bool) uint32 {
	status := uint32(s) & 0x7f
	if core {
		status |= 0x80
	}
	return status
}

// WaitStatusStopped returns the status of a process that s stopped.
func WaitStatusStopped(s Signal) uint32 { return uint32(s)&0xff<<8 | 0x7f }
