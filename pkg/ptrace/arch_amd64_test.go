package ptrace

// syscallLoop is: 1: mov $39, %eax; syscall; jmp 1b.
var syscallLoop = []byte{0xb8, 39, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7}
