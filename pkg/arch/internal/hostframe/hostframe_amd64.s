#include "textflag.h"

#define SYS_rt_sigreturn 15
#define SYS_tgkill 234

// Where RIP lies in the frame: return address, ucontext, sigcontext.
#define FRAME_RIP (8+40+128)

// func addresses() (handler, restorer uintptr)
TEXT ·addresses(SB), NOSPLIT, $0-16
	LEAQ ·handler(SB), AX
	MOVQ AX, handler+0(FP)
	LEAQ ·restorer(SB), AX
	MOVQ AX, restorer+8(FP)
	RET

TEXT ·handler(SB), NOSPLIT|NOFRAME, $0
	MOVQ SP, ·frameAddr(SB)
	MOVQ DI, ·entry+0(SB)
	MOVQ SI, ·entry+8(SB)
	MOVQ DX, ·entry+16(SB)
	MOVQ AX, ·entry+24(SB)
	PUSHFQ
	POPQ AX
	MOVQ AX, ·entry+32(SB)
	FSTCW ·entry+40(SB)
	STMXCSR ·entry+48(SB)

	MOVQ ·frameTop(SB), CX
	SUBQ SP, CX
	CMPQ CX, ·frameCap(SB)
	JHI  done
	MOVQ SP, SI
	MOVQ ·frameBuf(SB), DI
	REP
	MOVSB

	MOVQ ·skip(SB), AX
	ADDQ AX, FRAME_RIP(SP)
done:
	RET

TEXT ·restorer(SB), NOSPLIT|NOFRAME, $0
	MOVQ $SYS_rt_sigreturn, AX
	SYSCALL
	INT  $3

// func trigger(fp *byte, xfeatures uint64, sp, pid, tid, sig, fault uintptr)
TEXT ·trigger(SB), NOSPLIT, $0-56
	MOVQ SP, ·savedSP(SB)
	MOVQ BP, ·savedBP(SB)
	MOVQ fp+0(FP), BX
	MOVQ xfeatures+8(FP), AX
	MOVQ AX, DX
	SHRQ $32, DX
	XRSTOR64 (BX)
	MOVQ pid+24(FP), DI
	MOVQ tid+32(FP), SI
	MOVQ sig+40(FP), DX
	MOVQ fault+48(FP), CX
	MOVQ sp+16(FP), SP

	MOVQ $0x0101010101010101, AX
	MOVQ $0x0404040404040404, BX
	MOVQ $0x0606060606060606, BP
	MOVQ $0x0909090909090909, R8
	MOVQ $0x0a0a0a0a0a0a0a0a, R9
	MOVQ $0x0b0b0b0b0b0b0b0b, R10
	MOVQ $0x0c0c0c0c0c0c0c0c, R11
	MOVQ $0x0d0d0d0d0d0d0d0d, R12
	MOVQ $0x0e0e0e0e0e0e0e0e, R13
	MOVQ $0x0f0f0f0f0f0f0f0f, R14
	MOVQ $0x1010101010101010, R15

	STD
	TESTQ CX, CX
	JNZ  fault
	MOVQ $SYS_tgkill, AX
	SYSCALL
	JMP  back
fault:
	MOVQ AX, (CX) // faultSize bytes
back:
	CLD
	MOVQ ·savedSP(SB), SP
	MOVQ ·savedBP(SB), BP
	BYTE $0xdb; BYTE $0xe3 // FNINIT
	LDMXCSR ·defaultMXCSR(SB)
	RET
