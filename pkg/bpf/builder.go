package bpf

import "fmt"

// Label is a place in a program that jumps can go to. Labels come from
// Builder.NewLabel.
type Label int

// Next is the label of the instruction that follows the jump.
const Next Label = -1

// Builder assembles a program. Jumps go to labels at any distance: Build adds
// an unconditional jump (or a copy of the return that is the target) where an
// 8-bit offset does not reach. The zero value is ready to use.
type Builder struct {
	items  []item
	labels []labelInfo
}

// item is an instruction whose jump targets are still labels.
type item struct {
	in Instruction
	// jt and jf are the targets of conditional jumps; jt also that of Jmp|Ja.
	jt, jf Label
	// farT and farF say that jt or jf is out of reach and goes through an
	// instruction put behind this one.
	farT, farF bool
	// pos is the index in the program of the last layout.
	pos int
}

type labelInfo struct {
	name string
	// item is the index of the item that the label stands before, or -1.
	item int
}

// NewLabel returns a label for Place to put somewhere. The name is for error
// messages.
func (b *Builder) NewLabel(name string) Label {
	b.labels = append(b.labels, labelInfo{name, -1})
	return Label(len(b.labels) - 1)
}

// Place puts l before the next instruction that is added.
func (b *Builder) Place(l Label) { b.labels[l].item = len(b.items) }

// Stmt adds an instruction that does not jump.
func (b *Builder) Stmt(code uint16, k uint32) {
	b.items = append(b.items, item{in: Stmt(code, k)})
}

// Jump adds an unconditional jump.
func (b *Builder) Jump(to Label) {
	b.items = append(b.items, item{in: Stmt(Jmp|Ja, 0), jt: to})
}

// JumpIf adds a conditional jump.
func (b *Builder) JumpIf(code uint16, k uint32, jt, jf Label) {
	b.items = append(b.items, item{in: Stmt(code, k), jt: jt, jf: jf})
}

// Build returns the program. If it does not pass Validate it is returned
// together with that error.
func (b *Builder) Build() (Program, error) {
	if err := b.checkTargets(); err != nil {
		return nil, err
	}
	// Each round lengthens at least one jump, so this ends.
	for b.layout() {
	}
	var p Program
	for i := range b.items {
		it := &b.items[i]
		in := it.in
		switch {
		case in.Code == Jmp|Ja:
			in.K = uint32(b.skip(i, it.jt))
			p = append(p, in)
		case in.isConditional():
			far := 0
			if it.farT {
				in.JT = uint8(far)
				far++
			} else {
				in.JT = uint8(b.skip(i, it.jt))
			}
			if it.farF {
				in.JF = uint8(far)
			} else {
				in.JF = uint8(b.skip(i, it.jf))
			}
			p = append(p, in)
			if it.farT {
				p = append(p, b.farJump(len(p), it.jt))
			}
			if it.farF {
				p = append(p, b.farJump(len(p), it.jf))
			}
		default:
			p = append(p, in)
		}
	}
	return p, p.Validate()
}

// checkTargets reports labels that were not placed, or that would need a jump
// backwards.
func (b *Builder) checkTargets() error {
	check := func(i int, l Label) error {
		if l == Next {
			l, i = -1, i+1
		} else if int(l) >= len(b.labels) || l < 0 {
			return fmt.Errorf("assemble BPF program: instruction %d jumps to label %d, which is not from this builder", i, l)
		}
		switch {
		case l < 0 && i < len(b.items):
			return nil
		case l < 0:
			return fmt.Errorf("assemble BPF program: the jump at the end goes nowhere")
		case b.labels[l].item < 0 || b.labels[l].item == len(b.items):
			return fmt.Errorf("assemble BPF program: no instruction follows label %q", b.labels[l].name)
		case b.labels[l].item <= i:
			return fmt.Errorf("assemble BPF program: the jump to %q at instruction %d goes backwards, which classic BPF cannot", b.labels[l].name, i)
		}
		return nil
	}
	for i, it := range b.items {
		if it.in.Code == Jmp|Ja || it.in.isConditional() {
			if err := check(i, it.jt); err != nil {
				return err
			}
		}
		if it.in.isConditional() {
			if err := check(i, it.jf); err != nil {
				return err
			}
		}
	}
	return nil
}

// layout assigns positions and reports whether a jump turned out too long,
// after marking it.
func (b *Builder) layout() bool {
	pos := 0
	for i := range b.items {
		it := &b.items[i]
		it.pos = pos
		pos++
		if it.farT {
			pos++
		}
		if it.farF {
			pos++
		}
	}
	changed := false
	for i := range b.items {
		it := &b.items[i]
		if !it.in.isConditional() {
			continue
		}
		if !it.farT && b.skip(i, it.jt) > 255 {
			it.farT, changed = true, true
		}
		if !it.farF && b.skip(i, it.jf) > 255 {
			it.farF, changed = true, true
		}
	}
	return changed
}

// targetItem returns the index of the item that l, used by item i, leads to.
func (b *Builder) targetItem(i int, l Label) int {
	if l == Next {
		return i + 1
	}
	return b.labels[l].item
}

// skip returns how many instructions lie between item i itself and l.
func (b *Builder) skip(i int, l Label) int {
	return b.items[b.targetItem(i, l)].pos - b.items[i].pos - 1
}

// farJump returns the instruction that goes from index pc to l.
func (b *Builder) farJump(pc int, l Label) Instruction {
	target := &b.items[b.labels[l].item]
	if target.in.isReturn() {
		return target.in
	}
	return Stmt(Jmp|Ja, uint32(target.pos-pc-1))
}
