#include "textflag.h"
#include "go_asm.h"

// The text of every stub: see text_amd64.s, of which this is the translation. All
// addresses are relative to the page that the text is at the start of.
//
// Registers: R19 is the info page, R20 the id of our process, R21 what replies
// carry in their second word. The kernel changes R0 only.

#define SYS_close 57
#define SYS_ppoll 73
#define SYS_exit_group 94
#define SYS_sigaltstack 132
#define SYS_rt_sigaction 134
#define SYS_rt_sigprocmask 135
#define SYS_prctl 167
#define SYS_getpid 172
#define SYS_getppid 173
#define SYS_gettid 178
#define SYS_sendto 206
#define SYS_recvmsg 212
#define SYS_munmap 215
#define SYS_clone 220
#define SYS_seccomp 277
#define SYS_close_range 436

#define PR_SET_PDEATHSIG 1
#define PR_SET_NAME 15
#define PR_SET_NO_NEW_PRIVS 38
#define SECCOMP_SET_MODE_FILTER 1
#define MSG_NOSIGNAL 0x4000
#define MSG_CMSG_CLOEXEC 0x40000000
#define SIGKILL 9
#define SIGCHLD 17
#define CLONE_FILES 0x400
#define CLONE_PARENT 0x8000
#define CLONE_THREAD 0x50f00 // VM, FS, FILES, SIGHAND, THREAD, SYSVSEM
#define EINTR 4
#define EBADF 9

// How many descriptors are closed one by one on kernels without close_range(2).
#define MAX_INHERITED 4096

// The start of the text, from an instruction in it.
#define TEXT_START(label, reg) \
label: \
	ADR label, reg \
	AND $~(const_textSize - 1), reg

// Goes to park. Its address is in the text page, which applications cannot
// change.
#define GO_PARK(label) \
	TEXT_START(label, R0) \
	MOVD $const_parkPointer, R1 \
	ADD R1, R0 \
	MOVD (R0), R0 \
	B (R0)

// The same for newThread.
#define GO_NEW_THREAD(label) \
	TEXT_START(label, R0) \
	MOVD $const_newThreadPointer, R1 \
	ADD R1, R0 \
	MOVD (R0), R0 \
	B (R0)

// Sends R0 and R21.
#define REPLY \
	MOVD R0, const_infoReply(R19) \
	MOVD R21, (const_infoReply+8)(R19) \
	MOVD ZR, R0 \
	ADD $const_infoReply, R19, R1 \
	MOVD $16, R2 \
	MOVD $MSG_NOSIGNAL, R3 \
	MOVD ZR, R4 \
	MOVD ZR, R5 \
	MOVD $SYS_sendto, R8 \
	SVC

#define CLONE(flags) \
	MOVD $(flags), R0 \
	MOVD ZR, R1 \
	MOVD ZR, R2 \
	MOVD ZR, R3 \
	MOVD ZR, R4 \
	MOVD $SYS_clone, R8 \
	SVC

#define SIGPROCMASK(mask) \
	MOVD $2, R0 \
	ADD $mask, R19, R1 \
	MOVD ZR, R2 \
	MOVD $8, R3 \
	MOVD $SYS_rt_sigprocmask, R8 \
	SVC

