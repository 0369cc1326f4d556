package linux

// Resources of getrlimit(2).
const (
	RLIMIT_CPU        = 0
	RLIMIT_FSIZE      = 1
	RLIMIT_DATA       = 2
	RLIMIT_STACK      = 3
	RLIMIT_CORE       = 4
	RLIMIT_RSS        = 5
	RLIMIT_NPROC      = 6
	RLIMIT_NOFILE     = 7
	RLIMIT_MEMLOCK    = 8
	RLIMIT_AS         = 9
	RLIMIT_LOCKS      = 10
	RLIMIT_SIGPENDING = 11
	RLIMIT_MSGQUEUE   = 12
	RLIMIT_NICE       = 13
	RLIMIT_RTPRIO     = 14
	RLIMIT_RTTIME     = 15
	RLIM_NLIMITS      = 16

	RLIM_INFINITY = 0xffffffffffffffff
)

// Values of getrusage(2)'s who.
const (
	RUSAGE_SELF     = 0
	RUSAGE_CHILDREN = -1
	RUSAGE_THREAD   = 1
)

// Rlimit is struct rlimit (getrlimit(2)).
type Rlimit struct {
	Cur uint64
	Max uint64
}

func (s *Rlimit) fields(c *codec) {
	c.u64(&s.Cur)
	c.u64(&s.Max)
}

// SizeBytes implements Struct.
func (s *Rlimit) SizeBytes() int { return 16 }

// MarshalBytes implements Struct.
func (s *Rlimit) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Rlimit) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Rusage is struct rusage (getrusage(2)).
type Rusage struct {
	Utime    Timeval
	Stime    Timeval
	Maxrss   int64
	Ixrss    int64
	Idrss    int64
	Isrss    int64
	Minflt   int64
	Majflt   int64
	Nswap    int64
	Inblock  int64
	Oublock  int64
	Msgsnd   int64
	Msgrcv   int64
	Nsignals int64
	Nvcsw    int64
	Nivcsw   int64
}

func (s *Rusage) fields(c *codec) {
	s.Utime.fields(c)
	s.Stime.fields(c)
	c.i64(&s.Maxrss)
	c.i64(&s.Ixrss)
	c.i64(&s.Idrss)
	c.i64(&s.Isrss)
	c.i64(&s.Minflt)
	c.i64(&s.Majflt)
	c.i64(&s.Nswap)
	c.i64(&s.Inblock)
	c.i64(&s.Oublock)
	c.i64(&s.Msgsnd)
	c.i64(&s.Msgrcv)
	c.i64(&s.Nsignals)
	c.i64(&s.Nvcsw)
	c.i64(&s.Nivcsw)
}

// SizeBytes implements Struct.
func (s *Rusage) SizeBytes() int { return 144 }

// MarshalBytes implements Struct.
func (s *Rusage) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Rusage) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Sysinfo is struct sysinfo (sysinfo(2)); loads have 16 fractional bits, memory
// is in units of Unit bytes.
type Sysinfo struct {
	Uptime    int64
	Loads     [3]uint64
	TotalRAM  uint64
	FreeRAM   uint64
	SharedRAM uint64
	BufferRAM uint64
	TotalSwap uint64
	FreeSwap  uint64
	Procs     uint16
	_         [6]byte
	TotalHigh uint64
	FreeHigh  uint64
	Unit      uint32
	_         [4]byte
}

func (s *Sysinfo) fields(c *codec) {
	c.i64(&s.Uptime)
	for i := range s.Loads {
		c.u64(&s.Loads[i])
	}
	c.u64(&s.TotalRAM)
	c.u64(&s.FreeRAM)
	c.u64(&s.SharedRAM)
	c.u64(&s.BufferRAM)
	c.u64(&s.TotalSwap)
	c.u64(&s.FreeSwap)
	c.u16(&s.Procs)
	c.pad(6)
	c.u64(&s.TotalHigh)
	c.u64(&s.FreeHigh)
	c.u32(&s.Unit)
	c.pad(4)
}

// SizeBytes implements Struct.
func (s *Sysinfo) SizeBytes() int { return 112 }

// MarshalBytes implements Struct.
func (s *Sysinfo) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Sysinfo) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Utsname is struct new_utsname (uname(2)); every string ends with a NUL.
type Utsname struct {
	Sysname    [65]byte
	Nodename   [65]byte
	Release    [65]byte
	Version    [65]byte
	Machine    [65]byte
	Domainname [65]byte
}

func (s *Utsname) fields(c *codec) {
	c.raw(s.Sysname[:])
	c.raw(s.Nodename[:])
	c.raw(s.Release[:])
	c.raw(s.Version[:])
	c.raw(s.Machine[:])
	c.raw(s.Domainname[:])
}

// SizeBytes implements Struct.
func (s *Utsname) SizeBytes() int { return 390 }

// MarshalBytes implements Struct.
func (s *Utsname) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Utsname) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }
