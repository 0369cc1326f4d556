package selfcheck

import (
	"encoding/binary"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// restore makes the platform restore what f changes.
func restore(f func(ac *arch.Context64)) func(c *wrapContext, ac *arch.Context64) {
	return func(c *wrapContext, ac *arch.Context64) {
		f(ac)
		c.FullStateChanged()
	}
}

// spoil overwrites what a platform need not fill in after a system call.
func spoil(ac *arch.Context64) {
	r := &ac.Regs
	for _, p := range []*uint64{&r.Rax, &r.Rbx, &r.Rcx, &r.Rbp, &r.R11, &r.R12, &r.R13, &r.R14, &r.R15, &r.Eflags, &r.Fs_base, &r.Gs_base, &r.Cs, &r.Ss, &r.Ds, &r.Es, &r.Fs, &r.Gs} {
		*p = 0x5555_5555_5555_5555
	}
	fp := ac.FloatingPointData()
	for i := range fp {
		fp[i] = 0x55
	}
}

func archMutants() []mutant {
	return []mutant{
		{
			// The upper halves of YMM0 to YMM15 lie at 576 in the XSAVE area.
			name: "LosesAVX",
			wrap: wrapper{beforeSwitch: restore(func(ac *arch.Context64) {
				if fp := ac.FloatingPointData(); len(fp) >= 832 {
					clear(fp[576:832])
				}
			})},
			fails: []string{"State/VectorAcrossSyscall", "State/VectorAcrossInterrupts", "State/VectorFork"},
			says:  "AVX ",
		}, {
			name: "LosesMXCSR",
			wrap: wrapper{beforeSwitch: restore(func(ac *arch.Context64) {
				binary.LittleEndian.PutUint32(ac.FloatingPointData()[24:], 0x1f80)
			})},
			fails: []string{"State/VectorAcrossSyscall"},
			says:  "MXCSR",
		}, {
			name:  "LosesR12",
			wrap:  wrapper{beforeSwitch: restore(func(ac *arch.Context64) { ac.Regs.R12 &^= 1 << 40 })},
			fails: []string{"State/GeneralApplicationView", "State/GeneralSentryView", "State/GeneralAcrossInterrupts"},
			says:  "r12 is",
		}, {
			name:  "LosesDirectionFlag",
			wrap:  wrapper{beforeSwitch: restore(func(ac *arch.Context64) { ac.Regs.Eflags &^= 1 << 10 })},
			fails: []string{"State/GeneralApplicationView", "State/FirstSwitchRestoresAll"},
			says:  "eflags is",
		}, {
			name:  "LosesTLS",
			wrap:  wrapper{beforeSwitch: restore(func(ac *arch.Context64) { ac.Regs.Fs_base &= 0xfff })},
			fails: []string{"State/TLS", "State/BasesWrittenByApplication"},
		}, {
			name: "TakesInt80ForSyscall",
			wrap: wrapper{afterSwitch: func(_ *wrapContext, ac *arch.Context64, info *linux.SignalInfo, at hostarch.AccessType, err error) (*linux.SignalInfo, hostarch.AccessType, error) {
				if err == platform.ErrContextSignal || err == nil && int32(ac.Regs.Orig_rax) < 0 {
					ac.Regs.Orig_rax = 20
					return nil, hostarch.NoAccess, nil
				}
				return info, at, err
			}},
			fails: []string{"Hostile/Int80"},
			says:  "seen as the 64-bit system call",
		},
	}
}
