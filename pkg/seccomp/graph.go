package seccomp

import (
	"math/bits"
	"slices"

	"github.com/ringfence/ringfence/pkg/bpf"
)

// A program is first a graph without cycles: its nodes test one word of the
// system call's data and go on to one of two nodes, or end with an action.
// Equal nodes are the same node, so that equal ends of rules are shared from
// the start.

// nodeID identifies a node of a graph.
type nodeID int32

// load is a word as tests see it: the four bytes of bpf.Data at off, after the
// operation alu (bpf.And, bpf.Or, or 0 for none) with mask.
type load struct {
	off  uint32
	alu  uint16
	mask uint32
}

// condition is what a node tests: whether jump (bpf.Jeq, Jgt, Jge or Jset) is
// taken for the loaded word and k.
type condition struct {
	load
	jump uint16
	k    uint32
}

// node is a test, or the end of the program if isEnd.
type node struct {
	isEnd  bool
	action Action
	cond   condition
	t, f   nodeID
	// words has a bit for each word (offset / 4) tested here or later.
	words uint16
}

// nodeKey is what makes nodes equal.
type nodeKey struct {
	isEnd  bool
	action Action
	cond   condition
	t, f   nodeID
}

// graph holds nodes.
type graph struct {
	nodes  []node
	ids    map[nodeKey]nodeID
	opaque map[uint32]bool

	// For simplify:
	conds  map[condition]int32
	memo   map[simplifyKey]nodeID
	budget int
}

func newGraph(opaque []uint32) *graph {
	g := &graph{
		ids:    make(map[nodeKey]nodeID),
		opaque: make(map[uint32]bool),
		conds:  make(map[condition]int32),
		memo:   make(map[simplifyKey]nodeID),
		budget: maxSimplify,
	}
	for _, v := range opaque {
		g.opaque[v] = true
	}
	return g
}

func (g *graph) intern(key nodeKey) nodeID {
	if id, ok := g.ids[key]; ok {
		return id
	}
	n := node{isEnd: key.isEnd, action: key.action, cond: key.cond, t: key.t, f: key.f}
	if !n.isEnd {
		n.words = 1<<(n.cond.off/4) | g.nodes[n.t].words | g.nodes[n.f].words
	}
	id := nodeID(len(g.nodes))
	g.nodes = append(g.nodes, n)
	g.ids[key] = id
	return id
}

// end returns the node that ends with a.
func (g *graph) end(a Action) nodeID { return g.intern(nodeKey{isEnd: true, action: a}) }

// test returns a node that goes on to t if c holds, else to f.
func (g *graph) test(c condition, t, f nodeID) nodeID {
	if t == f {
		return t
	}
	if !g.opaque[c.k] {
		// One form for each meaning.
		if c.jump == bpf.Jgt {
			if c.k == ^uint32(0) {
				return f
			}
			c.jump, c.k = bpf.Jge, c.k+1
			if g.opaque[c.k] {
				c.jump, c.k = bpf.Jgt, c.k-1
			}
		}
		switch {
		case c.jump == bpf.Jge && c.k == 0:
			return t
		case c.jump == bpf.Jge && c.k == 1:
			c.jump, c.k, t, f = bpf.Jeq, 0, f, t
		case c.jump == bpf.Jge && c.k == ^uint32(0):
			c.jump = bpf.Jeq
		case c.jump == bpf.Jset && c.k == 0:
			return f
		case c.jump == bpf.Jset && c.k == ^uint32(0):
			c.jump, c.k, t, f = bpf.Jeq, 0, f, t
		}
	}
	return g.intern(nodeKey{cond: c, t: t, f: f})
}

// compare is test of the plain word at off.
func (g *graph) compare(off uint32, jump uint16, k uint32, t, f nodeID) nodeID {
	return g.test(condition{load{off: off}, jump, k}, t, f)
}

// span is what follows for words from start up to the next span.
type span struct {
	start uint32
	to    nodeID
}

// exactSpans is the number of spans up to which dispatch finds the tree with
// the fewest tests for the average span; more are halved first.
const exactSpans = 48

// dispatch returns a search tree that goes on to the span that the word at off
// is in. The first span starts at 0.
func (g *graph) dispatch(off uint32, spans []span) nodeID {
	spans = slices.CompactFunc(slices.Clone(spans), func(a, b span) bool { return a.to == b.to })
	d := dispatcher{g: g, off: off, spans: spans}
	return d.build(0, len(spans), 1<<32)
}

