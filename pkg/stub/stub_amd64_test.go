package stub

import "golang.org/x/sys/unix"

var filterCases = map[uint64]uint32{
	0x400000:              unix.SECCOMP_RET_ALLOW,
	0x7fff_ff60_0000:      unix.SECCOMP_RET_ALLOW,
	0xff60_0000:           unix.SECCOMP_RET_ALLOW,
	vsyscallStart - 1:     unix.SECCOMP_RET_ALLOW,
	vsyscallStart:         unix.SECCOMP_RET_TRAP,
	vsyscallStart + 0x400: unix.SECCOMP_RET_TRAP,
	vsyscallEnd - 1:       unix.SECCOMP_RET_TRAP,
	vsyscallEnd:           unix.SECCOMP_RET_ALLOW,
}
