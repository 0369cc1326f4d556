package platformtest

import (
	"bytes"
	"context"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// patch is what a platform has replaced.
type patch struct{ old, new []byte }

// PatchText implements platform.TextPatcher.PatchText: a copy of the page takes the
// page's place.
func (mm *memoryManager) PatchText(_ context.Context, addr hostarch.Addr, new []byte, start hostarch.Addr, code []byte) error {
	mm.mu.Lock()
	defer mm.mu.Unlock()
	old := code[addr-start:][:len(new)]
	patched := bytes.Clone(code)
	copy(patched[addr-start:], new)
	if err := mm.replaceLocked(start, code, patched); err != nil {
		return err
	}
	if mm.patches == nil {
		mm.patches = make(map[hostarch.Addr]patch)
	}
	mm.patches[addr] = patch{bytes.Clone(old), bytes.Clone(new)}
	return nil
}

func (mm *memoryManager) replaceLocked(addr hostarch.Addr, old, new []byte) error {
	page := hostarch.AddrRange{Start: addr.RoundDown(), End: addr.RoundDown() + hostarch.PageSize}
	if addr+hostarch.Addr(len(old)) > page.End {
		return platform.TextTwoPages
	}
	for _, v := range mm.vmas {
		if !v.ar.Contains(addr) {
			continue
		}
		if v.at.Write {
			return platform.TextWritable
		}
		if !v.at.Execute {
			return platform.TextNotExecutable
		}
		blocks, err := v.f.MapInternal(v.fileRange(page), hostarch.Read)
		if err != nil {
			return err
		}
		code := bytes.Join(blocks, nil)
		at := code[addr.PageOffset():][:len(old)]
		if !bytes.Equal(at, old) {
			return platform.TextChanged
		}
		copy(at, new)
		f, err := newFile(hostarch.PageSize)
		if err != nil {
			return err
		}
		mm.anon = append(mm.anon, f)
		copy(f.data, code)
		return mm.mapLocked(vma{ar: page, f: f, at: v.at, hint: v.hint}, false)
	}
	return unix.EFAULT
}

// UnpatchText implements platform.TextPatcher.UnpatchText.
func (mm *memoryManager) UnpatchText(_ context.Context, addr hostarch.Addr) error {
	mm.mu.Lock()
	defer mm.mu.Unlock()
	if p, ok := mm.patches[addr]; ok {
		mm.replaceLocked(addr, p.new, p.old) // it may not be there any more
		delete(mm.patches, addr)
	}
	return nil
}

// RestoreText implements platform.TextPatcher.RestoreText.
func (mm *memoryManager) RestoreText(context.Context) error {
	mm.mu.Lock()
	defer mm.mu.Unlock()
	for addr, p := range mm.patches {
		mm.replaceLocked(addr, p.new, p.old) // it may not be there any more
	}
	clear(mm.patches)
	return nil
}

// TextState implements platform.TextPatcher.TextState.
func (mm *memoryManager) TextState(create func() platform.TextState) platform.TextState {
	mm.mu.Lock()
	defer mm.mu.Unlock()
	if mm.textState == nil {
		mm.textState = create()
	}
	return mm.textState
}

var _ platform.TextPatcher = (*memoryManager)(nil)
