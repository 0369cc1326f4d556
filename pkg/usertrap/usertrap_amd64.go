package usertrap

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/arch/x86/x86asm"
)

const supported = true

type pattern int

const (
	movSyscall pattern = iota
	syscallCmp
)

const (
	syscallSize = 2
	patchSize   = 5 // jmp rel32
	cmpSize     = 6

	// maxInstruction is the size of the longest instruction.
	maxInstruction = 15

	// codeBefore and codeAfter are how much is read before and behind the address
	// behind a system call instruction.
	codeBefore = syscallSize + maxInstruction
	codeAfter  = cmpSize
)

// Parts of trampolines.
const (
	trampolineSize = 32

	movLea   = 5  // lea site(%rip), %rcx
	movMov   = 12 // mov %rcx, %r11
	movJump  = 15 // jmp *call(%rip)
	cmpLea   = 7  // lea cmp(%rip), %r11
	cmpJump  = 14 // jmp *call(%rip)
	cmpBack  = trampolineCmp + cmpSize
	rel32End = 4

	// trampolineCmp is where a thread goes on after the system call.
	trampolineCmp = 20
)

// maxNumber bounds the numbers of system calls in a mov that is replaced: the
// proof needs small ones.
const maxNumber = 0x600

const sigreturnNumber = 15

// opMov is the opcode of mov imm32, %eax.
const opMov = 0xb8

// decide says in which pattern the system call instruction is that ends at pos in
// code; code begins where nothing before can be read. The call was nr; same says
// that it always is.
func decide(code []byte, pos int, nr uint64, same bool) (pattern, error) {
	if pos < syscallSize || code[pos-2] != 0x0f || code[pos-1] != 0x05 {
		return 0, Unknown // changed meanwhile
	}
	var why error = Unknown
	if mov := pos - syscallSize - patchSize; mov >= 0 && code[mov] == opMov {
		imm := uint64(binary.LittleEndian.Uint32(code[mov+1:]))
		switch {
		case imm == sigreturnNumber:
			return 0, Sigreturn
		case imm != nr || !same || imm >= maxNumber:
			why = OtherNumber
		case !certain(code, mov):
			why = Ambiguous
		default:
			return movSyscall, nil
		}
	}
	if after := code[pos:]; len(after) >= cmpSize && after[0] == 0x48 && after[1] == 0x3d {
		if operandSize(code[:pos-syscallSize]) {
			return 0, Ambiguous
		}
		return syscallCmp, nil
	}
	return 0, why
}

// operandSize reports whether the prefixes at the end of b may have the one of the
// operand size among them: with it AMD's CPUs take a jump for one of 16 bits.
func operandSize(b []byte) bool {
	for i := len(b) - 1; i >= 0 && isPrefix(b[i]); i-- {
		if b[i] == 0x66 {
			return true
		}
	}
	return false
}

// certain reports whether the five bytes at mov, b8 nr nr nr nr, are an
// instruction. A system call instruction, which was executed, follows, and RAX was
// nr at the time, which is less than maxNumber.
//
// Some instruction ends where the system call begins. It is the mov unless another
// one, that begins elsewhere, ends there as well. Those that access memory at RAX,
// and do not change it, would have accessed the first page, which nobody has; or
// the system call would have got a pointer for its number.
func certain(code []byte, mov int) bool {
	end := mov + patchSize
	for start := max(0, end-maxInstruction); start < end; start++ {
		if start == mov {
			continue
		}
		b := code[start:min(end+maxInstruction, len(code))]
		size := end - start
		inst, err := x86asm.Decode(b, 64)
		switch {
		case err != nil:
			if mayBeUnknown(b, size) {
				return false
			}
		case inst.Len == size && !needsRAX(&inst):
			return false
		}
	}
	return true
}

// relied returns where all lies that a patch relies on: what it replaces, the rest of
// the pattern, and what certain and operandSize have looked at. ip is behind the
// system call instruction.
func relied(p pattern, ip uint64) (start, end uint64) {
	if p == movSyscall {
		return ip - syscallSize - maxInstruction, ip
	}
	return ip - maxInstruction, ip + cmpSize
}

// mayBeUnknown reports whether b may begin with an instruction of the given size
// that the decoder does not know.
func mayBeUnknown(b []byte, size int) bool {
	for len(b) > 0 && size > 0 && isPrefix(b[0]) {
		b, size = b[1:], size-1
	}
	if len(b) == 0 || size < 2 {
		return false
	}
	switch b[0] {
	case 0x0f, 0xc4, 0xc5, 0x62, 0x8f, 0xd5: // two bytes, VEX, EVEX, XOP, REX2
		return true
	case 0xc0, 0xc1, 0xd0, 0xd1, 0xd2, 0xd3, 0xf6, 0xf7: // groups 2 and 3: CPUs execute what no manual has
		return true
	}
	return false
}

