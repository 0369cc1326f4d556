#include "textflag.h"

// See programs_amd64.s. Arguments are in R0 to R5, the system call's number in
// R8.

#define PROGRAM(variable, symbol) \
	DATA variable(SB)/8, $symbol(SB)   \
	GLOBL variable(SB), RODATA, $8     \
	TEXT symbol(SB), NOSPLIT|NOFRAME, $0

// END is programEnd.
#define END \
	WORD $0x5aa50b0f \
	WORD $0x5aa55aa5 \
	WORD $0xc33cc33c \
	WORD $0xc33cc33c

#define REPORT \
	MOVD $0x5afe, R8 \
	SVC

PROGRAM(·progSyscall, syscall<>)
again:
	SVC
	JMP again
	END

PROGRAM(·progCount, count<>)
	MOVD $0, R9
again:
	MOVD R0, R1
	ADD  $1, R9
	MOVD R9, R0
	REPORT
	JMP  again
	END

PROGRAM(·progSpin, spin<>)
again:
	JMP again
	END

PROGRAM(·progBeat, beat<>)
again:
	MOVD (R0), R9
	ADD  $1, R9
	MOVD R9, (R0)
	JMP  again
	END

PROGRAM(·progReadSpin, readspin<>)
again:
	MOVD (R1), R9
	MOVD (R0), R9
	ADD  $1, R9
	MOVD R9, (R0)
	JMP  again
	END

PROGRAM(·progWriteSpin, writespin<>)
again:
	MOVD (R0), R9
	ADD  $1, R9
	MOVD R9, (R1)
	MOVD R9, (R0)
	JMP  again
	END

PROGRAM(·progReadCheck, readcheck<>)
again:
	MOVD (R1), R10
	MOVD (R0), R9
	ADD  $1, R9
	MOVD R9, (R0)
	CMP  R2, R10
	BEQ  again
	CMP  R3, R10
	BEQ  again
	MOVD R10, R4
	MOVD R0, R11
	REPORT
	MOVD R11, R0
	JMP  again
	END

PROGRAM(·progLoad, load<>)
	MOVD R0, R11
again:
	MOVD R11, R0
	MOVD (R0), R1
	REPORT
	JMP  again
	END

PROGRAM(·progStore, store<>)
	MOVD R0, R11
again:
	MOVD R11, R0
	MOVD R1, (R0)
	REPORT
	JMP  again
	END

PROGRAM(·progJump, jump<>)
	JMP (R0)
	END

PROGRAM(·progAtomicAdd, atomicadd<>)
	MOVD R0, R11
again:
	MOVD R11, R0
	MOVD R1, R2
loop:
	LDAXR (R0), R9
	ADD   $1, R9
	STLXR R9, (R0), R10
	CBNZ  R10, loop
	SUBS  $1, R2
	BNE   loop
	REPORT
	JMP   again
	END

PROGRAM(·progSum, sum<>)
	MOVD R0, R11
again:
	MOVD R11, R4
	MOVD R11, R0
	MOVD $0, R3
loop:
	MOVD (R4), R9
	ADD  R9, R3
	ADD  R2, R4
	CMP  R1, R4
	BLO  loop
	REPORT
	JMP  again
	END

PROGRAM(·progFill, fill<>)
	MOVD R0, R11
again:
	MOVD R11, R4
	MOVD R11, R0
loop:
	MOVD R4, (R4)
	ADD  R2, R4
	CMP  R1, R4
	BLO  loop
	REPORT
	JMP  again
	END

PROGRAM(·progTLS, tls<>)
again:
	MRS  TPIDR_EL0, R9
	MOVD (R9), R0
	REPORT
	JMP  again
	END

PROGRAM(·progNops, nops<>)
again:
	NOOP
	NOOP
	NOOP
	NOOP
	NOOP
	NOOP
	NOOP
	NOOP
	REPORT
	JMP again
	END

PROGRAM(·progBreakpoint, breakpoint<>)
again:
	BRK
	REPORT
	JMP again
	END

PROGRAM(·progIllegal, illegal<>)
again:
	WORD $0                 // udf #0
	REPORT
	JMP  again
	END

PROGRAM(·progDekker, dekker<>)
	MOVD $0, R4
again:
	MOVD (R2), R9
	CMP  R4, R9
	BEQ  again
	MOVD R9, R4
	MOVD R9, (R0)
	MOVD (R1), R10
	MOVD R10, (R3)
	DMB  $0xa               // ishst: the answer before the round
	MOVD R9, 8(R3)
	JMP  again
	END

