package mm

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/pgalloc"
)

// sharedBlock is how much shared anonymous memory is allocated at a time, in
// bytes.
const sharedBlock = 512 << 10

// sharedDevice is what /proc/PID/maps shows as the device of shared anonymous
// memory: Linux has it in a file system of its own.
const sharedDevice = 1

// lastSharedInode numbers the objects.
var lastSharedInode atomic.Uint64

// sharedAnon is shared anonymous memory: a Mappable that is its own identity.
// Its size is that of the first mapping, as in Linux.
type sharedAnon struct {
	mf    *pgalloc.MemoryFile
	size  uint64
	inode uint64
	refs  atomic.Int64

	mu     sync.Mutex
	blocks map[uint64]memmap.FileRange // by number
}

// newSharedAnon returns an object with one reference.
func newSharedAnon(mf *pgalloc.MemoryFile, size uint64) *sharedAnon {
	s := &sharedAnon{mf: mf, size: size, inode: lastSharedInode.Add(1), blocks: make(map[uint64]memmap.FileRange)}
	s.refs.Store(1)
	return s
}

// IncRef implements memmap.MappingIdentity.IncRef.
func (s *sharedAnon) IncRef() { s.refs.Add(1) }

// DecRef implements memmap.MappingIdentity.DecRef.
func (s *sharedAnon) DecRef() {
	if s.refs.Add(-1) > 0 {
		return
	}
	for _, fr := range s.blocks {
		s.mf.DecRef(fr)
	}
}

// MappedName implements memmap.MappingIdentity.MappedName.
func (s *sharedAnon) MappedName() string { return "/dev/zero (deleted)" }

// DeviceID implements memmap.MappingIdentity.DeviceID.
func (s *sharedAnon) DeviceID() uint64 { return sharedDevice }

// InodeID implements memmap.MappingIdentity.InodeID.
func (s *sharedAnon) InodeID() uint64 { return s.inode }

// Msync implements memmap.MappingIdentity.Msync.
func (s *sharedAnon) Msync(context.Context, memmap.MappableRange) error { return nil }

// AddMapping implements memmap.Mappable.AddMapping.
func (s *sharedAnon) AddMapping(memmap.MappingSpace, hostarch.AddrRange, uint64, bool) error {
	return nil
}

// RemoveMapping implements memmap.Mappable.RemoveMapping.
func (s *sharedAnon) RemoveMapping(memmap.MappingSpace, hostarch.AddrRange, uint64, bool) {}

// CopyMapping implements memmap.Mappable.CopyMapping.
func (s *sharedAnon) CopyMapping(memmap.MappingSpace, hostarch.AddrRange, hostarch.AddrRange, uint64, bool) error {
	return nil
}

// Translate implements memmap.Mappable.Translate.
func (s *sharedAnon) Translate(_ context.Context, required, optional memmap.MappableRange, _ hostarch.AccessType) ([]memmap.Translation, error) {
	var err error
	if required.End > s.size {
		err = &memmap.BusError{Err: fmt.Errorf("offset %#x is beyond the end of shared memory", s.size)}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var ts []memmap.Translation
	end := min(required.End, s.size)
	for start := required.Start; start < end; {
		i := start / sharedBlock
		fr, ok := s.blocks[i]
		if !ok {
			hint := uint64(pgalloc.NoHint)
			if prev, ok := s.blocks[i-1]; ok {
				hint = prev.End
			}
			length := min(sharedBlock, s.size-i*sharedBlock)
			var aerr error
			if fr, aerr = s.mf.AllocateAt(length, hint); aerr != nil {
				return ts, aerr
			}
			s.blocks[i] = fr
		}
		source := memmap.MappableRange{Start: max(i*sharedBlock, optional.Start), End: min(i*sharedBlock+fr.Length(), optional.End)}
		ts = append(ts, memmap.Translation{
			Source: source,
			File:   s.mf,
			Offset: fr.Start + source.Start - i*sharedBlock,
			Perms:  hostarch.AnyAccess,
		})
		start = source.End
	}
	return ts, err
}

// zero sets mr to zeros and frees its memory (MADV_REMOVE).
func (s *sharedAnon) zero(mr memmap.MappableRange) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	mr.End = min(mr.End, s.size)
	for i, fr := range s.blocks {
		start := max(i*sharedBlock, mr.Start)
		end := min(i*sharedBlock+fr.Length(), mr.End)
		if start >= end {
			continue
		}
		fr.Start += start - i*sharedBlock
		fr.End = fr.Start + end - start
		if s.mf.Decommit(fr) != nil {
			return unix.ENOMEM
		}
	}
	return nil
}
