package bpf

import "slices"

// Optimize returns a program that answers every call as p does, has no more
// instructions, and executes no more of them. It follows jumps to jumps,
// decides conditions that were tested before on every way there, drops loads
// of what the accumulator holds or nothing reads, joins equal tails and removes what cannot be
// reached. p must be valid.
//
// Constants are compared for equality only, and never changed or computed
// with: a constant that a later step patches keeps its places.
func Optimize(p Program) Program {
	for {
		o := newOptimizer(p)
		o.analyze()
		o.simplify()
		o.dropUnused()
		o.mergeTails()
		next := o.emit()
		// The kernel's check of scratch memory takes code behind a return for
		// its continuation, so it can refuse a program for what was removed.
		if slices.Equal(p, next) || next.Validate() != nil {
			return p
		}
		p = next
	}
}

// optNode is an instruction with absolute jump targets.
type optNode struct {
	in Instruction
	// t is the target of Jmp|Ja, and of conditional jumps if true; else the
	// next instruction. f is the target of conditional jumps if false.
	t, f int
	// reached says that some way leads here.
	reached bool
	// state is what is known before the instruction.
	state optState
}

// valueID numbers values that registers may hold. Equal numbers are equal
// values: a program's input does not change while it runs.
type valueID int

// unknownValue is a value that may differ from any other.
const unknownValue valueID = -1

// valueKey defines a value: the code that computes it, and from what.
type valueKey struct {
	code uint16
	k    uint32
	a, x valueID
}

// fact is a condition whose outcome is known.
type fact struct {
	cond    valueKey
	outcome bool
}

// maxFacts bounds the facts that are kept; the newest matter most.
const maxFacts = 16

type optState struct {
	a, x  valueID
	facts []fact // never changed in place
}

type optimizer struct {
	nodes  []optNode
	values map[valueKey]valueID
}

func newOptimizer(p Program) *optimizer {
	o := &optimizer{nodes: make([]optNode, len(p)), values: make(map[valueKey]valueID)}
	for pc, in := range p {
		n := optNode{in: in, t: pc + 1, f: pc + 1}
		switch {
		case in.Code == Jmp|Ja:
			n.t += int(in.K)
		case in.isConditional():
			n.t += int(in.JT)
			n.f += int(in.JF)
		}
		o.nodes[pc] = n
	}
	return o
}

// value returns the number of the value that key defines.
func (o *optimizer) value(key valueKey) valueID {
	if key.a == unknownValue || key.x == unknownValue {
		return unknownValue
	}
	id, ok := o.values[key]
	if !ok {
		id = valueID(len(o.values))
		o.values[key] = id
	}
	return id
}

// after returns the state after the non-jump instruction in.
func (o *optimizer) after(in Instruction, s optState) optState {
	switch in.Code {
	case Ld | W | Abs, Ld | Imm, Ld | W | Len:
		s.a = o.value(valueKey{code: in.Code, k: in.K})
	case Ldx | Imm, Ldx | W | Len:
		// The same value as in A: Ld and Ldx differ in the class only.
		s.x = o.value(valueKey{code: in.Code&^classMask | Ld, k: in.K})
	case Ld | Mem:
		s.a = unknownValue
	case Ldx | Mem:
		s.x = unknownValue
	case Misc | Tax:
		s.x = s.a
	case Misc | Txa:
		s.a = s.x
	default:
		if in.Code&classMask == Alu {
			key := valueKey{code: in.Code, k: in.K, a: s.a}
			if in.Code&X != 0 {
				key.k, key.x = 0, s.x
			}
			s.a = o.value(key)
		}
	}
	return s
}

// condition returns what defines the outcome of the conditional jump in.
func (o *optimizer) condition(in Instruction, s optState) (valueKey, bool) {
	key := valueKey{code: in.Code, k: in.K, a: s.a}
	if in.Code&X != 0 {
		key.k, key.x = 0, s.x
	}
	return key, key.a != unknownValue && key.x != unknownValue
}

// known returns the outcome of the conditional jump in, if s tells it.
func (o *optimizer) known(in Instruction, s optState) (outcome, ok bool) {
	key, ok := o.condition(in, s)
	if !ok {
		return false, false
	}
	for _, f := range s.facts {
		if f.cond == key {
			return f.outcome, true
		}
	}
	return false, false
}

