package bpf

import "fmt"

// Result is what running a program gives.
type Result struct {
	// Action is the value that the program returns: a SECCOMP_RET_* value.
	Action uint32
	// Executed is the number of instructions executed, the return included.
	Executed int
}

// Run executes p on d as the kernel does. The error is an *InvalidError, and
// comes only of programs that Validate refuses.
func (p Program) Run(d *Data) (Result, error) {
	var (
		a, x    uint32
		scratch [scratchWords]uint32
		pc      int
	)
	// Jumps go forward only, so no more than len(p) rounds.
	for n := 1; ; n++ {
		if pc >= len(p) {
			return Result{}, &InvalidError{pc, "execution runs off the end"}
		}
		in := p[pc]
		pc++

		operand := in.K
		if class := in.Code & classMask; in.Code&X != 0 && (class == Alu || class == Jmp) {
			operand = x
		}
		taken := false
		switch in.Code {
		case Ld | W | Abs:
			if in.K%4 != 0 || in.K >= dataSize {
				return Result{}, p.invalidAt(pc - 1)
			}
			a = d.load(in.K)
		case Ld | Imm:
			a = in.K
		case Ldx | Imm:
			x = in.K
		case Ld | W | Len:
			a = dataSize
		case Ldx | W | Len:
			x = dataSize
		case Ld | Mem, Ldx | Mem, St, Stx:
			if in.K >= scratchWords {
				return Result{}, p.invalidAt(pc - 1)
			}
			switch in.Code {
			case Ld | Mem:
				a = scratch[in.K]
			case Ldx | Mem:
				x = scratch[in.K]
			case St:
				scratch[in.K] = a
			case Stx:
				scratch[in.K] = x
			}
		case Alu | Add | K, Alu | Add | X:
			a += operand
		case Alu | Sub | K, Alu | Sub | X:
			a -= operand
		case Alu | Mul | K, Alu | Mul | X:
			a *= operand
		case Alu | Div | K, Alu | Div | X:
			if operand == 0 {
				// The kernel ends the program with 0: kill the thread.
				return Result{Action: 0, Executed: n}, nil
			}
			a /= operand
		case Alu | And | K, Alu | And | X:
			a &= operand
		case Alu | Or | K, Alu | Or | X:
			a |= operand
		case Alu | Xor | K, Alu | Xor | X:
			a ^= operand
		case Alu | Lsh | K, Alu | Lsh | X:
			// 32-bit shifts of eBPF take the amount modulo 32.
			a <<= operand & 31
		case Alu | Rsh | K, Alu | Rsh | X:
			a >>= operand & 31
		case Alu | Neg:
			a = -a
		case Misc | Tax:
			x = a
		case Misc | Txa:
			a = x
		case Jmp | Ja:
			if uint64(in.K) >= uint64(len(p)) {
				return Result{}, p.invalidAt(pc - 1)
			}
			pc += int(in.K)
			continue
		case Jmp | Jeq | K, Jmp | Jeq | X:
			taken = a == operand
		case Jmp | Jgt | K, Jmp | Jgt | X:
			taken = a > operand
		case Jmp | Jge | K, Jmp | Jge | X:
			taken = a >= operand
		case Jmp | Jset | K, Jmp | Jset | X:
			taken = a&operand != 0
		case Ret | K:
			return Result{Action: in.K, Executed: n}, nil
		case Ret | A:
			return Result{Action: a, Executed: n}, nil
		default:
			return Result{}, p.invalidAt(pc - 1)
		}
		if in.isConditional() {
			if taken {
				pc += int(in.JT)
			} else {
				pc += int(in.JF)
			}
		}
	}
}

// invalidAt says what Validate holds against the instruction at pc.
func (p Program) invalidAt(pc int) error {
	return &InvalidError{pc, fmt.Sprintf("cannot execute it: %s", p.checkInstruction(pc, p[pc]))}
}
