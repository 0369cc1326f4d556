#include "textflag.h"
#include "go_asm.h"

// The text that systrap has in its stubs, copied as it is: all between
// syscallThread and textEnd, which the linker keeps in the order of this file.
// There is no Go here: no g, no TLS, and no stack but signal stacks.
//
// Applications can jump to any instruction with any registers, and write all
// memory that the stub can write. What is done with the authority of the system
// call thread comes from its registers and from the read-only region alone; an
// application's threads, which have a filter of their own, get SIGSYS for all
// calls but rt_sigreturn and futex.

#define SYS_mmap 9
#define SYS_lseek 8
#define SYS_rt_sigreturn 15
#define SYS_clone 56
#define SYS_sigaltstack 131
#define SYS_prctl 157
#define SYS_futex 202
#define SYS_exit_group 231
#define SYS_seccomp 317

#define PROT_READ 1
#define MAP_SHARED_FIXED 0x11
#define FUTEX_WAIT 0
#define FUTEX_WAKE 1
#define ALL 0x7fffffff
#define PR_SET_SYSCALL_USER_DISPATCH 59
#define PR_SYS_DISPATCH_ON 1
#define SECCOMP_SET_MODE_FILTER 1
#define SECCOMP_FILTER_FLAG_SPEC_ALLOW 4

// Writes what a call does not, and says so. A signal would get its frame where it
// always is: the header, which is the stack for a moment, is not on the signal stack.
// Changes RAX, RDX and R11.
#define SAVE \
	MOVQ BX, const_headerRBX(GS) \
	MOVQ BP, const_headerRBP(GS) \
	MOVQ R12, const_headerR12(GS) \
	MOVQ R13, const_headerR13(GS) \
	MOVQ R14, const_headerR14(GS) \
	MOVQ R15, const_headerR15(GS) \
	RDFSBASEQ AX \
	MOVQ AX, const_headerFS(GS) \
	MOVQ SP, R11 \
	RDGSBASEQ AX \
	LEAQ const_headerStack(AX), SP \
	PUSHFQ \
	MOVQ R11, SP \
	MOVL $const_xfeatures, AX \
	MOVL $-1, DX \
	XSAVE64 -const_stackSize(GS) \
	MOVL $const_kindState, const_headerKind(GS)

// Goes on the errand that the header at R says, with the state, in AX, that says so, and
// is to look again. Changes RAX, RCX, RDX, RSI, RDI, R10 and R11.
#define ERRAND(R) \
	MOVL $const_stateSentry, DX \
	LOCK \
	CMPXCHGL DX, const_headerState(R) \
	MOVQ const_headerWake(R), DI \
	MOVL $FUTEX_WAKE, SI \
	MOVL $ALL, DX \
	MOVL $SYS_futex, AX \
	SYSCALL \
	MOVQ const_headerUntil(R), DI \
	MOVL $FUTEX_WAIT, SI \
	MOVL const_headerWhile(R), DX \
	XORL R10, R10 \
	MOVL $SYS_futex, AX \
	SYSCALL \
	MOVL const_headerSpin(R), CX

