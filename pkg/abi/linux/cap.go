package linux

// The capabilities (capabilities(7)).
const (
	CAP_CHOWN              = 0
	CAP_DAC_OVERRIDE       = 1
	CAP_DAC_READ_SEARCH    = 2
	CAP_FOWNER             = 3
	CAP_FSETID             = 4
	CAP_KILL               = 5
	CAP_SETGID             = 6
	CAP_SETUID             = 7
	CAP_SETPCAP            = 8
	CAP_LINUX_IMMUTABLE    = 9
	CAP_NET_BIND_SERVICE   = 10
	CAP_NET_BROADCAST      = 11
	CAP_NET_ADMIN          = 12
	CAP_NET_RAW            = 13
	CAP_IPC_LOCK           = 14
	CAP_IPC_OWNER          = 15
	CAP_SYS_MODULE         = 16
	CAP_SYS_RAWIO          = 17
	CAP_SYS_CHROOT         = 18
	CAP_SYS_PTRACE         = 19
	CAP_SYS_PACCT          = 20
	CAP_SYS_ADMIN          = 21
	CAP_SYS_BOOT           = 22
	CAP_SYS_NICE           = 23
	CAP_SYS_RESOURCE       = 24
	CAP_SYS_TIME           = 25
	CAP_SYS_TTY_CONFIG     = 26
	CAP_MKNOD              = 27
	CAP_LEASE              = 28
	CAP_AUDIT_WRITE        = 29
	CAP_AUDIT_CONTROL      = 30
	CAP_SETFCAP            = 31
	CAP_MAC_OVERRIDE       = 32
	CAP_MAC_ADMIN          = 33
	CAP_SYSLOG             = 34
	CAP_WAKE_ALARM         = 35
	CAP_BLOCK_SUSPEND      = 36
	CAP_AUDIT_READ         = 37
	CAP_PERFMON            = 38
	CAP_BPF                = 39
	CAP_CHECKPOINT_RESTORE = 40
	CAP_LAST_CAP           = 40
)

// Versions of capget(2)'s structures.
const (
	LINUX_CAPABILITY_VERSION_1 = 0x19980330
	LINUX_CAPABILITY_VERSION_2 = 0x20071026
	LINUX_CAPABILITY_VERSION_3 = 0x20080522
)

// CapUserHeader is struct __user_cap_header_struct (capget(2)).
type CapUserHeader struct {
	Version uint32
	PID     int32
}

func (s *CapUserHeader) fields(c *codec) {
	c.u32(&s.Version)
	c.i32(&s.PID)
}

// SizeBytes implements Struct.
func (s *CapUserHeader) SizeBytes() int { return 8 }

// MarshalBytes implements Struct.
func (s *CapUserHeader) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *CapUserHeader) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// CapUserData is struct __user_cap_data_struct; versions 2 and 3 use two of them,
// the low capabilities first.
type CapUserData struct {
	Effective   uint32
	Permitted   uint32
	Inheritable uint32
}

func (s *CapUserData) fields(c *codec) {
	c.u32(&s.Effective)
	c.u32(&s.Permitted)
	c.u32(&s.Inheritable)
}

// SizeBytes implements Struct.
func (s *CapUserData) SizeBytes() int { return 12 }

// MarshalBytes implements Struct.
func (s *CapUserData) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *CapUserData) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }
