package hostarch

import "fmt"

// Addr is an address in an application's address space.
type Addr uint64

// RoundDown returns the start of the page that holds v.
func (v Addr) RoundDown() Addr { return v &^ PageMask }

// RoundUp returns the first page boundary at or above v; ok is false when that
// lies beyond the last address.
func (v Addr) RoundUp() (addr Addr, ok bool) {
	addr = (v + PageMask).RoundDown()
	return addr, addr >= v
}

// MustRoundUp is RoundUp for addresses already known to be in range. It panics
// when the result does not exist.
func (v Addr) MustRoundUp() Addr {
	addr, ok := v.RoundUp()
	if !ok {
		panic(fmt.Sprintf("hostarch: Addr(%#x).RoundUp wraps", uint64(v)))
	}
	return addr
}

// HugeRoundDown returns the start of the huge page that holds v.
func (v Addr) HugeRoundDown() Addr { return v &^ (HugePageSize - 1) }

// PageOffset returns the offset of v in its page, in bytes.
func (v Addr) PageOffset() uint64 { return uint64(v & PageMask) }

// IsPageAligned reports whether v is a page boundary.
func (v Addr) IsPageAligned() bool { return v&PageMask == 0 }

// AddLength returns v+length; ok is false when that wraps.
func (v Addr) AddLength(length uint64) (end Addr, ok bool) {
	end = v + Addr(length)
	return end, end >= v
}

// ToRange returns [v, v+length); ok is false when that wraps.
func (v Addr) ToRange(length uint64) (AddrRange, bool) {
	end, ok := v.AddLength(length)
	return AddrRange{v, end}, ok
}

// String returns v in hexadecimal.
func (v Addr) String() string { return fmt.Sprintf("%#x", uint64(v)) }

// AddrRange is the half-open range of addresses [Start, End).
type AddrRange struct {
	Start Addr
	End   Addr
}

// WellFormed reports whether Start <= End.
func (r AddrRange) WellFormed() bool { return r.Start <= r.End }

// Length returns the size of r in bytes.
func (r AddrRange) Length() uint64 { return uint64(r.End - r.Start) }

// Empty reports whether r holds no address.
func (r AddrRange) Empty() bool { return r.End <= r.Start }

// Contains reports whether x lies in r.
func (r AddrRange) Contains(x Addr) bool { return r.Start <= x && x < r.End }

// Overlaps reports whether r and r2 share an address.
func (r AddrRange) Overlaps(r2 AddrRange) bool { return r.Start < r2.End && r2.Start < r.End }

// IsSupersetOf reports whether every address of r2 lies in r.
func (r AddrRange) IsSupersetOf(r2 AddrRange) bool { return r.Start <= r2.Start && r2.End <= r.End }

// Intersect returns the addresses that are in both r and r2; an empty range
// when there are none.
func (r AddrRange) Intersect(r2 AddrRange) AddrRange {
	r.Start = max(r.Start, r2.Start)
	r.End = min(r.End, r2.End)
	r.End = max(r.End, r.Start)
	return r
}

// IsPageAligned reports whether both ends are page boundaries.
func (r AddrRange) IsPageAligned() bool { return r.Start.IsPageAligned() && r.End.IsPageAligned() }

// RoundOut returns the whole pages that r touches; ok is false when that wraps.
func (r AddrRange) RoundOut() (AddrRange, bool) {
	end, ok := r.End.RoundUp()
	return AddrRange{r.Start.RoundDown(), end}, ok
}

// String returns r as "[start, end)".
func (r AddrRange) String() string { return fmt.Sprintf("[%v, %v)", r.Start, r.End) }

// PageRoundDown returns the multiple of PageSize at or below x.
func PageRoundDown(x uint64) uint64 { return x &^ PageMask }

// PageRoundUp returns the multiple of PageSize at or above x; ok is false when
// that wraps.
func PageRoundUp(x uint64) (val uint64, ok bool) {
	val = PageRoundDown(x + PageMask)
	return val, val >= x
}
