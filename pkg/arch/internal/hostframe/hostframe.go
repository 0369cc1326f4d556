// Package hostframe makes the running kernel push a signal frame and shows it,
// so that tests can compare Ringfence's frames with the real ones.
//
// It depends on abi/linux and x/sys. It is for tests alone: it borrows a signal
// handler of the process.
package hostframe

// Request says how the signal comes about.
type Request struct {
	// FP is loaded into the floating point and vector registers before the
	// signal: on amd64 an XSAVE area, aligned to 64 bytes, of which the state
	// components XFeatures are loaded; on arm64 V0-V31, or with SVE and vectors
	// of VL bytes Z0-Z31, P0-P15 and FFR, and from Status FPSR and FPCR.
	FP        []byte
	XFeatures uint64
	SVE       bool
	VL        int
	Status    []byte

	// Fault asks for a SIGSEGV by a write to FaultAddr, instead of a SIGUSR2
	// that the thread sends itself with tgkill(2).
	Fault bool

	// AltStack gives the thread an alternate stack with AltFlags, and the
	// handler SA_ONSTACK.
	AltStack bool
	AltFlags uint32
}

// FaultAddr is an address where nothing is mapped.
const FaultAddr = 0x1000

// Frame is what the kernel pushed.
type Frame struct {
	// Addr is the stack pointer at the handler's entry, and Bytes what was above
	// it: up to the interrupted stack pointer or the end of the alternate stack.
	Addr  uint64
	Bytes []byte

	// SP is the stack pointer before the signal. AltAddr and AltSize are those
	// of the alternate stack.
	SP               uint64
	AltAddr, AltSize uint64

	// Handler, Restorer and Mask are the handler's, where it returns to and the
	// signal mask before the signal.
	Handler, Restorer uint64
	Mask              uint64

	// Entry are registers at the handler's entry; see the architecture's file.
	Entry Entry
}
