package systrap

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
)

// memory is the memory file that an AddressSpace shares with its stub, to be used
// between enter and leave. It implements memmap.File as far as package stub needs it.
type memory struct {
	fd int

	// region is the read-only region and, behind it, the hint page.
	region []byte

	// chunks are those of slots that are mapped here.
	chunks [][]byte
}

const memoryName = "ringfence-systrap"

func newMemory() (*memory, error) {
	fd, err := unix.MemfdCreate(memoryName, unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if err == unix.EINVAL { // before Linux 6.3
		fd, err = unix.MemfdCreate(memoryName, unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create for the slots of a stub: %w%s", err, hint(err))
	}
	m := &memory{fd: fd}
	if err := unix.Ftruncate(fd, fileSize); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("ftruncate of the slots of a stub to %d bytes: %w: raise RLIMIT_FSIZE (ulimit -f)", fileSize, err)
	}
	m.region, err = unix.Mmap(fd, 0, roSize+pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("mmap of a stub's requests: %w%s", err, hint(err))
	}
	return m, nil
}

// chunk returns the n-th chunk of slots, which is the next one or was there.
//
// Preconditions: as those of addressSpace.prepareThread.
func (m *memory) chunk(n int) ([]byte, error) {
	if n < len(m.chunks) {
		return m.chunks[n], nil
	}
	b, err := unix.Mmap(m.fd, slotsOffset+int64(n)*chunkSize, chunkSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mmap of slots: %w%s", err, hint(err))
	}
	m.chunks = append(m.chunks, b)
	return b, nil
}

// close frees the memory: nobody touches it any more.
func (m *memory) close() {
	unix.Munmap(m.region)
	for _, b := range m.chunks {
		unix.Munmap(b)
	}
	unix.Close(m.fd)
}

// put64 writes a word of the region.
func (m *memory) put64(off int, v uint64) { binary.LittleEndian.PutUint64(m.region[off:], v) }

// FD implements memmap.File.FD.
func (m *memory) FD() int { return m.fd }

// IncRef implements memmap.File.IncRef.
func (*memory) IncRef(memmap.FileRange) {}

// DecRef implements memmap.File.DecRef.
func (*memory) DecRef(memmap.FileRange) {}

// MapInternal implements memmap.File.MapInternal.
func (*memory) MapInternal(memmap.FileRange, hostarch.AccessType) ([][]byte, error) {
	return nil, unix.ENODEV
}
