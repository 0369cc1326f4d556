package linux

// Options of prctl(2).
const (
	PR_SET_PDEATHSIG         = 1
	PR_GET_PDEATHSIG         = 2
	PR_GET_DUMPABLE          = 3
	PR_SET_DUMPABLE          = 4
	PR_GET_KEEPCAPS          = 7
	PR_SET_KEEPCAPS          = 8
	PR_SET_NAME              = 15
	PR_GET_NAME              = 16
	PR_GET_SECCOMP           = 21
	PR_SET_SECCOMP           = 22
	PR_CAPBSET_READ          = 23
	PR_CAPBSET_DROP          = 24
	PR_GET_TSC               = 25
	PR_SET_TSC               = 26
	PR_GET_SECUREBITS        = 27
	PR_SET_SECUREBITS        = 28
	PR_SET_TIMERSLACK        = 29
	PR_GET_TIMERSLACK        = 30
	PR_SET_MM                = 35
	PR_SET_PTRACER           = 0x59616d61
	PR_SET_CHILD_SUBREAPER   = 36
	PR_GET_CHILD_SUBREAPER   = 37
	PR_SET_NO_NEW_PRIVS      = 38
	PR_GET_NO_NEW_PRIVS      = 39
	PR_GET_TID_ADDRESS       = 40
	PR_SET_THP_DISABLE       = 41
	PR_GET_THP_DISABLE       = 42
	PR_CAP_AMBIENT           = 47
	PR_CAP_AMBIENT_IS_SET    = 1
	PR_CAP_AMBIENT_RAISE     = 2
	PR_CAP_AMBIENT_LOWER     = 3
	PR_CAP_AMBIENT_CLEAR_ALL = 4
	PR_SVE_SET_VL            = 50
	PR_SVE_GET_VL            = 51
	PR_GET_SPECULATION_CTRL  = 52
	PR_SET_SPECULATION_CTRL  = 53
	PR_PAC_RESET_KEYS        = 54
	PR_SET_TAGGED_ADDR_CTRL  = 55
	PR_GET_TAGGED_ADDR_CTRL  = 56
	PR_SET_VMA               = 0x53564d41
	PR_SET_VMA_ANON_NAME     = 0
	PR_GET_AUXV              = 0x41555856
	PR_SET_MDWE              = 65
	PR_GET_MDWE              = 66
	PR_TSC_ENABLE            = 1
	PR_TSC_SIGSEGV           = 2
)

// Sizes of names (prctl(2), PR_SET_NAME).
const (
	TASK_COMM_LEN = 16
)

// Operations and modes of seccomp(2).
const (
	SECCOMP_MODE_DISABLED                  = 0
	SECCOMP_MODE_STRICT                    = 1
	SECCOMP_MODE_FILTER                    = 2
	SECCOMP_SET_MODE_STRICT                = 0
	SECCOMP_SET_MODE_FILTER                = 1
	SECCOMP_GET_ACTION_AVAIL               = 2
	SECCOMP_GET_NOTIF_SIZES                = 3
	SECCOMP_FILTER_FLAG_TSYNC              = 1
	SECCOMP_FILTER_FLAG_LOG                = 2
	SECCOMP_FILTER_FLAG_SPEC_ALLOW         = 4
	SECCOMP_FILTER_FLAG_NEW_LISTENER       = 8
	SECCOMP_FILTER_FLAG_TSYNC_ESRCH        = 16
	SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 32
)

// Actions of seccomp filters.
const (
	SECCOMP_RET_KILL_PROCESS = 0x80000000
	SECCOMP_RET_KILL_THREAD  = 0
	SECCOMP_RET_TRAP         = 0x30000
	SECCOMP_RET_ERRNO        = 0x50000
	SECCOMP_RET_USER_NOTIF   = 0x7fc00000
	SECCOMP_RET_TRACE        = 0x7ff00000
	SECCOMP_RET_LOG          = 0x7ffc0000
	SECCOMP_RET_ALLOW        = 0x7fff0000
	SECCOMP_RET_ACTION_FULL  = 0xffff0000
	SECCOMP_RET_DATA         = 0xffff
)

// Architectures as seccomp and audit name them (linux/audit.h).
const (
	AUDIT_ARCH_I386    = 0x40000003
	AUDIT_ARCH_X86_64  = 0xc000003e
	AUDIT_ARCH_ARM     = 0x40000028
	AUDIT_ARCH_AARCH64 = 0xc00000b7
)

// Magic numbers and commands of reboot(2).
const (
	LINUX_REBOOT_MAGIC1        = 0xfee1dead
	LINUX_REBOOT_MAGIC2        = 0x28121969
	LINUX_REBOOT_CMD_CAD_ON    = 0x89abcdef
	LINUX_REBOOT_CMD_CAD_OFF   = 0
	LINUX_REBOOT_CMD_HALT      = 0xcdef0123
	LINUX_REBOOT_CMD_POWER_OFF = 0x4321fedc
	LINUX_REBOOT_CMD_RESTART   = 0x1234567
)

// SeccompData is struct seccomp_data (seccomp(2)).
type SeccompData struct {
	Nr   int32
	Arch uint32
	IP   uint64
	Args [6]uint64
}

func (s *SeccompData) fields(c *codec) {
	c.i32(&s.Nr)
	c.u32(&s.Arch)
	c.u64(&s.IP)
	for i := range s.Args {
		c.u64(&s.Args[i])
	}
}

// SizeBytes implements Struct.
func (s *SeccompData) SizeBytes() int { return 64 }

// MarshalBytes implements Struct.
func (s *SeccompData) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *SeccompData) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// SockFprog is struct sock_fprog, the program of a seccomp filter.
type SockFprog struct {
	Len    uint16
	_      [6]byte
	Filter uint64
}

func (s *SockFprog) fields(c *codec) {
	c.u16(&s.Len)
	c.pad(6)
	c.u64(&s.Filter)
}

// SizeBytes implements Struct.
func (s *SockFprog) SizeBytes() int { return 16 }

// MarshalBytes implements Struct.
func (s *SockFprog) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *SockFprog) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }
