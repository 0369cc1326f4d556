#include "textflag.h"

// func query(leaf, subleaf uint32) (eax, ebx, ecx, edx uint32)
TEXT ·query(SB), NOSPLIT, $0-24
	MOVL leaf+0(FP), AX
	MOVL subleaf+4(FP), CX
	CPUID
	MOVL AX, eax+8(FP)
	MOVL BX, ebx+12(FP)
	MOVL CX, ecx+16(FP)
	MOVL DX, edx+20(FP)
	RET

// func xgetbv() uint64
TEXT ·xgetbv(SB), NOSPLIT, $0-8
	XORL CX, CX
	XGETBV
	SHLQ $32, DX
	ORQ  DX, AX
	MOVQ AX, ret+0(FP)
	RET

// func mxcsrMask() uint32
TEXT ·mxcsrMask(SB), 0, $528-4
	LEAQ 15(SP), AX
	ANDQ $~15, AX
	MOVL $0, 28(AX)
	FXSAVE (AX)
	MOVL 28(AX), AX
	MOVL AX, ret+0(FP)
	RET
