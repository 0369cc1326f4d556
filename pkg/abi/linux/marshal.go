package linux

import "encoding/binary"

// Struct is a structure of the ABI that crosses to application memory. Its
// layout there, padding included, is the kernel's; padding is written as zeros
// and not read.
type Struct interface {
	// SizeBytes returns the size of the structure in memory.
	SizeBytes() int

	// MarshalBytes writes the structure to dst, of SizeBytes at least.
	MarshalBytes(dst []byte)

	// UnmarshalBytes reads the structure from src, of SizeBytes at least. It
	// checks nothing: what applications write is hostile.
	UnmarshalBytes(src []byte)
}

// codec moves fields, one after the other, to or from memory, so that a
// structure lists its fields once for both directions.
type codec struct {
	b   []byte
	out bool
}

func (c *codec) next(n int) []byte {
	b := c.b[:n:len(c.b)] // not beyond the length, whatever the capacity
	c.b = c.b[n:]
	return b
}

func (c *codec) pad(n int) {
	if b := c.next(n); c.out {
		clear(b)
	}
}

func (c *codec) raw(p []byte) {
	if b := c.next(len(p)); c.out {
		copy(b, p)
	} else {
		copy(p, b)
	}
}

func (c *codec) u8(p *uint8) {
	if b := c.next(1); c.out {
		b[0] = *p
	} else {
		*p = b[0]
	}
}

func (c *codec) u16(p *uint16) {
	if b := c.next(2); c.out {
		binary.LittleEndian.PutUint16(b, *p)
	} else {
		*p = binary.LittleEndian.Uint16(b)
	}
}

func (c *codec) u32(p *uint32) {
	if b := c.next(4); c.out {
		binary.LittleEndian.PutUint32(b, *p)
	} else {
		*p = binary.LittleEndian.Uint32(b)
	}
}

func (c *codec) u64(p *uint64) {
	if b := c.next(8); c.out {
		binary.LittleEndian.PutUint64(b, *p)
	} else {
		*p = binary.LittleEndian.Uint64(b)
	}
}

func (c *codec) i16(p *int16) {
	v := uint16(*p)
	c.u16(&v)
	*p = int16(v)
}

func (c *codec) i32(p *int32) {
	v := uint32(*p)
	c.u32(&v)
	*p = int32(v)
}

func (c *codec) i64(p *int64) {
	v := uint64(*p)
	c.u64(&v)
	*p = int64(v)
}
