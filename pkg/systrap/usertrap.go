package systrap

import (
	"context"
	"fmt"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/usertrap"
)

// SetTextPatching implements platform.TextPatching.SetTextPatching.
func (p *systrap) SetTextPatching(on bool) { p.patching.Store(on) }

// PatchesText implements platform.TextPatching.PatchesText.
func (p *systrap) PatchesText() bool { return p.patching.Load() }

// TextPatches implements platform.TextPatching.TextPatches.
func (p *systrap) TextPatches() platform.TextPatches { return p.stats.Get() }

// patches reports whether code of the AddressSpace may be patched.
func (as *addressSpace) patches() bool { return as.table.Load().On() }

// preparePatches sees to it that a thread can run patched code with the state ac,
// or that there is no patched code.
func (as *addressSpace) preparePatches(ctx context.Context, mm platform.MemoryManager, c *threadContext, ac *arch.Context64) error {
	t := as.table.Load()
	if t == nil {
		if as.noTable.Load() {
			return nil
		}
		call := uint64(as.at.call)
		text, ok := mm.(platform.TextPatcher)
		if ok {
			// Another AddressSpace, before fork, may have had what this one must not.
			t, ok = text.TextState(func() platform.TextState {
				if !as.patching {
					return nil
				}
				return usertrap.NewTable(call, as.stats)
			}).(*usertrap.Table)
		}
		if !ok {
			as.noTable.Store(true)
			return nil
		}
		as.table.CompareAndSwap(nil, t)
		switch {
		case !as.patching:
			as.stopPatches(ctx, mm, usertrap.Asked)
		case t.Call() != call:
			as.stopPatches(ctx, mm, usertrap.Moved)
		}
	}
	if !t.On() {
		return nil
	}
	switch {
	case wantsGS(ac):
		as.stopPatches(ctx, mm, usertrap.SegmentGS)
	case ac.SingleStep():
		as.stopPatches(ctx, mm, usertrap.SingleStep)
	case c.stopPatches.Load():
		as.stopPatches(ctx, mm, usertrap.Asked)
	default:
		return nil
	}
	return as.check()
}

// stopPatches undoes all patches for ever. It reports whether there could be any
// before.
func (as *addressSpace) stopPatches(ctx context.Context, mm platform.MemoryManager, why platform.TextRefusal) bool {
	text, ok := mm.(platform.TextPatcher)
	if !ok {
		return false
	}
	stopped, err := as.table.Load().Stop(ctx, text, why)
	if err != nil {
		as.fail(fmt.Errorf("stub process %d: undoing patches because of %s: %w", as.pid, why, err))
	}
	return stopped
}

// StopTextPatches implements platform.TextPatchStopper.StopTextPatches.
func (c *threadContext) StopTextPatches() { c.stopPatches.Store(true) }

// patch patches the system call instruction that the application has executed, if
// it is used often and that can be done.
func (c *threadContext) patch(ctx context.Context, mm platform.MemoryManager, as *addressSpace, ac *arch.Context64) {
	t := as.table.Load()
	if !t.On() {
		return
	}
	if hot, same := c.sites.Hot(uint64(ac.IP()), uint64(ac.SyscallNo())); hot && !ac.SingleStep() {
		t.Patch(ctx, mm, uint64(ac.IP()), uint64(ac.SyscallNo()), same)
	}
}

var (
	_ platform.TextPatching     = (*systrap)(nil)
	_ platform.TextPatchStopper = (*threadContext)(nil)
)
