package arch

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
)

// SignalSetup and SignalRestore are defined per architecture, with one contract:
//
// SignalSetup writes a signal frame to the application's stack and makes c enter
// the handler of act. info is what the handler is told; alt is the thread's
// alternate stack, which is disarmed if it has SS_AUTODISARM; mask is what
// SignalRestore will return, the mask from before the signal. restorer is where
// the handler returns to if act has no SA_RESTORER. The full state of the thread
// must be in c (platform.Context.PullFullState). On error, which is EFAULT when
// the frame cannot be written or does not fit the alternate stack, c and alt are
// unchanged and Linux kills the thread with SIGSEGV.
//
// SignalRestore is rt_sigreturn(2): it restores c from the frame at its stack
// pointer, and returns the signal mask and the alternate stack that the frame
// holds. The frame is the application's to forge: it is read once, and nothing
// is taken from it that the application could not have set itself. mask lacks
// SIGKILL and SIGSTOP; alt is not checked: treat it as an argument of
// sigaltstack(2) whose errors are ignored. On error c is unchanged and Linux
// sends SIGSEGV.

// badFrame is the error for a frame at addr.
func badFrame(addr uint64, why any) error {
	return fmt.Errorf("signal frame at %#x: %v: %w", addr, why, unix.EFAULT)
}

// onSignalStack reports whether a thread with stack pointer sp runs on alt. A
// stack with SS_AUTODISARM is never in use while it is armed.
func onSignalStack(alt *linux.SignalStack, sp uint64) bool {
	return alt.Flags&linux.SS_AUTODISARM == 0 && alt.Contains(sp)
}

// entersSignalStack reports whether a handler of act switches to alt from sp.
func entersSignalStack(act *linux.SigAction, alt *linux.SignalStack, sp uint64) bool {
	return act.Flags&linux.SA_ONSTACK != 0 && alt.Flags&linux.SS_DISABLE == 0 && alt.Size != 0 && !onSignalStack(alt, sp)
}

// disarm does what SS_AUTODISARM asks for, once a frame is written.
func disarm(alt *linux.SignalStack) {
	if alt.Flags&linux.SS_AUTODISARM != 0 {
		*alt = linux.SignalStack{Flags: linux.SS_DISABLE}
	}
}

// restorerOf returns where act's handler returns to.
func restorerOf(act *linux.SigAction, restorer uint64) (uint64, error) {
	if act.Flags&linux.SA_RESTORER != 0 {
		return act.Restorer, nil
	}
	if restorer == 0 {
		return 0, fmt.Errorf("signal handler at %#x has no restorer: set SA_RESTORER: %w", act.Handler, unix.EFAULT)
	}
	return restorer, nil
}
