package filemap

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/usermem"
)

const page = hostarch.PageSize

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(names)
}

func translate(t *testing.T, o *Object, start, end uint64, at hostarch.AccessType) ([]memmap.Translation, error) {
	t.Helper()
	mr := memmap.MappableRange{Start: start, End: end}
	return o.Translate(context.Background(), mr, memmap.MappableRange{Start: 0, End: 64 * page}, at)
}

func TestObject(t *testing.T) {
	before := descriptors(t)
	h, err := os.OpenFile(filepath.Join(t.TempDir(), "f"), os.O_RDWR|os.O_CREATE, 0o644)
	must(t, err)
	must(t, h.Truncate(2*page+10))
	released := 0
	o := New(1, 2, func() { released++ })
	ro, err := os.Open(h.Name())
	must(t, err)
	must(t, o.AddFD(int(ro.Fd()), false, "/f"))
	ro.Close() // the Object has its own

	ts, err := translate(t, o, 0, page, hostarch.Read)
	must(t, err)
	if len(ts) != 1 || ts[0].Source.End != 3*page || ts[0].Offset != ts[0].Source.Start || ts[0].Perms != hostarch.ReadExec {
		t.Errorf("translations %+v", ts)
	}
	var bus *memmap.BusError
	if _, err := translate(t, o, 0, page, hostarch.Write); !errors.As(err, &bus) {
		t.Errorf("write access to a file open for reading: %v, want a BusError", err)
	}
	if ts, err := translate(t, o, page, 4*page, hostarch.Read); !errors.As(err, &bus) || len(ts) != 1 || ts[0].Source.End != 3*page {
		t.Errorf("beyond the end: %+v, %v", ts, err)
	}
	if ts, err := translate(t, o, 3*page, 4*page, hostarch.Read); !errors.As(err, &bus) || len(ts) != 0 {
		t.Errorf("behind the end: %+v, %v", ts, err)
	}

	must(t, o.AddFD(int(h.Fd()), true, "/f"))
	ts, err = translate(t, o, 0, page, hostarch.Write)
	must(t, err)
	f, fr := ts[0].File, memmap.FileRange{Start: page, End: 3 * page}
	f.IncRef(fr)
	blocks, err := f.MapInternal(fr, hostarch.ReadWrite)
	must(t, err)
	if _, err := usermem.SafeCopy(blocks[0], []byte("hello")); err != nil {
		t.Error(err)
	}
	buf := make([]byte, 5)
	if _, err := h.ReadAt(buf, page); err != nil || string(buf) != "hello" {
		t.Errorf("file has %q, %v", buf, err)
	}
	// The file shrinks under the mapping: an error, not a crash.
	must(t, h.Truncate(page))
	if _, err := usermem.SafeCopy(buf, blocks[0]); err != unix.EFAULT {
		t.Errorf("access to a truncated page: %v, want EFAULT", err)
	}
	if _, err := translate(t, o, page, 2*page, hostarch.Read); !errors.As(err, &bus) {
		t.Errorf("after truncate: %v, want a BusError", err)
	}

	o.IncRef() // a mapping
	o.DecRef() // closed
	if released != 0 || !o.TryIncRef() {
		t.Fatal("released while mapped")
	}
	o.DecRef()
	o.DecRef() // unmapped; pages are still referenced
	if released != 0 {
		t.Fatal("released while a page is referenced")
	}
	f.DecRef(memmap.FileRange{Start: page, End: 2 * page})
	f.DecRef(memmap.FileRange{Start: 2 * page, End: 3 * page})
	if released != 1 || o.TryIncRef() {
		t.Errorf("released %d times, want once", released)
	}
	h.Close()
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestMapInternalAcrossChunks(t *testing.T) {
	h, err := os.OpenFile(filepath.Join(t.TempDir(), "f"), os.O_RDWR|os.O_CREATE, 0o644)
	must(t, err)
	defer h.Close()
	must(t, h.Truncate(3*chunkSize))
	_, err = h.WriteAt([]byte("ab"), chunkSize-1)
	must(t, err)
	o := New(1, 2, nil)
	defer o.DecRef()
	must(t, o.AddFD(int(h.Fd()), false, "/f"))
	ts, err := translate(t, o, 0, page, hostarch.Read)
	must(t, err)
	f := ts[0].File
	fr := memmap.FileRange{Start: chunkSize - page, End: chunkSize + page}
	f.IncRef(fr)
	defer f.DecRef(fr)
	blocks, err := f.MapInternal(fr, hostarch.Read)
	must(t, err)
	if len(blocks) != 2 || len(blocks[0]) != page || blocks[0][page-1] != 'a' || blocks[1][0] != 'b' {
		t.Errorf("%d blocks", len(blocks))
	}
	if _, err := f.MapInternal(fr, hostarch.Write); err != unix.EACCES {
		t.Errorf("MapInternal for writing: %v, want EACCES", err)
	}
}
