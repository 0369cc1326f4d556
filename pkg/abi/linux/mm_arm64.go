package linux

// Protections of mmap(2) that only arm64 has (asm/mman.h).
const (
	PROT_BTI = 0x10
	PROT_MTE = 0x20
)

// Flags of mmap(2) that only other architectures have.
const (
	MAP_32BIT   = 0
	MAP_ABOVE4G = 0
)