// R26 is the buffer: X0 to X30, SP, NZCV. R27 is scratch, and restored. The
// assembler calls X28 g.
PROGRAM(·progDump, dump<>)
again:
	STP  (R0, R1), 0(R26)
	STP  (R2, R3), 16(R26)
	STP  (R4, R5), 32(R26)
	STP  (R6, R7), 48(R26)
	STP  (R8, R9), 64(R26)
	STP  (R10, R11), 80(R26)
	STP  (R12, R13), 96(R26)
	STP  (R14, R15), 112(R26)
	STP  (R16, R17), 128(R26)
	MOVD R18_PLATFORM, 144(R26)
	STP  (R19, R20), 152(R26)
	STP  (R21, R22), 168(R26)
	STP  (R23, R24), 184(R26)
	STP  (R25, R26), 200(R26)
	MOVD R27, 216(R26)
	MOVD g, 224(R26)
	MOVD R29, 232(R26)
	MOVD R30, 240(R26)
	MOVD RSP, R27
	MOVD R27, 248(R26)
	MRS  NZCV, R27
	MOVD R27, 256(R26)
	MOVD 216(R26), R27
	SVC
	JMP  again
	END

// The vectorState program; X11 keeps arg0.
PROGRAM(·progFPSIMD, fpsimd<>)
	MOVD  R0, R11
again:
	MOVD  R11, R0
	FLDPQ 0(R0), (F0, F1)
	FLDPQ 32(R0), (F2, F3)
	FLDPQ 64(R0), (F4, F5)
	FLDPQ 96(R0), (F6, F7)
	FLDPQ 128(R0), (F8, F9)
	FLDPQ 160(R0), (F10, F11)
	FLDPQ 192(R0), (F12, F13)
	FLDPQ 224(R0), (F14, F15)
	FLDPQ 256(R0), (F16, F17)
	FLDPQ 288(R0), (F18, F19)
	FLDPQ 320(R0), (F20, F21)
	FLDPQ 352(R0), (F22, F23)
	FLDPQ 384(R0), (F24, F25)
	FLDPQ 416(R0), (F26, F27)
	FLDPQ 448(R0), (F28, F29)
	FLDPQ 480(R0), (F30, F31)
	MOVD  512(R0), R9
	MSR   R9, FPCR
	REPORT
	MOVD  8(R2), R9
	ADD   $1, R9
	MOVD  R9, 8(R2)
wait:
	MOVD  (R2), R9
	CBZ   R9, wait
	FSTPQ (F0, F1), 0(R1)
	FSTPQ (F2, F3), 32(R1)
	FSTPQ (F4, F5), 64(R1)
	FSTPQ (F6, F7), 96(R1)
	FSTPQ (F8, F9), 128(R1)
	FSTPQ (F10, F11), 160(R1)
	FSTPQ (F12, F13), 192(R1)
	FSTPQ (F14, F15), 224(R1)
	FSTPQ (F16, F17), 256(R1)
	FSTPQ (F18, F19), 288(R1)
	FSTPQ (F20, F21), 320(R1)
	FSTPQ (F22, F23), 352(R1)
	FSTPQ (F24, F25), 384(R1)
	FSTPQ (F26, F27), 416(R1)
	FSTPQ (F28, F29), 448(R1)
	FSTPQ (F30, F31), 480(R1)
	MRS   FPCR, R9
	MOVD  R9, 512(R1)
	REPORT
	JMP   again
	END

PROGRAM(·progSaveFPSIMD, savefpsimd<>)
again:
	FSTPQ (F0, F1), 0(R1)
	FSTPQ (F2, F3), 32(R1)
	FSTPQ (F4, F5), 64(R1)
	FSTPQ (F6, F7), 96(R1)
	FSTPQ (F8, F9), 128(R1)
	FSTPQ (F10, F11), 160(R1)
	FSTPQ (F12, F13), 192(R1)
	FSTPQ (F14, F15), 224(R1)
	FSTPQ (F16, F17), 256(R1)
	FSTPQ (F18, F19), 288(R1)
	FSTPQ (F20, F21), 320(R1)
	FSTPQ (F22, F23), 352(R1)
	FSTPQ (F24, F25), 384(R1)
	FSTPQ (F26, F27), 416(R1)
	FSTPQ (F28, F29), 448(R1)
	FSTPQ (F30, F31), 480(R1)
	MRS   FPCR, R9
	MOVD  R9, 512(R1)
	REPORT
	JMP   again
	END

// An unaligned exclusive load always faults (Arm ARM, B2.9).
PROGRAM(·progExclusive, exclusive<>)
again:
	LDXR (R0), R1
	REPORT
	JMP  again
	END

// A privileged instruction: msr daifset, #2 (traps at EL0).
PROGRAM(·progPrivileged, privileged<>)
again:
	WORD $0xd50342df
	REPORT
	JMP  again
	END