// onEdge returns the state on the way out of the conditional jump in.
func (o *optimizer) onEdge(in Instruction, s optState, outcome bool) optState {
	key, ok := o.condition(in, s)
	if !ok {
		return s
	}
	if _, known := o.known(in, s); known {
		return s
	}
	facts := s.facts
	if len(facts) == maxFacts {
		facts = facts[1:]
	}
	s.facts = append(slices.Clip(facts), fact{key, outcome})
	return s
}

// arrive merges s into what is known before pc.
func (o *optimizer) arrive(pc int, s optState) {
	n := &o.nodes[pc]
	if !n.reached {
		n.reached, n.state = true, s
		return
	}
	if n.state.a != s.a {
		n.state.a = unknownValue
	}
	if n.state.x != s.x {
		n.state.x = unknownValue
	}
	var both []fact
	for _, f := range n.state.facts {
		if slices.Contains(s.facts, f) {
			both = append(both, f)
		}
	}
	n.state.facts = both
}

// analyze finds what is reached and what is known there, and takes shortcuts
// from jumps as it goes.
func (o *optimizer) analyze() {
	// A and X are zero at the start.
	zero := o.value(valueKey{code: Ld | Imm})
	o.arrive(0, optState{a: zero, x: zero})
	for pc := range o.nodes {
		n := &o.nodes[pc]
		if !n.reached || n.in.isReturn() {
			continue
		}
		if !n.in.isConditional() {
			s := o.after(n.in, n.state)
			if n.in.Code == Jmp|Ja {
				n.t = o.shortcut(pc, n.t, s)
			}
			o.arrive(n.t, s)
			continue
		}
		if outcome, ok := o.known(n.in, n.state); ok {
			if !outcome {
				n.t = n.f
			}
			n.in = Stmt(Jmp|Ja, 0)
			n.t = o.shortcut(pc, n.t, n.state)
			o.arrive(n.t, n.state)
			continue
		}
		st, sf := o.onEdge(n.in, n.state, true), o.onEdge(n.in, n.state, false)
		n.t, n.f = o.shortcut(pc, n.t, st), o.shortcut(pc, n.f, sf)
		o.arrive(n.t, st)
		o.arrive(n.f, sf)
	}
}

// inReach reports whether the jump at pc can go to target.
func (o *optimizer) inReach(pc, target int) bool {
	return o.nodes[pc].in.Code == Jmp|Ja || target-pc-1 <= 255
}

// shortcut returns where a jump at pc to target may as well go, given the
// state on that way.
func (o *optimizer) shortcut(pc, target int, s optState) int {
	best := target
	for {
		n := &o.nodes[target]
		switch {
		case n.in.Code == Jmp|Ja:
			target = n.t
		case n.in.isConditional():
			outcome, ok := o.known(n.in, s)
			if !ok {
				return best
			}
			if target = n.f; outcome {
				target = n.t
			}
		case n.in.isReturn() || !o.redundant(n.in, s):
			return best
		default:
			target++
		}
		if o.inReach(pc, target) {
			best = target
		}
	}
}

// redundant reports whether the non-jump instruction in changes nothing in s.
func (o *optimizer) redundant(in Instruction, s optState) bool {
	if in.Code == St || in.Code == Stx {
		return false
	}
	t := o.after(in, s)
	return t.a == s.a && t.x == s.x && t.a != unknownValue && t.x != unknownValue
}

// simplify replaces instructions by cheaper ones.
func (o *optimizer) simplify() {
	for pc := range o.nodes {
		n := &o.nodes[pc]
		if !n.reached {
			continue
		}
		if n.in.isConditional() && n.t == n.f {
			n.in = Stmt(Jmp|Ja, 0)
		}
		switch {
		case n.in.Code == Jmp|Ja && o.nodes[n.t].in.isReturn():
			n.in = o.nodes[n.t].in
		case n.in.isReturn() || n.in.Code == Jmp|Ja || n.in.isConditional():
		case o.redundant(n.in, n.state):
			n.in = Stmt(Jmp|Ja, 0)
		}
	}
}

