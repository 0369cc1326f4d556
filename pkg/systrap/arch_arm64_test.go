package systrap

// syscallLoop makes one system call after the other.
var syscallLoop = []byte{0x01, 0x00, 0x00, 0xd4, 0xff, 0xff, 0xff, 0x17} // svc #0; b .-4
