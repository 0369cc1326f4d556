package ptrace

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// The platform is not written for arm64 yet: package stub refuses to start, so
// that none of this is reached.

const (
	fpRegSet     = unix.NT_PRFPREG
	ptraceSysemu = 31 // PTRACE_SYSEMU (asm/ptrace.h)
)

func getRegs(int, *arch.Registers) error { return unix.ENOSYS }

func setRegs(int, *arch.Registers) error { return unix.ENOSYS }

func instructionPointer(r *arch.Registers) uintptr { return uintptr(r.Pc) }

func injectRegs(*arch.Registers, uintptr, uintptr, []uintptr) {}

func injectResult(*arch.Registers, uintptr) (uintptr, bool) { return 0, false }

func hasSyscallMark(*arch.Registers) bool { return false }

func getSyscall(int, *arch.Registers) (native, known bool, err error) {
	return false, false, unix.ENOSYS
}

func setResult(int, *arch.Registers, *arch.Registers) (bool, error) { return false, unix.ENOSYS }

func foreignSyscall(*arch.Context64) *linux.SignalInfo { return nil }

func protectionFault(*arch.Context64) *linux.SignalInfo { return nil }

func isFakeSyscall(*linux.SignalInfo, *arch.Context64) bool { return false }

func (t *thread) fault(*threadContext, *arch.Context64, unix.Signal, *linux.SignalInfo) (arch.FaultInfo, hostarch.AccessType, error) {
	return arch.FaultInfo{}, hostarch.NoAccess, platform.ErrNotSupported
}
