package mm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// patch is what PatchText did at an address.
type patch struct{ old, new []byte }

// at returns what p, which is at addr, has replaced.
func (p patch) at(addr hostarch.Addr) hostarch.AddrRange {
	return hostarch.AddrRange{Start: addr, End: addr + hostarch.Addr(len(p.old))}
}

// maxPatches bounds the patches of a process, and the pages that may not be
// patched any more.
const maxPatches = 4096

// text are the patches of a process. MemoryManager.activeMu protects it.
type text struct {
	state   platform.TextState
	patches map[hostarch.Addr]patch
	// written are pages that were patched when the application wanted to write
	// them: they are not patched again.
	written map[hostarch.Addr]struct{}
	// lost says that nothing is patched any more.
	lost bool
}

// loseTextLocked is called before what is mapped in ar changes, or its permissions.
//
// Preconditions: mm.mappingMu is locked for writing; mm.activeMu is, too.
func (mm *MemoryManager) loseTextLocked(ar hostarch.AddrRange) {
	if mm.text.state == nil {
		return
	}
	if done := mm.text.state.Lose(ar); done != nil {
		mm.text.lost = true
		// Code that cannot be restored is the application's loss.
		mm.restoreTextLocked(context.Background(), hostarch.AddrRange{End: mm.layout.max}, false)
		done()
	}
}

// PatchText implements platform.TextPatcher.PatchText.
func (mm *MemoryManager) PatchText(ctx context.Context, addr hostarch.Addr, new []byte, start hostarch.Addr, code []byte) error {
	around, ok := start.ToRange(uint64(len(code)))
	ar, ok2 := addr.ToRange(uint64(len(new)))
	if !ok || !ok2 || ar.Empty() || !around.IsSupersetOf(ar) {
		return fmt.Errorf("patch of %d bytes at %v: %w", len(new), addr, unix.EINVAL)
	}
	page := addr.RoundDown()
	if !pageAt(page).IsSupersetOf(around) {
		return platform.TextTwoPages
	}
	return mm.withVMA(addr, hostarch.NoAccess, true, func(v *segment[vma]) error {
		switch perms := v.v.perms; {
		case !v.v.private:
			return platform.TextShared
		case perms.Write:
			return platform.TextWritable
		case !perms.Execute:
			return platform.TextNotExecutable
		}
		mm.activeMu.Lock()
		defer mm.activeMu.Unlock()
		t := &mm.text
		if _, ok := t.written[page]; ok || t.lost {
			return platform.TextRestored
		}
		seg, _, err := mm.pageLocked(ctx, v, page, hostarch.Read)
		if err != nil {
			return err
		}
		if !seg.v.private && seg.v.max.Write {
			return platform.TextFile // a copy would not follow its changes
		}
		full := len(t.patches) >= maxPatches
		maps.DeleteFunc(t.patches, func(addr hostarch.Addr, p patch) bool {
			return (full || ar.Overlaps(p.at(addr))) && !mm.hasLocked(addr, p.new)
		})
		if len(t.patches) >= maxPatches {
			return platform.TextTooMany
		}
		for addr, p := range t.patches {
			if ar.Overlaps(p.at(addr)) {
				return platform.TextChanged // it could not be restored before this one
			}
		}
		changed, err := mm.replaceTextLocked(ctx, v, start, code, addr, new)
		if err == nil && !changed {
			err = platform.TextChanged
		}
		if err != nil {
			return err
		}
		if t.patches == nil {
			t.patches = make(map[hostarch.Addr]patch)
		}
		t.patches[addr] = patch{bytes.Clone(code[addr-start:][:len(new)]), bytes.Clone(new)}
		return nil
	})
}

// hasLocked reports whether code is at addr, in a page of the application's own.
//
// Preconditions: mm.activeMu is locked.
func (mm *MemoryManager) hasLocked(addr hostarch.Addr, code []byte) bool {
	seg := mm.pmas.lookup(addr)
	if seg == nil || !seg.v.private {
		return false
	}
	mem := make([]byte, len(code))
	return mm.readTextLocked(seg, addr, mem) == nil && bytes.Equal(mem, code)
}

// readTextLocked copies what is at addr, in seg, to mem.
//
// Preconditions: mm.activeMu is locked.
func (mm *MemoryManager) readTextLocked(seg *segment[pma], addr hostarch.Addr, mem []byte) error {
	_, err := mm.accessPMA(seg, hostarch.AddrRange{Start: addr, End: addr + hostarch.Addr(len(mem))}, hostarch.Read, 0, func(b []byte, done uint64) (int, error) {
		return usermem.SafeCopy(mem[done:], b)
	})
	return err
}

