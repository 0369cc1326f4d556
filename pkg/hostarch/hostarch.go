// Package hostarch holds the vocabulary of virtual memory that every other
// package speaks: addresses, address ranges, access types and page sizes of the
// host.
//
// It depends on the standard library alone. It must never make a host call
// beyond asking for the page size, nor know anything of platforms.
package hostarch

import (
	"fmt"
	"os"
	"syscall"
)

// PageSize and PageShift describe the base page of this architecture's
// application ABI, in bytes. Ringfence supports hosts whose page size equals
// it; CheckPageSize says whether this one does.
const (
	PageShift = 12
	PageSize  = 1 << PageShift
	PageMask  = PageSize - 1

	// HugePageSize is the size in bytes of a second-level page table entry.
	HugePageShift = 21
	HugePageSize  = 1 << HugePageShift
)

// HostPageSize returns the page size of the running kernel, in bytes.
func HostPageSize() int { return os.Getpagesize() }

// CheckPageSize returns an error, which wraps ENOTSUP, if the running kernel's pages
// are not those of applications: arm64 kernels may have pages of 16 or 64 KiB.
func CheckPageSize() error { return checkPageSize(HostPageSize()) }

func checkPageSize(host int) error {
	if host == PageSize {
		return nil
	}
	return fmt.Errorf("the kernel's pages have %d KiB, an application's %d: boot a kernel with pages of %d KiB: %w", host>>10, PageSize>>10, PageSize>>10, syscall.ENOTSUP)
}

// AccessType says in which ways memory is accessed, or may be.
type AccessType struct {
	Read    bool
	Write   bool
	Execute bool
}

// The access types that have names.
var (
	NoAccess  = AccessType{}
	Read      = AccessType{Read: true}
	Write     = AccessType{Write: true}
	Execute   = AccessType{Execute: true}
	ReadWrite = AccessType{Read: true, Write: true}
	ReadExec  = AccessType{Read: true, Execute: true}
	AnyAccess = AccessType{Read: true, Write: true, Execute: true}
)

// Any reports whether a allows any access at all.
func (a AccessType) Any() bool { return a.Read || a.Write || a.Execute }

// SupersetOf reports whether a allows all that b does.
func (a AccessType) SupersetOf(b AccessType) bool {
	return (a.Read || !b.Read) && (a.Write || !b.Write) && (a.Execute || !b.Execute)
}

// Union returns the accesses that a or b allow.
func (a AccessType) Union(b AccessType) AccessType {
	return AccessType{a.Read || b.Read, a.Write || b.Write, a.Execute || b.Execute}
}

// Intersect returns the accesses that both a and b allow.
func (a AccessType) Intersect(b AccessType) AccessType {
	return AccessType{a.Read && b.Read, a.Write && b.Write, a.Execute && b.Execute}
}

// Effective returns the accesses that the hardware gives to a mapping made with
// a: on amd64 and arm64 what can be written or executed can be read as well.
func (a AccessType) Effective() AccessType {
	if a.Write || a.Execute {
		a.Read = true
	}
	return a
}

// Prot returns a as PROT_* bits (mmap(2)).
func (a AccessType) Prot() int {
	prot := 0
	if a.Read {
		prot |= 1
	}
	if a.Write {
		prot |= 2
	}
	if a.Execute {
		prot |= 4
	}
	return prot
}

// String returns a the way /proc/PID/maps writes it, as in "r-x".
func (a AccessType) String() string {
	b := []byte("---")
	if a.Read {
		b[0] = 'r'
	}
	if a.Write {
		b[1] = 'w'
	}
	if a.Execute {
		b[2] = 'x'
	}
	return string(b)
}
