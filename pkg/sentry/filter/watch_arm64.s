#include "textflag.h"
#include "go_asm.h"

// watch, as its program has it: see watch.go. R19 is the stack that the kernel made
// (argc, argv, NULL, envp, NULL), R20 the memory below it, R21 the listener.

#define SYS_ppoll 73
#define SYS_exit_group 94
#define SYS_recvmsg 212
#define SYS_execveat 281

// Offsets in the memory at R20.
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
	MOVD RSP, R19
	SUB $frame, R19, R20
	MOVD R20, RSP
	MOVD ZR, msg(R20)
	MOVD ZR, 8(R20)
	MOVD $1, R0
	MOVD R0, msgIovLen(R20)
	MOVD R0, iovLen(R20)
	ADD $iovBase, R20, R0
	MOVD R0, msgIov(R20)
	ADD $control, R20, R0
	MOVD R0, msgControl(R20)
	ADD $buf, R20, R0
	MOVD R0, iovBase(R20)
peek:
	MOVD $24, R0
	MOVD R0, msgControlLen(R20)
	MOVD $const_monitorFD, R0
	MOVD R20, R1
	MOVD $const_watchFlags, R2
	MOVD $SYS_recvmsg, R8
	SVC
	CMN $4, R0 // EINTR
	BEQ peek
	CMP $1, R0
	BNE exit
	MOVWU (control+16)(R20), R21

	MOVD $const_monitorFD, R0 // no events: of itself only POLLHUP and POLLERR
	MOVD R0, polls(R20)
	ORR $(1<<32), R21, R0 // POLLIN
	MOVD R0, (polls+8)(R20)
poll:
	ADD $polls, R20, R0
	MOVD $2, R1
	MOVD ZR, R2
	MOVD ZR, R3
	MOVD ZR, R4
	MOVD $SYS_ppoll, R8
	SVC
	CMN $4, R0
	BEQ poll
	CMP $0, R0
	BLE exit
	MOVD (polls+8)(R20), R0
	TBZ $48, R0, exit // POLLIN

	MOVD (R19), R3
	ADD $8, R19, R2        // argv
	ADD R3<<3, R2, R3
	MOVD R3, R1            // NULL, an empty string as well
	ADD $8, R3, R3         // envp
	MOVD $const_monitorExe, R0
	MOVD $const_atEmptyPath, R4
	MOVD $SYS_execveat, R8
	SVC
exit:
	MOVD ZR, R0
	MOVD $SYS_exit_group, R8
	SVC
	UNDEF

TEXT ·watchEnd(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	UNDEF

// func watchSymbols() (start, end uintptr)
TEXT ·watchSymbols(SB),NOSPLIT,$0-16
	MOVD $·watch(SB), R0
	MOVD R0, start+0(FP)
	MOVD $·watchEnd(SB), R0
	MOVD R0, end+8(FP)
	RET
