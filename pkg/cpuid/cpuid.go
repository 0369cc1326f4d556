// Package cpuid says what the CPU can do, and what an application is told it
// can do: CPUID and XSAVE on amd64, hardware capabilities and the SVE vector
// length on arm64.
//
// A FeatureSet is either the host's (Native) or the host's without the features
// that a Policy hides. Hiding changes what applications are told; it does not
// make the CPU refuse an instruction.
//
// It depends on golang.org/x/sys alone. It must know nothing of platforms or
// threads.
package cpuid

import (
	"context"
	"sync"

	"golang.org/x/sys/unix"
)

// Policy says how a FeatureSet differs from the host's.
type Policy struct {
	// Hide lists the features that applications do not see. What cannot work
	// without one of them is hidden as well.
	Hide []Feature
}

// AuxHWCap are the hardware capabilities in a new program's auxiliary vector
// (getauxval(3)).
type AuxHWCap struct {
	HWCap  uint64 // AT_HWCAP
	HWCap2 uint64 // AT_HWCAP2
}

// contextID is the type of this package's context keys.
type contextID int

// CtxFeatureSet is the context.Context key of the *FeatureSet that the
// application of a task is shown.
const CtxFeatureSet contextID = iota

// FromContext returns ctx's FeatureSet, or Native's when it has none.
func FromContext(ctx context.Context) *FeatureSet {
	if fs, ok := ctx.Value(CtxFeatureSet).(*FeatureSet); ok && fs != nil {
		return fs
	}
	return Native()
}

// Native returns what the host has, without features whose state Ringfence does
// not carry from one Switch to the next. It is the same for every call.
var Native = sync.OnceValue(newNative)

// New returns the host's feature set as p changes it.
func New(p Policy) *FeatureSet {
	fs := Native().clone()
	fs.hide(p.Hide)
	return fs
}

// Types of the auxiliary vector's entries (linux/auxvec.h).
const (
	atHWCap  = 16
	atHWCap2 = 26
)

// hostHWCap is the auxiliary vector that the kernel gave this process.
var hostHWCap = sync.OnceValue(func() (h AuxHWCap) {
	auxv, err := unix.Auxv()
	if err != nil {
		return h // a Go runtime too old to tell
	}
	for _, a := range auxv {
		switch a[0] {
		case atHWCap:
			h.HWCap = uint64(a[1])
		case atHWCap2:
			h.HWCap2 = uint64(a[1])
		}
	}
	return h
})
