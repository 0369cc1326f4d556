package linux

// Stat is struct stat, which newfstatat(2) and fstat(2) fill in.
type Stat struct {
	Dev     uint64
	Ino     uint64
	Mode    uint32
	Nlink   uint32
	UID     uint32
	GID     uint32
	Rdev    uint64
	_       [8]byte
	Size    int64
	Blksize int32
	_       [4]byte
	Blocks  int64
	Atime   Timespec
	Mtime   Timespec
	Ctime   Timespec
	_       [8]byte
}

func (s *Stat) fields(c *codec) {
	c.u64(&s.Dev)
	c.u64(&s.Ino)
	c.u32(&s.Mode)
	c.u32(&s.Nlink)
	c.u32(&s.UID)
	c.u32(&s.GID)
	c.u64(&s.Rdev)
	c.pad(8)
	c.i64(&s.Size)
	c.i32(&s.Blksize)
	c.pad(4)
	c.i64(&s.Blocks)
	s.Atime.fields(c)
	s.Mtime.fields(c)
	s.Ctime.fields(c)
	c.pad(8)
}

// SizeBytes implements Struct.
func (s *Stat) SizeBytes() int { return 128 }

// MarshalBytes implements Struct.
func (s *Stat) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *Stat) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }
