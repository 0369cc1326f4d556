package seccomp

import (
	"github.com/ringfence/ringfence/pkg/bpf"
)

// buildNaive compiles rule sets in the most direct way: set after set, call
// after call, every comparison with its own loads and in both halves. It is
// what BuildProgram is compared with.
func buildNaive(sets []RuleSet, o ProgramOptions) (bpf.Program, error) {
	n := naive{}
	a := o.arch()
	end := func(action Action) { n.b.Stmt(bpf.Ret|bpf.K, uint32(action)) }

	bad, good := n.b.NewLabel("bad arch"), n.b.NewLabel("good arch")
	n.b.Stmt(bpf.Ld|bpf.W|bpf.Abs, bpf.OffArch)
	n.b.JumpIf(bpf.Jmp|bpf.Jeq|bpf.K, a.AuditArch(), bpf.Next, bad)
	n.b.Stmt(bpf.Ld|bpf.W|bpf.Abs, bpf.OffNr)
	if foreign := foreignNr(a); foreign != 0 {
		n.b.JumpIf(bpf.Jmp|bpf.Jge|bpf.K, foreign, bpf.Next, good)
	} else {
		n.b.Jump(good)
	}
	n.b.Place(bad)
	end(o.BadArchAction)
	n.b.Place(good)
	for _, s := range sets {
		for _, nr := range s.Rules.Numbers() {
			next, match := n.b.NewLabel("next"), n.b.NewLabel("match")
			n.b.Stmt(bpf.Ld|bpf.W|bpf.Abs, bpf.OffNr)
			n.b.JumpIf(bpf.Jmp|bpf.Jeq|bpf.K, uint32(nr), bpf.Next, next)
			n.rule(s.Rules.Get(nr), match, next)
			n.b.Place(match)
			end(s.Action)
			n.b.Place(next)
		}
	}
	end(o.DefaultAction)
	return n.b.Build()
}

type naive struct{ b bpf.Builder }

// rule adds code that jumps to t if r matches, else to f.
func (n *naive) rule(r SyscallRule, t, f bpf.Label) {
	switch r := r.(type) {
	case MatchAll:
		n.b.Jump(t)
	case PerArg:
		for i, m := range r {
			if m == nil {
				continue
			}
			next := n.b.NewLabel("next argument")
			off := uint32(bpf.OffIP)
			if i != RuleIP {
				off = bpf.OffArg(i)
			}
			n.value(m, off, next, f)
			n.b.Place(next)
		}
		n.b.Jump(t)
	case Or:
		for _, s := range r {
			next := n.b.NewLabel("or")
			n.rule(s, t, next)
			n.b.Place(next)
		}
		n.b.Jump(f)
	case And:
		for _, s := range r {
			next := n.b.NewLabel("and")
			n.rule(s, next, f)
			n.b.Place(next)
		}
		n.b.Jump(t)
	}
}

// value is like rule for the 64-bit value at off.
func (n *naive) value(m ValueMatcher, off uint32, t, f bpf.Label) {
	half := func(off uint32, mask uint32, jump uint16, k uint32, t, f bpf.Label) {
		n.b.Stmt(bpf.Ld|bpf.W|bpf.Abs, off)
		if mask != ^uint32(0) {
			n.b.Stmt(bpf.Alu|bpf.And|bpf.K, mask)
		}
		n.b.JumpIf(bpf.Jmp|bpf.K|jump, k, t, f)
	}
	masked := func(mask, v uint64, t, f bpf.Label) {
		next := n.b.NewLabel("low half")
		half(bpf.OffHigh(off), uint32(mask>>32), bpf.Jeq, uint32(v>>32), next, f)
		n.b.Place(next)
		half(bpf.OffLow(off), uint32(mask), bpf.Jeq, uint32(v), t, f)
	}
	above := func(jump uint16, v uint64, t, f bpf.Label) {
		notAbove, equal := n.b.NewLabel("not above"), n.b.NewLabel("equal")
		half(bpf.OffHigh(off), ^uint32(0), bpf.Jgt, uint32(v>>32), t, notAbove)
		n.b.Place(notAbove)
		half(bpf.OffHigh(off), ^uint32(0), bpf.Jeq, uint32(v>>32), equal, f)
		n.b.Place(equal)
		half(bpf.OffLow(off), ^uint32(0), jump, uint32(v), t, f)
	}
	switch m := m.(type) {
	case AnyValue:
		n.b.Jump(t)
	case EqualTo:
		masked(^uint64(0), uint64(m), t, f)
	case NotEqual:
		masked(^uint64(0), uint64(m), f, t)
	case GreaterThan:
		above(bpf.Jgt, uint64(m), t, f)
	case GreaterThanOrEqual:
		above(bpf.Jge, uint64(m), t, f)
	case LessThan:
		above(bpf.Jge, uint64(m), f, t)
	case LessThanOrEqual:
		above(bpf.Jgt, uint64(m), f, t)
	case MaskedEqual:
		masked(m.Mask, m.Value, t, f)
	case BitsAllowlist:
		masked(^uint64(m), 0, t, f)
	case AnyOf:
		for _, s := range m {
			next := n.b.NewLabel("any of")
			n.value(s, off, t, next)
			n.b.Place(next)
		}
		n.b.Jump(f)
	case AllOf:
		for _, s := range m {
			next := n.b.NewLabel("all of")
			n.value(s, off, next, f)
			n.b.Place(next)
		}
		n.b.Jump(t)
	}
}