// dispatcher builds search trees over spans[i:j], of which the last ends before
// end.
type dispatcher struct {
	g     *graph
	off   uint32
	spans []span
	// cost[i][j] is the cheapest way for spans[from+i:from+j], found by plan.
	from int
	cost [][]treeCost
}

// treeCost is the number of tests summed over spans, and the first test that
// gives it.
type treeCost struct {
	total int
	// at is the span that the first test sets apart: those from it on (by
	// Jge), or only it if only is set (by Jeq).
	at   int
	only bool
}

// spanEnd returns where span i ends, for a range of spans that ends before end.
func (d *dispatcher) spanEnd(i, j int, end uint64) uint64 {
	if i+1 < j {
		return uint64(d.spans[i+1].start)
	}
	return end
}

func (d *dispatcher) build(i, j int, end uint64) nodeID {
	if j-i > exactSpans {
		mid := i + (j-i)/2
		low := d.build(i, mid, uint64(d.spans[mid].start))
		high := d.build(mid, j, end)
		return d.g.compare(d.off, bpf.Jge, d.spans[mid].start, high, low)
	}
	d.plan(i, j, end)
	return d.follow(i, j)
}

// follow builds the tree that plan found for spans[i:j].
func (d *dispatcher) follow(i, j int) nodeID {
	if j-i == 1 {
		return d.spans[i].to
	}
	c := d.cost[i-d.from][j-d.from]
	s := d.spans[c.at]
	if !c.only {
		return d.g.compare(d.off, bpf.Jge, s.start, d.follow(c.at, j), d.follow(i, c.at))
	}
	var rest nodeID
	switch c.at {
	case i:
		rest = d.follow(i+1, j)
	case j - 1:
		rest = d.follow(i, j-1)
	default:
		rest = d.spans[i].to // plan: i and i+2 lead to the same
	}
	return d.g.compare(d.off, bpf.Jeq, s.start, s.to, rest)
}

// plan fills cost for all ranges within spans[from:to].
func (d *dispatcher) plan(from, to int, end uint64) {
	n := to - from
	d.from = from
	d.cost = make([][]treeCost, n+1)
	for i := range d.cost {
		d.cost[i] = make([]treeCost, n+1)
	}
	single := func(i int) bool {
		return d.spanEnd(from+i, to, end)-uint64(d.spans[from+i].start) == 1
	}
	for size := 2; size <= n; size++ {
		for i := 0; i+size <= n; i++ {
			j := i + size
			best := treeCost{total: 1 << 30}
			consider := func(total, at int, only bool) {
				if total < best.total {
					best = treeCost{total, from + at, only}
				}
			}
			if size == 3 && single(i+1) && d.spans[from+i].to == d.spans[from+i+2].to {
				consider(3, i+1, true)
			}
			if single(i) {
				consider(1+d.cost[i+1][j].total+size-1, i, true)
			}
			if single(j - 1) {
				consider(1+d.cost[i][j-1].total+size-1, j-1, true)
			}
			for at := i + 1; at < j; at++ {
				consider(d.cost[i][at].total+d.cost[at][j].total+size, at, false)
			}
			d.cost[i][j] = best
		}
	}
}

// A path through the graph can know the outcome of a test before it comes to
// it: by an earlier test of the same word. simplify removes such tests.

// maxSimplify bounds the work of simplify, which could grow exponentially with
// rules that are made for it. What is over the bound stays as it is.
const maxSimplify = 20000

// wordFacts is what is known of a word. The zero value is nothing.
type wordFacts struct {
	min, belowMax uint32 // min <= word <= ^belowMax
	zeros, ones   uint32 // bits that are known
}

// maxOutcomes is how many outcomes are remembered that wordFacts cannot say.
const maxOutcomes = 6

// facts is what is known on a path.
type facts struct {
	words [16]wordFacts
	// outcomes are the newest such outcomes: the index of the condition in
	// graph.conds + 1, negative if it does not hold.
	outcomes [maxOutcomes]int32
	// outcomeWords are the words (offset / 4) of those conditions.
	outcomeWords [maxOutcomes]uint8
}

type simplifyKey struct {
	n nodeID
	f facts
}

// restrict forgets what does not concern words.
func (f *facts) restrict(words uint16) {
	for i := range f.words {
		if words&(1<<i) == 0 {
			f.words[i] = wordFacts{}
		}
	}
	n := 0
	for i, o := range f.outcomes {
		if o != 0 && words&(1<<f.outcomeWords[i]) != 0 {
			f.outcomes[n], f.outcomeWords[n] = o, f.outcomeWords[i]
			n++
		}
	}
	clear(f.outcomes[n:])
	clear(f.outcomeWords[n:])
}

