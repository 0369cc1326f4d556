#include "textflag.h"
#include "go_asm.h"

// The text of the program, copied as it is into its ELF image (guest.go): all of
// it between entry and textEnd, which the linker keeps in the order of this file.
// There is no Go here: no TLS, no g; every jump is relative.
//
// Registers: R12 is the data, R14 what is left to do. The kernel changes RAX,
// RCX and R11 only.

#define SYS_read 0
#define SYS_write 1
#define SYS_mmap 9
#define SYS_mprotect 10
#define SYS_munmap 11
#define SYS_rt_sigaction 13
#define SYS_rt_sigreturn 15
#define SYS_pipe 22
#define SYS_getpid 39
#define SYS_clone 56
#define SYS_exit 60
#define SYS_wait4 61
#define SYS_prctl 157
#define SYS_gettid 186
#define SYS_futex 202
#define SYS_clock_gettime 228
#define SYS_exit_group 231
#define SYS_tgkill 234
#define SYS_openat 257

#define PR_SET_THP_DISABLE 41
#define CLOCK_MONOTONIC 1
#define SIGUSR1 10
#define SIGSEGV 11
#define SIGCHLD 17
#define PROT_READ 1
#define PROT_READ_WRITE 3
#define MAP_PRIVATE_ANONYMOUS 0x22
#define CLONE_THREAD 0x350f00 // VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, PARENT_SETTID, CHILD_CLEARTID

// What FirstTouch and MapTouchUnmap map at once.
#define PAGE 4096
#define TOUCH_PAGES 1024
#define TOUCH_SIZE 0x400000
#define MAP_PAGES 16
#define MAP_SIZE 0x10000

// A system call as a C library makes it.
#define LIBC(nr) \
	MOVL $nr, AX \
	SYSCALL \
	CMPQ AX, $-4095

#define DATA(reg) \
	LEAQ ·entry(SB), reg \
	ADDQ $const_pageSize, reg

#define CLOCK(where) \
	MOVL $CLOCK_MONOTONIC, DI \
	LEAQ where(R12), SI \
	LIBC(SYS_clock_gettime)

// Adds the time between dataTime0 and dataTime1 to the result.
#define ELAPSED \
	MOVQ const_dataTime1(R12), AX \
	SUBQ const_dataTime0(R12), AX \
	IMULQ $1000000000, AX \
	ADDQ (const_dataTime1+8)(R12), AX \
	SUBQ (const_dataTime0+8)(R12), AX \
	ADDQ AX, const_dataResult(R12)

#define OP(nr, label) \
	CMPQ AX, $nr \
	JEQ label

