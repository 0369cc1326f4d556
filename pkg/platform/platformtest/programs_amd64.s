#include "textflag.h"

// Programs that run as application code. Each is a TEXT symbol that a Go
// variable of the same name points to; newTextFile copies its bytes into
// application memory, up to the END mark. They are position-independent, know
// nothing of Go, and take their arguments where a system call has them: DI, SI,
// DX, R10, R8, R9. Most of them report by the system call 0x5afe (nrReport) and
// start over when it returns. What each does stands with its variable.

// PROGRAM starts a program: the Go variable that points to it, and its symbol.
#define PROGRAM(variable, symbol) \
	DATA variable(SB)/8, $symbol(SB)   \
	GLOBL variable(SB), RODATA, $8     \
	TEXT symbol(SB), NOSPLIT|NOFRAME, $0

// END is programEnd: ud2 and a pattern that no program contains.
#define END \
	QUAD $0x5aa55aa55aa50b0f \
	QUAD $0xc33cc33cc33cc33c

// What follows the system call is what a C library has there, and a platform may
// know that.
#define REPORT \
	MOVL $0x5afe, AX \
	SYSCALL \
	CMPQ AX, $-4095

PROGRAM(·progSyscall, syscall<>)
again:
	SYSCALL
	JMP  again
	END

PROGRAM(·progCount, count<>)
loop:
	MOVQ AX, SI
	INCQ DI
	REPORT
	JMP  loop
	END

PROGRAM(·progSpin, spin<>)
loop:
	JMP loop
	END

PROGRAM(·progBeat, beat<>)
loop:
	INCQ (DI)
	JMP  loop
	END

PROGRAM(·progReadSpin, readspin<>)
loop:
	MOVQ (SI), AX
	INCQ (DI)
	JMP  loop
	END

PROGRAM(·progWriteSpin, writespin<>)
loop:
	INCQ AX
	MOVQ AX, (SI) // nothing that reads as well: of that qemu's CPU says it is a read
	INCQ (DI)
	JMP  loop
	END

PROGRAM(·progReadCheck, readcheck<>)
loop:
	MOVQ (SI), AX
	INCQ (DI)
	CMPQ AX, DX
	JEQ  loop
	CMPQ AX, R10
	JEQ  loop
	MOVQ AX, R8
	REPORT
	JMP  loop
	END

PROGRAM(·progLoad, load<>)
loop:
	MOVQ (DI), SI
	REPORT
	JMP  loop
	END

PROGRAM(·progStore, store<>)
loop:
	MOVQ SI, (DI)
	REPORT
	JMP  loop
	END

PROGRAM(·progJump, jump<>)
	JMP DI
	END

PROGRAM(·progAtomicAdd, atomicadd<>)
again:
	MOVQ SI, DX
loop:
	LOCK
	INCQ (DI)
	DECQ DX
	JNZ  loop
	REPORT
	JMP  again
	END

PROGRAM(·progSum, sum<>)
again:
	MOVQ DI, R8
	XORL R10, R10
loop:
	ADDQ (R8), R10
	ADDQ DX, R8
	CMPQ R8, SI
	JCS  loop
	REPORT
	JMP  again
	END

PROGRAM(·progFill, fill<>)
again:
	MOVQ DI, R8
loop:
	MOVQ R8, (R8)
	ADDQ DX, R8
	CMPQ R8, SI
	JCS  loop
	REPORT
	JMP  again
	END

PROGRAM(·progTLS, tls<>)
loop:
	BYTE $0x64; BYTE $0x48; BYTE $0x8b; BYTE $0x3c // mov %fs:0, %rdi
	BYTE $0x25; LONG $0
	REPORT
	JMP  loop
	END

PROGRAM(·progNops, nops<>)
again:
	BYTE $0x90
	BYTE $0x90
	BYTE $0x90
	BYTE $0x90
	BYTE $0x90
	BYTE $0x90
	BYTE $0x90
	BYTE $0x90
	REPORT
	JMP  again
	END

PROGRAM(·progBreakpoint, breakpoint<>)
again:
	BYTE $0xcc
	REPORT
	JMP  again
	END

PROGRAM(·progIllegal, illegal<>)
again:
	UD2
	REPORT
	JMP again
	END

// The test of asymmetric barriers: x at DI, y at SI, the round at DX, the answer
// at R10.
PROGRAM(·progDekker, dekker<>)
	XORL R8, R8
