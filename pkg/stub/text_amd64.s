#include "textflag.h"
#include "go_asm.h"

// The text of every stub, copied as it is into the stub's ELF image (image.go):
// all of it between zygoteEntry and textEnd, which the linker keeps in the order
// of this file. There is no Go here: no stack, no TLS, no g; every jump is
// relative, and the only memory used is the info page, textSize bytes above
// zygoteEntry.
//
// Registers: R12 is the info page, R13 the id of our process. The kernel changes
// RAX, RCX and R11 only.

#define SYS_close 3
#define SYS_munmap 11
#define SYS_rt_sigaction 13
#define SYS_rt_sigprocmask 14
#define SYS_pause 34
#define SYS_getpid 39
#define SYS_sendto 44
#define SYS_recvmsg 47
#define SYS_clone 56
#define SYS_getppid 110
#define SYS_sigaltstack 131
#define SYS_prctl 157
#define SYS_arch_prctl 158
#define SYS_gettid 186
#define SYS_exit_group 231
#define SYS_seccomp 317
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
#define ARCH_SET_CPUID 0x1012
#define CLONE_PARENT 0x8000
#define CLONE_THREAD 0x50f00 // VM, FS, FILES, SIGHAND, THREAD, SYSVSEM
#define EINTR 4
#define EBADF 9

// How many descriptors are closed one by one on kernels without close_range(2).
#define MAX_INHERITED 4096

// Sends AX and BX.
#define REPLY \
	MOVQ AX, const_infoReply(R12) \
	MOVQ BX, (const_infoReply+8)(R12) \
	XORL DI, DI \
	LEAQ const_infoReply(R12), SI \
	MOVL $16, DX \
	MOVL $MSG_NOSIGNAL, R10 \
	XORL R8, R8 \
	XORL R9, R9 \
	MOVL $SYS_sendto, AX \
	SYSCALL

