package systrap

// Where things lie in a stub, from high to low addresses:
//
//	the image of package stub, with our text at its end
//	the read-only region: requests, constants, the stack_t of every slot
//	the hint page, which the stub can write
//	the slots
//	what applications can use
//
// All but the image is one memory file, in the order region, hint page, slots; the
// Sentry has it mapped too. The stub's assembler knows these names.
const (
	pageSize = 4096

	// A slot is a thread's signal stack with a header above it. Slots are aligned
	// to their size, so that the stack pointer leads to the header. A signal frame
	// with all that XCR0 can have is less than 13 KiB; of an ordinary one everything
	// is in the slot's last page. There may be two. At the beginning of the slot is the
	// floating point state of a call (usertrap_amd64.go), when there is one frame at most.
	slotSize   = 32 << 10
	headerSize = 384
	stackSize  = slotSize - headerSize

	// maxSlots bounds the threads of a stub, and so the Contexts that run in one
	// AddressSpace at a time.
	maxSlots = 4096
	// chunkSlots is how many slots are mapped at a time.
	chunkSlots = 8
	chunkSize  = chunkSlots * slotSize

	// The header, by cache lines; more of it is in layout_amd64.go. The first line goes
	// to and fro with every call that is made without a signal (usertrap_amd64.go).
	headerState = 0  // sysmsg.Word
	headerSpin  = 4  // how often the stub looks at the word before it sleeps
	headerKind  = 8  // what the stub has given the slot away for
	headerOrder = 12 // what the thread is to do after a call, and with the next one
	headerRAX   = 16
	headerRDI   = 24
	headerRSI   = 32
	headerRDX   = 40
	headerR10   = 48
	headerRIP   = 56

	// What an errand is: to wake the thread that sleeps on the word at headerWake, and to
	// sleep as long as that at headerUntil has the value headerWhile.
	headerWake  = 168
	headerUntil = 176
	headerWhile = 184

	// What a thread is to do after a call, in headerOrder: return from it, write its
	// state, or go on with the state that is written there. And whether it is to write
	// its state with the next call.
	orderReturn = 0
	orderSave   = 1
	orderLoad   = 2
	orderWhole  = 4
)

// The read-only region. The first page is the request to the system call thread.
const (
	requestSeq   = 0  // changes with every request
	requestFD    = 8  // the number of the memory file
	requestHint  = 16 // the address of the hint page
	requestCount = 24 // how many system calls there are: the first that fails is the last
	requestCalls = 64 // each its number and six arguments

	callSize = 64
	maxCalls = (pageSize - requestCalls) / callSize

	// The low 32 bits of a result that is negative are an errno and, above it, the
	// number of calls that were not made, the one that failed included.
	resultLeftShift = 12

	constantAction = pageSize       // struct sigaction: of interrupts, of all other signals
	actionSize     = 32             // no less than sizeof(struct sigaction)
	constantText   = pageSize + 64  // address and size of our text
	constantProgs  = pageSize + 96  // struct sock_fprog: of the system call thread, of the others
	constantFilter = pageSize + 128 // their instructions
	stacksOffset   = 2 * pageSize   // a stack_t for each slot
	stackTSize     = 32             // more than sizeof(stack_t)
	roSize         = stacksOffset + maxSlots*stackTSize
)

// In the memory file.
const (
	hintOffset  = roSize
	slotsOffset = (roSize + pageSize + slotSize - 1) &^ (slotSize - 1)
	fileSize    = slotsOffset + maxSlots*slotSize
)

// layout are the addresses in the stubs of one zygote.
type layout struct {
	ro, hint, slots uintptr
	// entry is the system call thread's, handler that for signals; text is ours.
	entry, handler, text, textEnd uintptr
	// call is where patched code calls. From callArgs on flags may be lost, from callState
	// on RDX and RSP; the call is made by the instruction at makeCall, and all behind it
	// up to callEnd belongs to it.
	call, callArgs, callState, makeCall, callEnd uintptr
}
