package mm

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// maxIO is how much is copied without letting others at the mappings, in bytes.
const maxIO = 256 << 10

// CopyOut implements usermem.IO.CopyOut.
func (mm *MemoryManager) CopyOut(ctx context.Context, addr hostarch.Addr, src []byte, opts usermem.IOOpts) (int, error) {
	n, err := mm.access(ctx, addr, uint64(len(src)), hostarch.Write, opts, func(mem []byte, done uint64) (int, error) {
		return usermem.SafeCopy(mem, src[done:])
	})
	return int(n), err
}

// CopyIn implements usermem.IO.CopyIn.
func (mm *MemoryManager) CopyIn(ctx context.Context, addr hostarch.Addr, dst []byte, opts usermem.IOOpts) (int, error) {
	n, err := mm.access(ctx, addr, uint64(len(dst)), hostarch.Read, opts, func(mem []byte, done uint64) (int, error) {
		return usermem.SafeCopy(dst[done:], mem)
	})
	return int(n), err
}

// ZeroOut implements usermem.IO.ZeroOut.
func (mm *MemoryManager) ZeroOut(ctx context.Context, addr hostarch.Addr, toZero int64, opts usermem.IOOpts) (int64, error) {
	if toZero < 0 {
		return 0, unix.EINVAL
	}
	n, err := mm.access(ctx, addr, uint64(toZero), hostarch.Write, opts, func(mem []byte, _ uint64) (int, error) {
		if err := usermem.SafeZero(mem); err != nil {
			return 0, err
		}
		return len(mem), nil
	})
	return int64(n), err
}

// atomically calls f with the aligned word at addr.
func (mm *MemoryManager) atomically(ctx context.Context, addr hostarch.Addr, at hostarch.AccessType, opts usermem.IOOpts, f func(mem []byte) (uint32, error)) (v uint32, err error) {
	if addr%4 != 0 {
		return 0, unix.EINVAL
	}
	_, err = mm.access(ctx, addr, 4, at, opts, func(mem []byte, _ uint64) (int, error) {
		var err error
		v, err = f(mem)
		return len(mem), err
	})
	return v, err
}

// SwapUint32 implements usermem.IO.SwapUint32.
func (mm *MemoryManager) SwapUint32(ctx context.Context, addr hostarch.Addr, new uint32, opts usermem.IOOpts) (uint32, error) {
	return mm.atomically(ctx, addr, hostarch.ReadWrite, opts, func(mem []byte) (uint32, error) {
		return usermem.SafeSwapUint32(mem, new)
	})
}

// CompareAndSwapUint32 implements usermem.IO.CompareAndSwapUint32.
func (mm *MemoryManager) CompareAndSwapUint32(ctx context.Context, addr hostarch.Addr, old, new uint32, opts usermem.IOOpts) (uint32, error) {
	return mm.atomically(ctx, addr, hostarch.ReadWrite, opts, func(mem []byte) (uint32, error) {
		return usermem.SafeCompareAndSwapUint32(mem, old, new)
	})
}

// LoadUint32 implements usermem.IO.LoadUint32.
func (mm *MemoryManager) LoadUint32(ctx context.Context, addr hostarch.Addr, opts usermem.IOOpts) (uint32, error) {
	return mm.atomically(ctx, addr, hostarch.Read, opts, usermem.SafeLoadUint32)
}

