package platformtest

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// nullSpace is an AddressSpace that maps nothing.
type nullSpace struct {
	platform.NoAddressSpaceIO
	err error
}

func (s *nullSpace) MapFile(hostarch.Addr, memmap.File, memmap.FileRange, hostarch.AccessType, bool) error {
	return s.err
}
func (*nullSpace) Unmap(hostarch.Addr, uint64) {}
func (*nullSpace) Release()                    {}
func (*nullSpace) PreFork()                    {}
func (*nullSpace) PostFork()                   {}

func TestFileReferences(t *testing.T) {
	fr := fileRange
	for _, c := range []struct {
		name string
		do   func(f *file)
		want string // "" if balanced
	}{
		{"none", func(f *file) {}, ""},
		{"balanced", func(f *file) { f.IncRef(fr(0, pageSize)); f.DecRef(fr(0, pageSize)) }, ""},
		{"balanced in parts", func(f *file) {
			f.IncRef(fr(0, 4*pageSize))
			f.DecRef(fr(2*pageSize, 2*pageSize))
			f.DecRef(fr(0, 2*pageSize))
		}, ""},
		{"left", func(f *file) { f.IncRef(fr(0, pageSize)) }, "must be 0"},
		{"left in the middle", func(f *file) {
			f.IncRef(fr(0, 3*pageSize))
			f.DecRef(fr(0, pageSize))
			f.DecRef(fr(2*pageSize, pageSize))
		}, "must be 0"},
		{"never taken", func(f *file) { f.DecRef(fr(0, pageSize)); f.IncRef(fr(0, pageSize)) }, "was not held"},
		{"elsewhere", func(f *file) {
			f.IncRef(fr(0, pageSize))
			f.DecRef(fr(pageSize, pageSize))
		}, "was not held"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, err := newFile(4 * pageSize)
			if err != nil {
				t.Fatal(err)
			}
			c.do(f)
			switch err := f.close(); {
			case (err == nil) != (c.want == ""), err != nil && !strings.Contains(err.Error(), c.want):
				t.Errorf("close: %v, want %q", err, c.want)
			}
		})
	}
}

func TestFileClosedBySomeoneElse(t *testing.T) {
	f, err := newFile(pageSize)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(f.fd)
	if err := f.close(); !errors.Is(err, unix.EBADF) {
		t.Errorf("close: %v, want EBADF", err)
	}
}

