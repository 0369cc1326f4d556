package usermem

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
)

// sliceIO is memory that starts at address base.
type sliceIO struct {
	IO
	base hostarch.Addr
	mem  []byte
}

func (s *sliceIO) CopyIn(_ context.Context, addr hostarch.Addr, dst []byte, _ IOOpts) (int, error) {
	if addr < s.base || addr > s.base+hostarch.Addr(len(s.mem)) {
		return 0, unix.EFAULT
	}
	n := copy(dst, s.mem[addr-s.base:])
	if n < len(dst) {
		return n, unix.EFAULT
	}
	return n, nil
}

func TestCopyStringIn(t *testing.T) {
	mem := make([]byte, hostarch.PageSize)
	for i := range mem {
		mem[i] = 'a'
	}
	copy(mem[4000:], "tail\x00")
	io := &sliceIO{base: 0x10000, mem: mem}
	for _, test := range []struct {
		addr   hostarch.Addr
		maxlen int
		want   string
		err    error
	}{
		{0x10000 + 4000, 100, "tail", nil},
		{0x10000 + 4000, 5, "tail", nil},
		{0x10000 + 4000, 4, "", unix.ENAMETOOLONG},
		{0x10000 + 3998, 100, "aatail", nil},
		{0x10000 + 4005, 4096, "", unix.EFAULT},
		{0x10000, 1000, "", unix.ENAMETOOLONG},
		{0x1000, 1000, "", unix.EFAULT},
	} {
		got, err := CopyStringIn(context.Background(), io, test.addr, test.maxlen, IOOpts{})
		if got != test.want || !errors.Is(err, test.err) {
			t.Errorf("CopyStringIn(%v, %d) = %q, %v; want %q, %v", test.addr, test.maxlen, got, err, test.want, test.err)
		}
	}
}

// A mapping of a truncated file gives EFAULT from every safe access.
func TestSafeAccessOfTruncatedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(hostarch.PageSize); err != nil {
		t.Fatal(err)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, hostarch.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)

	accesses := map[string]func() error{
		"copy out": func() error { _, err := SafeCopy(m, []byte("x")); return err },
		"copy in":  func() error { _, err := SafeCopy(make([]byte, 1), m); return err },
		"zero":     func() error { return SafeZero(m) },
		"swap":     func() error { _, err := SafeSwapUint32(m, 1); return err },
		"cas":      func() error { _, err := SafeCompareAndSwapUint32(m, 0, 1); return err },
		"load":     func() error { _, err := SafeLoadUint32(m); return err },
	}
	for name, access := range accesses {
		if err := access(); err != nil {
			t.Errorf("%s before truncation: %v", name, err)
		}
	}
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	for name, access := range accesses {
		if err := access(); !errors.Is(err, unix.EFAULT) {
			t.Errorf("%s after truncation: %v, want EFAULT", name, err)
		}
	}
}

func TestSafeAtomics(t *testing.T) {
	b := make([]byte, 8)
	if v, err := SafeSwapUint32(b, 7); v != 0 || err != nil {
		t.Errorf("swap = %d, %v", v, err)
	}
	if v, err := SafeCompareAndSwapUint32(b, 6, 9); v != 7 || err != nil {
		t.Errorf("failing cas = %d, %v", v, err)
	}
	if v, err := SafeCompareAndSwapUint32(b, 7, 9); v != 7 || err != nil {
		t.Errorf("cas = %d, %v", v, err)
	}
	if v, err := SafeLoadUint32(b); v != 9 || err != nil {
		t.Errorf("load = %d, %v", v, err)
	}
}
