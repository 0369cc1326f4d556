package seccomp

import (
	"fmt"
	"slices"
	"strings"
)

// ValueMatcher matches the 64-bit value of one argument (or of the instruction
// pointer). The implementations are AnyValue, EqualTo, NotEqual, GreaterThan,
// GreaterThanOrEqual, LessThan, LessThanOrEqual, MaskedEqual, BitsAllowlist,
// AnyOf and AllOf.
//
// Comparisons are unsigned and see all 64 bits of the register. For arguments
// that the kernel takes as int or unsigned int use Int32 or Uint32, which look
// at the low 32 bits as the kernel does.
type ValueMatcher interface {
	matchesValue(v uint64) bool
	// describe renders the condition on the value called name.
	describe(name string) string
}

// AnyValue matches every value.
type AnyValue struct{}

// EqualTo matches the value itself.
type EqualTo uint64

// NotEqual matches every other value.
type NotEqual uint64

// GreaterThan matches values above it.
type GreaterThan uint64

// GreaterThanOrEqual matches the value itself and those above it.
type GreaterThanOrEqual uint64

// LessThan matches values below it.
type LessThan uint64

// LessThanOrEqual matches the value itself and those below it.
type LessThanOrEqual uint64

// MaskedEqual matches values v with v & Mask == Value. It matches nothing when
// Value has bits outside Mask.
type MaskedEqual struct {
	Mask, Value uint64
}

// BitsAllowlist matches values that have no bit set outside it.
type BitsAllowlist uint64

// AnyOf matches when any of its matchers does. The empty AnyOf matches nothing.
type AnyOf []ValueMatcher

// AllOf matches when all of its matchers do. The empty AllOf matches everything.
type AllOf []ValueMatcher

// NonNegativeFD matches file descriptors that can exist: 0 to INT_MAX. It
// leaves out AT_FDCWD and -1.
const NonNegativeFD = LessThanOrEqual(1<<31 - 1)

// Int32 matches arguments that the kernel takes as int and that are v there,
// whatever the upper half of the register.
func Int32(v int32) ValueMatcher { return Uint32(uint32(v)) }

// Uint32 is like Int32 for arguments that the kernel takes as unsigned int.
func Uint32(v uint32) ValueMatcher {
	return MaskedEqual{Mask: 1<<32 - 1, Value: uint64(v)}
}

func (AnyValue) matchesValue(uint64) bool            { return true }
func (m EqualTo) matchesValue(v uint64) bool         { return v == uint64(m) }
func (m NotEqual) matchesValue(v uint64) bool        { return v != uint64(m) }
func (m GreaterThan) matchesValue(v uint64) bool     { return v > uint64(m) }
func (m LessThan) matchesValue(v uint64) bool        { return v < uint64(m) }
func (m LessThanOrEqual) matchesValue(v uint64) bool { return v <= uint64(m) }
func (m MaskedEqual) matchesValue(v uint64) bool     { return v&m.Mask == m.Value }
func (m BitsAllowlist) matchesValue(v uint64) bool   { return v&^uint64(m) == 0 }
func (m GreaterThanOrEqual) matchesValue(v uint64) bool {
	return v >= uint64(m)
}

func (m AnyOf) matchesValue(v uint64) bool {
	return slices.ContainsFunc(m, func(s ValueMatcher) bool { return s.matchesValue(v) })
}

func (m AllOf) matchesValue(v uint64) bool {
	return !slices.ContainsFunc(m, func(s ValueMatcher) bool { return !s.matchesValue(v) })
}

func (AnyValue) describe(name string) string      { return name + " is anything" }
func (m EqualTo) describe(name string) string     { return fmt.Sprintf("%s == %#x", name, uint64(m)) }
func (m NotEqual) describe(name string) string    { return fmt.Sprintf("%s != %#x", name, uint64(m)) }
func (m GreaterThan) describe(name string) string { return fmt.Sprintf("%s > %#x", name, uint64(m)) }
func (m LessThan) describe(name string) string    { return fmt.Sprintf("%s < %#x", name, uint64(m)) }
func (m BitsAllowlist) describe(name string) string {
	return fmt.Sprintf("%s &^ %#x == 0", name, uint64(m))
}
func (m GreaterThanOrEqual) describe(name string) string {
	return fmt.Sprintf("%s >= %#x", name, uint64(m))
}
func (m LessThanOrEqual) describe(name string) string {
	return fmt.Sprintf("%s <= %#x", name, uint64(m))
}
func (m MaskedEqual) describe(name string) string {
	return fmt.Sprintf("%s & %#x == %#x", name, m.Mask, m.Value)
}
func (m AnyOf) describe(name string) string { return describeAll(m, name, " || ", "never") }
func (m AllOf) describe(name string) string {
	return describeAll(m, name, " && ", AnyValue{}.describe(name))
}

func describeAll(ms []ValueMatcher, name, sep, empty string) string {
	if len(ms) == 0 {
		return empty
	}
	parts := make([]string, len(ms))
	for i, m := range ms {
		parts[i] = m.describe(name)
	}
	if len(parts) == 1 {
		return parts[0]
	}
	return "(" + strings.Join(parts, sep) + ")"
}