// condIndex returns the number by which outcomes name c.
func (g *graph) condIndex(c condition) int32 {
	i, ok := g.conds[c]
	if !ok {
		i = int32(len(g.conds)) + 1
		g.conds[c] = i
	}
	return i
}

// known returns the outcome of c if f tells it.
func (g *graph) known(f *facts, c condition) (outcome, ok bool) {
	i := g.condIndex(c)
	for _, o := range f.outcomes {
		if o == i || o == -i {
			return o == i, true
		}
	}
	if g.opaque[c.k] || c.alu == bpf.Or || c.alu != 0 && g.opaque[c.mask] {
		return false, false
	}
	w := f.words[c.off/4]
	minimum, maximum := w.min, ^w.belowMax
	if c.alu == bpf.And {
		// The masked word: only its bits are known.
		w = wordFacts{zeros: w.zeros&c.mask | ^c.mask, ones: w.ones & c.mask}
		minimum, maximum = 0, c.mask
	}
	minimum, maximum = max(minimum, w.ones), min(maximum, ^w.zeros)
	switch c.jump {
	case bpf.Jeq:
		if c.k < minimum || c.k > maximum || c.k&w.zeros != 0 || ^c.k&w.ones != 0 {
			return false, true
		}
		return true, minimum == maximum
	case bpf.Jge:
		return minimum >= c.k, minimum >= c.k || maximum < c.k
	case bpf.Jgt:
		return minimum > c.k, minimum > c.k || maximum <= c.k
	case bpf.Jset:
		if w.ones&c.k != 0 {
			return true, true
		}
		return false, c.k&^w.zeros == 0
	}
	return false, false
}

// learn adds to f that c has the outcome.
func (g *graph) learn(f facts, c condition, outcome bool) facts {
	w := &f.words[c.off/4]
	exact := false
	if !g.opaque[c.k] && c.alu == 0 {
		switch {
		case c.jump == bpf.Jeq && outcome:
			*w = wordFacts{c.k, ^c.k, ^c.k, c.k}
			exact = true
		case c.jump == bpf.Jeq && c.k == w.min && w.min < ^w.belowMax:
			w.min++
			exact = true
		case c.jump == bpf.Jeq && c.k == ^w.belowMax && w.min < c.k:
			w.belowMax++
			exact = true
		case c.jump == bpf.Jge && outcome:
			w.min = max(w.min, c.k)
			exact = true
		case c.jump == bpf.Jge: // k > 0, or the outcome is known
			w.belowMax = max(w.belowMax, ^(c.k - 1))
			exact = true
		case c.jump == bpf.Jset && !outcome:
			w.zeros |= c.k
			exact = true
		case c.jump == bpf.Jset && bits.OnesCount32(c.k) == 1:
			w.ones |= c.k
			exact = true
		}
	}
	if !g.opaque[c.k] && c.alu == bpf.And && !g.opaque[c.mask] && c.jump == bpf.Jeq && outcome {
		w.ones |= c.k & c.mask
		w.zeros |= ^c.k & c.mask
		exact = true
	}
	if !exact {
		copy(f.outcomes[1:], f.outcomes[:])
		copy(f.outcomeWords[1:], f.outcomeWords[:])
		f.outcomes[0] = g.condIndex(c)
		if !outcome {
			f.outcomes[0] = -f.outcomes[0]
		}
		f.outcomeWords[0] = uint8(c.off / 4)
	}
	return f
}

// simplify returns a node that does what id does where f is known, without
// tests whose outcome is known.
func (g *graph) simplify(id nodeID, f facts) nodeID {
	n := g.nodes[id]
	if n.isEnd {
		return id
	}
	if outcome, ok := g.known(&f, n.cond); ok {
		if outcome {
			return g.simplify(n.t, f)
		}
		return g.simplify(n.f, f)
	}
	f.restrict(n.words)
	key := simplifyKey{id, f}
	if to, ok := g.memo[key]; ok {
		return to
	}
	if g.budget == 0 {
		return id
	}
	g.budget--
	to := g.test(n.cond,
		g.simplify(n.t, g.learn(f, n.cond, true)),
		g.simplify(n.f, g.learn(f, n.cond, false)))
	g.memo[key] = to
	return to
}
