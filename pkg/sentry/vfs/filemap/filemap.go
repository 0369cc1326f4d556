// Package filemap maps host files into applications and into the Sentry.
//
// It depends on memmap and hostarch. It knows nothing of names or file systems:
// they own the descriptors' meaning and say which file an Object stands for.
package filemap

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
)

// Object is one host file as processes map it: all that open the same file
// share it. It implements memmap.Mappable and memmap.MappingIdentity. It starts
// with one reference, that of whoever has the file open.
//
// The offsets of an Object are those of the file, so nothing has to be kept of
// its mappings: when the file is truncated the host takes the pages away, and
// the next access faults.
type Object struct {
	dev, ino uint64
	release  func()
	// discard says that the contents go with the last reference.
	discard bool

	mu   sync.Mutex
	refs int64 // users, mappings and pages
	name string
	ro   *file
	rw   *file
}

// New returns an Object for the file with the given numbers. release is called
// when the last reference goes, with the number of references at 0; it may be
// nil.
func New(dev, ino uint64, release func()) *Object {
	return &Object{dev: dev, ino: ino, refs: 1, release: release}
}

// Discard makes the contents go with the last reference. A platform may keep a
// descriptor of the file for longer.
func (o *Object) Discard() { o.discard = true }

// AddFD lets the Object map the file through fd, of which it makes a duplicate.
// writable says that fd is open for reading and writing. name is for
// /proc/PID/maps.
func (o *Object) AddFD(fd int, writable bool, name string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.name == "" {
		o.name = name
	}
	slot := &o.ro
	if writable {
		slot = &o.rw
	}
	if *slot != nil {
		return nil
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("duplicate descriptor of mapped file: %w", err)
	}
	*slot = &file{o: o, fd: dup, writable: writable}
	return nil
}

// TryIncRef adds a reference unless the last one is gone.
func (o *Object) TryIncRef() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.refs == 0 {
		return false
	}
	o.refs++
	return true
}

// IncRef implements memmap.MappingIdentity.
func (o *Object) IncRef() { o.add(1) }

// DecRef implements memmap.MappingIdentity.
func (o *Object) DecRef() { o.add(-1) }

func (o *Object) add(n int64) {
	o.mu.Lock()
	o.refs += n
	refs := o.refs
	var close []*file
	if refs == 0 {
		close = append(close, o.ro, o.rw)
		o.ro, o.rw = nil, nil
	}
	o.mu.Unlock()
	if refs < 0 {
		panic("filemap: Object.DecRef without a reference")
	}
	if refs > 0 {
		return
	}
	for _, f := range close {
		if f != nil {
			f.unmap()
			if o.discard {
				unix.Ftruncate(f.fd, 0) // what it cannot free is freed with the descriptors
			}
			unix.Close(f.fd)
		}
	}
	if o.release != nil {
		o.release()
	}
}

// MappedName implements memmap.MappingIdentity.
func (o *Object) MappedName() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.name
}

// DeviceID implements memmap.MappingIdentity.
func (o *Object) DeviceID() uint64 { return o.dev }

// InodeID implements memmap.MappingIdentity.
func (o *Object) InodeID() uint64 { return o.ino }

// Msync implements memmap.MappingIdentity.
func (o *Object) Msync(_ context.Context, _ memmap.MappableRange) error {
	o.mu.Lock()
	f := o.rw
	o.mu.Unlock()
	if f == nil {
		return nil
	}
	return unix.Fdatasync(f.fd)
}

// AddMapping implements memmap.Mappable.
func (o *Object) AddMapping(memmap.MappingSpace, hostarch.AddrRange, uint64, bool) error { return nil }

// RemoveMapping implements memmap.Mappable.
func (o *Object) RemoveMapping(memmap.MappingSpace, hostarch.AddrRange, uint64, bool) {}

// CopyMapping implements memmap.Mappable.
func (o *Object) CopyMapping(memmap.MappingSpace, hostarch.AddrRange, hostarch.AddrRange, uint64, bool) error {
	return nil
}

// Translate implements memmap.Mappable.
func (o *Object) Translate(_ context.Context, required, optional memmap.MappableRange, at hostarch.AccessType) ([]memmap.Translation, error) {
	o.mu.Lock()
	f := o.rw
	if f == nil {
		f = o.ro
	}
	o.mu.Unlock()
	if f == nil {
		return nil, &memmap.BusError{Err: unix.EBADF}
	}
	perms := hostarch.ReadExec
	if f.writable {
		perms = hostarch.AnyAccess
	}
	if !perms.SupersetOf(at) {
		return nil, &memmap.BusError{Err: unix.EACCES}
	}
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return nil, &memmap.BusError{Err: err}
	}
	end, ok := hostarch.PageRoundUp(uint64(max(st.Size, 0)))
	if !ok {
		end = hostarch.PageRoundDown(^uint64(0))
	}
	var err error
	if required.End > end {
		err = &memmap.BusError{Err: fmt.Errorf("offset %#x is beyond the end of the file", end)}
	}
	if required.Start >= end {
		return nil, err
	}
	optional.End = min(optional.End, end)
	return []memmap.Translation{{Source: optional, File: f, Offset: optional.Start, Perms: perms}}, err
}

// chunkSize is how much of a file the Sentry maps at a time, in bytes: address
// space, not memory.
const chunkSize = 16 << 20

// file is the memmap.File of an Object for one access mode.
type file struct {
	o        *Object
	fd       int
	writable bool

	mu     sync.Mutex
	pages  int64 // references
	chunks map[uint64][]byte
}

// IncRef implements memmap.File.
func (f *file) IncRef(fr memmap.FileRange) {
	n := int64(fr.Length() / hostarch.PageSize)
	f.o.add(n)
	f.mu.Lock()
	f.pages += n
	f.mu.Unlock()
}

// DecRef implements memmap.File.
func (f *file) DecRef(fr memmap.FileRange) {
	n := int64(fr.Length() / hostarch.PageSize)
	f.mu.Lock()
	f.pages -= n
	unused := f.pages == 0
	f.mu.Unlock()
	if unused {
		f.unmap()
	}
	f.o.add(-n)
}

// unmap gives the Sentry's mappings back if no page is referenced.
func (f *file) unmap() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pages != 0 {
		return
	}
	for _, b := range f.chunks {
		unix.Munmap(b) // cannot fail on what Mmap returned
	}
	f.chunks = nil
}

// MapInternal implements memmap.File.
func (f *file) MapInternal(fr memmap.FileRange, at hostarch.AccessType) ([][]byte, error) {
	if at.Write && !f.writable {
		return nil, unix.EACCES
	}
	prot := unix.PROT_READ
	if f.writable {
		prot |= unix.PROT_WRITE
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var blocks [][]byte
	for fr.Start < fr.End {
		start := fr.Start &^ (chunkSize - 1)
		b := f.chunks[start]
		if b == nil {
			var err error
			b, err = unix.Mmap(f.fd, int64(start), chunkSize, prot, unix.MAP_SHARED)
			if err != nil {
				return nil, fmt.Errorf("map host file for the Sentry: %w", err)
			}
			if f.chunks == nil {
				f.chunks = map[uint64][]byte{}
			}
			f.chunks[start] = b
		}
		end := min(fr.End, start+chunkSize)
		blocks = append(blocks, b[fr.Start-start:end-start])
		fr.Start = end
	}
	return blocks, nil
}

// FD implements memmap.File.
func (f *file) FD() int { return f.fd }
