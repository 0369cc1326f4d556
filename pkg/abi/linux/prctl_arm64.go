package linux

// The names of this architecture: of seccomp and audit, of ELF, and of uname(2)
// and AT_PLATFORM.
const (
	AUDIT_ARCH_NATIVE = AUDIT_ARCH_AARCH64
	EM_NATIVE         = EM_AARCH64
	MachineName       = "aarch64"
)
