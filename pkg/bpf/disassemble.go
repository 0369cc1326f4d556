package bpf

import (
	"fmt"
	"strings"
)

// String returns the instruction as readable text, with jumps as the number
// of instructions skipped. Program.String resolves them.
func (in Instruction) String() string { return in.text(-1) }

// String returns the program as text, an instruction a line, with its index
// and with the indices that jumps go to:
//
//	0: A = arch
//	1: if A == 0xc000003e goto 3 else 2
func (p Program) String() string {
	var b strings.Builder
	for pc, in := range p {
		fmt.Fprintf(&b, "%4d: %s\n", pc, in.text(pc))
	}
	return b.String()
}

// fieldName returns the name of the four bytes of Data at off.
func fieldName(off uint32) string {
	half := ".lo"
	if off%8 != 0 {
		half = ".hi"
	}
	switch {
	case off >= dataSize || off%4 != 0:
		return fmt.Sprintf("data[%d]", off)
	case off == OffNr:
		return "nr"
	case off == OffArch:
		return "arch"
	case off < OffArgs:
		return "ip" + half
	}
	return fmt.Sprintf("arg%d%s", (off-OffArgs)/8, half)
}

// binaryOps has the symbols of Alu operations.
var binaryOps = map[uint16]string{
	Add: "+", Sub: "-", Mul: "*", Div: "/", And: "&", Or: "|", Xor: "^", Lsh: "<<", Rsh: ">>",
}

// conditions has the symbols of conditional jumps.
var conditions = map[uint16]string{Jeq: "==", Jgt: ">", Jge: ">=", Jset: "&"}

// text renders in at index pc, or without absolute targets if pc is negative.
func (in Instruction) text(pc int) string {
	target := func(skip uint32) string {
		if pc < 0 {
			return fmt.Sprintf("+%d", skip)
		}
		return fmt.Sprintf("%d", uint64(pc)+1+uint64(skip))
	}
	operand := fmt.Sprintf("%#x", in.K)
	if in.Code&X != 0 {
		operand = "X"
	}
	op := in.Code & 0xf0
	switch in.Code {
	case Ld | W | Abs:
		return "A = " + fieldName(in.K)
	case Ld | Imm:
		return "A = " + operand
	case Ldx | Imm:
		return fmt.Sprintf("X = %#x", in.K)
	case Ld | W | Len:
		return "A = len"
	case Ldx | W | Len:
		return "X = len"
	case Ld | Mem:
		return fmt.Sprintf("A = M[%d]", in.K)
	case Ldx | Mem:
		return fmt.Sprintf("X = M[%d]", in.K)
	case St:
		return fmt.Sprintf("M[%d] = A", in.K)
	case Stx:
		return fmt.Sprintf("M[%d] = X", in.K)
	case Alu | Neg:
		return "A = -A"
	case Misc | Tax:
		return "X = A"
	case Misc | Txa:
		return "A = X"
	case Jmp | Ja:
		return "goto " + target(in.K)
	case Ret | K:
		return "return " + operand
	case Ret | A:
		return "return A"
	}
	if in.Code&^(op|X) == Alu && binaryOps[op] != "" {
		return fmt.Sprintf("A %s= %s", binaryOps[op], operand)
	}
	if in.Code&^(op|X) == Jmp && conditions[op] != "" {
		return fmt.Sprintf("if A %s %s goto %s else %s", conditions[op], operand, target(uint32(in.JT)), target(uint32(in.JF)))
	}
	return fmt.Sprintf("invalid {%#04x, %d, %d, %#x}", in.Code, in.JT, in.JF, in.K)
}