// The thread that makes system calls for the Sentry. Registers: R13 is the
// read-only region, R14 the last request; RDI and R12 as Zygote.ForkAt has them.
TEXT ·syscallThread(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	MOVQ DI, R8
	LEAQ (-const_pageSize-const_roSize)(R12), R13
	MOVQ R13, DI
	MOVL $const_roSize, SI
	MOVL $PROT_READ, DX
	MOVL $MAP_SHARED_FIXED, R10
	XORL R9, R9
	MOVL $SYS_mmap, AX
	SYSCALL
	CMPQ AX, R13
	JNE exit
	XORL R14, R14
next:
	MOVL const_requestSeq(R13), AX
	CMPL AX, R14
	JNE request
	LEAQ const_requestSeq(R13), DI
	MOVL $FUTEX_WAIT, SI
	MOVL R14, DX
	XORL R10, R10
	MOVL $SYS_futex, AX
	SYSCALL
	JMP next
request:
	MOVL AX, R14
	LEAQ const_requestCalls(R13), R12
	MOVL const_requestCount(R13), BX
call:
	MOVQ 0(R12), R15
	MOVQ 8(R12), DI
	MOVQ 16(R12), SI
	MOVQ 24(R12), DX
	MOVQ 32(R12), R10
	MOVQ 40(R12), R8
	MOVQ 48(R12), R9
	MOVQ R15, AX
	SYSCALL
	TESTQ AX, AX
	JNE parent
	CMPQ R15, $SYS_clone
	JEQ child
parent:
	CMPQ AX, $-4095
	JCC failed
	ADDQ $const_callSize, R12
	DECL BX
	JNE call
	ANDL $0x7fffffff, AX
	JMP done
failed:
	// The errno negated, and above it how many calls are left.
	SHLQ $const_resultLeftShift, BX
	SUBQ BX, AX
	MOVL AX, AX
done:
	// The result is the position of the memory file: nobody else in the stub can
	// set that. Without it an application could make the Sentry believe that
	// memory is unmapped, and use it again, when it is not.
	MOVQ R14, SI
	SHLQ $32, SI
	ORQ AX, SI
	MOVQ const_requestFD(R13), DI
	XORL DX, DX // SEEK_SET
	MOVL $SYS_lseek, AX
	SYSCALL
	MOVQ const_requestHint(R13), DI
	MOVL R14, AX
	XCHGL AX, (DI)
	MOVL $FUTEX_WAKE, SI
	MOVL $ALL, DX
	MOVL $SYS_futex, AX
	SYSCALL
	JMP next

// A new thread, on its slot's signal stack: R8 is the stack_t, R9 the filter,
// which clone(2) does not use. It waits in its slot, as after a signal.
child:
	MOVQ R9, BX
	MOVQ R8, DI
	XORL SI, SI
	MOVL $SYS_sigaltstack, AX
	SYSCALL
	TESTQ AX, AX
	JNE exit
	// System calls from elsewhere than our text are to be signals. The filter does
	// the same, but takes longer, and Linux lets uprobe(2) and uretprobe(2) pass all
	// filters. Before Linux 5.11 the filter is all there is.
	MOVL $PR_SET_SYSCALL_USER_DISPATCH, DI
	MOVL $PR_SYS_DISPATCH_ON, SI
	MOVQ const_constantText(R13), DX
	MOVQ (const_constantText+8)(R13), R10
	XORL R8, R8 // no selector
	MOVL $SYS_prctl, AX
	SYSCALL
	MOVL $SECCOMP_SET_MODE_FILTER, DI
	MOVL $SECCOMP_FILTER_FLAG_SPEC_ALLOW, SI
	MOVQ BX, DX
	MOVL $SYS_seccomp, AX
	SYSCALL
	TESTQ AX, AX
	JNE exit
	MOVQ SP, BX
	ORQ $(const_slotSize-1), BX
	SUBQ $(const_headerSize-1), BX
	XORL CX, CX
	LEAQ ·resume(SB), R12
	JMP ·await(SB)

exit:
	MOVL $1, DI
	MOVL $SYS_exit_group, AX
	SYSCALL
	JMP exit

// The handler of all signals that have one. The kernel has written the thread's
// state onto the signal stack. All but the interrupt let other signals come.
TEXT ·handler(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	MOVQ SP, BX
	ORQ $(const_slotSize-1), BX
	SUBQ $(const_headerSize-1), BX
	MOVQ (const_frameUC+const_ucContext+const_scRip)(SP), AX
	LEAQ ·goOn(SB), R13
	CMPL DI, $const_sigInterrupt
	JNE exception
	LEAQ ·resume(SB), R13
	LEAQ ·handler(SB), CX
	CMPQ AX, CX
	JCS exception
	LEAQ ·goOnEnd(SB), CX
	CMPQ AX, CX
	JCC exception
	// It came while another one was being handled. The Sentry is about to hear of that
	// and has no need of an interrupt; or it has heard of it, and must not be told
	// otherwise until it has answered.
	LEAQ ·give(SB), CX
	CMPQ AX, CX
	JLS dismiss
	LEAQ ·nested(SB), R12
	JMP later
dismiss:
	JMP ·sigreturn(SB)
exception:
	// A call without a signal may be under way: the slot is the Sentry's, and the
	// signal has to wait until it is not, as if it were blocked.
	LEAQ ·makeCall(SB), CX
	CMPQ AX, CX
	JLS event
	LEAQ ·callEnd(SB), CX
	CMPQ AX, CX
	JCC event
	LEAQ ·event(SB), R12
later:
	// What was interrupted may have been about to wake the Sentry.
	LEAQ const_headerState(BX), DI
	MOVL $FUTEX_WAKE, SI
	MOVL $ALL, DX
	MOVL $SYS_futex, AX
	SYSCALL
	XORL CX, CX
	JMP ·await(SB)
event:
	JMP ·event(SB) // not by a register: from here an interrupt is dismissed

// R13 is where to go on when the slot has come back.
TEXT ·event(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	MOVQ SP, const_headerSP(BX)
	RDFSBASEQ AX
	MOVQ AX, const_headerFS(BX)
	RDGSBASEQ AX
	MOVQ AX, const_headerGS(BX)
	MOVL $const_kindFrame, const_headerKind(BX)
	MOVQ R13, R12
	MOVL $const_stateSentry, AX
	JMP ·give(SB)

// The first instruction gives the slot, with AX, to the Sentry.
TEXT ·give(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	XCHGL AX, const_headerState(BX)
	MOVL const_headerSpin(BX), CX
	CMPL AX, $const_stateStubSentryWaits
	JNE wait
	LEAQ const_headerState(BX), DI
	MOVL $FUTEX_WAKE, SI
	MOVL $ALL, DX
	MOVL $SYS_futex, AX
	SYSCALL
	// Whom we have woken may need this CPU.
	XORL CX, CX
wait:
	JMP ·await(SB)

// Waits until the slot is the stub's, and goes on at R12. RBX is the header, RCX
// how often to look before sleeping.
TEXT ·await(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
look:
	MOVL const_headerState(BX), AX
	CMPL AX, $const_stateSentry
	JNE changed
	TESTL CX, CX
	JEQ mark
	PAUSE
	DECL CX
	JMP look
mark:
	MOVL $const_stateSentryStubWaits, DX
	LOCK
	CMPXCHGL DX, const_headerState(BX)
sleep:
	MOVL const_headerState(BX), AX
	XORL CX, CX
	CMPL AX, $const_stateSentryStubWaits
	JNE look
	LEAQ const_headerState(BX), DI
	MOVL $FUTEX_WAIT, SI
	MOVL $const_stateSentryStubWaits, DX
	XORL R10, R10
	MOVL $SYS_futex, AX
	SYSCALL
	JMP sleep
changed:
	CMPL AX, $const_stateSentryStubWaits
	JEQ sleep
	CMPL AX, $const_stateErrand
	JEQ errand
	JMP R12
errand:
	ERRAND(BX)
	JMP look

// Runs the application after an exception. By rt_sigreturn(2) a system call by signal
// would take a quarter longer. An interrupt that comes here gets its frame below.
TEXT ·goOn(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	MOVQ const_headerFS(BX), AX
	WRFSBASEQ AX
	MOVQ const_headerGS(BX), AX
	WRGSBASEQ AX
	LEAQ (const_frameUC+const_ucContext)(SP), R12
	MOVQ const_scFPState(R12), CX
	MOVL $const_xfeatures, AX
	MOVL $-1, DX
	XRSTOR64 (CX)
	PUSHQ $2 // no flag set: with NT there is no IRETQ
	POPFQ
	MOVWQZX const_scSS(R12), AX
	PUSHQ AX
	PUSHQ const_scRsp(R12)
	PUSHQ const_scEflags(R12)
	MOVWQZX const_scCS(R12), AX // that of 32-bit code
	PUSHQ AX
	PUSHQ const_scRip(R12)
	PUSHQ 80(R12)
	POPQ BP // a MOVQ is what go vet takes for a mistake
	MOVQ 0(R12), R8
	MOVQ 8(R12), R9
	MOVQ 16(R12), R10
	MOVQ 24(R12), R11
	MOVQ 40(R12), R13
	MOVQ 48(R12), R14
	MOVQ 56(R12), R15
	MOVQ 64(R12), DI
	MOVQ 72(R12), SI
	MOVQ 88(R12), BX
	MOVQ 96(R12), DX
	MOVQ 104(R12), AX
	MOVQ 112(R12), CX
	MOVQ 32(R12), R12
	IRETQ

TEXT ·goOnEnd(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	UNDEF

// An interrupt while the thread was about to go on after another signal: it gives the
// slot away, and goes on by the frame of that one.
TEXT ·nested(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	MOVL $const_kindNested, const_headerKind(BX)
	LEAQ ·resumeFirst(SB), R12
	MOVL $const_stateSentry, AX
	JMP ·give(SB)

TEXT ·resumeFirst(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	MOVQ const_headerSP(BX), SP
	JMP ·resume(SB)

// Runs the application, and lets signals come.
TEXT ·resume(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	MOVQ const_headerFS(BX), AX
	WRFSBASEQ AX
	MOVQ const_headerGS(BX), AX
	WRGSBASEQ AX
	JMP ·sigreturn(SB)

TEXT ·sigreturn(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	ADDQ $8, SP // the return address, which the kernel does not want
	MOVL $SYS_rt_sigreturn, AX
	SYSCALL
	UNDEF

// A system call that the application makes without a signal: patched code comes
// here. RCX is the address behind the system call instruction, R11 where to go
// on; GS leads to the header. Everything but RAX, RCX and R11, flags included, is
// as it was when the application goes on.
TEXT ·call(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	MOVQ AX, const_headerRAX(GS)
	LAHF
	SETOS AX
	MOVL AX, const_headerFlags(GS)
	JMP ·callArgs(SB)

TEXT ·callArgs(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	MOVQ DI, const_headerRDI(GS)
	MOVQ SI, const_headerRSI(GS)
	MOVQ DX, const_headerRDX(GS)
	MOVQ R10, const_headerR10(GS)
	MOVQ CX, const_headerRIP(GS)
	MOVQ R11, const_headerReturn(GS)
	CMPQ R8, const_headerR8(GS)
	JNE more
	CMPQ R9, const_headerR9(GS)
	JNE more
	CMPQ SP, const_headerRSP(GS)
	JNE more
made:
	TESTB $const_orderWhole, const_headerOrder(GS)
	JNE whole
	MOVL $const_kindCall, const_headerKind(GS)
	MOVL $const_stateSentry, R11
	JMP ·makeCall(SB)
more:
	MOVQ R8, const_headerR8(GS)
	MOVQ R9, const_headerR9(GS)
	MOVQ SP, const_headerRSP(GS)
	JMP made
whole:
	JMP ·callState(SB)

// From here on RDX and RSP are in the header.
TEXT ·callState(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	SAVE
	MOVL $const_stateSentry, R11
	JMP ·makeCall(SB)

// With its first instruction the call is made: from then on what the thread goes
// on with is the Sentry's to say.
TEXT ·makeCall(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	XCHGL R11, const_headerState(GS)
made:
	MOVL const_headerSpin(GS), CX
	CMPL R11, $const_stateStubSentryWaits
	JEQ wake
look:
	MOVL const_headerState(GS), AX
	CMPL AX, $const_stateSentry
	JNE changed
	TESTL CX, CX
	JEQ mark
	PAUSE
	DECL CX
	JMP look
mark:
	MOVL $const_stateSentryStubWaits, CX
	LOCK
	CMPXCHGL CX, const_headerState(GS)
sleep:
	MOVL const_headerState(GS), AX
	XORL CX, CX
	CMPL AX, $const_stateSentryStubWaits
	JNE look
	RDGSBASEQ DI
	ADDQ $const_headerState, DI
	MOVL $FUTEX_WAIT, SI
	MOVL $const_stateSentryStubWaits, DX
	XORL R10, R10
	MOVL $SYS_futex, AX
	SYSCALL
	JMP sleep
wake:
	RDGSBASEQ DI
	ADDQ $const_headerState, DI
	MOVL $FUTEX_WAKE, SI
	MOVL $ALL, DX
	MOVL $SYS_futex, AX
	SYSCALL
	XORL CX, CX
	JMP look
changed:
	CMPL AX, $const_stateSentryStubWaits
	JEQ sleep
	CMPL AX, $const_stateErrand
	JEQ errand
	// Early, so that this CPU has the line when the next call is made.
	MOVL $const_kindCall, const_headerKind(GS)
	MOVQ const_headerRDI(GS), DI
	MOVQ const_headerRSI(GS), SI
	MOVQ const_headerRDX(GS), DX
	MOVQ const_headerR10(GS), R10
	TESTB $(const_orderSave|const_orderLoad), const_headerOrder(GS)
	JNE all
	MOVL const_headerFlags(GS), AX
	ADDB $127, AX // the overflow flag
	SAHF
	MOVQ const_headerReturn(GS), R11
	MOVQ const_headerRIP(GS), CX
	MOVQ const_headerRAX(GS), AX
	JMP R11

errand:
	ERRAND(GS)
	JMP look

all:
	TESTB $const_orderSave, const_headerOrder(GS)
	JEQ load
	SAVE
	MOVL $const_stateSentry, R11
	XCHGL R11, const_headerState(GS)
	JMP made

load:
	MOVL $const_xfeatures, AX
	MOVL $-1, DX
	XRSTOR64 -const_stackSize(GS)
	RDGSBASEQ AX
	LEAQ const_headerStack(AX), SP
	PUSHQ $2 // no flag set: with NT there is no IRETQ
	POPFQ
	POPQ AX
	WRFSBASEQ AX
	MOVQ const_headerRDX(GS), DX
	MOVQ const_headerRBX(GS), BX
	MOVQ const_headerRBP(GS), BP
	MOVQ const_headerR8(GS), R8
	MOVQ const_headerR9(GS), R9
	MOVQ const_headerR12(GS), R12
	MOVQ const_headerR13(GS), R13
	MOVQ const_headerR14(GS), R14
	MOVQ const_headerR15(GS), R15
	MOVQ const_headerRCX(GS), CX
	MOVQ const_headerR11(GS), R11
	POPQ AX
	WRGSBASEQ AX
	POPQ AX
	IRETQ

TEXT ·callEnd(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	BYTE $0xcc

TEXT ·textEnd(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	BYTE $0xcc

// func textSymbols() (s textAddresses)
TEXT ·textSymbols(SB),NOSPLIT,$0-80
	LEAQ ·syscallThread(SB), AX
	MOVQ AX, s_start+0(FP)
	LEAQ ·handler(SB), AX
	MOVQ AX, s_handler+8(FP)
	LEAQ ·give(SB), AX
	MOVQ AX, s_give+16(FP)
	LEAQ ·goOnEnd(SB), AX
	MOVQ AX, s_goOnEnd+24(FP)
	LEAQ ·call(SB), AX
	MOVQ AX, s_call+32(FP)
	LEAQ ·callArgs(SB), AX
	MOVQ AX, s_callArgs+40(FP)
	LEAQ ·callState(SB), AX
	MOVQ AX, s_callState+48(FP)
	LEAQ ·makeCall(SB), AX
	MOVQ AX, s_makeCall+56(FP)
	LEAQ ·callEnd(SB), AX
	MOVQ AX, s_callEnd+64(FP)
	LEAQ ·textEnd(SB), AX
	MOVQ AX, s_end+72(FP)
	RET