TEXT ·entry(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	DATA(R12)

	// No huge pages: FirstTouch is about each page.
	MOVL $PR_SET_THP_DISABLE, DI
	MOVL $1, SI
	XORL DX, DX
	XORL R10, R10
	XORL R8, R8
	LIBC(SYS_prctl)

	MOVQ $-100, DI // AT_FDCWD
	LEAQ const_dataZeroName(R12), SI
	XORL DX, DX
	LIBC(SYS_openat)
	TESTQ AX, AX
	JLT fail
	MOVQ AX, const_dataZeroFD(R12)
	LEAQ const_dataPipes(R12), DI
	LIBC(SYS_pipe)
	TESTQ AX, AX
	JNE fail
	LEAQ (const_dataPipes+8)(R12), DI
	LIBC(SYS_pipe)
	TESTQ AX, AX
	JNE fail
	LIBC(SYS_getpid)
	MOVL AX, const_dataPID(R12)
	LIBC(SYS_gettid)
	MOVL AX, const_dataMainTID(R12)
	MOVL $SIGUSR1, DI
	LEAQ const_dataAction(R12), SI
	XORL DX, DX
	MOVL $8, R10
	LIBC(SYS_rt_sigaction)
	TESTQ AX, AX
	JNE fail
	MOVL $SIGSEGV, DI
	LEAQ const_dataFault(R12), SI
	XORL DX, DX
	MOVL $8, R10
	LIBC(SYS_rt_sigaction)
	TESTQ AX, AX
	JNE fail

next:
	XORL DI, DI
	LEAQ const_dataRequest(R12), SI
	MOVL $16, DX
	LIBC(SYS_read)
	TESTQ AX, AX
	JEQ done
	CMPQ AX, $16
	JNE fail
	MOVQ $0, const_dataResult(R12)
	MOVQ (const_dataRequest+8)(R12), R14
	CLOCK(const_dataTime0)
	MOVQ const_dataRequest(R12), AX
	OP(const_GetpidPlain, getpidPlain)
	OP(const_GetpidMov, getpidMov)
	OP(const_GetpidCmp, getpidCmp)
	OP(const_ReadPlain, readPlain)
	OP(const_ReadCmp, readCmp)
	OP(const_MapTouchUnmap, mapTouchUnmap)
	OP(const_FirstTouch, firstTouch)
	OP(const_ProtectFault, protectFault)
	OP(const_SelfSignal, selfSignal)
	OP(const_Raise, raise)
	OP(const_Thread, thread)
	OP(const_Fork, fork)
	OP(const_PingPong, pingPong)
	JMP fail

timed:
	CLOCK(const_dataTime1)
	ELAPSED
reply:
	MOVL $1, DI
	LEAQ const_dataResult(R12), SI
	MOVL $8, DX
	LIBC(SYS_write)
	CMPQ AX, $8
	JEQ next
fail:
	MOVL $1, DI
	JMP exitGroup
done:
	XORL DI, DI
exitGroup:
	LIBC(SYS_exit_group)
	INT $3

getpidPlain:
	MOVL $SYS_getpid, BX
getpidPlainNext:
	MOVL BX, AX
	SYSCALL
	DECQ R14
	JNE getpidPlainNext
	JMP timed

getpidMov:
	MOVL $SYS_getpid, AX
	SYSCALL
	DECQ R14
	JNE getpidMov
	JMP timed

getpidCmp:
	MOVL $SYS_getpid, BX
getpidCmpNext:
	MOVL BX, AX
	SYSCALL
	CMPQ AX, $-4095
	JCC fail
	DECQ R14
	JNE getpidCmpNext
	JMP timed

readPlain:
	MOVL $SYS_read, BX
	MOVQ const_dataZeroFD(R12), DI
	LEAQ const_dataBuf(R12), SI
	MOVL $1, DX
readPlainNext:
	MOVL BX, AX
	SYSCALL
	DECQ R14
	JNE readPlainNext
	CMPQ AX, $1
	JNE fail
	JMP timed

readCmp:
	MOVL $SYS_read, BX
	MOVQ const_dataZeroFD(R12), DI
	LEAQ const_dataBuf(R12), SI
	MOVL $1, DX
readCmpNext:
	MOVL BX, AX
	SYSCALL
	CMPQ AX, $-4095
	JCC fail
	DECQ R14
	JNE readCmpNext
	JMP timed

mapTouchUnmap:
	XORL DI, DI
	MOVL $MAP_SIZE, SI
	MOVL $PROT_READ_WRITE, DX
	MOVL $MAP_PRIVATE_ANONYMOUS, R10
	MOVQ $-1, R8
	XORL R9, R9
	LIBC(SYS_mmap)
	JCC fail
	MOVQ AX, DI
	MOVL $MAP_PAGES, BX
mapTouch:
	MOVB $1, (AX)
	ADDQ $PAGE, AX
	DECQ BX
	JNE mapTouch
	MOVL $MAP_SIZE, SI
	LIBC(SYS_munmap)
	JCC fail
	DECQ R14
	JNE mapTouchUnmap
	JMP timed

	// Only the writes are timed.
firstTouch:
	XORL DI, DI
	MOVL $TOUCH_SIZE, SI
	MOVL $PROT_READ_WRITE, DX
	MOVL $MAP_PRIVATE_ANONYMOUS, R10
	MOVQ $-1, R8
	XORL R9, R9
	LIBC(SYS_mmap)
	JCC fail
	MOVQ AX, R15
	MOVQ AX, R13
	MOVL $TOUCH_PAGES, BX
	CMPQ BX, R14
	JLS touchTimed
	MOVQ R14, BX
touchTimed:
	SUBQ BX, R14
	CLOCK(const_dataTime0)
touch:
	MOVB $1, (R13)
	ADDQ $PAGE, R13
	DECQ BX
	JNE touch
	CLOCK(const_dataTime1)
	ELAPSED
	MOVQ R15, DI
	MOVL $TOUCH_SIZE, SI
	LIBC(SYS_munmap)
	JCC fail
	TESTQ R14, R14
	JNE firstTouch
	JMP reply

protectFault:
	LEAQ const_dataPage(R12), R15
protectFaultNext:
	MOVQ R15, DI
	MOVL $PAGE, SI
	MOVL $PROT_READ, DX
	LIBC(SYS_mprotect)
	JCC fail
	MOVB $1, (R15)
	DECQ R14
	JNE protectFaultNext
	MOVQ R15, DI
	MOVL $PAGE, SI
	MOVL $PROT_READ_WRITE, DX
	LIBC(SYS_mprotect)
	JCC fail
	JMP timed

selfSignal:
	MOVL const_dataPID(R12), DI
	MOVL const_dataMainTID(R12), SI
	MOVL $SIGUSR1, DX
	LIBC(SYS_tgkill)
	JCC fail
	DECQ R14
	JNE selfSignal
	JMP timed

raise:
	LIBC(SYS_gettid)
	MOVL AX, BX
	LIBC(SYS_getpid)
	MOVL AX, DI
	MOVL BX, SI
	MOVL $SIGUSR1, DX
	LIBC(SYS_tgkill)
	JCC fail
	DECQ R14
	JNE raise
	JMP timed

thread:
	MOVL $CLONE_THREAD, DI
	LEAQ const_dataStack(R12), SI
	LEAQ const_dataTID(R12), DX
	LEAQ const_dataTID(R12), R10
	XORL R8, R8
	LIBC(SYS_clone)
	JCC fail
	TESTQ AX, AX
	JEQ threadExit
threadJoin:
	MOVL const_dataTID(R12), DX
	TESTL DX, DX
	JEQ threadJoined
	LEAQ const_dataTID(R12), DI
	XORL SI, SI // FUTEX_WAIT
	XORL R10, R10
	LIBC(SYS_futex)
	JMP threadJoin
threadJoined:
	DECQ R14
	JNE thread
	JMP timed
threadExit:
	XORL DI, DI
	LIBC(SYS_exit)
	INT $3

fork:
	MOVL $SIGCHLD, DI
	XORL SI, SI
	XORL DX, DX
	XORL R10, R10
	XORL R8, R8
	LIBC(SYS_clone)
	JCC fail
	TESTQ AX, AX
	JEQ done
	MOVQ AX, DI
	XORL SI, SI
	XORL DX, DX
	XORL R10, R10
	LIBC(SYS_wait4)
	JCC fail
	DECQ R14
	JNE fork
	JMP timed

	// The second thread sends back what it gets until that is not 0.
pingPong:
	MOVB $0, const_dataBuf(R12)
	MOVL $CLONE_THREAD, DI
	LEAQ const_dataStack(R12), SI
	LEAQ const_dataTID(R12), DX
	LEAQ const_dataTID(R12), R10
	XORL R8, R8
	LIBC(SYS_clone)
	JCC fail
	TESTQ AX, AX
	JEQ pong
ping:
	CMPQ R14, $1
	JNE pingSend
	MOVB $1, const_dataBuf(R12) // the last one
pingSend:
	MOVL (const_dataPipes+4)(R12), DI
	LEAQ const_dataBuf(R12), SI
	MOVL $1, DX
	LIBC(SYS_write)
	JCC fail
	MOVL (const_dataPipes+8)(R12), DI
	LEAQ const_dataBuf(R12), SI
	MOVL $1, DX
	LIBC(SYS_read)
	JCC fail
	DECQ R14
	JNE ping
	MOVL $1, R14
	JMP threadJoin
pong:
	MOVL const_dataPipes(R12), DI
	LEAQ (const_dataBuf+8)(R12), SI
	MOVL $1, DX
	LIBC(SYS_read)
	JCC fail
	MOVL (const_dataPipes+12)(R12), DI
	LEAQ (const_dataBuf+8)(R12), SI
	MOVL $1, DX
	LIBC(SYS_write)
	JCC fail
	CMPB (const_dataBuf+8)(R12), $0
	JEQ pong
	JMP threadExit

// The handler of SIGUSR1.
TEXT ·handler(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	RET

// The handler of SIGSEGV, for the page of ProtectFault.
TEXT ·faultHandler(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	DATA(DI)
	ADDQ $const_dataPage, DI
	MOVL $PAGE, SI
	MOVL $PROT_READ_WRITE, DX
	LIBC(SYS_mprotect)
	JCC bad
	RET
bad:
	INT $3

// Where handlers return to.
TEXT ·restorer(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	MOVL $SYS_rt_sigreturn, AX
	SYSCALL
	INT $3

TEXT ·textEnd(SB),NOSPLIT|NOFRAME|TOPFRAME,$0
	INT $3

// func textSymbols() (s symbols)
TEXT ·textSymbols(SB),NOSPLIT,$0-40
	LEAQ ·entry(SB), AX
	MOVQ AX, s_start+0(FP)
	LEAQ ·handler(SB), AX
	MOVQ AX, s_handler+8(FP)
	LEAQ ·faultHandler(SB), AX
	MOVQ AX, s_faultHandler+16(FP)
	LEAQ ·restorer(SB), AX
	MOVQ AX, s_restorer+24(FP)
	LEAQ ·textEnd(SB), AX
	MOVQ AX, s_end+32(FP)
	RET