loop:
	MOVQ (DX), AX
	CMPQ AX, R8
	JEQ  loop
	MOVQ AX, R8
	MOVQ AX, (DI)
	MOVQ (SI), R9
	MOVQ R9, (R10)
	MOVQ AX, 8(R10)
	JMP  loop
	END

// R15 is the buffer: see generalRegs for the order.
PROGRAM(·progDump, dump<>)
	JMP loop
loop:
	MOVQ AX, 0(R15)
	MOVQ BX, 8(R15)
	MOVQ CX, 16(R15)
	MOVQ DX, 24(R15)
	MOVQ SI, 32(R15)
	MOVQ DI, 40(R15)
	BYTE $0x49; BYTE $0x89; BYTE $0x6f; BYTE $48 // mov %rbp, 48(%r15)
	MOVQ SP, 56(R15)
	MOVQ R8, 64(R15)
	MOVQ R9, 72(R15)
	MOVQ R10, 80(R15)
	MOVQ R11, 88(R15)
	MOVQ R12, 96(R15)
	MOVQ R13, 104(R15)
	MOVQ R14, 112(R15)
	MOVQ R15, 120(R15)
	BYTE $0x9c                                   // pushf
	BYTE $0x41; BYTE $0x8f; BYTE $0x87; LONG $128 // pop 128(%r15)
	SYSCALL
	JMP  loop
	END

// Programs for vector state: load all registers from DI, report, count 8(DX) up,
// wait until (DX) is not zero, store all registers at SI, report.

#define HOLD(label) \
	REPORT       \
	INCQ 8(DX)   \
label:           \
	CMPQ (DX), $0 \
	JEQ  label

PROGRAM(·progFX, fx<>)
again:
	FXRSTOR64 (DI)
	HOLD(wait)
	FXSAVE64 (SI)
	REPORT
	JMP  again
	END

PROGRAM(·progAVX, avx<>)
again:
	VMOVDQU (DI), Y0
	VMOVDQU 32(DI), Y1
	VMOVDQU 64(DI), Y2
	VMOVDQU 96(DI), Y3
	VMOVDQU 128(DI), Y4
	VMOVDQU 160(DI), Y5
	VMOVDQU 192(DI), Y6
	VMOVDQU 224(DI), Y7
	VMOVDQU 256(DI), Y8
	VMOVDQU 288(DI), Y9
	VMOVDQU 320(DI), Y10
	VMOVDQU 352(DI), Y11
	VMOVDQU 384(DI), Y12
	VMOVDQU 416(DI), Y13
	VMOVDQU 448(DI), Y14
	VMOVDQU 480(DI), Y15
	HOLD(wait)
	VMOVDQU Y0, (SI)
	VMOVDQU Y1, 32(SI)
	VMOVDQU Y2, 64(SI)
	VMOVDQU Y3, 96(SI)
	VMOVDQU Y4, 128(SI)
	VMOVDQU Y5, 160(SI)
	VMOVDQU Y6, 192(SI)
	VMOVDQU Y7, 224(SI)
	VMOVDQU Y8, 256(SI)
	VMOVDQU Y9, 288(SI)
	VMOVDQU Y10, 320(SI)
	VMOVDQU Y11, 352(SI)
	VMOVDQU Y12, 384(SI)
	VMOVDQU Y13, 416(SI)
	VMOVDQU Y14, 448(SI)
	VMOVDQU Y15, 480(SI)
	REPORT
	JMP  again
	END

#define ZLOAD4(off, a, b, c, d) \
	VMOVDQU64 (off+0)(DI), a   \
	VMOVDQU64 (off+64)(DI), b  \
	VMOVDQU64 (off+128)(DI), c \
	VMOVDQU64 (off+192)(DI), d

#define ZSTORE4(off, a, b, c, d) \
	VMOVDQU64 a, (off+0)(SI)   \
	VMOVDQU64 b, (off+64)(SI)  \
	VMOVDQU64 c, (off+128)(SI) \
	VMOVDQU64 d, (off+192)(SI)

