package linux

// Sizes in arch/x86/include/uapi/asm/stat.h and linux/eventpoll.h.
const (
	statSize       = 144
	epollEventSize = 12
)