// The entry point of the image.
TEXT ·zygoteEntry(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	TEXT_START(start, R19)
	ADD $const_textSize, R19

	MOVD $PR_SET_NAME, R0
	ADD $const_infoName, R19, R1
	MOVD $SYS_prctl, R8
	SVC

	MOVD $1, R0
	MOVD $0xffffffff, R1
	MOVD ZR, R2
	MOVD $SYS_close_range, R8
	SVC
	CBZ R0, closed
	MOVD $MAX_INHERITED, R22 // before Linux 5.9
closeNext:
	MOVD R22, R0
	MOVD $SYS_close, R8
	SVC
	SUB $1, R22
	CBNZ R22, closeNext
closed:

	MOVD $const_stageUnmap, R21
	MOVD ZR, R0
	SUB $const_textSize, R19, R1
	MOVD $SYS_munmap, R8
	SVC
	CBNZ R0, failed
	MOVD const_infoEnd(R19), R0
	MOVD const_infoTaskEnd(R19), R1
	SUBS R0, R1
	BEQ unmapped
	MOVD $SYS_munmap, R8
	SVC
	CBNZ R0, failed
unmapped:

	MOVD $const_stageSignals, R21
	ADD $const_infoSignals, R19, R22
nextSignal:
	MOVWU (R22), R0
	CBZ R0, signalsDone
	ADD $const_infoAction, R19, R1
	MOVD ZR, R2
	MOVD $8, R3
	MOVD $SYS_rt_sigaction, R8
	SVC
	CBNZ R0, failed
	ADD $4, R22
	B nextSignal
signalsDone:
	SIGPROCMASK(const_infoMask)
	CBNZ R0, failed

	MOVD $const_stageSeccomp, R21
	MOVD $PR_SET_NO_NEW_PRIVS, R0
	MOVD $1, R1
	MOVD ZR, R2
	MOVD ZR, R3
	MOVD ZR, R4
	MOVD $SYS_prctl, R8
	SVC
	CBNZ R0, failed
	MOVD $SECCOMP_SET_MODE_FILTER, R0
	MOVWU const_infoFilterFlags(R19), R1
	ADD $const_infoFilter, R19, R2
	MOVD $SYS_seccomp, R8
	SVC
	CBNZ R0, failed

	MOVD $SYS_getppid, R8
	SVC
	MOVD R0, R20

	MOVD $const_stageReady, R21
	MOVD ZR, R0
	B reply

failed:
	REPLY
	B exit

reply:
	REPLY

receive:
	MOVD $const_controlSize, R0
	MOVD R0, (const_infoMsg+40)(R19) // msg_controllen
	MOVD ZR, (const_infoMsg+8)(R19)  // msg_namelen
	MOVD ZR, R0
	ADD $const_infoMsg, R19, R1
	MOVD $MSG_CMSG_CLOEXEC, R2
	MOVD $SYS_recvmsg, R8
	SVC
	CMN $EINTR, R0
	BEQ receive
	CMP $16, R0
	BNE exit // 0 when our process is gone
	MOVD const_infoRequest(R19), R21
	CMP $const_opFork, R21
	BEQ fork
	CMP $const_opPutFile, R21
	BEQ closeFiles
	CMP $const_opCloseFiles, R21
	BEQ closeFiles
	CMP $const_opDropFiles, R21
	BNE exit

closeFiles:
	MOVWU (const_infoRequest+8)(R19), R22  // the first, or 0
	MOVWU (const_infoRequest+12)(R19), R23 // the last
	CBZ R22, allClosed
closeFile:
	MOVD R22, R0
	MOVD $SYS_close, R8
	SVC
	ADD $1, R22
	CMP R23, R22
	BLS closeFile
allClosed:
	CMP $const_opDropFiles, R21
	BEQ receive
	CMP $const_opCloseFiles, R21
	BEQ reply
	MOVD $-EBADF, R0
	MOVD (const_infoMsg+40)(R19), R1
	CMP $20, R1 // cmsghdr and one descriptor
	BLT reply
	MOVW (const_infoControl+16)(R19), R0
	B reply

fork:
	CLONE(CLONE_PARENT|CLONE_FILES|SIGCHLD)
	CBNZ R0, reply // and the child does, too

	// The child.
	MOVD $PR_SET_PDEATHSIG, R0
	MOVD $SIGKILL, R1
	MOVD $SYS_prctl, R8
	SVC
	CBNZ R0, exit
	MOVD $SYS_getppid, R8 // is it too late for that?
	SVC
	CMP R20, R0
	BNE exit
	MOVD $SYS_getpid, R8
	SVC
	LSL $32, R0
	MOVD $const_opBorn, R21
	ORR R0, R21
	SIGPROCMASK(const_infoFullMask)
	MOVWU (const_infoRequest+8)(R19), R1
	CBNZ R1, usable
	CLONE(CLONE_THREAD)
	CBZ R0, usable
	CMP $0, R0
	BLT failed // with the error, and exit
	GO_PARK(first)

usable:
	MOVD $SYS_gettid, R8
	SVC
	REPLY
	MOVD (const_infoRequest+8)(R19), R1
	LSR $32, R1, R0
	MOVWU R1, R1 // a backend's entry, relative to the image, or 0
	CBZ R1, start2
	SUB $const_textSize, R19, R2
	ADD R1, R2
	B (R2)
start2:
	GO_NEW_THREAD(third)

exit:
	MOVD ZR, R0
	MOVD $SYS_exit_group, R8
	SVC
	B exit

// A new thread sets its signal stack, and parks.
TEXT ·newThread(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	TEXT_START(start, R0)
	MOVD $const_altStackOffset, R1
	ADD R1, R0
	MOVD ZR, R1
	MOVD $SYS_sigaltstack, R8
	SVC
	GO_PARK(end)

// Where a thread waits for its tracer.
TEXT ·park(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
again:
	MOVD ZR, R0
	MOVD ZR, R1
	MOVD ZR, R2
	MOVD ZR, R3
	MOVD $SYS_ppoll, R8
	SVC
	B again

// A system call, then a breakpoint. The tracer sets all registers.
TEXT ·callGadget(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	SVC
	BRK

// The same for clone(2), with a new thread that nobody traces yet.
TEXT ·cloneGadget(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	SVC
	CBNZ R0, old
	GO_NEW_THREAD(new)
old:
	BRK
	B old

TEXT ·textEnd(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	BRK

// func textSymbols() (s symbols)
TEXT ·textSymbols(SB),NOSPLIT,$0-48
	MOVD $·zygoteEntry(SB), R0
	MOVD R0, s_start+0(FP)
	MOVD $·newThread(SB), R0
	MOVD R0, s_newThread+8(FP)
	MOVD $·park(SB), R0
	MOVD R0, s_park+16(FP)
	MOVD $·callGadget(SB), R0
	MOVD R0, s_call+24(FP)
	MOVD $·cloneGadget(SB), R0
	MOVD R0, s_clone+32(FP)
	MOVD $·textEnd(SB), R0
	MOVD R0, s_end+40(FP)
	RET
