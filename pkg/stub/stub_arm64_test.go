package stub

import "golang.org/x/sys/unix"

var filterCases = map[uint64]uint32{0x400000: unix.SECCOMP_RET_ALLOW}