PROGRAM(·progAVX512, avx512<>)
again:
	ZLOAD4(0, Z0, Z1, Z2, Z3)
	ZLOAD4(256, Z4, Z5, Z6, Z7)
	ZLOAD4(512, Z8, Z9, Z10, Z11)
	ZLOAD4(768, Z12, Z13, Z14, Z15)
	ZLOAD4(1024, Z16, Z17, Z18, Z19)
	ZLOAD4(1280, Z20, Z21, Z22, Z23)
	ZLOAD4(1536, Z24, Z25, Z26, Z27)
	ZLOAD4(1792, Z28, Z29, Z30, Z31)
	KMOVQ 2048(DI), K0
	KMOVQ 2056(DI), K1
	KMOVQ 2064(DI), K2
	KMOVQ 2072(DI), K3
	KMOVQ 2080(DI), K4
	KMOVQ 2088(DI), K5
	KMOVQ 2096(DI), K6
	KMOVQ 2104(DI), K7
	HOLD(wait)
	ZSTORE4(0, Z0, Z1, Z2, Z3)
	ZSTORE4(256, Z4, Z5, Z6, Z7)
	ZSTORE4(512, Z8, Z9, Z10, Z11)
	ZSTORE4(768, Z12, Z13, Z14, Z15)
	ZSTORE4(1024, Z16, Z17, Z18, Z19)
	ZSTORE4(1280, Z20, Z21, Z22, Z23)
	ZSTORE4(1536, Z24, Z25, Z26, Z27)
	ZSTORE4(1792, Z28, Z29, Z30, Z31)
	KMOVQ K0, 2048(SI)
	KMOVQ K1, 2056(SI)
	KMOVQ K2, 2064(SI)
	KMOVQ K3, 2072(SI)
	KMOVQ K4, 2080(SI)
	KMOVQ K5, 2088(SI)
	KMOVQ K6, 2096(SI)
	KMOVQ K7, 2104(SI)
	REPORT
	JMP  again
	END

// The second halves alone: what a thread has in its registers when it starts.

PROGRAM(·progSaveFX, savefx<>)
again:
	FXSAVE64 (SI)
	REPORT
	JMP  again
	END

PROGRAM(·progSaveAVX, saveavx<>)
again:
	VMOVDQU Y0, (SI)
	VMOVDQU Y1, 32(SI)
	VMOVDQU Y2, 64(SI)
	VMOVDQU Y3, 96(SI)
	VMOVDQU Y4, 128(SI)
	VMOVDQU Y5, 160(SI)
	VMOVDQU Y6, 192(SI)
	VMOVDQU Y7, 224(SI)
	VMOVDQU Y8, 256(SI)
	VMOVDQU Y9, 288(SI)
	VMOVDQU Y10, 320(SI)
	VMOVDQU Y11, 352(SI)
	VMOVDQU Y12, 384(SI)
	VMOVDQU Y13, 416(SI)
	VMOVDQU Y14, 448(SI)
	VMOVDQU Y15, 480(SI)
	REPORT
	JMP  again
	END

PROGRAM(·progSaveAVX512, saveavx512<>)
again:
	ZSTORE4(0, Z0, Z1, Z2, Z3)
	ZSTORE4(256, Z4, Z5, Z6, Z7)
	ZSTORE4(512, Z8, Z9, Z10, Z11)
	ZSTORE4(768, Z12, Z13, Z14, Z15)
	ZSTORE4(1024, Z16, Z17, Z18, Z19)
	ZSTORE4(1280, Z20, Z21, Z22, Z23)
	ZSTORE4(1536, Z24, Z25, Z26, Z27)
	ZSTORE4(1792, Z28, Z29, Z30, Z31)
	KMOVQ K0, 2048(SI)
	KMOVQ K1, 2056(SI)
	KMOVQ K2, 2064(SI)
	KMOVQ K3, 2072(SI)
	KMOVQ K4, 2080(SI)
	KMOVQ K5, 2088(SI)
	KMOVQ K6, 2096(SI)
	KMOVQ K7, 2104(SI)
	REPORT
	JMP  again
	END

// What only amd64 has.

PROGRAM(·progDivide, divide<>)
again:
	MOVQ DI, AX
	CQO
	IDIVQ SI
	REPORT
	JMP  again
	END

PROGRAM(·progX87Divide, x87divide<>)
again:
	FLDCW (DI)
	FLD1
	FLDZ
	BYTE $0xde; BYTE $0xf9 // fdivp: 1/0, pending
	WAIT
	REPORT
	JMP  again
	END

PROGRAM(·progSSEDivide, ssedivide<>)
again:
	LDMXCSR (DI)
	XORPS   X0, X0
	MOVL    $0x3f800000, AX
	MOVL    AX, X1
	DIVSS   X0, X1
	REPORT
	JMP     again
	END

