package seccomp

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/ringfence/ringfence/pkg/bpf"
)

// BuildProgram compiles rule sets: a call gets the action of the first set
// that matches it. The program answers as Evaluate does. The error is a
// *TooLongError if the kernel would not take the program for its length;
// others are mistakes in the rules.
func BuildProgram(sets []RuleSet, o ProgramOptions) (bpf.Program, error) {
	if err := checkRules(sets, o.arch()); err != nil {
		return nil, fmt.Errorf("build seccomp program: %w", err)
	}
	c := newCompiler(sets, &o)
	p, err := c.program(true)
	var tooLong *TooLongError
	if errors.As(err, &tooLong) {
		// Deciding conditions early can copy what follows them.
		p, err = c.program(false)
	}
	if err != nil {
		return nil, fmt.Errorf("build seccomp program: %w", err)
	}
	return p, nil
}

type compiler struct {
	*graph
	sets []RuleSet
	o    *ProgramOptions
}

func newCompiler(sets []RuleSet, o *ProgramOptions) *compiler {
	return &compiler{newGraph(o.Opaque), sets, o}
}

// program compiles everything.
func (c *compiler) program(simplify bool) (bpf.Program, error) {
	rules := c.calls(simplify)
	root := c.compare(bpf.OffArch, bpf.Jeq, c.o.arch().AuditArch(), c.selectCall(rules), c.end(c.o.BadArchAction))
	p, err := c.emit(root)
	switch {
	case len(p) > bpf.MaxInstructions:
		return nil, c.tooLong(len(p), rules)
	case err != nil:
		return nil, err
	}
	return bpf.Optimize(p), nil
}

// callNode is what follows once the number of a call is known.
type callNode struct {
	nr uint32
	n  nodeID
}

// calls compiles the rules of every call, in ascending order of the numbers.
func (c *compiler) calls(simplify bool) []callNode {
	var numbers []uintptr
	for _, s := range c.sets {
		numbers = append(numbers, s.Rules.Numbers()...)
	}
	slices.Sort(numbers)
	var calls []callNode
	for _, nr := range slices.Compact(numbers) {
		n := c.end(c.o.DefaultAction)
		for _, s := range slices.Backward(c.sets) {
			if r := s.Rules.Get(nr); r != nil {
				n = c.rule(r, c.end(s.Action), n)
			}
		}
		if simplify {
			n = c.simplify(n, facts{})
		}
		calls = append(calls, callNode{uint32(nr), n})
	}
	return calls
}

// selectCall returns the node that finds the rules of a call by its number.
func (c *compiler) selectCall(calls []callNode) nodeID {
	var hot []callNode
	for _, nr := range c.o.HottestSyscalls {
		i, ok := slices.BinarySearchFunc(calls, nr, func(n callNode, nr uintptr) int { return cmp.Compare(uintptr(n.nr), nr) })
		if ok && !slices.Contains(hot, calls[i]) {
			hot = append(hot, calls[i])
		}
	}

	byDefault := c.end(c.o.DefaultAction)
	var spans []span
	add := func(start uint32, to nodeID) {
		if n := len(spans); n > 0 && spans[n-1].start == start {
			spans[n-1].to = to
		} else {
			spans = append(spans, span{start, to})
		}
	}
	add(0, byDefault)
	for _, call := range calls {
		if slices.Contains(hot, call) {
			// Never looked for in the tree: it is part of the span before.
			continue
		}
		add(call.nr, call.n)
		add(call.nr+1, byDefault)
	}
	if foreign := foreignNr(c.o.arch()); foreign != 0 {
		add(foreign, c.end(c.o.BadArchAction))
	}
	n := c.dispatch(bpf.OffNr, spans)
	for _, call := range slices.Backward(hot) {
		n = c.compare(bpf.OffNr, bpf.Jeq, call.nr, call.n, n)
	}
	return n
}

// tooLong returns the error about a program of n instructions.
func (c *compiler) tooLong(n int, calls []callNode) error {
	e := &TooLongError{Length: n}
	for _, call := range calls {
		if size := len(c.order(call.n)); size > 0 {
			e.Biggest = append(e.Biggest, RuleSize{c.o.arch().Name(uintptr(call.nr)), size})
		}
	}
	slices.SortStableFunc(e.Biggest, func(a, b RuleSize) int { return cmp.Compare(b.Conditions, a.Conditions) })
	e.Biggest = e.Biggest[:min(len(e.Biggest), 5)]
	return e
}

