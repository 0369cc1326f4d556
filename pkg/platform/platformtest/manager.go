package platformtest

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
)

// MemFile is a memory file, by its descriptor, that counts no references: for tests
// of a backend's own.
type MemFile int

// NewMemFile returns a file of size bytes, which is closed with the test.
func NewMemFile(tb testing.TB, size int64) MemFile {
	tb.Helper()
	fd, err := unix.MemfdCreate("platformtest", unix.MFD_CLOEXEC)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, size); err != nil {
		tb.Fatal(err)
	}
	return MemFile(fd)
}

// IncRef implements memmap.File.IncRef.
func (MemFile) IncRef(memmap.FileRange) {}

// DecRef implements memmap.File.DecRef.
func (MemFile) DecRef(memmap.FileRange) {}

// MapInternal implements memmap.File.MapInternal: it is not needed.
func (MemFile) MapInternal(memmap.FileRange, hostarch.AccessType) ([][]byte, error) {
	return nil, unix.ENOSYS
}

// FD implements memmap.File.FD.
func (f MemFile) FD() int { return int(f) }

// Manager is a MemoryManager that has nothing but an AddressSpace: all else panics.
type Manager struct {
	platform.MemoryManager
	as platform.AddressSpace
}

// AddressSpace implements platform.MemoryManager.AddressSpace.
func (m *Manager) AddressSpace() platform.AddressSpace { return m.as }

// CodeAddr is where NewManager maps code.
const CodeAddr = 0x400000

// NewManager returns the Manager of an AddressSpace of a new platform, with a page
// that begins with code at CodeAddr. It is released with the test.
func NewManager(tb testing.TB, c platform.Constructor, code []byte) *Manager {
	tb.Helper()
	p, err := c.New(nil)
	if err != nil {
		tb.Fatal(err)
	}
	as, _, err := p.NewAddressSpace(nil)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(as.Release)
	f := NewMemFile(tb, hostarch.PageSize)
	if _, err := unix.Pwrite(f.FD(), code, 0); err != nil {
		tb.Fatal(err)
	}
	if err := as.MapFile(CodeAddr, f, memmap.FileRange{End: hostarch.PageSize}, hostarch.ReadExec, false); err != nil {
		tb.Fatal(err)
	}
	return &Manager{as: as}
}
