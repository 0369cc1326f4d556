package linux

// EpollEvent is struct epoll_event (epoll_ctl(2)), packed on amd64 alone. Data is
// the user's.
type EpollEvent struct {
	Events uint32
	_      [4]byte
	Data   uint64
}

func (s *EpollEvent) fields(c *codec) {
	c.u32(&s.Events)
	c.pad(4)
	c.u64(&s.Data)
}

// SizeBytes implements Struct.
func (s *EpollEvent) SizeBytes() int { return 16 }

// MarshalBytes implements Struct.
func (s *EpollEvent) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *EpollEvent) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }
