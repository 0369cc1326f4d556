package linux

// Flags of mmap(2) that other architectures do not have; there they are 0.
const (
	MAP_32BIT   = 0x40
	MAP_ABOVE4G = 0x80
)
