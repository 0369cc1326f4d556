package seccomp

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/ringfence/ringfence/pkg/bpf"
)

// SyscallRule decides, from everything but its number, whether a system call
// is matched. The implementations are MatchAll, PerArg, Or and And.
type SyscallRule interface {
	fmt.Stringer

	// matches is the definition of the rule's meaning; compiled programs are
	// tested against it. It also seals the interface: the compiler knows
	// every rule type.
	matches(d *bpf.Data) bool
}

// MatchAll matches every call.
type MatchAll struct{}

// RuleIP is the index in PerArg of the matcher for the instruction pointer
// (the address after the system call instruction).
const RuleIP = 6

// PerArg matches when every matcher matches its argument: indices 0 to 5 are
// the arguments, RuleIP is the instruction pointer. nil is AnyValue.
type PerArg [RuleIP + 1]ValueMatcher

// Or matches when any of its rules matches. The empty Or matches nothing.
type Or []SyscallRule

// And matches when all of its rules match. The empty And matches everything.
type And []SyscallRule

func (MatchAll) matches(*bpf.Data) bool { return true }

func (r PerArg) matches(d *bpf.Data) bool {
	for i, m := range r {
		if m == nil {
			continue
		}
		v := d.IP
		if i < len(d.Args) {
			v = d.Args[i]
		}
		if !m.matchesValue(v) {
			return false
		}
	}
	return true
}

func (r Or) matches(d *bpf.Data) bool {
	return slices.ContainsFunc(r, func(s SyscallRule) bool { return s.matches(d) })
}

func (r And) matches(d *bpf.Data) bool {
	return !slices.ContainsFunc(r, func(s SyscallRule) bool { return !s.matches(d) })
}

// String implements fmt.Stringer.
func (MatchAll) String() string { return "*" }

// String implements fmt.Stringer. Arguments that may have any value are left
// out: "(arg1 == 0x80 && ip >= 0x1000)".
func (r PerArg) String() string {
	var parts []string
	for i, m := range r {
		if m == nil || m == (AnyValue{}) {
			continue
		}
		name := fmt.Sprintf("arg%d", i)
		if i == RuleIP {
			name = "ip"
		}
		parts = append(parts, m.describe(name))
	}
	if len(parts) == 0 {
		return MatchAll{}.String()
	}
	return "(" + strings.Join(parts, " && ") + ")"
}

// String implements fmt.Stringer.
func (r Or) String() string { return joinRules(r, " || ", "never") }

// String implements fmt.Stringer.
func (r And) String() string { return joinRules(r, " && ", MatchAll{}.String()) }

func joinRules(rules []SyscallRule, sep, empty string) string {
	if len(rules) == 0 {
		return empty
	}
	parts := make([]string, len(rules))
	for i, r := range rules {
		parts[i] = r.String()
	}
	if len(parts) == 1 {
		return parts[0]
	}
	return "(" + strings.Join(parts, sep) + ")"
}

// SyscallRules maps system call numbers to rules. A call whose number is not
// in it is not matched. The zero value is an empty set that can be added to.
// Copies of a SyscallRules share their contents; Copy makes one that does not.
//
// Numbers are those of one architecture; see package sysno for rules that are
// made for either.
type SyscallRules struct {
	rules map[uintptr]SyscallRule
}

// NewSyscallRules returns an empty set.
func NewSyscallRules() SyscallRules {
	return SyscallRules{rules: make(map[uintptr]SyscallRule)}
}

// MakeSyscallRules returns a set with the contents of rules, which it does not
// keep.
func MakeSyscallRules(rules map[uintptr]SyscallRule) SyscallRules {
	r := NewSyscallRules()
	maps.Copy(r.rules, rules)
	return r
}

// Add makes calls to nr match when they match rule, besides when they did
// before.
func (r *SyscallRules) Add(nr uintptr, rule SyscallRule) {
	if r.rules == nil {
		r.rules = make(map[uintptr]SyscallRule)
	}
	old, ok := r.rules[nr]
	if !ok {
		r.rules[nr] = rule
		return
	}
	if _, all := old.(MatchAll); all {
		return
	}
	if _, all := rule.(MatchAll); all {
		r.rules[nr] = rule
		return
	}
	// A new slice: the old one may be shared with a copy.
	or, ok := old.(Or)
	if !ok {
		or = Or{old}
	}
	r.rules[nr] = append(slices.Clip(or), rule)
}

// Merge adds every rule of other.
func (r *SyscallRules) Merge(other SyscallRules) {
	for _, nr := range other.Numbers() {
		r.Add(nr, other.rules[nr])
	}
}

// Remove takes away the rule of nr, if there is one.
func (r SyscallRules) Remove(nr uintptr) { delete(r.rules, nr) }

// Get returns the rule of nr, or nil.
func (r SyscallRules) Get(nr uintptr) SyscallRule { return r.rules[nr] }

// Len returns the number of system call numbers that have a rule.
func (r SyscallRules) Len() int { return len(r.rules) }

// Numbers returns the numbers that have a rule, in ascending order.
func (r SyscallRules) Numbers() []uintptr { return slices.Sorted(maps.Keys(r.rules)) }

// Copy returns a set with the same contents that can be changed on its own.
func (r SyscallRules) Copy() SyscallRules { return MakeSyscallRules(r.rules) }