// dropUnused removes instructions whose result nothing reads.
func (o *optimizer) dropUnused() {
	// live[pc] says which registers are read at pc or later before they are
	// written.
	type registers struct{ a, x bool }
	live := make([]registers, len(o.nodes))
	for pc := len(o.nodes) - 1; pc >= 0; pc-- {
		n := &o.nodes[pc]
		if n.in.isReturn() {
			live[pc].a = n.in.Code == Ret|A
			continue
		}
		now := live[n.t]
		class := n.in.Code & classMask
		readsX := n.in.Code&X != 0
		unused := false
		switch {
		case n.in.Code == Jmp|Ja:
		case class == Jmp:
			now.a = true
			now.x = now.x || live[n.f].x || readsX
		case class == Ld:
			unused, now.a = !now.a, false
		case class == Ldx:
			unused, now.x = !now.x, false
		case class == St:
			now.a = true
		case class == Stx:
			now.x = true
		case n.in.Code == Misc|Tax:
			unused, now.a, now.x = !now.x, now.a || now.x, false
		case n.in.Code == Misc|Txa:
			unused, now.a, now.x = !now.a, false, now.a || now.x
		default: // Alu; division by X = 0 ends the program
			divides := n.in.Code == Alu|Div|X
			unused = !now.a && !divides
			now.x = now.x || readsX && !unused
			now.a = now.a || divides
		}
		if unused {
			n.in, n.t = Stmt(Jmp|Ja, 0), pc+1
			now = live[pc+1]
		}
		live[pc] = now
	}
}

// mergeTails sends jumps to the last of several equal tails.
func (o *optimizer) mergeTails() {
	type tail struct {
		code uint16
		k    uint32
		t, f int
	}
	ids := make(map[tail]int)
	id := make([]int, len(o.nodes))
	var last []int // by id, the last place of that tail
	for pc := len(o.nodes) - 1; pc >= 0; pc-- {
		n := &o.nodes[pc]
		key := tail{code: n.in.Code, k: n.in.K}
		switch {
		case n.in.isReturn():
			key.t, key.f = -1, -1
		case n.in.Code == Jmp|Ja:
			key.k = 0
			fallthrough
		default:
			key.t, key.f = id[n.t], id[n.t]
			if n.in.isConditional() {
				key.f = id[n.f]
			}
		}
		v, ok := ids[key]
		if !ok {
			v = len(last)
			ids[key] = v
			last = append(last, pc)
		}
		id[pc] = v
	}
	for pc := range o.nodes {
		n := &o.nodes[pc]
		if n.in.Code != Jmp|Ja && !n.in.isConditional() {
			continue
		}
		if to := last[id[n.t]]; o.inReach(pc, to) {
			n.t = to
		}
		if !n.in.isConditional() {
			n.f = n.t
		} else if to := last[id[n.f]]; o.inReach(pc, to) {
			n.f = to
		}
	}
}

// emit returns the program of what is reached. Distances only shrink, so all
// jumps stay in reach.
func (o *optimizer) emit() Program {
	for pc := range o.nodes {
		o.nodes[pc].reached = pc == 0
	}
	for pc := range o.nodes {
		n := &o.nodes[pc]
		if !n.reached || n.in.isReturn() {
			continue
		}
		o.nodes[n.t].reached = true
		if n.in.isConditional() {
			o.nodes[n.f].reached = true
		}
	}
	// From the end: a jump to the next instruction that is kept is not
	// itself kept. start[pc] is how many kept instructions follow pc's start.
	keep := make([]bool, len(o.nodes))
	start := make([]int, len(o.nodes)+1)
	for pc := len(o.nodes) - 1; pc >= 0; pc-- {
		n := &o.nodes[pc]
		start[pc] = start[pc+1]
		if !n.reached || n.in.Code == Jmp|Ja && start[n.t] == start[pc+1] {
			continue
		}
		keep[pc] = true
		start[pc]++
	}
	p := make(Program, 0, start[0])
	for pc := range o.nodes {
		if !keep[pc] {
			continue
		}
		n := &o.nodes[pc]
		in := n.in
		switch {
		case in.Code == Jmp|Ja:
			in.K = uint32(start[pc+1] - start[n.t])
		case in.isConditional():
			in.JT = uint8(start[pc+1] - start[n.t])
			in.JF = uint8(start[pc+1] - start[n.f])
		}
		p = append(p, in)
	}
	return p
}