// The entry point of the image.
TEXT ·zygoteEntry(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	LEAQ ·zygoteEntry(SB), R12
	ADDQ $const_textSize, R12

	MOVL $PR_SET_NAME, DI
	LEAQ const_infoName(R12), SI
	MOVL $SYS_prctl, AX
	SYSCALL

	// Descriptors that our process let its children inherit.
	MOVL $1, DI
	MOVL $-1, SI
	XORL DX, DX
	MOVL $SYS_close_range, AX
	SYSCALL
	TESTQ AX, AX
	JEQ closed
	MOVL $MAX_INHERITED, BX // before Linux 5.9
closeNext:
	MOVL BX, DI
	MOVL $SYS_close, AX
	SYSCALL
	DECL BX
	JNE closeNext
closed:

	// The stack, the vDSO and its data: everything but text and info.
	MOVL $const_stageUnmap, BX
	XORL DI, DI
	LEAQ ·zygoteEntry(SB), SI
	MOVL $SYS_munmap, AX
	SYSCALL
	TESTQ AX, AX
	JNE failed
	MOVQ const_infoEnd(R12), DI
	MOVQ const_infoTaskEnd(R12), SI
	SUBQ DI, SI
	JEQ unmapped
	MOVL $SYS_munmap, AX
	SYSCALL
	TESTQ AX, AX
	JNE failed
unmapped:

	// Handlers for the signals of exceptions, no signal blocked.
	MOVL $const_stageSignals, BX
	LEAQ const_infoSignals(R12), R14
nextSignal:
	MOVL (R14), DI
	TESTL DI, DI
	JEQ signalsDone
	LEAQ const_infoAction(R12), SI
	XORL DX, DX
	MOVL $8, R10
	MOVL $SYS_rt_sigaction, AX
	SYSCALL
	TESTQ AX, AX
	JNE failed
	ADDQ $4, R14
	JMP nextSignal
signalsDone:
	MOVL $2, DI // SIG_SETMASK
	LEAQ const_infoMask(R12), SI
	XORL DX, DX
	MOVL $8, R10
	MOVL $SYS_rt_sigprocmask, AX
	SYSCALL
	TESTQ AX, AX
	JNE failed

	MOVL $const_stageSeccomp, BX
	MOVL $PR_SET_NO_NEW_PRIVS, DI
	MOVL $1, SI
	XORL DX, DX
	XORL R10, R10
	XORL R8, R8
	MOVL $SYS_prctl, AX
	SYSCALL
	TESTQ AX, AX
	JNE failed
	MOVL $SECCOMP_SET_MODE_FILTER, DI
	MOVL const_infoFilterFlags(R12), SI
	LEAQ const_infoFilter(R12), DX
	MOVL $SYS_seccomp, AX
	SYSCALL
	TESTQ AX, AX
	JNE failed

	// Let CPUID fault, in the clones as well, where the CPU can do that
	// (arch_prctl(2)): applications see what package cpuid says.
	MOVL $ARCH_SET_CPUID, DI
	XORL SI, SI
	MOVL $SYS_arch_prctl, AX
	SYSCALL

	MOVL $SYS_getppid, AX
	SYSCALL
	MOVQ AX, R13

	MOVL $const_stageReady, BX
	XORL AX, AX
	JMP reply

failed:
	REPLY
	JMP exit

reply:
	REPLY

receive:
	MOVQ $const_controlSize, (const_infoMsg+40)(R12) // msg_controllen
	MOVQ $0, (const_infoMsg+8)(R12)                  // msg_namelen
	XORL DI, DI
	LEAQ const_infoMsg(R12), SI
	MOVL $MSG_CMSG_CLOEXEC, DX
	MOVL $SYS_recvmsg, AX
	SYSCALL
	CMPQ AX, $-EINTR
	JEQ receive
	CMPQ AX, $16
	JNE exit // 0 when our process is gone
	MOVQ const_infoRequest(R12), BX
	CMPQ BX, $const_opFork
	JEQ fork
	CMPQ BX, $const_opPutFile
	JEQ closeFiles
	CMPQ BX, $const_opCloseFiles
	JEQ closeFiles
	CMPQ BX, $const_opDropFiles
	JNE exit

closeFiles:
	MOVL (const_infoRequest+8)(R12), R14  // the first, or 0
	MOVL (const_infoRequest+12)(R12), R15 // the last
	TESTL R14, R14
	JEQ allClosed
closeFile:
	MOVL R14, DI
	MOVL $SYS_close, AX
	SYSCALL
	INCL R14
	CMPL R14, R15
	JLS closeFile
allClosed:
	CMPQ BX, $const_opDropFiles
	JEQ receive
	CMPQ BX, $const_opCloseFiles
	JEQ reply
	MOVQ $-EBADF, AX
	CMPQ (const_infoMsg+40)(R12), $20 // cmsghdr and one descriptor
	JLT reply
	MOVLQSX (const_infoControl+16)(R12), AX
	JMP reply

fork:
	MOVL $(CLONE_PARENT|CLONE_FILES|SIGCHLD), DI
	XORL SI, SI
	XORL DX, DX
	XORL R10, R10
	XORL R8, R8
	MOVL $SYS_clone, AX
	SYSCALL
	TESTQ AX, AX
	JNE reply // and the child does, too

	// The child.
	MOVL $PR_SET_PDEATHSIG, DI
	MOVL $SIGKILL, SI
	MOVL $SYS_prctl, AX
	SYSCALL
	TESTQ AX, AX
	JNE exit
	MOVL $SYS_getppid, AX // is it too late for that?
	SYSCALL
	CMPQ AX, R13
	JNE exit
	MOVL $SYS_getpid, AX
	SYSCALL
	SHLQ $32, AX
	MOVL $const_opBorn, BX
	ORQ AX, BX
	// The first thread must never get a signal: it stays for ever, since its end
	// would be reported only after that of all others. If it is not to go to a
	// backend's entry, it parks, and the second one is the first that can be used.
	MOVL $2, DI // SIG_SETMASK
	LEAQ const_infoFullMask(R12), SI
	XORL DX, DX
	MOVL $8, R10
	MOVL $SYS_rt_sigprocmask, AX
	SYSCALL
	MOVL (const_infoRequest+8)(R12), DX
	TESTL DX, DX
	JNE usable
	MOVL $CLONE_THREAD, DI
	XORL SI, SI
	XORL DX, DX
	XORL R10, R10
	XORL R8, R8
	MOVL $SYS_clone, AX
	SYSCALL
	TESTQ AX, AX
	JEQ usable
	JLT failed // with the error, and exit
	LEAQ ·park(SB), AX
	JMP AX

usable:
	MOVL $SYS_gettid, AX
	SYSCALL
	REPLY
	LEAQ ·newThread(SB), AX
	MOVQ (const_infoRequest+8)(R12), DI
	MOVL DI, DX // a backend's entry, relative to the image, or 0
	SHRQ $32, DI
	TESTQ DX, DX
	JEQ start
	LEAQ (-const_textSize)(R12)(DX*1), AX
start:
	JMP AX

exit:
	XORL DI, DI
	MOVL $SYS_exit_group, AX
	SYSCALL
	JMP exit

// A new thread sets its signal stack, and parks.
TEXT ·newThread(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	LEAQ ·zygoteEntry(SB), DI
	ADDQ $const_altStackOffset, DI
	XORL SI, SI
	MOVL $SYS_sigaltstack, AX
	SYSCALL
	LEAQ ·park(SB), AX
	JMP AX

// Where a thread waits for its tracer.
TEXT ·park(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
again:
	MOVL $SYS_pause, AX
	SYSCALL
	JMP again

// A system call, then a breakpoint. The tracer sets all registers.
TEXT ·callGadget(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	SYSCALL
	BYTE $0xcc // INT3

// The same for clone(2), with a new thread that nobody traces yet.
TEXT ·cloneGadget(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	SYSCALL
	TESTQ AX, AX
	JNE old
	LEAQ ·newThread(SB), AX
	JMP AX
old:
	BYTE $0xcc // INT3
	JMP old

TEXT ·textEnd(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	BYTE $0xcc

// func textSymbols() (s symbols)
TEXT ·textSymbols(SB),NOSPLIT,$0-48
	LEAQ ·zygoteEntry(SB), AX
	MOVQ AX, s_start+0(FP)
	LEAQ ·newThread(SB), AX
	MOVQ AX, s_newThread+8(FP)
	LEAQ ·park(SB), AX
	MOVQ AX, s_park+16(FP)
	LEAQ ·callGadget(SB), AX
	MOVQ AX, s_call+24(FP)
	LEAQ ·cloneGadget(SB), AX
	MOVQ AX, s_clone+32(FP)
	LEAQ ·textEnd(SB), AX
	MOVQ AX, s_end+40(FP)
	RET
