package affinity

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// A thread is held after some turns, and for so many turns at most; set free it can run
// where it could before.
func TestHolder(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	all := cpusOf(t, 0)
	tid := other(t)
	f := NewFollower(os.Getpid(), tid)
	var h Holder
	h.Free()
	for round := range 3 {
		held := 0
		for range heldAfter - 1 {
			h.Turn(f)
			if got := cpusOf(t, 0); got != all {
				t.Fatalf("round %d: held too early, on %v", round, got)
			}
		}
		for range heldTurns + 1 {
			h.Turn(f)
			got := cpusOf(t, 0)
			cpu, err := CurrentCPU()
			if err != nil {
				t.Fatal(err)
			}
			var one unix.CPUSet
			one.Set(cpu)
			if got != one {
				t.Fatalf("round %d, after %d turns: on CPU %d, and can run on %v", round, held, cpu, got)
			}
			if got := cpusOf(t, tid); got != one {
				t.Fatalf("round %d, after %d turns: on CPU %d, and the other can run on %v", round, held, cpu, got)
			}
			if held++; round == 1 && held == 3 {
				break
			}
		}
		if round == 1 {
			h.Free()
		} else {
			h.Turn(f)
		}
		if got := cpusOf(t, 0); got != all {
			t.Fatalf("round %d: set free it can run on %v", round, got)
		}
	}
}