// replaceTextLocked puts new at addr, in v, if code is at start, and reports whether
// it was. Both are in one page.
//
// Preconditions: mm.activeMu is locked for writing.
func (mm *MemoryManager) replaceTextLocked(ctx context.Context, v *segment[vma], start hostarch.Addr, code []byte, addr hostarch.Addr, new []byte) (bool, error) {
	page := pageAt(addr.RoundDown())
	mem := make([]byte, len(code))
	seg, _, err := mm.pageLocked(ctx, v, page.Start, hostarch.Read)
	if err == nil {
		err = mm.readTextLocked(seg, start, mem)
	}
	if err != nil || !bytes.Equal(mem, code) {
		return false, err
	}
	if _, _, err = mm.pageLocked(ctx, v, page.Start, hostarch.Write); err != nil {
		return false, err
	}
	mm.pmas.isolate(page)
	seg = mm.pmas.lookup(page.Start)
	// Whoever executes the page now comes to a fault, and waits for activeMu.
	if was := seg.v.mapped; was.Any() {
		mm.unmapAS(page)
		seg.v.mapped = hostarch.NoAccess
		defer func() {
			mm.mapLocked(seg, was, false) // an error leaves it to a fault
			mm.pmas.merge(page)
		}()
	} else {
		defer mm.pmas.merge(page)
	}
	if err := mm.readTextLocked(seg, start, mem); err != nil || !bytes.Equal(mem, code) {
		return false, err
	}
	_, err = mm.accessPMA(seg, hostarch.AddrRange{Start: addr, End: addr + hostarch.Addr(len(new))}, hostarch.Write, 0, func(b []byte, done uint64) (int, error) {
		return usermem.SafeCopy(b, new[done:])
	})
	return err == nil, err
}

// UnpatchText implements platform.TextPatcher.UnpatchText.
func (mm *MemoryManager) UnpatchText(ctx context.Context, addr hostarch.Addr) error {
	mm.mappingMu.RLock()
	defer mm.mappingMu.RUnlock()
	return mm.restoreText(ctx, hostarch.AddrRange{Start: addr, End: addr + 1}, false)
}

// RestoreText implements platform.TextPatcher.RestoreText.
func (mm *MemoryManager) RestoreText(ctx context.Context) error {
	mm.mappingMu.RLock()
	defer mm.mappingMu.RUnlock()
	return mm.restoreText(ctx, hostarch.AddrRange{End: mm.layout.max}, false)
}

// restoreText undoes the patches in ar; written says that it is because the
// application is about to write there. What is not as it was patched stays.
//
// Preconditions: mm.mappingMu is locked.
func (mm *MemoryManager) restoreText(ctx context.Context, ar hostarch.AddrRange, written bool) error {
	mm.activeMu.Lock()
	defer mm.activeMu.Unlock()
	return mm.restoreTextLocked(ctx, ar, written)
}

// restoreTextLocked is restoreText.
//
// Preconditions: mm.mappingMu is locked; mm.activeMu is locked for writing.
func (mm *MemoryManager) restoreTextLocked(ctx context.Context, ar hostarch.AddrRange, written bool) error {
	t := &mm.text
	for addr, p := range t.patches {
		// They may reach over the end, but then the whole page is in ar.
		if !ar.Overlaps(p.at(addr)) {
			continue
		}
		if v := mm.vmas.lookup(addr); v != nil && v.v.private {
			_, err := mm.replaceTextLocked(ctx, v, addr, p.new, addr, p.old)
			if bus := (*memmap.BusError)(nil); err != nil && !errors.As(err, &bus) {
				return fmt.Errorf("restore the code at %v: %w", addr, err)
			}
		}
		delete(t.patches, addr)
		if written && len(t.written) < maxPatches {
			if t.written == nil {
				t.written = make(map[hostarch.Addr]struct{})
			}
			t.written[addr.RoundDown()] = struct{}{}
		}
	}
	return nil
}

// forkText gives child what mm knows of the text.
//
// Preconditions: mm.activeMu and child's are locked for writing.
func (mm *MemoryManager) forkText(child *MemoryManager) {
	t, c := &mm.text, &child.text
	if t.state != nil {
		c.state = t.state.Fork()
	}
	c.lost = t.lost
	for addr, p := range t.patches {
		if seg := child.pmas.lookup(addr); seg == nil || !seg.v.private {
			continue // it has not got the page
		}
		if c.patches == nil {
			c.patches = make(map[hostarch.Addr]patch)
		}
		c.patches[addr] = p
	}
}

// TextState implements platform.TextPatcher.TextState.
func (mm *MemoryManager) TextState(create func() platform.TextState) platform.TextState {
	mm.activeMu.Lock()
	defer mm.activeMu.Unlock()
	if mm.text.state == nil {
		mm.text.state = create()
	}
	return mm.text.state
}

var _ platform.TextPatcher = (*MemoryManager)(nil)