PROGRAM(·progPopf, popf<>)
again:
	PUSHQ DI
	BYTE  $0x9d             // popf
	BYTE  $0x90
	BYTE  $0x90
	BYTE  $0x90
	BYTE  $0x90
	BYTE  $0x90
	BYTE  $0x90
	BYTE  $0x90
	BYTE  $0x90
	REPORT
	JMP   again
	END

PROGRAM(·progAlign, align<>)
again:
	PUSHQ DI
	BYTE  $0x9d             // popf
	MOVQ  (SI), DX
	REPORT
	JMP   again
	END

PROGRAM(·progICEBP, icebp<>)
again:
	BYTE $0xf1
	REPORT
	JMP  again
	END

PROGRAM(·progInt, int<>)
again:
	BYTE $0xcd; BYTE $0x42
	REPORT
	JMP  again
	END

PROGRAM(·progHalt, halt<>)
again:
	HLT
	REPORT
	JMP  again
	END

PROGRAM(·progOut, out<>)
again:
	BYTE $0xee              // out %al, (%dx)
	REPORT
	JMP  again
	END

PROGRAM(·progLoadBP, loadbp<>)
again:
	BYTE $0x48; BYTE $0x8b; BYTE $0x75; BYTE $0 // mov 0(%rbp), %rsi: #SS
	REPORT
	JMP  again
	END

PROGRAM(·progCPUID, cpuid<>)
again:
	MOVQ DI, AX
	MOVQ SI, CX
	CPUID
	MOVQ AX, DI
	MOVQ BX, SI
	MOVQ DX, R10
	MOVQ CX, DX
	REPORT
	JMP  again
	END

PROGRAM(·progGS, gs<>)
loop:
	BYTE $0x65; BYTE $0x48; BYTE $0x8b; BYTE $0x3c // mov %gs:0, %rdi
	BYTE $0x25; LONG $0
	REPORT
	JMP  loop
	END

PROGRAM(·progWriteBases, writebases<>)
again:
	BYTE $0xf3; BYTE $0x48; BYTE $0x0f; BYTE $0xae; BYTE $0xd7 // wrfsbase %rdi
	BYTE $0xf3; BYTE $0x48; BYTE $0x0f; BYTE $0xae; BYTE $0xde // wrgsbase %rsi
	REPORT
	BYTE $0xf3; BYTE $0x48; BYTE $0x0f; BYTE $0xae; BYTE $0xc7 // rdfsbase %rdi
	BYTE $0xf3; BYTE $0x48; BYTE $0x0f; BYTE $0xae; BYTE $0xce // rdgsbase %rsi
	REPORT
	JMP  again
	END

// Ways into the kernel other than SYSCALL. AX is the number; a report means that
// the instruction went through, with its result in DI.

PROGRAM(·progInt80, int80<>)
again:
	MOVQ DI, AX
	INT  $0x80
	MOVQ AX, DI
	REPORT
	JMP  again
	END

PROGRAM(·progSysenter, sysenter<>)
again:
	MOVQ DI, AX
	BYTE $0x0f; BYTE $0x34
	MOVQ AX, DI
	REPORT
	JMP  again
	END

// The return address of the vsyscall is on the stack: R8, the report below.
PROGRAM(·progVsyscall, vsyscall<>)
	PUSHQ R8
	JMP   DX
	END

PROGRAM(·progReportAX, reportax<>)
again:
	MOVQ AX, DI
	REPORT
	JMP  again
	END

// Goes to 32-bit code at DI, in a segment with 32-bit code.
PROGRAM(·progCompat, compat<>)
	MOVQ  DI, CX
	PUSHQ $0x23
	PUSHQ CX
	MOVQ  SI, AX
	BYTE  $0x48; BYTE $0xcb // lretq
	END

// 32-bit code: the instruction, then a far jump back is not needed: ud2 says
// that it went through.
PROGRAM(·progCompatInt80, compatint80<>)
	BYTE $0xcd; BYTE $0x80
	BYTE $0x0f; BYTE $0x0b
	END

PROGRAM(·progCompatSyscall, compatsyscall<>)
	BYTE $0x0f; BYTE $0x05
	BYTE $0x0f; BYTE $0x0b
	END

PROGRAM(·progCompatSysenter, compatsysenter<>)
	BYTE $0x0f; BYTE $0x34
	BYTE $0x0f; BYTE $0x0b
	END

PROGRAM(·progCompatSpin, compatspin<>)
	BYTE $0xeb; BYTE $0xfe  // jmp .
	END
