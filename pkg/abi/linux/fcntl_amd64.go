package linux

// Flags of open(2). O_LARGEFILE is the kernel's value: F_GETFL returns it.
const (
	O_DIRECT    = 0x4000
	O_DIRECTORY = 0x10000
	O_NOFOLLOW  = 0x20000
	O_TMPFILE   = 0x410000
	O_LARGEFILE = 0x8000
)
