// Package stub makes the processes in which application code runs, for the
// backends that run it in processes of the host: ptrace and systrap.
//
// A stub is a tiny static ELF of our own: a page of Go assembler text, which is
// position independent and needs no Go runtime, and some memory beside it, at
// the top of the address space. The image is built at start-up in a sealed memfd
// and started once, as the zygote, in which no application code ever runs. The
// zygote frees everything but the image, then takes requests on a socket: it
// clones stubs off itself, and takes the files that stubs map. Stubs share the
// zygote's table of file descriptors, so that a memory file is handed over once,
// and by a process that no application can touch.
//
// All stubs are children of this process's keeper thread, which lives as long as
// the process, and get a SIGKILL when it dies.
//
// It depends on packages freestanding, affinity, memmap and seccomp. It must never know
// how a backend runs application code, nor put anything into a stub that could be of
// use to an application: every instruction of the text can be jumped to with any
// registers.
package stub

// symbols are addresses of the text, in this program or in a stub.
type symbols struct {
	start, newThread, park, call, clone, end uintptr
}

// Layout says where things lie in every stub of a zygote.
type Layout struct {
	// Start is the address of the image: applications can use what is below it.
	Start uintptr
	// End is the end of the image.
	End uintptr

	// Extra is the address of the backend's own text, see SharedWith.
	Extra uintptr

	// Park is a loop around pause(2), ParkSize bytes long, in which threads wait.
	Park, ParkSize uintptr

	// Call is a system call instruction that a breakpoint follows.
	Call uintptr

	// Clone is the same for clone(2) with a new thread as the result, which sets its
	// signal stack and then parks.
	Clone uintptr

	// AltStack is a constant stack_t that describes SignalStack, a piece of memory
	// that the application can write, which is the signal stack of every thread.
	// The signals of exceptions have a handler that must not be reached: it is there
	// so that the kernel writes a signal frame.
	AltStack uintptr
	// SignalStack is the bounds of that memory.
	SignalStack [2]uintptr
	// Handler is the handler's address.
	Handler uintptr
}
