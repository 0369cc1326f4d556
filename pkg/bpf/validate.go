package bpf

import "fmt"

// InvalidError says why the kernel would refuse a program.
type InvalidError struct {
	// PC is the index of the offending instruction, or -1 when the program as
	// a whole is at fault.
	PC int
	// Reason is the rule that is broken.
	Reason string
}

// Error implements error.
func (e *InvalidError) Error() string {
	if e.PC < 0 {
		return "invalid BPF program: " + e.Reason
	}
	return fmt.Sprintf("invalid BPF program: instruction %d: %s", e.PC, e.Reason)
}

// Validate returns nil if the kernel accepts p as a seccomp filter, else an
// *InvalidError. The rules are those of bpf_check_classic in net/core/filter.c
// and of seccomp_check_filter in kernel/seccomp.c.
func (p Program) Validate() error {
	if len(p) == 0 {
		return &InvalidError{-1, "it is empty"}
	}
	if len(p) > MaxInstructions {
		return &InvalidError{-1, fmt.Sprintf("it has %d instructions, more than %d", len(p), MaxInstructions)}
	}
	for pc, in := range p {
		if reason := p.checkInstruction(pc, in); reason != "" {
			return &InvalidError{pc, reason}
		}
	}
	if !p[len(p)-1].isReturn() {
		return &InvalidError{len(p) - 1, "the last instruction is not a return"}
	}
	return p.checkScratch()
}

// checkInstruction returns what is wrong with the instruction at pc, or "".
func (p Program) checkInstruction(pc int, in Instruction) string {
	// In 64 bits, so that no offset overflows.
	left := uint64(len(p) - pc - 1)

	switch in.Code {
	case Ld | W | Abs:
		if in.K%4 != 0 || in.K >= dataSize {
			return fmt.Sprintf("load of offset %d, which is not a multiple of 4 below %d", in.K, dataSize)
		}
	case Ld | Mem, Ldx | Mem, St, Stx:
		if in.K >= scratchWords {
			return fmt.Sprintf("scratch word %d of %d", in.K, scratchWords)
		}
	case Alu | Div | K:
		if in.K == 0 {
			return "division by zero"
		}
	case Alu | Lsh | K, Alu | Rsh | K:
		if in.K >= 32 {
			return fmt.Sprintf("shift by %d of a 32-bit value", in.K)
		}
	case Jmp | Ja:
		if uint64(in.K) >= left {
			return "jump out of the program"
		}
	case Jmp | Jeq | K, Jmp | Jeq | X, Jmp | Jgt | K, Jmp | Jgt | X,
		Jmp | Jge | K, Jmp | Jge | X, Jmp | Jset | K, Jmp | Jset | X:
		if uint64(in.JT) >= left || uint64(in.JF) >= left {
			return "jump out of the program"
		}
	case Ld | Imm, Ldx | Imm, Ld | W | Len, Ldx | W | Len,
		Alu | Add | K, Alu | Add | X, Alu | Sub | K, Alu | Sub | X,
		Alu | Mul | K, Alu | Mul | X, Alu | Div | X,
		Alu | And | K, Alu | And | X, Alu | Or | K, Alu | Or | X,
		Alu | Xor | K, Alu | Xor | X, Alu | Lsh | X, Alu | Rsh | X,
		Alu | Neg, Misc | Tax, Misc | Txa, Ret | K, Ret | A:
	default:
		return fmt.Sprintf("code %#04x is not one that seccomp allows", in.Code)
	}
	return ""
}

// checkScratch reports a load of scratch memory that was not stored before on
// every way there. Like the kernel it goes through the program once, in order,
// and believes that a return falls through. p has passed checkInstruction.
func (p Program) checkScratch() error {
	// stored[pc] has a bit for every word that all jumps to pc agree on.
	stored := make([]uint16, len(p))
	for i := range stored {
		stored[i] = ^uint16(0)
	}
	var now uint16
	for pc, in := range p {
		now &= stored[pc]
		switch {
		case in.Code == St || in.Code == Stx:
			now |= 1 << in.K
		case in.Code == Ld|Mem || in.Code == Ldx|Mem:
			if now&(1<<in.K) == 0 {
				return &InvalidError{pc, fmt.Sprintf("scratch word %d is read before it is written", in.K)}
			}
		case in.Code == Jmp|Ja:
			stored[pc+1+int(in.K)] &= now
			now = ^uint16(0)
		case in.isConditional():
			stored[pc+1+int(in.JT)] &= now
			stored[pc+1+int(in.JF)] &= now
			now = ^uint16(0)
		}
	}
	return nil
}
