package kernel_test

import "github.com/ringfence/ringfence/pkg/arch"

const syscallSize = 4

// enterSyscall sets ac as the system call instruction does.
func enterSyscall(ac *arch.Context64, nr uintptr, args []uintptr) {
	r := &ac.Regs
	for i := range 6 {
		r.Regs[i] = 0
		if i < len(args) {
			r.Regs[i] = uint64(args[i])
		}
	}
	r.Regs[8], r.OrigX0, r.Pc = uint64(nr), r.Regs[0], r.Pc+syscallSize
}

// again runs the system call instruction that the thread was moved back onto.
func again(ac *arch.Context64) {
	ac.Regs.OrigX0 = ac.Regs.Regs[0]
	ac.Regs.Pc += syscallSize
}

// handlerSignal returns the first argument of a handler.
func handlerSignal(ac *arch.Context64) int { return int(ac.Regs.Regs[0]) }

// handlerInfo returns the second one: where the siginfo_t is.
func handlerInfo(ac *arch.Context64) uintptr { return uintptr(ac.Regs.Regs[1]) }

// handlerReturn is the return instruction at the end of a handler.
func handlerReturn(*arch.Context64) {}

// cloneChildTID is where clone(2) takes the address for CLONE_CHILD_CLEARTID.
const cloneChildTID = 4
