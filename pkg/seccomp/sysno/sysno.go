// Package sysno has the names and numbers of Linux system calls on every
// architecture that Ringfence knows, whatever the one it runs on.
//
// Seccomp rules are made with it, so that programs for all architectures can be
// compiled on any host. It depends on the standard library only.
package sysno

import (
	"fmt"
	"strings"
)

//go:generate go run gen.go

// Arch is an architecture: its system call numbers and calling convention.
type Arch uint8

// The architectures. The zero Arch is none of them.
const (
	AMD64 Arch = 1 + iota
	ARM64

	numArches = iota
)

// arches has the facts about each Arch.
var arches = [1 + numArches]struct {
	name  string
	audit uint32
}{
	// From <linux/audit.h>: the ELF machine with the bits for 64-bit and
	// little-endian.
	AMD64: {"amd64", 62 | 1<<31 | 1<<30},
	ARM64: {"arm64", 183 | 1<<31 | 1<<30},
}

// Arches returns all architectures.
func Arches() []Arch { return []Arch{AMD64, ARM64} }

// ParseArch returns the architecture of the given name (a GOARCH).
func ParseArch(name string) (Arch, error) {
	var names []string
	for _, a := range Arches() {
		if a.String() == name {
			return a, nil
		}
		names = append(names, a.String())
	}
	return 0, fmt.Errorf("architecture %q is unknown: use one of %s", name, strings.Join(names, ", "))
}

// String returns the name that Go has for a.
func (a Arch) String() string {
	if a < 1 || a > numArches {
		return fmt.Sprintf("Arch(%d)", uint8(a))
	}
	return arches[a].name
}

// AuditArch returns the AUDIT_ARCH_* value that seccomp filters see for
// 64-bit system calls of a, which must be one of Arches.
func (a Arch) AuditArch() uint32 { return arches[a].audit }

// Call is a system call, by name: its number depends on the architecture.
type Call uint16

// call is what is known of a Call. A number is -1 where the architecture does
// not have the call.
type call struct {
	name         string
	amd64, arm64 int16
}

// None is the number of a system call on an architecture that lacks it. Rules
// for it are refused when they are compiled.
const None = ^uintptr(0)

// String returns the name of c as in the manual: "futex".
func (c Call) String() string {
	if int(c) >= len(calls) {
		return fmt.Sprintf("Call(%d)", uint16(c))
	}
	return calls[c].name
}

// On returns the number of c on a, or None.
func (c Call) On(a Arch) uintptr {
	nr := calls[c].amd64
	if a == ARM64 {
		nr = calls[c].arm64
	}
	if nr < 0 {
		return None
	}
	return uintptr(nr)
}

// Lookup returns the call of the given name.
func Lookup(name string) (Call, bool) {
	for c := range calls {
		if calls[c].name == name {
			return Call(c), true
		}
	}
	return 0, false
}

// Find returns the call that has the number nr on a.
func (a Arch) Find(nr uintptr) (Call, bool) {
	for c := range calls {
		if n := Call(c).On(a); n == nr && n != None {
			return Call(c), true
		}
	}
	return 0, false
}

// Name returns the name of the call with number nr on a, or "syscall NR" when
// there is none.
func (a Arch) Name(nr uintptr) string {
	if c, ok := a.Find(nr); ok {
		return c.String()
	}
	if nr == None {
		return "no syscall"
	}
	return fmt.Sprintf("syscall %d", nr)
}