// access calls f with the memory of [addr, addr+length), piece by piece; done is
// what came before. It returns how much f has seen.
func (mm *MemoryManager) access(ctx context.Context, addr hostarch.Addr, length uint64, at hostarch.AccessType, opts usermem.IOOpts, f func(mem []byte, done uint64) (int, error)) (done uint64, err error) {
	ar, ok := addr.ToRange(length)
	if !ok || ar.End > mm.layout.max {
		if ar.End = mm.layout.max; ar.Start >= ar.End {
			return 0, &FaultError{Addr: addr}
		}
		defer func() { // once all that can be is done
			if err == nil {
				err = &FaultError{Addr: ar.End}
			}
		}()
	}
	for ar.Start < ar.End {
		part := ar
		part.End = min(part.End, part.Start+maxIO)
		var n uint64
		err := mm.withVMA(part.Start, at, opts.IgnorePermissions, func(v *segment[vma]) error {
			if at.Write && !v.v.private && !v.v.perms.Write {
				return &FaultError{Addr: part.Start, Mapped: true} // whatever IgnorePermissions says
			}
			var err error
			n, err = mm.accessVMA(ctx, v, part.Intersect(v.AddrRange), at, func(mem []byte, n uint64) (int, error) {
				return f(mem, done+n)
			})
			return err
		})
		done += n
		ar.Start += hostarch.Addr(n)
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// accessVMA is access for a part of v. It does all of ar or returns an error,
// unless it has done something.
func (mm *MemoryManager) accessVMA(ctx context.Context, v *segment[vma], ar hostarch.AddrRange, at hostarch.AccessType, f func(mem []byte, done uint64) (int, error)) (done uint64, err error) {
	start := ar.Start
	mm.activeMu.RLock()
	// A debugger, say, writes code.
	overPatches := at.Write && !v.v.perms.Write && len(mm.text.patches) > 0
	for ar.Start < ar.End && err == nil && !overPatches {
		seg := mm.pmas.lookup(ar.Start)
		if seg == nil || at.Write && seg.v.cow || !v.v.private && !seg.v.max.SupersetOf(at) {
			break
		}
		var n uint64
		n, err = mm.accessPMA(seg, ar.Intersect(seg.AddrRange), at, uint64(ar.Start-start), f)
		ar.Start += hostarch.Addr(n)
	}
	mm.activeMu.RUnlock()
	if ar.Start > start || err != nil {
		return uint64(ar.Start - start), err
	}

	mm.activeMu.Lock()
	defer mm.activeMu.Unlock()
	if overPatches {
		if err := mm.restoreTextLocked(ctx, ar, true); err != nil {
			return 0, err
		}
	}
	seg, _, err := mm.pageLocked(ctx, v, ar.Start.RoundDown(), at)
	if err != nil {
		return 0, err
	}
	return mm.accessPMA(seg, ar.Intersect(seg.AddrRange), at, 0, f)
}

// accessPMA is access for a part of seg; done is what came before.
//
// Preconditions: mm.activeMu is locked.
func (mm *MemoryManager) accessPMA(seg *segment[pma], ar hostarch.AddrRange, at hostarch.AccessType, before uint64, f func(mem []byte, done uint64) (int, error)) (done uint64, err error) {
	fr := fileRange(seg, ar)
	if seg.v.file == memmap.File(mm.mf) { // without an allocation
		for fr.Start < fr.End {
			mem, err := mm.mf.Bytes(fr)
			if err != nil {
				return done, err
			}
			n, err := accessBytes(mem, before+done, f)
			done += n
			if err != nil {
				return done, err
			}
			fr.Start += n
		}
		return done, nil
	}
	// The file wants whole pages.
	skip := fr.Start % hostarch.PageSize
	end, _ := hostarch.PageRoundUp(fr.End)
	blocks, err := seg.v.file.MapInternal(memmap.FileRange{Start: fr.Start - skip, End: end}, at)
	if err != nil {
		return 0, err
	}
	for _, mem := range blocks {
		if skip >= uint64(len(mem)) {
			skip -= uint64(len(mem))
			continue
		}
		mem = mem[skip:]
		skip = 0
		mem = mem[:min(uint64(len(mem)), ar.Length()-done)]
		if len(mem) == 0 {
			break
		}
		n, err := accessBytes(mem, before+done, f)
		done += n
		if err != nil {
			return done, err
		}
	}
	if done < ar.Length() {
		return done, &memmap.BusError{Err: unix.EFAULT}
	}
	return done, nil
}

// accessBytes calls f with mem. If that faults it goes page by page, so that
// what can be done is done, and known.
func accessBytes(mem []byte, before uint64, f func(mem []byte, done uint64) (int, error)) (done uint64, err error) {
	n, err := f(mem, before)
	if err == nil {
		return uint64(n), nil
	}
	if !errors.Is(err, unix.EFAULT) || len(mem) <= 4 {
		return 0, &memmap.BusError{Err: err}
	}
	for len(mem) > 0 {

		k := min(len(mem), pageRest(mem))
		n, err := f(mem[:k], before+done)
		if err != nil {
			return done, &memmap.BusError{Err: err}
		}
		done += uint64(n)
		mem = mem[n:]
	}
	return done, nil
}
