package hostframe

// Entry are registers at the entry of a signal handler.
type Entry struct {
	RDI, RSI, RDX, RAX uint64
	RFLAGS             uint64
	FCW, MXCSR         uint64
}

// GPR returns the value that general register i holds at the signal, by its
// number in instructions. RAX, RCX, RDX, RSP, RSI, RDI and R11 are not covered:
// the system call uses them.
func GPR(i int) uint64 { return 0x0101010101010101 * uint64(i+1) }

func addresses() (handler, restorer uintptr)

func trigger(fp *byte, xfeatures uint64, sp, pid, tid, sig, fault uintptr)

func raise(req Request, sp, pid, tid, sig, fault uintptr) {
	trigger(&req.FP[0], req.XFeatures, sp, pid, tid, sig, fault)
}

// defaultMXCSR is what Go code runs with.
//
//lint:ignore U1000 trigger loads it
var defaultMXCSR uint32 = 0x1f80

// faultSize is the size of the instruction that faults in trigger.
const faultSize = 3
