package seccomp

import (
	"slices"

	"github.com/ringfence/ringfence/pkg/bpf"
)

// order returns the tests that root leads to, each before those it goes on to.
func (g *graph) order(root nodeID) []nodeID {
	var order []nodeID
	seen := make(map[nodeID]bool)
	var visit func(id nodeID)
	visit = func(id nodeID) {
		if g.nodes[id].isEnd || seen[id] {
			return
		}
		seen[id] = true
		// What is visited last comes first: the rules of a call directly
		// behind the test of its number.
		visit(g.nodes[id].f)
		visit(g.nodes[id].t)
		order = append(order, id)
	}
	visit(root)
	slices.Reverse(order)
	return order
}

// entries are the labels in front of the up to three instructions of a test,
// for those who come with the accumulator in a certain state. A label is made
// when it is first jumped to.
type entries struct {
	load, alu, jump       bpf.Label
	hasLoad, hasAlu, hasJ bool
}

// endReach is how many instructions away an end may be before it is put
// between the tests. It is below the reach of 8 bits by more than what may
// still come between: one test and jumps that turn out to need help.
const endReach = 180

// emitter lays out a graph as a program.
type emitter struct {
	g       *graph
	b       bpf.Builder
	entries map[nodeID]*entries
	// ends are the actions that were jumped to and not yet placed, in order
	// of their first jump.
	ends []pendingEnd
	// count is the number of instructions so far.
	count int
}

type pendingEnd struct {
	action Action
	label  bpf.Label
	first  int // count at the first jump
}

// emit returns the program that does what root does. Like bpf.Builder.Build it
// returns a program that is too long together with the error.
func (g *graph) emit(root nodeID) (bpf.Program, error) {
	e := emitter{g: g, entries: make(map[nodeID]*entries)}
	e.target(root, load{off: noWord})
	for _, id := range g.order(root) {
		e.placeEnds(endReach)
		e.test(id)
	}
	e.placeEnds(0)
	return e.b.Build()
}

// noWord is the offset of a load that no test makes: nothing is in the
// accumulator.
const noWord = ^uint32(0)

// target returns the label for a jump to id with acc in the accumulator.
func (e *emitter) target(id nodeID, acc load) bpf.Label {
	n := &e.g.nodes[id]
	if n.isEnd {
		for _, end := range e.ends {
			if end.action == n.action {
				return end.label
			}
		}
		l := e.b.NewLabel(n.action.String())
		e.ends = append(e.ends, pendingEnd{n.action, l, e.count})
		return l
	}
	en := e.entries[id]
	if en == nil {
		en = &entries{}
		e.entries[id] = en
	}
	label := func(l *bpf.Label, has *bool) bpf.Label {
		if !*has {
			*l, *has = e.b.NewLabel("test"), true
		}
		return *l
	}
	switch acc {
	case n.cond.load:
		return label(&en.jump, &en.hasJ)
	case load{off: n.cond.off}:
		return label(&en.alu, &en.hasAlu)
	}
	return label(&en.load, &en.hasLoad)
}

// test adds the instructions of the test id.
func (e *emitter) test(id nodeID) {
	n := &e.g.nodes[id]
	en := e.entries[id]
	if en.hasLoad {
		e.b.Place(en.load)
		e.b.Stmt(bpf.Ld|bpf.W|bpf.Abs, n.cond.off)
		e.count++
	}
	if en.hasAlu {
		e.b.Place(en.alu)
	}
	if n.cond.alu != 0 && (en.hasLoad || en.hasAlu) {
		e.b.Stmt(bpf.Alu|bpf.K|n.cond.alu, n.cond.mask)
		e.count++
	}
	if en.hasJ {
		e.b.Place(en.jump)
	}
	t, f := e.target(n.t, n.cond.load), e.target(n.f, n.cond.load)
	e.b.JumpIf(bpf.Jmp|bpf.K|n.cond.jump, n.cond.k, t, f)
	e.count++
}

// placeEnds puts the ends here that were first jumped to reach or more
// instructions ago. Nothing runs into them: tests end with a jump both ways.
func (e *emitter) placeEnds(reach int) {
	e.ends = slices.DeleteFunc(e.ends, func(end pendingEnd) bool {
		if e.count-end.first < reach {
			return false
		}
		e.b.Place(end.label)
		e.b.Stmt(bpf.Ret|bpf.K, uint32(end.action))
		e.count++
		return true
	})
}
