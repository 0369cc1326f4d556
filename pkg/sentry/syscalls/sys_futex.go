package syscalls

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
)

// futexSyscalls wait for words in memory.
var futexSyscalls = []kernel.Syscall{
	unix.SYS_FUTEX: {Name: "futex", Fn: sysFutex},
}

func sysFutex(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	n, err := futex(t, args)
	return uintptr(n), nil, err
}

func futex(t *kernel.Task, args arch.SyscallArguments) (int, error) {
	addr, op, val := args[0].Pointer(), args[1].Int(), args[2].Uint()
	addr2, val2, val3 := args[4].Pointer(), args[3].Int(), args[5].Uint()
	private := op&linux.FUTEX_PRIVATE_FLAG != 0
	realtime := op&linux.FUTEX_CLOCK_REALTIME != 0
	cmd := op & linux.FUTEX_CMD_MASK
	switch cmd {
	case linux.FUTEX_WAIT_BITSET, linux.FUTEX_WAIT, linux.FUTEX_LOCK_PI2:
	case linux.FUTEX_LOCK_PI:
		realtime = true
	default:
		if realtime {
			return 0, unix.ENOSYS
		}
	}
	switch cmd {
	case linux.FUTEX_WAIT:
		end, err := futexDeadline(t, args[3].Pointer(), false, false)
		if err != nil {
			return 0, err
		}
		return 0, futexWait(t, addr, private, val, linux.FUTEX_BITSET_MATCH_ANY, end)
	case linux.FUTEX_WAIT_BITSET:
		end, err := futexDeadline(t, args[3].Pointer(), true, realtime)
		if err != nil {
			return 0, err
		}
		return 0, futexWait(t, addr, private, val, val3, end)
	case linux.FUTEX_WAKE:
		return t.FutexWake(addr, private, wakeCount(int32(val)), linux.FUTEX_BITSET_MATCH_ANY)
	case linux.FUTEX_WAKE_BITSET:
		return t.FutexWake(addr, private, wakeCount(int32(val)), val3)
	case linux.FUTEX_REQUEUE:
		woken, moved, err := t.FutexRequeue(addr, addr2, private, int(int32(val)), int(val2), nil)
		return woken + moved, err
	case linux.FUTEX_CMP_REQUEUE:
		woken, moved, err := t.FutexRequeue(addr, addr2, private, int(int32(val)), int(val2), &val3)
		return woken + moved, err
	case linux.FUTEX_WAKE_OP:
		return t.FutexWakeOp(addr, addr2, private, wakeCount(int32(val)), wakeCount(val2), val3)
	case linux.FUTEX_LOCK_PI, linux.FUTEX_LOCK_PI2:
		end, err := futexDeadline(t, args[3].Pointer(), true, realtime)
		if err != nil {
			return 0, err
		}
		return 0, t.FutexLockPI(addr, private, false, end)
	case linux.FUTEX_TRYLOCK_PI:
		return 0, t.FutexLockPI(addr, private, true, time.Time{})
	case linux.FUTEX_UNLOCK_PI:
		return 0, t.FutexUnlockPI(addr, private)
	}
	return 0, unix.ENOSYS
}

// wakeCount returns how many to wake: Linux wakes one even if asked for none.
func wakeCount(n int32) int { return int(max(n, 1)) }

// futexDeadline returns when the time-out at addr ends; the zero Time if there
// is none.
func futexDeadline(t *kernel.Task, addr hostarch.Addr, absolute, realtime bool) (time.Time, error) {
	if addr == 0 {
		return time.Time{}, nil
	}
	d, err := copyInDuration(t, addr)
	if err != nil || d == maxDuration {
		return time.Time{}, err
	}
	if absolute {
		clock := int32(linux.CLOCK_MONOTONIC)
		if realtime {
			clock = linux.CLOCK_REALTIME
		}
		d -= hostNow(clock)
	}
	return time.Now().Add(d), nil
}

func futexWait(t *kernel.Task, addr hostarch.Addr, private bool, val, bitset uint32, end time.Time) error {
	err := t.FutexWait(addr, private, val, bitset, end)
	if err == kernel.ERESTARTSYS && !end.IsZero() {
		t.SetRestartBlock(func(t *kernel.Task) (uintptr, error) {
			return 0, futexWait(t, addr, private, val, bitset, end)
		})
		return kernel.ERESTART_RESTARTBLOCK
	}
	return err
}