// rule returns a node that goes on to t if r matches, else to f.
func (c *compiler) rule(r SyscallRule, t, f nodeID) nodeID {
	switch r := r.(type) {
	case MatchAll:
		return t
	case PerArg:
		for i, m := range slices.Backward(r[:]) {
			if m == nil {
				continue
			}
			off := uint32(bpf.OffIP)
			if i != RuleIP {
				off = bpf.OffArg(i)
			}
			t = c.value(m, off, t, f)
		}
		return t
	case Or:
		for _, s := range slices.Backward(joinPerArgs(r)) {
			f = c.rule(s, t, f)
		}
		return f
	case And:
		for _, s := range slices.Backward(r) {
			t = c.rule(s, t, f)
		}
		return t
	}
	return f // checkRule
}

// joinPerArgs returns an equivalent of rules in which those that differ in one
// argument only are one, so that its values become a search tree.
func joinPerArgs(rules Or) Or {
	var flat Or
	var flatten func(rules Or)
	flatten = func(rules Or) {
		for _, r := range rules {
			if or, ok := r.(Or); ok {
				flatten(or)
			} else {
				flat = append(flat, r)
			}
		}
	}
	flatten(rules)
	for arg := range len(PerArg{}) {
		at := make(map[string]int) // by text without arg: index in joined
		var joined Or
		for _, r := range flat {
			p, ok := r.(PerArg)
			if !ok || p[arg] == nil {
				joined = append(joined, r)
				continue
			}
			rest := p
			rest[arg] = nil
			key := rest.String()
			if i, ok := at[key]; ok {
				values := joined[i].(PerArg)[arg]
				if list, ok := values.(AnyOf); ok {
					rest[arg] = append(slices.Clip(list), p[arg])
				} else {
					rest[arg] = AnyOf{values, p[arg]}
				}
				joined[i] = rest
				continue
			}
			at[key] = len(joined)
			joined = append(joined, r)
		}
		flat = joined
	}
	return flat
}

// value returns a node that goes on to t if m matches the 64-bit value at off,
// else to f.
func (c *compiler) value(m ValueMatcher, off uint32, t, f nodeID) nodeID {
	if set, ok := c.valueSet(m); ok {
		return c.inSet(set, off, t, f)
	}
	switch m := m.(type) {
	case EqualTo:
		return c.masked(MaskedEqual{^uint64(0), uint64(m)}, off, t, f)
	case NotEqual:
		return c.masked(MaskedEqual{^uint64(0), uint64(m)}, off, f, t)
	case GreaterThan:
		return c.above(bpf.Jgt, uint64(m), off, t, f)
	case GreaterThanOrEqual:
		return c.above(bpf.Jge, uint64(m), off, t, f)
	case LessThan:
		return c.above(bpf.Jge, uint64(m), off, f, t)
	case LessThanOrEqual:
		return c.above(bpf.Jgt, uint64(m), off, f, t)
	case MaskedEqual:
		return c.masked(m, off, t, f)
	case BitsAllowlist:
		low, high := uint32(m), uint32(m>>32)
		return c.allowedBits(high, bpf.OffHigh(off), c.allowedBits(low, bpf.OffLow(off), t, f), f)
	case AnyOf:
		sets := valueSet{}
		for _, s := range slices.Backward(m) {
			if set, ok := c.valueSet(s); ok {
				sets = sets.union(set)
			} else {
				f = c.value(s, off, t, f)
			}
		}
		return c.inSet(sets, off, t, f)
	case AllOf:
		sets := everyValue
		for _, s := range slices.Backward(m) {
			if set, ok := c.valueSet(s); ok {
				sets = sets.intersect(set)
			} else {
				t = c.value(s, off, t, f)
			}
		}
		return c.inSet(sets, off, t, f)
	}
	return f // checkValue
}

// above compares the 64-bit value at off with v, by jump: Jgt or Jge.
func (c *compiler) above(jump uint16, v uint64, off uint32, t, f nodeID) nodeID {
	low, high := uint32(v), uint32(v>>32)
	equal := c.compare(bpf.OffLow(off), jump, low, t, f)
	return c.compare(bpf.OffHigh(off), bpf.Jgt, high, t,
		c.compare(bpf.OffHigh(off), bpf.Jeq, high, equal, f))
}

func (c *compiler) masked(m MaskedEqual, off uint32, t, f nodeID) nodeID {
	t = c.maskedHalf(uint32(m.Mask), uint32(m.Value), bpf.OffLow(off), t, f)
	return c.maskedHalf(uint32(m.Mask>>32), uint32(m.Value>>32), bpf.OffHigh(off), t, f)
}

// maskedHalf tests whether the word at off, masked with mask, is v.
func (c *compiler) maskedHalf(mask, v, off uint32, t, f nodeID) nodeID {
	if !c.opaque[mask] {
		switch {
		case mask == ^uint32(0):
			return c.compare(off, bpf.Jeq, v, t, f)
		case c.opaque[v]:
		case v&^mask != 0:
			return f
		case mask == 0:
			return t
		case v == 0:
			return c.compare(off, bpf.Jset, mask, f, t)
		case v == mask && mask&(mask-1) == 0:
			return c.compare(off, bpf.Jset, mask, t, f)
		}
	}
	return c.test(condition{load{off, bpf.And, mask}, bpf.Jeq, v}, t, f)
}

