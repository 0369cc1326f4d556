package platform

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// Commands of membarrier(2).
const (
	membarrierQuery                    = 0
	membarrierGlobal                   = 1 << 0
	membarrierPrivateExpedited         = 1 << 3
	membarrierRegisterPrivateExpedited = 1 << 4
)

// membarrier is membarrier(2) without flags.
func membarrier(cmd int) (int, error) {
	n, _, errno := unix.RawSyscall(unix.SYS_MEMBARRIER, uintptr(cmd), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// membarrierHas reports whether the host has all commands in want.
func membarrierHas(want int) bool {
	have, err := membarrier(membarrierQuery)
	return err == nil && have&want == want
}

// UseHostGlobalMemoryBarrier is embedded by Platforms whose application code
// runs in processes other than the Sentry's.
type UseHostGlobalMemoryBarrier struct{}

// HaveGlobalMemoryBarrier implements Platform.HaveGlobalMemoryBarrier.
func (UseHostGlobalMemoryBarrier) HaveGlobalMemoryBarrier() bool {
	return membarrierHas(membarrierGlobal)
}

// GlobalMemoryBarrier implements Platform.GlobalMemoryBarrier. It may take
// several milliseconds: the host waits until every CPU has switched.
func (UseHostGlobalMemoryBarrier) GlobalMemoryBarrier() error {
	if _, err := membarrier(membarrierGlobal); err != nil {
		return fmt.Errorf("membarrier(MEMBARRIER_CMD_GLOBAL): %w", err)
	}
	return nil
}

// UseHostProcessMemoryBarrier is embedded by Platforms whose application code
// runs in the Sentry's own address space as the host sees it (as kvm does).
type UseHostProcessMemoryBarrier struct{}

// registerPrivateExpedited registers this process once.
var registerPrivateExpedited = sync.OnceValue(func() error {
	_, err := membarrier(membarrierRegisterPrivateExpedited)
	return err
})

// HaveGlobalMemoryBarrier implements Platform.HaveGlobalMemoryBarrier.
func (UseHostProcessMemoryBarrier) HaveGlobalMemoryBarrier() bool {
	return membarrierHas(membarrierPrivateExpedited | membarrierRegisterPrivateExpedited)
}

// GlobalMemoryBarrier implements Platform.GlobalMemoryBarrier.
func (UseHostProcessMemoryBarrier) GlobalMemoryBarrier() error {
	if err := registerPrivateExpedited(); err != nil {
		return fmt.Errorf("membarrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED): %w", err)
	}
	if _, err := membarrier(membarrierPrivateExpedited); err != nil {
		return fmt.Errorf("membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED): %w", err)
	}
	return nil
}
