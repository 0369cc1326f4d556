package systrap

// syscallLoop makes one system call after the other.
var syscallLoop = []byte{0x0f, 0x05, 0xeb, 0xfc} // syscall; jmp .-2