// allowedBits tests whether the word at off has no bits but those of allowed.
func (c *compiler) allowedBits(allowed, off uint32, t, f nodeID) nodeID {
	if c.opaque[allowed] {
		// The complement is not known.
		return c.test(condition{load{off, bpf.Or, allowed}, bpf.Jeq, allowed}, t, f)
	}
	return c.compare(off, bpf.Jset, ^allowed, f, t)
}

// valueSet is a set of 64-bit values: those of bounds[0] up to but without
// bounds[1], and so on in ascending order; without a last one, up to the
// greatest.
type valueSet struct {
	bounds []uint64
}

var everyValue = valueSet{[]uint64{0}}

// between returns the set of values from low to high inclusive.
func between(low, high uint64) valueSet {
	if high == ^uint64(0) {
		return valueSet{[]uint64{low}}
	}
	return valueSet{[]uint64{low, high + 1}}
}

func (s valueSet) complement() valueSet {
	if len(s.bounds) > 0 && s.bounds[0] == 0 {
		return valueSet{s.bounds[1:]}
	}
	return valueSet{append([]uint64{0}, s.bounds...)}
}

func (s valueSet) union(t valueSet) valueSet {
	var u valueSet
	in := false
	for i, j := 0, 0; i < len(s.bounds) || j < len(t.bounds); {
		var at uint64
		switch {
		case j == len(t.bounds) || i < len(s.bounds) && s.bounds[i] < t.bounds[j]:
			at = s.bounds[i]
			i++
		case i == len(s.bounds) || t.bounds[j] < s.bounds[i]:
			at = t.bounds[j]
			j++
		default:
			at = s.bounds[i]
			i++
			j++
		}
		// An odd number of bounds passed means inside.
		if now := i%2 == 1 || j%2 == 1; now != in {
			u.bounds = append(u.bounds, at)
			in = now
		}
	}
	return u
}

func (s valueSet) intersect(t valueSet) valueSet {
	return s.complement().union(t.complement()).complement()
}

// valueSet returns the values that m matches, if that is a set of few ranges
// and does not depend on opaque constants.
func (c *compiler) valueSet(m ValueMatcher) (valueSet, bool) {
	known := func(v uint64) bool { return !c.opaque[uint32(v)] && !c.opaque[uint32(v>>32)] }
	switch m := m.(type) {
	case AnyValue:
		return everyValue, true
	case EqualTo:
		return between(uint64(m), uint64(m)), known(uint64(m))
	case NotEqual:
		return between(uint64(m), uint64(m)).complement(), known(uint64(m))
	case GreaterThan:
		return between(0, uint64(m)).complement(), known(uint64(m))
	case GreaterThanOrEqual:
		return valueSet{[]uint64{uint64(m)}}, known(uint64(m))
	case LessThan:
		return valueSet{[]uint64{uint64(m)}}.complement(), known(uint64(m))
	case LessThanOrEqual:
		return between(0, uint64(m)), known(uint64(m))
	case AnyOf:
		all := valueSet{}
		for _, s := range m {
			set, ok := c.valueSet(s)
			if !ok {
				return valueSet{}, false
			}
			all = all.union(set)
		}
		return all, true
	case AllOf:
		all := everyValue
		for _, s := range m {
			set, ok := c.valueSet(s)
			if !ok {
				return valueSet{}, false
			}
			all = all.intersect(set)
		}
		return all, true
	}
	return valueSet{}, false
}

// inSet returns a node that goes on to t if the 64-bit value at off is in set,
// else to f.
func (c *compiler) inSet(set valueSet, off uint32, t, f nodeID) nodeID {
	// One span for each high half in which the answer depends on the low
	// half, and one for each range of high halves between those.
	now := f
	spans := []span{{0, f}}
	add := func(spans []span, start uint32, to nodeID) []span {
		if last := &spans[len(spans)-1]; last.start == start {
			last.to = to
			return spans
		}
		return append(spans, span{start, to})
	}
	for i := 0; i < len(set.bounds); {
		high := uint32(set.bounds[i] >> 32)
		low := []span{{0, now}}
		for ; i < len(set.bounds) && uint32(set.bounds[i]>>32) == high; i++ {
			if now = f; i%2 == 0 {
				now = t
			}
			low = add(low, uint32(set.bounds[i]), now)
		}
		spans = add(spans, high, c.dispatch(bpf.OffLow(off), low))
		if high != ^uint32(0) {
			spans = add(spans, high+1, now)
		}
	}
	return c.dispatch(bpf.OffHigh(off), spans)
}