// isPrefix reports whether b is a prefix: segments, sizes, lock and rep, REX.
func isPrefix(b byte) bool {
	return b&0xf0 == 0x40 || bytes.IndexByte([]byte{0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3}, b) >= 0
}

// needsRAX reports whether inst accesses memory at a small distance from RAX, and
// leaves RAX as it is.
func needsRAX(inst *x86asm.Inst) bool {
	switch inst.Op {
	case x86asm.LEA, x86asm.NOP, x86asm.PREFETCHNTA, x86asm.PREFETCHT0, x86asm.PREFETCHT1, x86asm.PREFETCHT2, x86asm.PREFETCHW:
		return false
	}
	for _, p := range inst.Prefix {
		if p &= 0xff; p == x86asm.PrefixVEX2Bytes || p == x86asm.PrefixVEX3Bytes {
			return false // masked ones do not fault
		}
	}
	found := false
	for i, a := range inst.Args {
		switch a := a.(type) {
		case x86asm.Mem:
			if a.Base == x86asm.RAX && a.Index == 0 && (a.Segment == 0 || a.Segment == x86asm.DS || a.Segment == x86asm.SS || a.Segment == x86asm.ES || a.Segment == x86asm.CS) && a.Disp >= 0 && a.Disp < maxNumber {
				found = true
			}
		case x86asm.Reg:
			switch a {
			case x86asm.AL, x86asm.AH, x86asm.AX, x86asm.EAX, x86asm.RAX:
				if i == 0 || inst.Op == x86asm.XCHG || inst.Op == x86asm.XADD {
					return false
				}
			}
		}
	}
	return found && !changesRAX[inst.Op]
}

// changesRAX are instructions that change RAX without naming it.
var changesRAX = map[x86asm.Op]bool{
	x86asm.MUL: true, x86asm.IMUL: true, x86asm.DIV: true, x86asm.IDIV: true,
	x86asm.CMPXCHG: true, x86asm.CMPXCHG8B: true, x86asm.CMPXCHG16B: true,
}

// invalidOpcode reports whether an instruction that begins with b does not exist
// in 64-bit mode (Intel SDM vol. 2, appendix A: those that are invalid there, and
// UDB), so that it gives #UD.
func invalidOpcode(b byte) bool {
	switch b {
	case 0x06, 0x07, 0x0e, 0x16, 0x17, 0x1e, 0x1f, 0x27, 0x2f, 0x37, 0x3f, 0x60, 0x61, 0x9a, 0xce, 0xd4, 0xd6, 0xea:
		return true
	}
	return false
}

// reaches reports whether a trampoline for s may be at at.
func reaches(s *site, at uint64) bool {
	d := int64(at - (s.addr + patchSize))
	return d == int64(int32(d)) && (s.pattern != syscallCmp || invalidOpcode(byte(d>>8)))
}

// relative appends the distance to the address to from the end of an instruction that
// ends with the distance. at is the address of the distance itself.
func relative(b []byte, at, to uint64) []byte {
	return binary.LittleEndian.AppendUint32(b, uint32(to-(at+rel32End)))
}

// jump returns the instruction that jumps from one address to the other.
func jump(from, to uint64) []byte { return relative([]byte{0xe9}, from+1, to) }

// code returns the trampoline. The address to be called is at call.
func (s *site) code(call uint64) []byte {
	b := make([]byte, 0, trampolineSize)
	// add appends an instruction that ends with a distance.
	add := func(to uint64, opcode ...byte) {
		b = append(b, opcode...)
		b = relative(b, s.trampoline+uint64(len(b)), to)
	}
	leaRCX := []byte{0x48, 0x8d, 0x0d}
	leaR11 := []byte{0x4c, 0x8d, 0x1d}
	jumpTo := []byte{0xff, 0x25}
	if s.pattern == movSyscall {
		b = append(b, s.old[:]...)
		add(s.addr+patchSize+syscallSize, leaRCX...)
		b = append(b, 0x49, 0x89, 0xcb) // mov %rcx, %r11
		add(call, jumpTo...)
		return b
	}
	add(s.addr+syscallSize, leaRCX...)
	add(s.trampoline+trampolineCmp, leaR11...)
	add(call, jumpTo...)
	b = append(b, s.after[:cmpSize]...)
	add(s.addr+syscallSize+cmpSize, 0xe9)
	return b
}

// settle is Table.Settle for a trampoline.
func (s *site) settle(ip uint64) (uint64, bool) {
	off := ip - s.trampoline
	if s.pattern == movSyscall {
		switch off {
		case 0:
			return s.addr, true
		case movLea, movMov, movJump:
			return s.addr + patchSize, true
		}
		return 0, false
	}
	switch off {
	case 0, cmpLea, cmpJump:
		return s.addr, true
	case trampolineCmp:
		return s.addr + syscallSize, true
	case cmpBack:
		return s.addr + syscallSize + cmpSize, true
	}
	return 0, false
}
