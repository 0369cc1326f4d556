package hostarch

import (
	"errors"
	"math"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const maxAddr = Addr(math.MaxUint64)

func TestPageSize(t *testing.T) {
	if HostPageSize() != PageSize {
		t.Errorf("the host's pages have %d bytes, this package says %d", HostPageSize(), PageSize)
	}
	if 1<<PageShift != PageSize || 1<<HugePageShift != HugePageSize || PageMask != PageSize-1 {
		t.Error("sizes, shifts and masks do not agree")
	}
}

func TestCheckPageSize(t *testing.T) {
	if err := checkPageSize(PageSize); err != nil {
		t.Error(err)
	}
	if err := checkPageSize(16 << 10); !errors.Is(err, syscall.ENOTSUP) || !strings.Contains(err.Error(), "16 KiB") || !strings.Contains(err.Error(), "boot a kernel") {
		t.Errorf("16 KiB: %v", err)
	}
}

func TestRounding(t *testing.T) {
	for _, test := range []struct {
		v, down, up Addr
		ok          bool
	}{
		{0, 0, 0, true},
		{1, 0, PageSize, true},
		{PageSize - 1, 0, PageSize, true},
		{PageSize, PageSize, PageSize, true},
		{PageSize + 1, PageSize, 2 * PageSize, true},
		{maxAddr - PageMask, maxAddr - PageMask, maxAddr - PageMask, true},
		{maxAddr - PageMask + 1, maxAddr - PageMask, 0, false},
		{maxAddr, maxAddr - PageMask, 0, false},
	} {
		if got := test.v.RoundDown(); got != test.down {
			t.Errorf("%v.RoundDown() = %v, want %v", test.v, got, test.down)
		}
		if got, ok := test.v.RoundUp(); got != test.up || ok != test.ok {
			t.Errorf("%v.RoundUp() = %v, %v; want %v, %v", test.v, got, ok, test.up, test.ok)
		}
		if got := PageRoundDown(uint64(test.v)); got != uint64(test.down) {
			t.Errorf("PageRoundDown(%v) = %#x, want %v", test.v, got, test.down)
		}
		if got, ok := PageRoundUp(uint64(test.v)); got != uint64(test.up) || ok != test.ok {
			t.Errorf("PageRoundUp(%v) = %#x, %v; want %v, %v", test.v, got, ok, test.up, test.ok)
		}
		if got := test.v.IsPageAligned(); got != (test.v == test.down) {
			t.Errorf("%v.IsPageAligned() = %v", test.v, got)
		}
		if got := test.v.PageOffset(); got != uint64(test.v-test.down) {
			t.Errorf("%v.PageOffset() = %#x", test.v, got)
		}
		panicked := func() (p bool) {
			defer func() { p = recover() != nil }()
			if got := test.v.MustRoundUp(); got != test.up {
				t.Errorf("%v.MustRoundUp() = %v, want %v", test.v, got, test.up)
			}
			return false
		}()
		if panicked == test.ok {
			t.Errorf("%v.MustRoundUp(): panicked %v", test.v, panicked)
		}
	}
	if got := Addr(3*HugePageSize - 1).HugeRoundDown(); got != 2*HugePageSize {
		t.Errorf("HugeRoundDown = %v", got)
	}
}

func TestAddLength(t *testing.T) {
	for _, test := range []struct {
		v      Addr
		length uint64
		end    Addr
		ok     bool
	}{
		{0, 0, 0, true},
		{1, 2, 3, true},
		{maxAddr, 0, maxAddr, true},
		{maxAddr, 1, 0, false},
		{0, math.MaxUint64, maxAddr, true},
		{2, math.MaxUint64, 1, false},
	} {
		if end, ok := test.v.AddLength(test.length); end != test.end || ok != test.ok {
			t.Errorf("%v.AddLength(%#x) = %v, %v; want %v, %v", test.v, test.length, end, ok, test.end, test.ok)
		}
		if r, ok := test.v.ToRange(test.length); r != (AddrRange{test.v, test.end}) || ok != test.ok || r.WellFormed() != ok {
			t.Errorf("%v.ToRange(%#x) = %v, %v", test.v, test.length, r, ok)
		}
	}
}

// Every method of AddrRange against the plain definition, over all ranges of a
// small space.
func TestAddrRange(t *testing.T) {
	const n = 6
	var all []AddrRange
	for s := Addr(0); s < n; s++ {
		for e := s; e < n; e++ {
			all = append(all, AddrRange{s, e})
		}
	}
	in := func(r AddrRange, x Addr) bool { return x >= r.Start && x < r.End }
	for _, a := range all {
		count := uint64(0)
		for x := Addr(0); x < n; x++ {
			if a.Contains(x) != in(a, x) {
				t.Errorf("%v.Contains(%v) = %v", a, x, a.Contains(x))
			}
			if in(a, x) {
				count++
			}
		}
		if a.Length() != count || a.Empty() != (count == 0) || !a.WellFormed() {
			t.Errorf("%v: length %d, empty %v, well formed %v", a, a.Length(), a.Empty(), a.WellFormed())
		}
		for _, b := range all {
			both, missing := 0, 0
			for x := Addr(0); x < n; x++ {
				if in(a, x) && in(b, x) {
					both++
				}
				if in(b, x) && !in(a, x) {
					missing++
				}
				if got := in(a.Intersect(b), x); got != (in(a, x) && in(b, x)) {
					t.Errorf("%v.Intersect(%v) = %v", a, b, a.Intersect(b))
				}
			}
			if !a.Empty() && !b.Empty() {
				if a.Overlaps(b) != (both > 0) {
					t.Errorf("%v.Overlaps(%v) = %v", a, b, a.Overlaps(b))
				}
				if a.IsSupersetOf(b) != (missing == 0) {
					t.Errorf("%v.IsSupersetOf(%v) = %v", a, b, a.IsSupersetOf(b))
				}
			}
			if !a.Intersect(b).WellFormed() {
				t.Errorf("%v.Intersect(%v) = %v", a, b, a.Intersect(b))
			}
		}
	}
	if (AddrRange{2, 1}).WellFormed() || !(AddrRange{2, 1}).Empty() {
		t.Error("a range that ends before it starts is well formed, or not empty")
	}
	if s := (AddrRange{0x1000, 0x2000}).String(); s != "[0x1000, 0x2000)" {
		t.Errorf("String = %q", s)
	}
}

func TestRoundOut(t *testing.T) {
	for in, want := range map[AddrRange]AddrRange{
		{1, 2}:                          {0, PageSize},
		{PageSize, 2 * PageSize}:        {PageSize, 2 * PageSize},
		{PageSize - 1, PageSize + 1}:    {0, 2 * PageSize},
		{0, maxAddr - PageMask}:         {0, maxAddr - PageMask},
		{5 * PageSize, 5*PageSize + 10}: {5 * PageSize, 6 * PageSize},
	} {
		got, ok := in.RoundOut()
		if got != want || !ok || !got.IsPageAligned() {
			t.Errorf("%v.RoundOut() = %v, %v; want %v", in, got, ok, want)
		}
	}
	if r, ok := (AddrRange{0, maxAddr}).RoundOut(); ok {
		t.Errorf("RoundOut to beyond the last address = %v", r)
	}
	if (AddrRange{PageSize, PageSize + 1}).IsPageAligned() || (AddrRange{1, PageSize}).IsPageAligned() {
		t.Error("a range with one aligned end is page-aligned")
	}
}

func TestAccessType(t *testing.T) {
	var all []AccessType
	for i := range 8 {
		all = append(all, AccessType{i&1 != 0, i&2 != 0, i&4 != 0})
	}
	for i, a := range all {
		if a.Prot() != i {
			t.Errorf("%v.Prot() = %d, want %d", a, a.Prot(), i)
		}
		if a.Any() != (i != 0) {
			t.Errorf("%v.Any() = %v", a, a.Any())
		}
		effective := i
		if i&6 != 0 {
			effective |= 1
		}
		if a.Effective() != all[effective] {
			t.Errorf("%v.Effective() = %v", a, a.Effective())
		}
		for j, b := range all {
			if a.SupersetOf(b) != (i&j == j) || a.Union(b) != all[i|j] || a.Intersect(b) != all[i&j] {
				t.Errorf("%v and %v: superset %v, union %v, intersection %v", a, b, a.SupersetOf(b), a.Union(b), a.Intersect(b))
			}
		}
	}
	for a, want := range map[AccessType]string{NoAccess: "---", Read: "r--", Write: "-w-", Execute: "--x", ReadWrite: "rw-", ReadExec: "r-x", AnyAccess: "rwx"} {
		if a.String() != want {
			t.Errorf("String = %q, want %q", a, want)
		}
	}
	if AnyAccess.Prot() != unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC || Execute.Prot() != unix.PROT_EXEC || Write.Prot() != unix.PROT_WRITE {
		t.Error("Prot does not give the host's bits")
	}
}
