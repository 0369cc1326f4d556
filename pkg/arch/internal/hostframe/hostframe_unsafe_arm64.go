package hostframe

import "unsafe"

// Entry are registers at the entry of a signal handler.
type Entry struct {
	X0, X1, X2, X29, X30 uint64
}

// GPR returns the value that general register i holds at the signal. X0, X1, X2,
// X8, X18, X27 and X28 are not covered: the system call and Go need them.
func GPR(i int) uint64 { return 0x0101010101010101 * uint64(i+1) }

// faultSize is the size of the instruction that faults in trigger.
const faultSize = 4

//lint:ignore U1000 trigger keeps its link register there
var savedLR uint64

func addresses() (handler, restorer uintptr)

func trigger(fp *byte, predicates uintptr, sp, pid, tid, sig, fault uintptr, status *byte)

func raise(req Request, sp, pid, tid, sig, fault uintptr) {
	var predicates uintptr
	if req.SVE {
		predicates = uintptr(unsafe.Pointer(&req.FP[32*req.VL]))
	}
	trigger(&req.FP[0], predicates, sp, pid, tid, sig, fault, &req.Status[0])
}
