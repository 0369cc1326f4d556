package precompiled_test

import (
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ringfence/ringfence/pkg/bpf"
	"github.com/ringfence/ringfence/pkg/seccomp"
	"github.com/ringfence/ringfence/pkg/seccomp/internal/sample/rules"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// caller makes calls that a program is likely to care for, from its constants.
type caller struct {
	*rand.Rand
	p bpf.Program
}

func (c *caller) half() uint32 {
	k := c.p[c.IntN(len(c.p))].K
	switch c.IntN(6) {
	case 0:
		k++
	case 1:
		k--
	}
	return k
}

func (c *caller) call(s *precompiled.Source) bpf.Data {
	d := bpf.Data{Arch: s.Options.Arch.AuditArch(), Nr: uint32(c.IntN(450))}
	if hot := s.Options.HottestSyscalls; c.IntN(2) == 0 && len(hot) > 0 {
		d.Nr = uint32(hot[c.IntN(len(hot))])
	}
	for i := range d.Args {
		d.Args[i] = uint64(c.half())
		if c.IntN(4) == 0 {
			d.Args[i] |= uint64(c.half()) << 32
		}
	}
	return d
}

// boundaryValues returns values of all variables at the boundaries and beyond
// what anybody expects: all equal, and equal to constants in the rules.
func boundaryValues(r *rand.Rand, names []string) precompiled.Values {
	v := make(precompiled.Values)
	for _, name := range names {
		v[name] = []uint32{0, 0, 1, 7, 1 << 31, 1<<31 - 1, ^uint32(0), 0xae80}[r.IntN(8)]
	}
	return v
}

// TestRender compares rendered programs with the meaning of the rules, for
// both architectures.
func TestRender(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, a := range sysno.Arches() {
		sources, err := rules.Sources(a)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range sources {
			p, err := s.Compile()
			if err != nil {
				t.Fatal(err)
			}
			allowed := 0
			const rounds, calls = 40, 250
			for round := range rounds {
				values := rules.Values()
				if round > 0 {
					values = boundaryValues(r, s.Variables)
				}
				program, err := p.Render(values)
				if err != nil {
					t.Fatal(err)
				}
				if err := program.Validate(); err != nil {
					t.Fatal(err)
				}
				c := caller{r, program}
				for range calls {
					d := c.call(&s)
					got, err := program.Run(&d)
					if err != nil {
						t.Fatal(err)
					}
					want := seccomp.Evaluate(s.Rules(values), s.Options, &d)
					if seccomp.Action(got.Action) != want {
						t.Fatalf("%v %s with %v: %v, want %v for %+v", a, s.Key, values, seccomp.Action(got.Action), want, d)
					}
					if want == seccomp.Allow {
						allowed++
					}
				}
			}
			if allowed < rounds*calls/20 || allowed > rounds*calls*19/20 {
				t.Errorf("%v %s: %d of %d calls are allowed: too one-sided to test much", a, s.Key, allowed, rounds*calls)
			}
		}
	}
}

// source returns a Source with the rule for one call.
func source(variables []string, rule func(v precompiled.Values) seccomp.SyscallRule) precompiled.Source {
	return precompiled.Source{
		Key:       "test",
		Variables: variables,
		Rules: func(v precompiled.Values) []seccomp.RuleSet {
			return []seccomp.RuleSet{{
				Rules:  seccomp.MakeSyscallRules(map[uintptr]seccomp.SyscallRule{5: rule(v)}),
				Action: seccomp.Allow,
			}}
		},
		Options: seccomp.ProgramOptions{Arch: sysno.AMD64},
	}
}

func TestRenderErrors(t *testing.T) {
	s := source([]string{"b", "a", "unused"}, func(v precompiled.Values) seccomp.SyscallRule {
		return seccomp.PerArg{seccomp.EqualTo(v["a"]), seccomp.EqualTo(v["b"])}
	})
	p, err := s.Compile()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name   string
		values precompiled.Values
		want   *precompiled.VariablesError // nil for none
		text   string
	}{
		{"all", precompiled.Values{"a": 1, "b": 2, "unused": 3}, nil, ""},
		{"none", nil, &precompiled.VariablesError{Key: "test", Missing: []string{"a", "b", "unused"}}, `"test": no value for a, b, unused`},
		{"missing", precompiled.Values{"a": 1, "unused": 1}, &precompiled.VariablesError{Key: "test", Missing: []string{"b"}}, `"test": no value for b`},
		{"missing unused", precompiled.Values{"a": 1, "b": 1}, &precompiled.VariablesError{Key: "test", Missing: []string{"unused"}}, "no value for unused"},
		{"unknown", precompiled.Values{"a": 1, "b": 2, "unused": 3, "c": 4}, &precompiled.VariablesError{Key: "test", Unknown: []string{"c"}}, `"test": it has no variable c`},
		{"misspelt", precompiled.Values{"a": 1, "b": 2, "unusd": 3}, &precompiled.VariablesError{Key: "test", Missing: []string{"unused"}, Unknown: []string{"unusd"}}, "no value for unused; it has no variable unusd"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, renderErr := p.Render(test.values)
			_, buildErr := s.Build(test.values)
			for _, err := range []error{renderErr, buildErr} {
				if test.want == nil {
					if err != nil {
						t.Error(err)
					}
					continue
				}
				var got *precompiled.VariablesError
				if !errors.As(err, &got) {
					t.Fatalf("got %v, want a VariablesError", err)
				}
				if diff := cmp.Diff(test.want, got); diff != "" {
					t.Errorf("-want +got:\n%s", diff)
				}
				if !strings.Contains(err.Error(), test.text) {
					t.Errorf("the error is %q, want one with %q", err, test.text)
				}
			}
		})
	}
}

