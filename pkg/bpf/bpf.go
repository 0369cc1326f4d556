// Package bpf is classic BPF as seccomp filters use it: instructions, a
// builder with labels, a decoder and disassembler, a validator with the
// kernel's rules, an interpreter and an optimiser.
//
// It depends on the standard library only. It knows what an instruction does
// and nothing of why: rules about system calls are pkg/seccomp's.
//
// Sources: Documentation/networking/filter.rst, <linux/bpf_common.h>,
// <linux/filter.h>, <linux/seccomp.h>, net/core/filter.c, kernel/seccomp.c.
package bpf

import (
	"encoding/binary"
	"fmt"
)

// Parts of an instruction's code: class, and for each class what it combines
// with. The names are those of <linux/bpf_common.h> without the prefix.
const (
	Ld   = 0x00
	Ldx  = 0x01
	St   = 0x02
	Stx  = 0x03
	Alu  = 0x04
	Jmp  = 0x05
	Ret  = 0x06
	Misc = 0x07

	// Ld, Ldx: size and mode.
	W   = 0x00
	Imm = 0x00
	Abs = 0x20
	Mem = 0x60
	Len = 0x80

	// Alu: operation.
	Add = 0x00
	Sub = 0x10
	Mul = 0x20
	Div = 0x30
	Or  = 0x40
	And = 0x50
	Lsh = 0x60
	Rsh = 0x70
	Neg = 0x80
	Xor = 0xa0

	// Jmp: operation.
	Ja   = 0x00
	Jeq  = 0x10
	Jgt  = 0x20
	Jge  = 0x30
	Jset = 0x40

	// Alu, Jmp, Ret: operand.
	K = 0x00
	X = 0x08
	A = 0x10 // Ret only

	// Misc: operation.
	Tax = 0x00
	Txa = 0x80
)

const (
	// MaxInstructions is the most instructions that one program may have
	// (BPF_MAXINSNS).
	MaxInstructions = 4096

	// scratchWords is the number of words of scratch memory (BPF_MEMWORDS).
	scratchWords = 16

	// classMask selects the class of an instruction's code.
	classMask = 0x07
)

// Instruction is one instruction, laid out like struct sock_filter.
type Instruction struct {
	Code uint16
	// JT and JF are how many instructions a conditional jump skips when its
	// condition is true and when it is false.
	JT, JF uint8
	// K is the immediate operand: a constant, an offset, an index of scratch
	// memory, or how many instructions Jmp|Ja skips.
	K uint32
}

// Stmt returns an instruction that does not jump.
func Stmt(code uint16, k uint32) Instruction {
	return Instruction{Code: code, K: k}
}

// JumpStmt returns a conditional jump.
func JumpStmt(code uint16, k uint32, jt, jf uint8) Instruction {
	return Instruction{Code: code, JT: jt, JF: jf, K: k}
}

// isConditional reports whether in is a conditional jump.
func (in Instruction) isConditional() bool {
	return in.Code&classMask == Jmp && in.Code != Jmp|Ja
}

// isReturn reports whether in ends the program.
func (in Instruction) isReturn() bool { return in.Code&classMask == Ret }

// Program is a sequence of instructions.
type Program []Instruction

// Data is struct seccomp_data of <linux/seccomp.h>: what a program sees of a
// system call.
type Data struct {
	// Nr is the system call number. The kernel has it as int; programs
	// compare unsigned.
	Nr uint32
	// Arch is the AUDIT_ARCH_* value of the calling convention.
	Arch uint32
	// IP is the address of the instruction after the one that made the call.
	IP uint64
	// Args are the six argument registers, all 64 bits of each, whatever the
	// C type of the argument.
	Args [6]uint64
}

// Offsets of the fields of Data for Ld|W|Abs. Every load is of four aligned
// bytes, so 64-bit fields are read in halves.
const (
	OffNr   = 0
	OffArch = 4
	OffIP   = 8
	OffArgs = 16

	// dataSize is sizeof(struct seccomp_data).
	dataSize = 64
)

// OffLow returns the offset of the low half of the 64-bit field at off.
// The architectures that Ringfence knows are little-endian.
func OffLow(off uint32) uint32 { return off }

// OffHigh returns the offset of the high half of the 64-bit field at off.
func OffHigh(off uint32) uint32 { return off + 4 }

// OffArg returns the offset of argument i, 0 to 5.
func OffArg(i int) uint32 { return OffArgs + 8*uint32(i) }

// load returns the four bytes of d at off, which must be a multiple of four
// below dataSize.
func (d *Data) load(off uint32) uint32 {
	var v uint64
	switch {
	case off == OffNr:
		return d.Nr
	case off == OffArch:
		return d.Arch
	case off < OffArgs:
		v = d.IP
	default:
		v = d.Args[(off-OffArgs)/8]
	}
	if off%8 != 0 {
		v >>= 32
	}
	return uint32(v)
}

// instructionSize is sizeof(struct sock_filter).
const instructionSize = 8

// Encode returns p as an array of struct sock_filter, little-endian.
func (p Program) Encode() []byte {
	b := make([]byte, 0, len(p)*instructionSize)
	for _, in := range p {
		b = binary.LittleEndian.AppendUint16(b, in.Code)
		b = append(b, in.JT, in.JF)
		b = binary.LittleEndian.AppendUint32(b, in.K)
	}
	return b
}

// Decode is the inverse of Encode. The program that it returns has not been
// validated.
func Decode(b []byte) (Program, error) {
	if len(b)%instructionSize != 0 {
		return nil, fmt.Errorf("decode BPF program: %d bytes are not a whole number of %d-byte instructions", len(b), instructionSize)
	}
	p := make(Program, 0, len(b)/instructionSize)
	for ; len(b) > 0; b = b[instructionSize:] {
		p = append(p, Instruction{
			Code: binary.LittleEndian.Uint16(b),
			JT:   b[2],
			JF:   b[3],
			K:    binary.LittleEndian.Uint32(b[4:]),
		})
	}
	return p, nil
}