func TestMemoryManager(t *testing.T) {
	f, err := newFile(8 * pageSize)
	if err != nil {
		t.Fatal(err)
	}
	as := &nullSpace{}
	mm := &memoryManager{as: as}
	ctx := context.Background()
	mapAt := func(page, off, n uint64, at hostarch.AccessType) {
		t.Helper()
		if err := mm.mapFile(dataBase+hostarch.Addr(page)*pageSize, f, fileRange(off*pageSize, n*pageSize), at, false); err != nil {
			t.Fatal(err)
		}
	}
	mapAt(0, 0, 8, hostarch.ReadWrite)
	mapAt(2, 6, 1, hostarch.Read)
	mm.unmap(dataBase+5*pageSize, pageSize)
	var got []hostarch.AddrRange
	for _, v := range mm.vmas {
		got = append(got, hostarch.AddrRange{Start: (v.ar.Start - dataBase) / pageSize, End: (v.ar.End - dataBase) / pageSize})
	}
	if want := []hostarch.AddrRange{{Start: 0, End: 2}, {Start: 2, End: 3}, {Start: 3, End: 5}, {Start: 6, End: 8}}; !slices.Equal(got, want) {
		t.Fatalf("mappings are %v, want %v", got, want)
	}
	b := []byte{1, 2, 3, 4, 5, 6, 7, 8}
	if n, err := mm.CopyOut(ctx, dataBase+2*pageSize-4, b, usermem.IOOpts{}); n != 4 || err != unix.EFAULT {
		t.Errorf("CopyOut into a read-only page: %d, %v", n, err)
	}
	if n, err := mm.CopyOut(ctx, dataBase+2*pageSize-4, b, usermem.IOOpts{IgnorePermissions: true}); n != 8 || err != nil {
		t.Errorf("CopyOut in spite of permissions: %d, %v", n, err)
	}
	if f.data[6*pageSize] != 5 {
		t.Errorf("the file has %d at page 6, want 5", f.data[6*pageSize])
	}
	in := make([]byte, 16)
	if n, err := mm.CopyIn(ctx, dataBase+5*pageSize-8, in, usermem.IOOpts{}); n != 8 || err != unix.EFAULT {
		t.Errorf("CopyIn into a hole: %d, %v", n, err)
	}
	if n, err := mm.ZeroOut(ctx, dataBase+2*pageSize-8, 8, usermem.IOOpts{}); n != 8 || err != nil || f.data[2*pageSize-1] != 0 {
		t.Errorf("ZeroOut: %d, %v", n, err)
	}
	if v, err := mm.SwapUint32(ctx, dataBase, 7, usermem.IOOpts{}); v != 0 || err != nil {
		t.Errorf("SwapUint32: %d, %v", v, err)
	}
	if v, err := mm.CompareAndSwapUint32(ctx, dataBase, 7, 8, usermem.IOOpts{}); v != 7 || err != nil {
		t.Errorf("CompareAndSwapUint32: %d, %v", v, err)
	}
	if v, err := mm.LoadUint32(ctx, dataBase, usermem.IOOpts{}); v != 8 || err != nil {
		t.Errorf("LoadUint32: %d, %v", v, err)
	}
	if _, err := mm.LoadUint32(ctx, dataBase+2, usermem.IOOpts{}); err != unix.EINVAL {
		t.Errorf("LoadUint32 of an unaligned address: %v", err)
	}

	// A mapping that fails leaves a hole.
	as.err = unix.ENOMEM
	if err := mm.mapFile(dataBase, f, fileRange(0, pageSize), hostarch.Read, false); err != unix.ENOMEM {
		t.Errorf("mapFile: %v", err)
	}
	as.err = nil
	if n, err := mm.CopyIn(ctx, dataBase, in, usermem.IOOpts{}); n != 0 || err != unix.EFAULT {
		t.Errorf("CopyIn after a mapping that failed: %d, %v", n, err)
	}

	addr, err := mm.MMap(ctx, memmap.MMapOpts{Length: 100, Perms: hostarch.ReadExec, Hint: "[x]"})
	if err != nil {
		t.Fatal(err)
	}
	if got, _, err := mm.FindVMAByName(hostarch.AddrRange{End: ^hostarch.Addr(0)}, "[x]"); got != addr || err != nil {
		t.Errorf("FindVMAByName: %v, %v; want %v", got, err, addr)
	}
	if _, err := mm.MMap(ctx, memmap.MMapOpts{Length: 1, Addr: addr, Fixed: true}); err != unix.EEXIST {
		t.Errorf("MMap over a mapping: %v", err)
	}
	if a, err := mm.MMap(ctx, memmap.MMapOpts{Length: 1, Addr: addr, Fixed: true, Unmap: true}); a != addr || err != nil {
		t.Errorf("MMap in place of a mapping: %v, %v", a, err)
	}
	if err := mm.release(); err != nil {
		t.Error(err)
	}
	if err := f.close(); err != nil {
		t.Error(err)
	}
}

// Every program can be found, and ends where it should.
func TestPrograms(t *testing.T) {
	tf, err := newTextFile()
	if err != nil {
		t.Fatal(err)
	}
	defer tf.close()
	for i, p := range slices.Concat(allPrograms(), archPrograms()) {
		b := code(p)
		if len(b) < 2 || tf.addr(p) < uintptr(textBase) {
			t.Errorf("program %d has %d bytes at %#x", i, len(b), tf.addr(p))
		}
		if !slices.Equal(tf.data[tf.offsets[p]:][:len(b)], b) {
			t.Errorf("program %d is not in the text file", i)
		}
	}
}

func TestDescendants(t *testing.T) {
	c, err := takeCensus()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.compareSettled(); err != nil {
		t.Errorf("nothing happened, and the census says %v", err)
	}
	fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := c.compare(); err == nil || !strings.Contains(err.Error(), "/dev/null") {
		t.Errorf("a new descriptor of /dev/null gives %v", err)
	}
}
