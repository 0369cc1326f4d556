package pgalloc

import (
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
)

const page = hostarch.PageSize

func newFile(t testing.TB) *MemoryFile {
	t.Helper()
	mf, err := New("test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(mf.Destroy)
	return mf
}

func allocate(t testing.TB, mf *MemoryFile, length uint64) memmap.FileRange {
	t.Helper()
	fr, err := mf.Allocate(length)
	if err != nil {
		t.Fatal(err)
	}
	return fr
}

// words returns the first byte of each page of fr.
func words(t testing.TB, mf *MemoryFile, fr memmap.FileRange) []*byte {
	t.Helper()
	blocks, err := mf.MapInternal(fr, hostarch.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	var out []*byte
	for _, b := range blocks {
		for ; len(b) > 0; b = b[page:] {
			out = append(out, &b[0])
		}
	}
	if uint64(len(out)) != fr.Length()/page {
		t.Fatalf("MapInternal(%v) gave %d pages", fr, len(out))
	}
	return out
}

// Pages are zero when allocated, hold what is written while they have a
// reference, and never belong to two allocations.
func TestRandom(t *testing.T) {
	mf := newFile(t)
	r := rand.New(rand.NewPCG(1, 2))
	type alloc struct {
		fr   memmap.FileRange
		refs int
		tag  byte
	}
	var live []*alloc
	owner := make(map[uint64]*alloc)
	for i := range 20000 {
		switch op := r.IntN(10); {
		case op < 5 && len(live) < 300:
			length := (1 + uint64(r.IntN(64))) * page
			hint := uint64(NoHint)
			if len(live) > 0 && r.IntN(2) == 0 {
				hint = live[r.IntN(len(live))].fr.End
			}
			kind := r.IntN(3)
			fr, err := []func(_, _ uint64) (memmap.FileRange, error){mf.AllocateAt, mf.AllocateCommitted, mf.AllocateDirty}[kind](length, hint)
			if err != nil || fr.Length() != length {
				t.Fatalf("allocation %d of %#x at %#x: %v, %v", kind, length, hint, fr, err)
			}
			if kind == 2 {
				for _, w := range words(t, mf, fr) {
					*w = 0
				}
			}
			a := &alloc{fr, 1, byte(1 + i%255)}
			for j, w := range words(t, mf, fr) {
				off := fr.Start + uint64(j)*page
				if owner[off] != nil {
					t.Fatalf("page %#x allocated twice", off)
				}
				if *w != 0 {
					t.Fatalf("page %#x is not zero", off)
				}
				owner[off] = a
				*w = a.tag
			}
			live = append(live, a)
		case len(live) == 0:
		case op < 7:
			a := live[r.IntN(len(live))]
			mf.IncRef(a.fr)
			a.refs++
		default:
			j := r.IntN(len(live))
			a := live[j]
			for _, w := range words(t, mf, a.fr) {
				if *w != a.tag {
					t.Fatalf("page of %v holds %d, want %d", a.fr, *w, a.tag)
				}
			}
			if n, alone := mf.Exclusive(a.fr); n != a.fr.Length() || alone != (a.refs == 1) {
				t.Fatalf("Exclusive(%v) = %#x, %v with %d references", a.fr, n, alone, a.refs)
			}
			// In two parts, so that ranges are freed in pieces.
			mid := a.fr.Start + uint64(r.IntN(int(a.fr.Length()/page)+1))*page
			mf.DecRef(memmap.FileRange{Start: a.fr.Start, End: mid})
			mf.DecRef(memmap.FileRange{Start: mid, End: a.fr.End})
			if a.refs--; a.refs > 0 {
				continue
			}
			for off := a.fr.Start; off < a.fr.End; off += page {
				delete(owner, off)
			}
			live[j] = live[len(live)-1]
			live = live[:len(live)-1]
		}
		if used := uint64(len(owner)) * page; mf.UsedBytes() != used {
			t.Fatalf("%#x bytes used, want %#x", mf.UsedBytes(), used)
		}
	}
	if n := len(*mf.chunks.Load()); n > 3 {
		t.Errorf("file of %d chunks for at most 300 small allocations", n)
	}
}

// An allocation at the end of another one lies there.
func TestHint(t *testing.T) {
	mf := newFile(t)
	a := allocate(t, mf, 16*page)
	b := allocate(t, mf, 16*page)
	if fr, err := mf.AllocateAt(page, a.End); err != nil || fr.Start == a.End {
		t.Errorf("AllocateAt in %v = %v, %v", b, fr, err)
	}
	if fr, err := mf.AllocateAt(4*page, b.End+8*page); err != nil || fr.Start != b.End+8*page {
		t.Errorf("AllocateAt(%#x) = %v, %v", b.End+8*page, fr, err)
	}
	for _, hint := range []uint64{1 << 62, NoHint - page, chunkSize - page} {
		if _, err := mf.AllocateAt(4*page, hint); err != nil {
			t.Errorf("AllocateAt(%#x): %v", hint, err)
		}
	}
}

// An allocation may reach over chunks, and is one range all the same.
func TestLarge(t *testing.T) {
	mf := newFile(t)
	allocate(t, mf, page)
	fr := allocate(t, mf, 3*chunkSize)
	for _, off := range []uint64{fr.Start, chunkSize - page, chunkSize, 2 * chunkSize, fr.End - page} {
		*words(t, mf, memmap.FileRange{Start: off, End: off + page})[0] = byte(off >> 12)
	}
	mf.DecRef(fr)
	again := allocate(t, mf, 3*chunkSize)
	for _, off := range []uint64{fr.Start, chunkSize - page, chunkSize, 2 * chunkSize, fr.End - page} {
		if v := *words(t, mf, memmap.FileRange{Start: off, End: off + page})[0]; v != 0 {
			t.Errorf("page %#x holds %d after it was freed", off, v)
		}
	}
	mf.DecRef(again)
	for _, length := range []uint64{0, 1, page + 1, maxAllocation + page, 1 << 63} {
		if fr, err := mf.Allocate(length); !errors.Is(err, unix.EINVAL) {
			t.Errorf("Allocate(%#x) = %v, %v, want EINVAL", length, fr, err)
		}
	}
}

func TestExclusive(t *testing.T) {
	mf := newFile(t)
	fr := allocate(t, mf, 8*page)
	part := memmap.FileRange{Start: fr.Start + 2*page, End: fr.Start + 5*page}
	mf.IncRef(part)
	for _, test := range []struct {
		from, n uint64
		alone   bool
	}{{0, 2, true}, {1, 1, true}, {2, 3, false}, {4, 1, false}, {5, 3, true}} {
		n, alone := mf.Exclusive(memmap.FileRange{Start: fr.Start + test.from*page, End: fr.End})
		if n != test.n*page || alone != test.alone {
			t.Errorf("Exclusive from page %d = %#x, %v; want %d pages, %v", test.from, n, alone, test.n, test.alone)
		}
	}
}

func TestDecommit(t *testing.T) {
	mf := newFile(t)
	fr := allocate(t, mf, 4*page)
	for _, w := range words(t, mf, fr) {
		*w = 1
	}
	if err := mf.Decommit(memmap.FileRange{Start: fr.Start + page, End: fr.Start + 3*page}); err != nil {
		t.Fatal(err)
	}
	for i, w := range words(t, mf, fr) {
		if want := []byte{1, 0, 0, 1}; *w != want[i] {
			t.Errorf("page %d holds %d, want %d", i, *w, want[i])
		}
	}
}

func TestLimit(t *testing.T) {
	mf := newFile(t)
	mf.SetLimit(16 * page)
	fr := allocate(t, mf, 12*page)
	if _, err := mf.Allocate(5 * page); !errors.Is(err, unix.ENOMEM) {
		t.Errorf("beyond the limit: %v", err)
	}
	allocate(t, mf, 4*page)
	mf.DecRef(fr)
	allocate(t, mf, 12*page)
	mf.SetLimit(0)
	allocate(t, mf, 100*page)
}

// What the host refuses is an error, and memory that it does not clear is not
// given out again.
func TestHostFails(t *testing.T) {
	mf := newFile(t)
	fr := allocate(t, mf, 2*maxFreedBytes)
	*words(t, mf, fr)[0] = 1
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := mf.fd
	mf.fd = null
	mf.DecRef(fr) // cannot be cleared
	for range 3 * chunkSize / maxFreedBytes {
		again, err := mf.Allocate(maxFreedBytes)
		if errors.Is(err, unix.ENOMEM) {
			break // the file cannot grow
		}
		if err != nil {
			t.Fatal(err)
		}
		if again.Start < fr.End && fr.Start < again.End {
			t.Fatalf("%v given out again as %v", fr, again)
		}
	}
	if _, err := mf.Allocate(chunkSize); !errors.Is(err, unix.ENOMEM) {
		t.Errorf("Allocate on a host that refuses: %v, want ENOMEM", err)
	}
	if _, err := mf.MapInternal(memmap.FileRange{Start: 100 * chunkSize, End: 100*chunkSize + page}, hostarch.Read); !errors.Is(err, unix.EFAULT) {
		t.Errorf("MapInternal of what is not there: %v", err)
	}
	mf.fd = file
	unix.Close(null)
}

// held returns how many bytes the host holds for mf.
func held(t *testing.T, mf *MemoryFile) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(mf.fd, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// Memory that is freed and allocated again stays with us and is zeroed; there is a
// limit to it, and it is given back if nobody asks for it.
func TestKept(t *testing.T) {
	mf := newFile(t)
	const size = 1 << 20
	use := func() memmap.FileRange {
		before := held(t, mf)
		fr, err := mf.AllocateCommitted(size, NoHint)
		if err != nil {
			t.Fatal(err)
		}
		if n := held(t, mf); before == 0 && n != size {
			t.Errorf("the host holds %#x bytes before they are touched, want %#x", n, size)
		}
		for i, w := range words(t, mf, fr) {
			if *w != 0 {
				t.Fatalf("page %d is not zero", i)
			}
			*w = 1
		}
		return fr
	}
	first := use()
	mf.DecRef(first)
	for range 20 {
		fr := use()
		if fr != first {
			t.Fatalf("%v was freed, %v is allocated", first, fr)
		}
		mf.DecRef(fr)
	}
	if n := held(t, mf); n != size {
		t.Errorf("the host holds %#x bytes, want %#x", n, size)
	}
	var all []memmap.FileRange
	for range 4 * maxKept / size {
		all = append(all, use())
	}
	for _, fr := range all {
		mf.DecRef(fr)
	}
	if n := held(t, mf); n > maxKept+maxFreedBytes {
		t.Errorf("the host holds %#x bytes that are free", n)
	}
	for start := time.Now(); held(t, mf) != 0; time.Sleep(10 * time.Millisecond) {
		if time.Since(start) > time.Minute {
			t.Fatalf("the host still holds %#x bytes that are free", held(t, mf))
		}
	}
	mf.DecRef(use())
}

func TestDestroy(t *testing.T) {
	mf := newFile(t)
	fr := allocate(t, mf, page)
	words(t, mf, fr)
	mf.Destroy()
	mf.Destroy()
	if _, err := mf.Allocate(page); !errors.Is(err, unix.ENOMEM) {
		t.Errorf("Allocate after Destroy: %v", err)
	}
}

func BenchmarkAllocate64K(b *testing.B) {
	mf := newFile(b)
	for b.Loop() {
		mf.DecRef(allocate(b, mf, 64<<10))
	}
}
