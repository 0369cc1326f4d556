package bpf

// Cost returns bounds on the number of instructions that p executes for calls
// with the given number and architecture, whatever their arguments. p must be
// valid.
//
// The bounds are those of the ways through p on which conditions about the
// number and the architecture have their real outcome, and all others have
// either. A program that tests the same argument twice may have ways that no
// call takes.
func (p Program) Cost(nr, arch uint32) (least, most int) {
	c := coster{p: p, data: Data{Nr: nr, Arch: arch}, memo: make(map[costState][2]int)}
	bounds := c.from(costState{pc: 0, known: true})
	return bounds[0], bounds[1]
}

type coster struct {
	p    Program
	data Data
	memo map[costState][2]int
}

// costState is a place in the program and the accumulator's value there, if it
// is known.
type costState struct {
	pc    int
	known bool
	a     uint32
}

// from returns the least and the most instructions executed from s on.
func (c *coster) from(s costState) [2]int {
	if bounds, ok := c.memo[s]; ok {
		return bounds
	}
	var bounds [2]int
	in := c.p[s.pc]
	next := costState{s.pc + 1, s.known, s.a}
	class := in.Code & classMask
	switch {
	case in.isReturn():
	case in.Code == Jmp|Ja:
		next.pc += int(in.K)
		bounds = c.from(next)
	case class == Jmp:
		taken, not := next, next
		taken.pc += int(in.JT)
		not.pc += int(in.JF)
		outcome, known := in.holds(s.a), s.known && in.Code&X == 0
		switch {
		case known && outcome:
			bounds = c.from(taken)
		case known:
			bounds = c.from(not)
		default:
			t, f := c.from(taken), c.from(not)
			bounds = [2]int{min(t[0], f[0]), max(t[1], f[1])}
		}
	default:
		switch {
		case in.Code == Ld|W|Abs && (in.K == OffNr || in.K == OffArch):
			next.known, next.a = true, c.data.load(in.K)
		case class == Ld || class == Alu || in.Code == Misc|Txa:
			next.known, next.a = false, 0
		}
		bounds = c.from(next)
	}
	bounds[0]++
	bounds[1]++
	c.memo[s] = bounds
	return bounds
}

// holds reports whether the condition of in, a conditional jump with operand
// K, holds for a.
func (in Instruction) holds(a uint32) bool {
	switch in.Code {
	case Jmp | Jeq | K:
		return a == in.K
	case Jmp | Jgt | K:
		return a > in.K
	case Jmp | Jge | K:
		return a >= in.K
	}
	return a&in.K != 0
}
