package linux

// Operations of arch_prctl(2) (asm/prctl.h).
const (
	ARCH_SET_GS         = 0x1001
	ARCH_SET_FS         = 0x1002
	ARCH_GET_FS         = 0x1003
	ARCH_GET_GS         = 0x1004
	ARCH_GET_CPUID      = 0x1011
	ARCH_SET_CPUID      = 0x1012
	ARCH_GET_XCOMP_SUPP = 0x1021
	ARCH_GET_XCOMP_PERM = 0x1022
	ARCH_REQ_XCOMP_PERM = 0x1023
)

// The names of this architecture: of seccomp and audit, of ELF, and of uname(2)
// and AT_PLATFORM.
const (
	AUDIT_ARCH_NATIVE = AUDIT_ARCH_X86_64
	EM_NATIVE         = EM_X86_64
	MachineName       = "x86_64"
)
