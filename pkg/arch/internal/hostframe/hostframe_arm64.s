#include "textflag.h"

#define SYS_rt_sigreturn 139
#define SYS_tgkill 131

// Where PC lies in the frame: siginfo, ucontext, sigcontext.
#define FRAME_PC (128+176+8+32*8)

// func addresses() (handler, restorer uintptr)
TEXT ·addresses(SB), NOSPLIT, $0-16
	MOVD $·handler(SB), R0
	MOVD R0, handler+0(FP)
	MOVD $·restorer(SB), R0
	MOVD R0, restorer+8(FP)
	RET

TEXT ·handler(SB), NOSPLIT|NOFRAME, $0
	MOVD RSP, R9
	MOVD R9, ·frameAddr(SB)
	MOVD R0, ·entry+0(SB)
	MOVD R1, ·entry+8(SB)
	MOVD R2, ·entry+16(SB)
	MOVD R29, ·entry+24(SB)
	MOVD R30, ·entry+32(SB)

	MOVD ·frameTop(SB), R10
	SUB  R9, R10
	MOVD ·frameCap(SB), R11
	CMP  R11, R10
	BHI  done
	MOVD ·frameBuf(SB), R12
copy:
	CBZ  R10, copied
	MOVBU.P 1(R9), R13
	MOVB.P R13, 1(R12)
	SUB  $1, R10
	B    copy
copied:
	MOVD RSP, R9
	MOVD FRAME_PC(R9), R13
	MOVD ·skip(SB), R14
	ADD  R14, R13
	MOVD R13, FRAME_PC(R9)
done:
	RET

TEXT ·restorer(SB), NOSPLIT|NOFRAME, $0
	MOVD $SYS_rt_sigreturn, R8
	SVC
	BRK

// The SVE instructions that Go's assembler lacks: LDR (vector) and LDR
// (predicate) from R0 and R1 plus i vectors or predicates, and WRFFR.
#define LDR_Z(i) WORD $(0x85804000 | (i>>3)<<16 | (i&7)<<10 | 0<<5 | i)
#define LDR_P(i) WORD $(0x85800000 | (i>>3)<<16 | (i&7)<<10 | 1<<5 | i)
#define LDR_P0_FFR WORD $(0x85800000 | 2<<16 | 1<<5 | 0)
#define WRFFR_P0 WORD $0x25289000

// func trigger(fp *byte, predicates uint64, sp, pid, tid, sig, fault uintptr, status *byte)
TEXT ·trigger(SB), NOSPLIT|NOFRAME, $0-64
	MOVD RSP, R9
	MOVD R9, ·savedSP(SB)
	MOVD R29, ·savedBP(SB)
	MOVD R30, ·savedLR(SB)
	MOVD fp+0(FP), R0
	MOVD predicates+8(FP), R1
	CBNZ R1, sve
	VLD1.P 64(R0), [V0.B16, V1.B16, V2.B16, V3.B16]
	VLD1.P 64(R0), [V4.B16, V5.B16, V6.B16, V7.B16]
	VLD1.P 64(R0), [V8.B16, V9.B16, V10.B16, V11.B16]
	VLD1.P 64(R0), [V12.B16, V13.B16, V14.B16, V15.B16]
	VLD1.P 64(R0), [V16.B16, V17.B16, V18.B16, V19.B16]
	VLD1.P 64(R0), [V20.B16, V21.B16, V22.B16, V23.B16]
	VLD1.P 64(R0), [V24.B16, V25.B16, V26.B16, V27.B16]
	VLD1.P 64(R0), [V28.B16, V29.B16, V30.B16, V31.B16]
	B    status
sve:
	LDR_P0_FFR
	WRFFR_P0
	LDR_Z(0)
	LDR_Z(1)
	LDR_Z(2)
	LDR_Z(3)
	LDR_Z(4)
	LDR_Z(5)
	LDR_Z(6)
	LDR_Z(7)
	LDR_Z(8)
	LDR_Z(9)
	LDR_Z(10)
	LDR_Z(11)
	LDR_Z(12)
	LDR_Z(13)
	LDR_Z(14)
	LDR_Z(15)
	LDR_Z(16)
	LDR_Z(17)
	LDR_Z(18)
	LDR_Z(19)
	LDR_Z(20)
	LDR_Z(21)
	LDR_Z(22)
	LDR_Z(23)
	LDR_Z(24)
	LDR_Z(25)
	LDR_Z(26)
	LDR_Z(27)
	LDR_Z(28)
	LDR_Z(29)
	LDR_Z(30)
	LDR_Z(31)
	LDR_P(0)
	LDR_P(1)
	LDR_P(2)
	LDR_P(3)
	LDR_P(4)
	LDR_P(5)
	LDR_P(6)
	LDR_P(7)
	LDR_P(8)
	LDR_P(9)
	LDR_P(10)
	LDR_P(11)
	LDR_P(12)
	LDR_P(13)
	LDR_P(14)
	LDR_P(15)
status:
	MOVD  status+56(FP), R0
	MOVWU (R0), R1
	MOVD  R1, FPSR
	MOVWU 4(R0), R1
	MOVD  R1, FPCR
	MOVD  pid+24(FP), R0
	MOVD  tid+32(FP), R1
	MOVD  sig+40(FP), R2
	MOVD  fault+48(FP), R8
	MOVD  sp+16(FP), R9
	MOVD  R9, RSP

	MOVD $0x0404040404040404, R3
	MOVD $0x0505050505050505, R4
	MOVD $0x0606060606060606, R5
	MOVD $0x0707070707070707, R6
	MOVD $0x0808080808080808, R7
	MOVD $0x0a0a0a0a0a0a0a0a, R9
	MOVD $0x0b0b0b0b0b0b0b0b, R10
	MOVD $0x0c0c0c0c0c0c0c0c, R11
	MOVD $0x0d0d0d0d0d0d0d0d, R12
	MOVD $0x0e0e0e0e0e0e0e0e, R13
	MOVD $0x0f0f0f0f0f0f0f0f, R14
	MOVD $0x1010101010101010, R15
	MOVD $0x1111111111111111, R16
	MOVD $0x1212121212121212, R17
	MOVD $0x1414141414141414, R19
	MOVD $0x1515151515151515, R20
	MOVD $0x1616161616161616, R21
	MOVD $0x1717171717171717, R22
	MOVD $0x1818181818181818, R23
	MOVD $0x1919191919191919, R24
	MOVD $0x1a1a1a1a1a1a1a1a, R25
	MOVD $0x1b1b1b1b1b1b1b1b, R26
	MOVD $0x1e1e1e1e1e1e1e1e, R29
	MOVD $0x1f1f1f1f1f1f1f1f, R30

	CBNZ R8, fault
	MOVD $SYS_tgkill, R8
	SVC
	B    back
fault:
	MOVD R3, (R8) // faultSize bytes
back:
	MOVD ·savedSP(SB), R9
	MOVD R9, RSP
	MOVD ·savedBP(SB), R29
	MOVD ·savedLR(SB), R30
	MOVD ZR, FPCR
	RET
