#include "textflag.h"
#include "go_asm.h"

// watch, as its program has it: see watch.go. R12 is the stack that the kernel made
// (argc, argv, NULL, envp, NULL), R13 the listener.

#define SYS_recvmsg 47
#define SYS_exit_group 231
#define SYS_ppoll 271
#define SYS_execveat 322

// Offsets in the memory at SP.
#define msg 0
#define msgIov 16
#define msgIovLen 24
#define msgControl 32
#define msgControlLen 40
#define iovBase 56
#define iovLen 64
#define control 72
#define polls 96
#define buf 112
#define frame 128

TEXT ·watch(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	MOVQ SP, R12
	SUBQ $frame, SP
	XORL AX, AX
	MOVQ AX, msg(SP)
	MOVQ AX, 8(SP)
	MOVQ $1, msgIovLen(SP)
	MOVQ $1, iovLen(SP)
	LEAQ iovBase(SP), AX
	MOVQ AX, msgIov(SP)
	LEAQ control(SP), AX
	MOVQ AX, msgControl(SP)
	LEAQ buf(SP), AX
	MOVQ AX, iovBase(SP)
peek:
	MOVQ $24, msgControlLen(SP)
	MOVL $const_monitorFD, DI
	LEAQ msg(SP), SI
	MOVL $const_watchFlags, DX
	MOVL $SYS_recvmsg, AX
	SYSCALL
	CMPQ AX, $-4 // EINTR
	JEQ peek
	CMPQ AX, $1
	JNE exit
	MOVL (control+16)(SP), R13

	MOVQ $const_monitorFD, AX // no events: of itself only POLLHUP and POLLERR
	MOVQ AX, polls(SP)
	MOVL R13, AX
	BTSQ $32, AX // POLLIN
	MOVQ AX, (polls+8)(SP)
poll:
	LEAQ polls(SP), DI
	MOVL $2, SI
	XORL DX, DX
	XORL R10, R10
	XORL R8, R8
	MOVL $SYS_ppoll, AX
	SYSCALL
	CMPQ AX, $-4
	JEQ poll
	TESTQ AX, AX
	JLE exit
	MOVQ (polls+8)(SP), AX
	BTQ $48, AX // POLLIN
	JCC exit

	MOVL $const_monitorExe, DI
	MOVQ (R12), R10
	LEAQ 8(R12), DX        // argv
	LEAQ 8(DX)(R10*8), R10 // envp
	LEAQ -8(R10), SI       // NULL, an empty string as well
	MOVL $const_atEmptyPath, R8
	MOVL $SYS_execveat, AX
	SYSCALL
exit:
	XORL DI, DI
	MOVL $SYS_exit_group, AX
	SYSCALL
	BYTE $0x0f
	BYTE $0x0b // UD2

TEXT ·watchEnd(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	BYTE $0xcc

// func watchSymbols() (start, end uintptr)
TEXT ·watchSymbols(SB),NOSPLIT,$0-16
	LEAQ ·watch(SB), AX
	MOVQ AX, start+0(FP)
	LEAQ ·watchEnd(SB), AX
	MOVQ AX, end+8(FP)
	RET
