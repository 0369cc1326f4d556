package linux

// Sizes in asm-generic/stat.h and linux/eventpoll.h.
const (
	statSize       = 128
	epollEventSize = 16
)
