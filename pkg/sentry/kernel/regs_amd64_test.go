package kernel_test

import "github.com/ringfence/ringfence/pkg/arch"

const syscallSize = 2

// enterSyscall sets ac as the system call instruction does.
func enterSyscall(ac *arch.Context64, nr uintptr, args []uintptr) {
	r := &ac.Regs
	for i, p := range []*uint64{&r.Rdi, &r.Rsi, &r.Rdx, &r.R10, &r.R8, &r.R9} {
		*p = 0
		if i < len(args) {
			*p = uint64(args[i])
		}
	}
	r.Orig_rax, r.Rip = uint64(nr), r.Rip+syscallSize
}

// again runs the system call instruction that the thread was moved back onto.
func again(ac *arch.Context64) {
	ac.Regs.Orig_rax = ac.Regs.Rax
	ac.Regs.Rip += syscallSize
}

// handlerSignal returns the first argument of a handler.
func handlerSignal(ac *arch.Context64) int { return int(ac.Regs.Rdi) }

// handlerInfo returns the second one: where the siginfo_t is.
func handlerInfo(ac *arch.Context64) uintptr { return uintptr(ac.Regs.Rsi) }

// handlerReturn is the return instruction at the end of a handler.
func handlerReturn(ac *arch.Context64) { ac.Regs.Rsp += 8 }

// cloneChildTID is where clone(2) takes the address for CLONE_CHILD_CLEARTID.
const cloneChildTID = 3
