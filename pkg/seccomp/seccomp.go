// Package seccomp turns rules about system calls into seccomp-BPF programs and
// installs them.
//
// Rules (SyscallRules, SyscallRule, ValueMatcher) say which calls a RuleSet
// matches; BuildProgram compiles rule sets, each with its Action, into a short
// and fast program; Install confines the process with it. Evaluate is the
// plain definition of what a program must answer.
//
// It depends on pkg/bpf, pkg/seccomp/sysno and x/sys only. It must never know a
// platform or the Sentry: they bring their rules.
package seccomp

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/bpf"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// RuleSet is rules and what happens to the calls that they match.
type RuleSet struct {
	Rules  SyscallRules
	Action Action
}

// ProgramOptions says what BuildProgram makes of rule sets.
type ProgramOptions struct {
	// Arch is the architecture that the numbers in the rules belong to. Zero
	// is the one that this program runs on.
	Arch sysno.Arch

	// DefaultAction is for calls that no rule set matches.
	DefaultAction Action

	// BadArchAction is for calls by another calling convention than the
	// 64-bit one of Arch: int 0x80 and x32 on amd64, AArch32 on arm64.
	BadArchAction Action

	// HottestSyscalls are the numbers of the calls that are made most often,
	// the most frequent first. They are looked for first, in this order.
	// Those without a rule are not.
	//
	// Since Linux 5.11 the kernel does not run filters for calls that they
	// allow whatever the arguments (seccomp_cache_prepare in
	// kernel/seccomp.c), so the order matters for those with rules about
	// arguments.
	HottestSyscalls []uintptr

	// Opaque are 32-bit constants that stand for values to be filled in
	// later, in the halves of the values that rules compare with. The program
	// has them where it compares with them, and is right whatever replaces
	// them.
	Opaque []uint32
}

// x32Bit is set in the numbers of x32 system calls on amd64
// (__X32_SYSCALL_BIT).
const x32Bit = 0x40000000

// arch returns the architecture to compile for.
func (o *ProgramOptions) arch() sysno.Arch {
	if o.Arch == 0 {
		return sysno.Native
	}
	return o.Arch
}

// foreignNr returns the first number that does not belong to the 64-bit
// calling convention, or 0 if all do.
func foreignNr(a sysno.Arch) uint32 {
	if a == sysno.AMD64 {
		return x32Bit
	}
	return 0
}

// Evaluate returns what a program built from sets and o answers for d: the
// action of the first set that matches, or one of the two defaults. It defines
// what programs must do, and is slow.
func Evaluate(sets []RuleSet, o ProgramOptions, d *bpf.Data) Action {
	a := o.arch()
	if foreign := foreignNr(a); d.Arch != a.AuditArch() || foreign != 0 && d.Nr >= foreign {
		return o.BadArchAction
	}
	for _, s := range sets {
		if r := s.Rules.Get(uintptr(d.Nr)); r != nil && r.matches(d) {
			return s.Action
		}
	}
	return o.DefaultAction
}

// TooLongError is what BuildProgram returns when the program would have more
// instructions than the kernel takes.
type TooLongError struct {
	// Length is the number of instructions that the rules take.
	Length int
	// Biggest are the calls whose rules take the most, in descending order.
	Biggest []RuleSize
}

// RuleSize is how much of a program the rules of a call take.
type RuleSize struct {
	// Name is the name of the call.
	Name string
	// Conditions is the number of conditions that the arguments are tested for.
	Conditions int
}

// Error implements error.
func (e *TooLongError) Error() string {
	parts := make([]string, len(e.Biggest))
	for i, r := range e.Biggest {
		parts[i] = fmt.Sprintf("%s (%d conditions)", r.Name, r.Conditions)
	}
	return fmt.Sprintf("the seccomp program has %d instructions and the kernel takes %d: simplify the biggest rules: %s",
		e.Length, bpf.MaxInstructions, strings.Join(parts, ", "))
}

// String returns the rules as text, a call a line, with the names that the
// numbers have on the architecture that this program runs on.
func (r SyscallRules) String() string { return r.Format(sysno.Native) }

// Format is like String for the numbers of a.
func (r SyscallRules) Format(a sysno.Arch) string {
	var b strings.Builder
	for _, nr := range r.Numbers() {
		fmt.Fprintf(&b, "%s: %s\n", a.Name(nr), r.rules[nr])
	}
	return b.String()
}

// checkRules reports what BuildProgram cannot compile.
func checkRules(sets []RuleSet, a sysno.Arch) error {
	if !slices.Contains(sysno.Arches(), a) {
		return fmt.Errorf("seccomp program for %v: unknown architecture", a)
	}
	for i, s := range sets {
		for _, nr := range s.Rules.Numbers() {
			if nr == sysno.None {
				return fmt.Errorf("rule set %d (%v) has a rule for a system call that %v does not have", i, s.Action, a)
			}
			if nr >= x32Bit {
				return fmt.Errorf("rule set %d (%v): %#x is not the number of a 64-bit system call", i, s.Action, nr)
			}
			if err := checkRule(s.Rules.Get(nr)); err != nil {
				return fmt.Errorf("rule set %d (%v), %s: %w", i, s.Action, a.Name(nr), err)
			}
		}
	}
	return nil
}

func checkRule(r SyscallRule) error {
	switch r := r.(type) {
	case MatchAll:
		return nil
	case PerArg:
		for i, m := range r {
			if m == nil {
				continue
			}
			if err := checkValue(m); err != nil {
				return fmt.Errorf("argument %d: %w", i, err)
			}
		}
		return nil
	case Or:
		return checkEach(r, checkRule)
	case And:
		return checkEach(r, checkRule)
	}
	return fmt.Errorf("rule of unknown type %T", r)
}

func checkValue(m ValueMatcher) error {
	switch m := m.(type) {
	case AnyValue, EqualTo, NotEqual, GreaterThan, GreaterThanOrEqual, LessThan, LessThanOrEqual, MaskedEqual, BitsAllowlist:
		return nil
	case AnyOf:
		return checkEach(m, checkValue)
	case AllOf:
		return checkEach(m, checkValue)
	}
	return fmt.Errorf("matcher of unknown type %T", m)
}

func checkEach[T any](list []T, check func(T) error) error {
	for _, x := range list {
		if err := check(x); err != nil {
			return err
		}
	}
	return nil
}

// errnoOf is for messages: the kernel's name of an errno and what it means.
func errnoOf(errno unix.Errno) string {
	return fmt.Sprintf("%s (%s)", unix.ErrnoName(errno), errno.Error())
}
