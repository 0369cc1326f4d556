package linux

// Requests of ioctl_tty(2) and ioctl(2).
const (
	TCGETS      = 0x5401
	TCSETS      = 0x5402
	TCSETSW     = 0x5403
	TCSETSF     = 0x5404
	TCSBRK      = 0x5409
	TCXONC      = 0x540a
	TCFLSH      = 0x540b
	TCSBRKP     = 0x5425
	TIOCEXCL    = 0x540c
	TIOCNXCL    = 0x540d
	TIOCSCTTY   = 0x540e
	TIOCGPGRP   = 0x540f
	TIOCSPGRP   = 0x5410
	TIOCOUTQ    = 0x5411
	TIOCSTI     = 0x5412
	TIOCGWINSZ  = 0x5413
	TIOCSWINSZ  = 0x5414
	TIOCINQ     = 0x541b
	TIOCNOTTY   = 0x5422
	TIOCGETD    = 0x5424
	TIOCSETD    = 0x5423
	TIOCGSID    = 0x5429
	TIOCGPTN    = 0x80045430
	TIOCSPTLCK  = 0x40045431
	TIOCGPTPEER = 0x5441
	TIOCPKT     = 0x5420

	FIONREAD = 0x541b
	FIONBIO  = 0x5421
	FIONCLEX = 0x5450
	FIOCLEX  = 0x5451
	FIOASYNC = 0x5452
	FIOQSIZE = 0x5460
)

// Input flags of Termios.
const (
	IGNBRK  = 1
	BRKINT  = 2
	IGNPAR  = 4
	PARMRK  = 8
	INPCK   = 0x10
	ISTRIP  = 0x20
	INLCR   = 0x40
	IGNCR   = 0x80
	ICRNL   = 0x100
	IUCLC   = 0x200
	IXON    = 0x400
	IXANY   = 0x800
	IXOFF   = 0x1000
	IMAXBEL = 0x2000
	IUTF8   = 0x4000
)

// Output flags of Termios.
const (
	OPOST  = 1
	OLCUC  = 2
	ONLCR  = 4
	OCRNL  = 8
	ONOCR  = 0x10
	ONLRET = 0x20
	OFILL  = 0x40
	OFDEL  = 0x80
	TABDLY = 6144
	XTABS  = 6144
)

// Control flags of Termios.
const (
	CBAUD  = 0x100f
	CSIZE  = 48
	CS5    = 0
	CS6    = 16
	CS7    = 32
	CS8    = 48
	CSTOPB = 64
	CREAD  = 0x80
	PARENB = 256
	PARODD = 512
	HUPCL  = 1024
	CLOCAL = 2048
	B9600  = 0xd
	B38400 = 0xf
)

// Local flags of Termios.
const (
	ISIG    = 1
	ICANON  = 2
	XCASE   = 4
	ECHO    = 8
	ECHOE   = 16
	ECHOK   = 32
	ECHONL  = 64
	NOFLSH  = 128
	TOSTOP  = 256
	ECHOCTL = 512
	ECHOPRT = 1024
	ECHOKE  = 2048
	FLUSHO  = 4096
	PENDIN  = 16384
	IEXTEN  = 0x8000
)

// Indices into Termios.ControlChars.
const (
	VINTR    = 0
	VQUIT    = 1
	VERASE   = 2
	VKILL    = 3
	VEOF     = 4
	VTIME    = 5
	VMIN     = 6
	VSWTC    = 7
	VSTART   = 8
	VSTOP    = 9
	VSUSP    = 10
	VEOL     = 11
	VREPRINT = 12
	VDISCARD = 13
	VWERASE  = 14
	VLNEXT   = 15
	VEOL2    = 16
)

// NumControlChars is the kernel's NCCS (asm-generic/termbits.h).
const (
	NumControlChars = 19
)

// Termios is the kernel's struct termios (TCGETS).
type Termios struct {
	InputFlags     uint32
	OutputFlags    uint32
	ControlFlags   uint32
	LocalFlags     uint32
	LineDiscipline uint8
	ControlChars   [19]byte
}

func (s *Termios) fields(c *codec) {
	c.u32(&s.InputFlags)
	c.u32(&s.OutputFlags)
	c.u32(&s.ControlFlags)
	c.u32(&s.LocalFlags)
	c.u8(&s.LineDiscipline)
	c.raw(s.ControlChars[:])
}

// SizeBytes implements Struct.
func (s *Termios) SizeBytes() int { return 36 }

// MarshalBytes implements Struct.
func (s *Termios) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Termios) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// Winsize is struct winsize (TIOCGWINSZ).
type Winsize struct {
	Row    uint16
	Col    uint16
	Xpixel uint16
	Ypixel uint16
}

func (s *Winsize) fields(c *codec) {
	c.u16(&s.Row)
	c.u16(&s.Col)
	c.u16(&s.Xpixel)
	c.u16(&s.Ypixel)
}

// SizeBytes implements Struct.
func (s *Winsize) SizeBytes() int { return 8 }

// MarshalBytes implements Struct.
func (s *Winsize) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Winsize) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }
