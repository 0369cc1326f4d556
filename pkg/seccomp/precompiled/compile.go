package precompiled

import (
	"fmt"
	"hash/fnv"
	"maps"
	"slices"

	"github.com/ringfence/ringfence/pkg/bpf"
	"github.com/ringfence/ringfence/pkg/seccomp"
)

// Source describes a program for one architecture and configuration.
type Source struct {
	// Key names the configuration: everything that the rules depend on but
	// the architecture and variables.
	Key string

	// Variables are the names of the variables.
	Variables []string

	// Rules returns the rules for given values of the variables. The values
	// may be used as the operands of matchers only: whole, or as one half of
	// a 64-bit operand, the other half of which is another variable or a
	// constant. Compile refuses rules that compute with them or depend on
	// them in another way.
	Rules func(Values) []seccomp.RuleSet

	// Options are how to compile the rules. Options.Arch must be set, and
	// Options.Opaque must not.
	Options seccomp.ProgramOptions
}

// sortedVariables returns the names of the variables in order.
func (s *Source) sortedVariables() []string { return slices.Sorted(slices.Values(s.Variables)) }

// Build compiles the rules for the given values, which must be those of all
// variables and no others, at run time.
func (s *Source) Build(values Values) (bpf.Program, error) {
	if err := checkValues(s.Key, s.sortedVariables(), values); err != nil {
		return nil, err
	}
	return seccomp.BuildProgram(s.Rules(maps.Clone(values)), s.Options)
}

// Compile compiles the rules for any values of the variables.
func (s *Source) Compile() (Program, error) {
	p, err := s.compile()
	if err != nil {
		return Program{}, fmt.Errorf("precompile seccomp program %q for %v: %w", s.Key, s.Options.Arch, err)
	}
	return p, nil
}

func (s *Source) compile() (Program, error) {
	names := s.sortedVariables()
	if len(slices.Compact(slices.Clone(names))) != len(names) {
		return Program{}, fmt.Errorf("a variable is named twice in %q", names)
	}
	// Two sets of placeholders. A constant of the rules or of the program that
	// happens to equal one of the first would differ from that of the second.
	values, others := placeholders(names, 0), placeholders(names, 1)
	if err := s.checkRules(values, others); err != nil {
		return Program{}, err
	}
	code, err := s.buildOpaque(values)
	if err != nil {
		return Program{}, err
	}
	other, err := s.buildOpaque(others)
	if err != nil {
		return Program{}, err
	}
	if len(code) != len(other) {
		return Program{}, fmt.Errorf("the program depends on the values of variables in more than its constants")
	}

	p := Program{Key: s.Key, Code: code}
	uses := make(map[string][]uint16)
	for i := range code {
		name, isVariable := values.nameOf(code[i].K)
		want := code[i]
		if isVariable {
			want.K = others[name]
		}
		if other[i] != want {
			return Program{}, fmt.Errorf("instruction %d depends on variables in another way than as its constant: %v, %v", i, code[i], other[i])
		}
		if isVariable {
			uses[name] = append(uses[name], uint16(i))
			code[i].K = 0
		}
	}
	for _, name := range names {
		p.Variables = append(p.Variables, Variable{Name: name, Uses: uses[name]})
	}
	return p, nil
}

// buildOpaque compiles the rules with values as placeholders.
func (s *Source) buildOpaque(values Values) (bpf.Program, error) {
	o := s.Options
	o.Opaque = slices.Sorted(maps.Values(values))
	return seccomp.BuildProgram(s.Rules(maps.Clone(values)), o)
}

// nameOf returns the variable that has the value k.
func (v Values) nameOf(k uint32) (string, bool) {
	for name, value := range v {
		if value == k {
			return name, true
		}
	}
	return "", false
}

// placeholders returns different values for all names, which nothing else is
// likely to have. They are the same on every host.
func placeholders(names []string, round int) Values {
	values := make(Values)
	for _, name := range names {
		for try := 0; ; try++ {
			h := fnv.New32a()
			fmt.Fprintf(h, "placeholder %d.%d of %q", round, try, name)
			if _, taken := values.nameOf(h.Sum32()); !taken {
				values[name] = h.Sum32()
				break
			}
		}
	}
	return values
}

// checkRules checks that the rules for any values are those for the
// placeholders with the placeholders replaced. It tries a few values at the
// boundaries, at which a rule that depends on a value in another way is likely
// to show.
func (s *Source) checkRules(values, others Values) error {
	flat := flatten(s.Rules(maps.Clone(values)))
	replaced := func(half uint32, by Values) uint32 {
		if name, ok := values.nameOf(half); ok {
			return by[name]
		}
		return half
	}
	up, down := make(Values), make(Values)
	for i, name := range s.sortedVariables() {
		up[name], down[name] = uint32(i), ^uint32(i)
	}
	tries := []Values{others, up, down}
	for _, v := range []uint32{0, 1, 1<<31 - 1, 1 << 31, ^uint32(0)} {
		all := make(Values)
		for name := range values {
			all[name] = v
		}
		tries = append(tries, all)
	}
	for _, try := range tries {
		want := slices.Clone(flat)
		for i := range want {
			if o := want[i].operand; want[i].isValue {
				want[i].operand = uint64(replaced(uint32(o>>32), try))<<32 | uint64(replaced(uint32(o), try))
			}
		}
		got := flatten(s.Rules(maps.Clone(try)))
		for i := range max(len(want), len(got)) {
			if i >= len(want) || i >= len(got) || got[i] != want[i] {
				return fmt.Errorf("the rules depend on variables in another way than by comparing with them: near %s they are not the same with values %v",
					near(want, i), try)
			}
		}
	}
	return nil
}

// element is a part of rules in the order in which they are written.
type element struct {
	what string
	// operand is a number; isValue says that it is one that a matcher compares
	// with, which variables may be part of.
	operand uint64
	isValue bool
}

// near names the last call in front of element i.
func near(elements []element, i int) string {
	for i = min(i, len(elements)-1); i >= 0; i-- {
		if elements[i].what == callElement {
			return fmt.Sprintf("system call %d", elements[i].operand)
		}
	}
	return "the start"
}

const callElement = "call"

// flatten returns the elements of sets.
func flatten(sets []seccomp.RuleSet) []element {
	var f flattener
	for _, s := range sets {
		f.add("set", uint64(s.Action))
		for _, nr := range s.Rules.Numbers() {
			f.add(callElement, uint64(nr))
			f.rule(s.Rules.Get(nr))
		}
	}
	return f
}

type flattener []element

func (f *flattener) add(what string, operand uint64) { *f = append(*f, element{what, operand, false}) }

func (f *flattener) values(what any, operands ...uint64) {
	for _, o := range operands {
		*f = append(*f, element{fmt.Sprintf("%T", what), o, true})
	}
}

func (f *flattener) rule(r seccomp.SyscallRule) {
	switch r := r.(type) {
	case seccomp.PerArg:
		for i, m := range r {
			f.add("argument", uint64(i))
			f.value(m)
		}
	case seccomp.Or:
		f.add("or", uint64(len(r)))
		for _, s := range r {
			f.rule(s)
		}
	case seccomp.And:
		f.add("and", uint64(len(r)))
		for _, s := range r {
			f.rule(s)
		}
	default:
		f.add(fmt.Sprintf("%T", r), 0)
	}
}

func (f *flattener) value(m seccomp.ValueMatcher) {
	switch m := m.(type) {
	case seccomp.EqualTo:
		f.values(m, uint64(m))
	case seccomp.NotEqual:
		f.values(m, uint64(m))
	case seccomp.GreaterThan:
		f.values(m, uint64(m))
	case seccomp.GreaterThanOrEqual:
		f.values(m, uint64(m))
	case seccomp.LessThan:
		f.values(m, uint64(m))
	case seccomp.LessThanOrEqual:
		f.values(m, uint64(m))
	case seccomp.BitsAllowlist:
		f.values(m, uint64(m))
	case seccomp.MaskedEqual:
		f.values(m, m.Mask, m.Value)
	case seccomp.AnyOf:
		f.add("any of", uint64(len(m)))
		for _, s := range m {
			f.value(s)
		}
	case seccomp.AllOf:
		f.add("all of", uint64(len(m)))
		for _, s := range m {
			f.value(s)
		}
	default:
		f.add(fmt.Sprintf("%T", m), 0)
	}
}
