package stub

import "golang.org/x/sys/unix"

const (
	// saRestorer is SA_RESTORER, without which amd64 delivers no signal
	// (arch/x86/kernel/signal_64.c, x64_setup_rt_frame).
	saRestorer = 0x04000000

	// The page in which the kernel answers vsyscalls itself (asm/vsyscall.h).
	vsyscallStart = 0xffff_ffff_ff60_0000
	vsyscallEnd   = vsyscallStart + 0x1000
)

// taskEnds are the ends of a process's addresses, where the image is put: with
// 4-level page tables, and with 5-level ones unless more is asked for
// (Documentation/arch/x86/x86_64/mm.rst).
var taskEnds = []uint64{1<<47 - 4096}

// filter traps what jumps into the vsyscall page: the kernel would answer such a
// call without telling the tracer.
func filter() []unix.SockFilter {
	const (
		ld  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		jeq = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		jge = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
		ret = unix.BPF_RET | unix.BPF_K
		// Offsets in struct seccomp_data (linux/seccomp.h).
		ipLow, ipHigh = 8, 12
	)
	return []unix.SockFilter{
		{Code: ld, K: ipHigh},
		{Code: jeq, Jf: 3, K: vsyscallStart >> 32},
		{Code: ld, K: ipLow},
		{Code: jge, Jf: 1, K: vsyscallStart & 0xffff_ffff},
		{Code: jge, Jt: 0, Jf: 1, K: vsyscallEnd & 0xffff_ffff},
		{Code: ret, K: unix.SECCOMP_RET_ALLOW},
		{Code: ret, K: unix.SECCOMP_RET_TRAP},
	}
}
