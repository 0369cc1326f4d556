package ptrace

import (
	"encoding/binary"

	"github.com/ringfence/ringfence/pkg/arch"
)

// writes says whether the instruction that begins with code, run with the
// registers r, writes or reads the memory at addr. known is false for those that
// it does not know, and for those that may do either. It knows what compilers
// make most of; Intel SDM vol. 2, appendix A, has the opcode maps. An instruction
// that reads and writes the same operand faults as a write.
func writes(code []byte, r *arch.Registers, addr uint64) (write, known bool) {
	rep := false // the prefix that selects a scalar form: F3
	i := 0
	for ; i < len(code); i++ {
		switch code[i] {
		case 0xf3:
			rep = true
			continue
		case 0x66, 0xf2, 0xf0, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65:
			continue
		}
		break
	}
	if i < len(code) && code[i]&0xf0 == 0x40 { // REX
		i++
	}
	if len(code)-i < 6 {
		return false, false
	}
	switch code = code[i:]; code[0] {
	case 0x0f:
		return writes0F(code[1], code[2], rep)
	case 0xc5: // VEX, two bytes: map 0F
		return writesVector(code[2], code[3], code[1]&3 == 2)
	case 0xc4: // VEX, three bytes
		if code[1]&0x1f != 1 {
			return false, false
		}
		return writesVector(code[3], code[4], code[2]&3 == 2)
	case 0x62: // EVEX
		if code[1]&7 != 1 {
			return false, false
		}
		return writesVector(code[4], code[5], code[2]&3 == 2)
	}
	op, modrm := code[0], code[1]
	reg := modrm >> 3 & 7
	switch {
	// The stack, and the string instructions.
	case op >= 0x50 && op <= 0x57, op == 0x68, op == 0x6a, op == 0xe8: // push, call
		return true, true
	case op >= 0x58 && op <= 0x5f, op == 0xc2, op == 0xc3, op == 0xc9: // pop, ret, leave
		return false, true
	case op == 0xa4, op == 0xa5: // movs
		const operand = 8
		to, from := addr-r.Rdi < operand, addr-r.Rsi < operand
		return to, to != from
	case op == 0xaa, op == 0xab: // stos
		return true, true
	case op == 0xa6, op == 0xa7, op >= 0xac && op <= 0xaf: // cmps, lods, scas
		return false, true
	// The rest have a memory operand, if any.
	case modrm>>6 == 3:
		return false, false
	case op < 0x40 && op&7 < 4: // add, or, adc, sbb, and, sub, xor, cmp
		return op&7 < 2 && op>>3 != 7, true
	case op == 0x80, op == 0x81, op == 0x83:
		return reg != 7, true
	case op == 0x88, op == 0x89, op == 0x86, op == 0x87: // mov, xchg
		return true, true
	case op == 0x8a, op == 0x8b, op == 0x84, op == 0x85, op == 0x63: // mov, test, movsxd
		return false, true
	case op == 0xc6, op == 0xc7: // mov
		return true, reg == 0
	case op == 0xc0, op == 0xc1, op >= 0xd0 && op <= 0xd3: // shifts
		return true, true
	case op == 0xf6, op == 0xf7: // test, not, neg, mul, div
		return reg == 2 || reg == 3, true
	case op == 0xfe, op == 0xff: // inc, dec
		return true, reg < 2
	}
	return false, false
}

// writes0F is writes for the opcodes behind 0F.
func writes0F(op, modrm byte, rep bool) (write, known bool) {
	if modrm>>6 == 3 {
		return false, false
	}
	switch {
	case op >= 0x40 && op <= 0x4f, // cmov
		op >= 0xb6 && op <= 0xb7, op >= 0xbe && op <= 0xbf, // movzx, movsx
		op == 0xaf, op == 0xa3: // imul, bt
		return false, true
	case op >= 0x90 && op <= 0x9f, // setcc
		op == 0xab, op == 0xb3, op == 0xbb, // bts, btr, btc
		op == 0xb0, op == 0xb1, op == 0xc0, op == 0xc1, op == 0xc3, // cmpxchg, xadd, movnti
		op == 0xa4, op == 0xa5, op == 0xac, op == 0xad: // shld, shrd
		return true, true
	case op == 0xba: // bt, bts, btr, btc
		return modrm>>3&7 > 4, modrm>>3&7 >= 4
	case op == 0xc7: // cmpxchg16b
		return true, modrm>>3&7 == 1
	}
	return writesVector(op, modrm, rep)
}

// writesVector is writes for SSE, AVX and AVX-512 instructions of map 0F.
func writesVector(op, modrm byte, rep bool) (write, known bool) {
	if modrm>>6 == 3 {
		return false, false
	}
	switch {
	case op == 0x11, op == 0x13, op == 0x17, op == 0x29, op == 0x2b, op == 0x7f, op == 0xd6, op == 0xe7:
		return true, true
	case op == 0x7e: // movq loads, movd stores
		return !rep, true
	case op == 0x10, op == 0x12, op >= 0x14 && op <= 0x16, op == 0x28, op == 0x2a, op >= 0x2c && op <= 0x2f,
		op >= 0x51 && op <= 0x70, op >= 0x74 && op <= 0x76, op == 0xc2, op == 0xc6, op >= 0xd0 && op <= 0xfe:
		return false, true
	}
	return false, false
}

// decoding is switched off to compare with what the CPU says.
var decoding = true

// maxInstruction is the length of the longest instruction in bytes.
const maxInstruction = 15

// decodeFault is the way to a page fault's error code that takes two reads of
// memory instead of a signal frame. known is false when it does not lead there.
func (t *thread) decodeFault(r *arch.Registers, addr uint64) (code uint64, known bool) {
	if addr-r.Rip < maxInstruction || addr >= uint64(t.as.Zygote.Layout.Start) {
		return 0, false // the fetch of the instruction, perhaps
	}
	var b [16]byte
	for i := uintptr(0); i < 16; i += 8 {
		w, err := peek(t.tid, uintptr(r.Rip)+i)
		if err != nil {
			// At the end of what is mapped.
			if i == 0 {
				return 0, false
			}
			break
		}
		binary.LittleEndian.PutUint64(b[i:], w)
	}
	write, known := writes(b[:], r, addr)
	if write {
		code = pfWrite
	}
	return code, known
}
