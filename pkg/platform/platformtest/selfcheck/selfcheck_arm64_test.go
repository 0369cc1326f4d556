package selfcheck

import "github.com/ringfence/ringfence/pkg/arch"

// spoil overwrites what a platform need not fill in after a system call.
func spoil(ac *arch.Context64) {
	for i := 9; i < len(ac.Regs.Regs); i++ {
		ac.Regs.Regs[i] = 0x5555_5555_5555_5555
	}
	ac.Regs.Regs[6], ac.Regs.Regs[7], ac.Regs.Pstate, ac.Regs.TPIDR = 0x55, 0x55, 0x55, 0x55
	fp := ac.FloatingPointData()
	for i := range fp {
		fp[i] = 0x55
	}
}

// archMutants are the mutants of what only this architecture has.
func archMutants() []mutant { return nil }