// TestRenderLeavesProgram checks that rendering twice gives two programs.
func TestRenderLeavesProgram(t *testing.T) {
	s := source([]string{"a"}, func(v precompiled.Values) seccomp.SyscallRule { return seccomp.PerArg{seccomp.EqualTo(v["a"])} })
	p, err := s.Compile()
	if err != nil {
		t.Fatal(err)
	}
	before := p.Code.String()
	for _, value := range []uint32{5, 6} {
		program, err := p.Render(precompiled.Values{"a": value})
		if err != nil {
			t.Fatal(err)
		}
		for arg, want := range map[uint64]seccomp.Action{uint64(value): seccomp.Allow, 11 - uint64(value): 0} {
			d := bpf.Data{Arch: sysno.AMD64.AuditArch(), Nr: 5, Args: [6]uint64{arg}}
			if r, err := program.Run(&d); err != nil || seccomp.Action(r.Action) != want {
				t.Errorf("a = %d, argument %d: %v, %v; want %v", value, arg, seccomp.Action(r.Action), err, want)
			}
		}
	}
	if p.Code.String() != before {
		t.Error("Render changes the precompiled program")
	}
}

// TestCompileRefuses gives Compile rules that do not merely compare with
// variables, and which it can therefore not compile.
func TestCompileRefuses(t *testing.T) {
	equal := func(v uint32) seccomp.SyscallRule { return seccomp.PerArg{seccomp.EqualTo(v)} }
	for _, test := range []struct {
		name string
		rule func(v precompiled.Values) seccomp.SyscallRule
		want string
	}{
		{"sum", func(v precompiled.Values) seccomp.SyscallRule { return equal(v["a"] + 1) }, "near system call 5"},
		{"wide sum", func(v precompiled.Values) seccomp.SyscallRule {
			return seccomp.PerArg{seccomp.LessThan(uint64(v["a"]) + 1)}
		}, "near system call 5"},
		{"shift", func(v precompiled.Values) seccomp.SyscallRule { return equal(v["a"] << 12) }, "near system call 5"},
		{"condition", func(v precompiled.Values) seccomp.SyscallRule {
			if v["a"] == 0 {
				return seccomp.MatchAll{}
			}
			return equal(v["a"])
		}, "near system call 5"},
		{"condition that placeholders do not meet", func(v precompiled.Values) seccomp.SyscallRule {
			if int32(v["a"]) == -1 {
				return seccomp.Or{}
			}
			return equal(v["a"])
		}, "near system call 5"},
		{"order", func(v precompiled.Values) seccomp.SyscallRule { return equal(min(v["a"], v["b"])) }, "near system call 5"},
		{"nothing to compile", func(v precompiled.Values) seccomp.SyscallRule { return nil }, "rule of unknown type"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := source([]string{"a", "b"}, test.rule)
			if _, err := s.Compile(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Compile: %v, want an error with %q", err, test.want)
			}
		})
	}
	s := source([]string{"a", "a"}, func(v precompiled.Values) seccomp.SyscallRule { return equal(v["a"]) })
	if _, err := s.Compile(); err == nil || !strings.Contains(err.Error(), "named twice") {
		t.Errorf("Compile with a variable twice: %v", err)
	}
}

func TestValues64(t *testing.T) {
	v := make(precompiled.Values)
	v.Set64("address", 0x7f00_1234_5678)
	if diff := cmp.Diff(precompiled.Values{"address_hi": 0x7f00, "address_lo": 0x1234_5678}, v); diff != "" {
		t.Errorf("Set64: -want +got:\n%s", diff)
	}
	if got := v.Get64("address"); got != 0x7f00_1234_5678 {
		t.Errorf("Get64: %#x", got)
	}
}
