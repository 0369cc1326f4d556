package systrap

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// The platform is not written for arm64 yet: New says so, and none of this is
// reached.

const auditArch = unix.AUDIT_ARCH_AARCH64

type stubText struct {
	text                                                  []byte
	handler, call, callArgs, callState, makeCall, callEnd uintptr
}

func textOf() (stubText, error) { return stubText{}, checkCPU() }

func checkCPU() error {
	return fmt.Errorf("not written for this architecture yet: %w", platform.ErrNotSupported)
}

func (t *thread) frameAddr() uint64 { return 0 }

func (t *thread) event(*threadContext, *arch.Registers) (event, error) {
	return event{}, platform.ErrNotSupported
}

func (t *thread) syscall(*arch.Context64, *event) (*linux.SignalInfo, hostarch.AccessType, error) {
	return nil, hostarch.NoAccess, platform.ErrNotSupported
}

func protectionFault(*arch.Context64) *linux.SignalInfo { return nil }

func (t *thread) fault(ac *arch.Context64, e *event) hostarch.AccessType {
	ac.Fault = e.fault
	return hostarch.NoAccess
}

func (t *thread) putChangedRegs(_, _ *arch.Registers) {}

func (t *thread) putFrame(*arch.Registers) {}

func (t *thread) putFP(arch.FPState) bool { return false }

func (t *thread) getFP(arch.FPState) {}

func (t *thread) checkFrame() error { return platform.ErrNotSupported }

func (as *addressSpace) putActions([]byte) {}

func (t *thread) answer(_, _ *arch.Registers) bool { return false }

func (t *thread) putState(*arch.Registers) {}

func (t *thread) saveCall(*threadContext, *arch.Registers) (bool, error) {
	return false, platform.ErrNotSupported
}

func (t *thread) nested() bool { return false }

func wantsGS(*arch.Context64) bool { return false }

func (t *thread) takeCall(_, _ *arch.Registers) bool { return false }
