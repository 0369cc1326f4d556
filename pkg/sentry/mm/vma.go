package mm

import (
	"context"
	"math"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
)

// maxVMAs is how many mappings a process may have: Linux's default of sysctl
// vm.max_map_count.
const maxVMAs = 65530

// vma is a mapping.
type vma struct {
	// mappable is nil for private anonymous memory.
	mappable memmap.Mappable
	// id holds a reference; it may be nil.
	id memmap.MappingIdentity
	// off is the offset in mappable of the vma's start.
	off uint64

	perms    hostarch.AccessType
	maxPerms hostarch.AccessType

	private    bool
	growsDown  bool
	stack      bool
	dontFork   bool
	wipeOnFork bool
	hint       string
}

func (v *vma) advance(n uint64) {
	if v.mappable != nil {
		v.off += n
	}
	if v.id != nil {
		v.id.IncRef()
	}
}

// clone returns a copy with a reference of its own.
func (v *vma) clone() vma {
	c := *v
	c.advance(0)
	return c
}

func (v *vma) release() {
	if v.id != nil {
		v.id.DecRef()
	}
}

func vmasMerge(a, b *segment[vma]) bool {
	next := a.v
	if next.mappable != nil {
		next.off += a.Length()
	}
	return next == b.v
}

// canShareWrites reports whether writes can ever reach the Mappable.
func (v *vma) canShareWrites() bool { return !v.private && v.maxPerms.Write }

// isData reports whether RLIMIT_DATA counts the vma.
func (v *vma) isData() bool { return v.private && v.perms.Write && !v.growsDown }

// low returns the address down to which the space below seg is its own.
func low(seg *segment[vma]) hostarch.Addr {
	if !seg.v.growsDown {
		return seg.Start
	}
	return seg.Start - min(stackGuardGap, seg.Start)
}

// addVMA inserts seg, whose reference on the identity it takes over.
//
// Preconditions: mm.mappingMu is locked for writing.
func (mm *MemoryManager) addVMA(seg *segment[vma]) {
	mm.usage += seg.Length()
	if seg.v.isData() {
		mm.dataUsage += seg.Length()
	}
	mm.vmas.insert(seg)
}

// takeVMAs removes what is mapped in ar and tells the Mappables. The caller
// calls releaseVMAs without locks.
//
// Preconditions: mm.mappingMu is locked for writing; there are no pmas in ar.
func (mm *MemoryManager) takeVMAs(ar hostarch.AddrRange) []*segment[vma] {
	removed := mm.vmas.remove(ar)
	for _, seg := range removed {
		mm.usage -= seg.Length()
		if seg.v.isData() {
			mm.dataUsage -= seg.Length()
		}
		if m := seg.v.mappable; m != nil {
			m.RemoveMapping(mm, seg.AddrRange, seg.v.off, seg.v.canShareWrites())
		}
	}
	return removed
}

// releaseVMAs drops references that may be the last ones.
func releaseVMAs(removed []*segment[vma]) {
	for _, seg := range removed {
		seg.v.release()
	}
}

// unmapLocked removes what is mapped in ar.
//
// Preconditions: mm.mappingMu is locked for writing.
func (mm *MemoryManager) unmapLocked(ar hostarch.AddrRange) []*segment[vma] {
	if mm.vmas.isFree(ar) {
		return nil
	}
	mm.activeMu.Lock()
	mm.loseTextLocked(ar)
	mm.dropLocked(ar)
	mm.activeMu.Unlock()
	return mm.takeVMAs(ar)
}

// mayExpandLocked checks the limits for length more bytes.
func (mm *MemoryManager) mayExpandLocked(length uint64, data bool) error {
	if mm.usage+length < length || mm.usage+length > mm.limits.AS {
		return unix.ENOMEM
	}
	if data && (mm.dataUsage+length < length || mm.dataUsage+length > mm.limits.Data) {
		return unix.ENOMEM
	}
	return nil
}

// usageIn returns how much is mapped in ar.
func (mm *MemoryManager) usageIn(ar hostarch.AddrRange) (all, data uint64) {
	mm.vmas.overlapping(ar, func(seg *segment[vma]) bool {
		n := seg.Intersect(ar).Length()
		all += n
		if seg.v.isData() {
			data += n
		}
		return true
	})
	return all, data
}

// findSpaceLocked returns where length bytes are free. addr is a suggestion, or
// 0.
func (mm *MemoryManager) findSpaceLocked(addr hostarch.Addr, length uint64, map32Bit bool) (hostarch.Addr, error) {
	lo, hi := mm.layout.min, mm.layout.mmapBase
	end := mm.layout.max
	if map32Bit { // arch/x86/kernel/sys_x86_64.c
		lo, hi, end = 0x40000000, 0x80000000, 0x80000000
	}
	if addr != 0 {
		addr = max(addr.RoundDown(), mm.layout.min)
		if ar, ok := addr.ToRange(length); ok && ar.End <= end {
			next := mm.vmas.at(mm.vmas.find(ar.Start))
			if next == nil || low(next) >= ar.End {
				return addr, nil
			}
		}
	}
	if found, ok := mm.vmas.gapBelow(lo, hi, length, low); ok {
		return found, nil
	}
	if !map32Bit {
		if found, ok := mm.vmas.gapBelow(hi, end, length, low); ok {
			return found, nil
		}
	}
	return 0, unix.ENOMEM
}

// MMap implements platform.MemoryManager.MMap. The errors are those of mmap(2).
func (mm *MemoryManager) MMap(ctx context.Context, opts memmap.MMapOpts) (hostarch.Addr, error) {
	if opts.Length == 0 {
		return 0, unix.EINVAL
	}
	length, ok := hostarch.PageRoundUp(opts.Length)
	if !ok {
		return 0, unix.ENOMEM
	}
	if opts.Mappable == nil {
		opts.Offset, opts.MappingIdentity = 0, nil
	}
	if opts.Offset%hostarch.PageSize != 0 {
		return 0, unix.EINVAL
	}
	if length > uint64(mm.layout.max) || opts.Fixed && opts.Addr > mm.layout.max-hostarch.Addr(length) {
		return 0, unix.ENOMEM
	}
	if opts.Fixed && !opts.Addr.IsPageAligned() {
		return 0, unix.EINVAL
	}
	if opts.Fixed && opts.Addr < mm.layout.min {
		return 0, unix.EPERM
	}

	mm.mappingMu.Lock()
	addr, removed, err := mm.mmapLocked(opts, length)
	mm.mappingMu.Unlock()
	releaseVMAs(removed)
	switch {
	case err != nil:
	case opts.Precommit, isSmall(&opts) && mm.entered.Load() && opts.Mappable == nil:
		mm.populateNew(ctx, hostarch.AddrRange{Start: addr, End: addr + hostarch.Addr(length)})
	case isSmall(&opts) && mm.entered.Load():
		mm.useNew(ctx, addr)
	}
	return addr, err
}

// isSmall reports whether a new mapping is so small that it is used as a whole.
func isSmall(opts *memmap.MMapOpts) bool {
	return opts.Private && !opts.GrowsDown && opts.Length <= minBlock && (opts.Perms.Write || opts.Mappable != nil && opts.Perms.Any())
}

func (mm *MemoryManager) mmapLocked(opts memmap.MMapOpts, length uint64) (hostarch.Addr, []*segment[vma], error) {
	v := vma{
		mappable:  opts.Mappable,
		id:        opts.MappingIdentity,
		off:       opts.Offset,
		perms:     opts.Perms,
		maxPerms:  opts.MaxPerms,
		private:   opts.Private,
		growsDown: opts.GrowsDown,
		stack:     opts.Stack,
		hint:      opts.Hint,
	}
	addr := opts.Addr
	var replacedAll, replacedData uint64
	if opts.Fixed {
		ar := hostarch.AddrRange{Start: addr, End: addr + hostarch.Addr(length)}
		// What has a name is not the application's: it is in no stack's way.
		if !opts.Unmap && (!mm.vmas.isFree(ar) || opts.Hint != "" && mm.belowStackLocked(ar)) {
			return 0, nil, unix.EEXIST
		}
		replacedAll, replacedData = mm.usageIn(ar)
	} else {
		var err error
		if addr, err = mm.findSpaceLocked(addr, length, opts.Map32Bit); err != nil {
			return 0, nil, err
		}
	}
	if opts.Offset > math.MaxInt64-length {
		return 0, nil, unix.EOVERFLOW
	}
	if opts.GrowsDown && (opts.Mappable != nil || !opts.Private) {
		return 0, nil, unix.EINVAL
	}
	if !opts.MaxPerms.SupersetOf(opts.Perms) {
		return 0, nil, unix.EACCES
	}
	if mm.vmas.count >= maxVMAs {
		return 0, nil, unix.ENOMEM
	}
	more := length - replacedAll
	if v.isData() && mm.dataUsage-replacedData+length > mm.limits.Data {
		return 0, nil, unix.ENOMEM
	}
	if err := mm.mayExpandLocked(more, false); err != nil {
		return 0, nil, err
	}
	ar := hostarch.AddrRange{Start: addr, End: addr + hostarch.Addr(length)}
	removed := mm.unmapLocked(ar)
	if v.mappable == nil && !v.private {
		shared := newSharedAnon(mm.mf, length)
		v.mappable, v.id = shared, shared // with its first reference
	} else if v.id != nil {
		v.id.IncRef()
	}
	if v.mappable != nil {
		if err := v.mappable.AddMapping(mm, ar, v.off, v.canShareWrites()); err != nil {
			v.release()
			return 0, removed, err
		}
	}
	mm.addVMA(&segment[vma]{ar, v})
	mm.vmas.merge(ar)
	switch small := isSmall(&opts); {
	case small && mm.entered.Load():
		// MMap maps it at once.
	case small || v.mappable != nil && v.private:
		mm.expectLocked(expectation{page: addr, fresh: small})
	}
	return addr, removed, nil
}

// userRange checks a range given by the application: that addr is aligned
// (EINVAL), and that the end exists (else the error wrapped).
func (mm *MemoryManager) userRange(addr hostarch.Addr, length uint64, wrapped unix.Errno) (hostarch.AddrRange, error) {
	if !addr.IsPageAligned() {
		return hostarch.AddrRange{}, unix.EINVAL
	}
	length, ok := hostarch.PageRoundUp(length)
	if !ok {
		return hostarch.AddrRange{}, wrapped
	}
	ar, ok := addr.ToRange(length)
	if !ok {
		return hostarch.AddrRange{}, wrapped
	}
	return ar, nil
}

// MUnmap is munmap(2).
func (mm *MemoryManager) MUnmap(_ context.Context, addr hostarch.Addr, length uint64) error {
	if length == 0 {
		return unix.EINVAL
	}
	ar, err := mm.userRange(addr, length, unix.EINVAL)
	if err != nil {
		return err
	}
	if ar.End > mm.layout.max {
		return unix.EINVAL
	}
	mm.mappingMu.Lock()
	if mm.splitsTooMany(ar) {
		mm.mappingMu.Unlock()
		return unix.ENOMEM
	}
	removed := mm.unmapLocked(ar)
	mm.mappingMu.Unlock()
	releaseVMAs(removed)
	return nil
}

// splitsTooMany reports whether a boundary in the middle of a vma would make
// too many of them.
func (mm *MemoryManager) splitsTooMany(ar hostarch.AddrRange) bool {
	if mm.vmas.count < maxVMAs {
		return false
	}
	seg := mm.vmas.lookup(ar.Start)
	return seg != nil && seg.Start < ar.Start && seg.End > ar.End
}

// MProtect is mprotect(2); growsDown is PROT_GROWSDOWN.
func (mm *MemoryManager) MProtect(ctx context.Context, addr hostarch.Addr, length uint64, perms hostarch.AccessType, growsDown bool) error {
	ar, err := mm.userRange(addr, length, unix.ENOMEM)
	if err != nil || ar.Length() == 0 {
		return err
	}
	mm.mappingMu.Lock()
	defer mm.mappingMu.Unlock()
	if growsDown {
		seg := mm.vmas.at(mm.vmas.find(ar.Start))
		if seg == nil || seg.Start >= ar.End {
			return unix.ENOMEM
		}
		if !seg.v.growsDown {
			return unix.EINVAL
		}
		ar.Start = seg.Start
	}
	if ar.End > mm.layout.max {
		ar.End = mm.layout.max
		err = unix.ENOMEM
	}
	mm.activeMu.Lock()
	mm.loseTextLocked(ar)
	mm.activeMu.Unlock()
	if perms.Write {
		if err := mm.restoreText(ctx, ar, true); err != nil {
			return unix.ENOMEM
		}
	}
	// Like Linux: what lies before the first problem is changed all the same.
	done, problem := mm.protectVMAs(ar, perms)
	if problem == nil {
		problem = err
	}
	if done > ar.Start {
		changed := hostarch.AddrRange{Start: ar.Start, End: done}
		mm.activeMu.Lock()
		mm.protectLocked(changed, perms)
		mm.activeMu.Unlock()
		mm.vmas.merge(changed)
	}
	return problem
}

// protectVMAs sets the permissions of vmas from the start of ar on, until one
// cannot have them, and returns the end of what was changed.
func (mm *MemoryManager) protectVMAs(ar hostarch.AddrRange, perms hostarch.AccessType) (hostarch.Addr, error) {
	for addr := ar.Start; addr < ar.End; {
		seg := mm.vmas.lookup(addr)
		if seg == nil {
			return addr, unix.ENOMEM
		}
		if !seg.v.maxPerms.SupersetOf(perms) {
			return addr, unix.EACCES
		}
		part := seg.Intersect(hostarch.AddrRange{Start: addr, End: ar.End})
		if seg.v.perms == perms {
			addr = part.End
			continue
		}
		was := seg.v.isData()
		now := seg.v
		now.perms = perms
		if !was && now.isData() {
			if err := mm.mayExpandLocked(0, false); err != nil || mm.dataUsage+part.Length() > mm.limits.Data {
				return addr, unix.ENOMEM
			}
		}
		if part != seg.AddrRange {
			if mm.vmas.count+2 > maxVMAs {
				return addr, unix.ENOMEM
			}
			mm.vmas.isolate(part)
			seg = mm.vmas.lookup(part.Start)
		}
		seg.v.perms = perms
		if was {
			mm.dataUsage -= part.Length()
		}
		if seg.v.isData() {
			mm.dataUsage += part.Length()
		}
		addr = part.End
	}
	return ar.End, nil
}

// BrkSetup places the empty heap at or, at random, somewhat behind addr, which
// is rounded up.
func (mm *MemoryManager) BrkSetup(_ context.Context, addr hostarch.Addr) error {
	mm.mappingMu.Lock()
	defer mm.mappingMu.Unlock()
	start, ok := addr.RoundUp()
	if !ok || start > mm.layout.max {
		return unix.ENOMEM
	}
	if mm.layout.heapRandom != 0 {
		start += randomBelow(min(mm.layout.heapRandom, uint64(mm.layout.max-start)))
	}
	mm.heap = hostarch.AddrRange{Start: start, End: start}
	return nil
}

// Brk is brk(2): it moves the end of the heap to addr if it can, and returns the
// end in any case. The error says why it is not addr.
func (mm *MemoryManager) Brk(_ context.Context, addr hostarch.Addr) (hostarch.Addr, error) {
	mm.mappingMu.Lock()
	removed, err := mm.brkLocked(addr)
	end := mm.heap.End
	mm.mappingMu.Unlock()
	releaseVMAs(removed)
	return end, err
}

func (mm *MemoryManager) brkLocked(addr hostarch.Addr) ([]*segment[vma], error) {
	if addr < mm.heap.Start {
		return nil, unix.EINVAL
	}
	if addr > mm.layout.max || uint64(addr-mm.heap.Start) > mm.limits.Data {
		return nil, unix.ENOMEM
	}
	oldEnd, newEnd := mm.heap.End.MustRoundUp(), addr.MustRoundUp()
	if newEnd <= oldEnd {
		mm.heap.End = addr
		return mm.unmapLocked(hostarch.AddrRange{Start: newEnd, End: oldEnd}), nil
	}
	ar := hostarch.AddrRange{Start: oldEnd, End: newEnd}
	if next := mm.vmas.at(mm.vmas.find(ar.Start)); next != nil && low(next) < ar.End+hostarch.PageSize {
		return nil, unix.ENOMEM
	}
	if mm.vmas.count >= maxVMAs {
		return nil, unix.ENOMEM
	}
	if err := mm.mayExpandLocked(ar.Length(), true); err != nil {
		return nil, err
	}
	mm.addVMA(&segment[vma]{ar, vma{
		perms: hostarch.ReadWrite, maxPerms: hostarch.AnyAccess, private: true, hint: "[heap]",
	}})
	mm.vmas.merge(ar)
	mm.heap.End = addr
	return nil, nil
}

// maxStackStep is how far a stack grows at a time, in bytes.
const maxStackStep = 64 << 10

// growStackLocked makes the stack above addr reach down to it.
//
// Preconditions: mm.mappingMu is locked for writing.
func (mm *MemoryManager) growStackLocked(addr hostarch.Addr) error {
	p := mm.vmas.find(addr)
	seg := mm.vmas.at(p)
	if seg == nil {
		return unix.ENOMEM
	}
	if seg.Start <= addr {
		return nil // someone else did
	}
	if !seg.v.growsDown {
		return unix.ENOMEM
	}
	// The stack may not come near another mapping that could be hit by a jump
	// over the guard; PROT_NONE is a guard by itself.
	floor := mm.layout.min
	if prev := mm.vmas.at(mm.vmas.prev(p)); prev != nil {
		floor = max(floor, prev.End)
		if !prev.v.growsDown && prev.v.perms.Any() {
			floor = max(floor, prev.End+stackGuardGap)
		}
	}
	if limit := mm.limits.Stack; limit < uint64(seg.End) {
		floor = max(floor, (seg.End - hostarch.Addr(limit)).MustRoundUp())
	}
	start := addr.RoundDown()
	if start < floor {
		return unix.ENOMEM
	}
	start = max(start&^(maxStackStep-1), floor)
	length := uint64(seg.Start - start)
	if mm.mayExpandLocked(length, false) != nil {
		start = addr.RoundDown()
		length = uint64(seg.Start - start)
		if err := mm.mayExpandLocked(length, false); err != nil {
			return err
		}
	}
	seg.Start = start
	mm.usage += length
	return nil
}

// belowStackLocked reports whether a stack above ar, which is free, may grow so far
// that it comes near it. Of one without a limit it is as much as Linux reserves.
//
// Preconditions: mm.mappingMu is locked.
func (mm *MemoryManager) belowStackLocked(ar hostarch.AddrRange) bool {
	seg := mm.vmas.at(mm.vmas.find(ar.Start))
	return seg != nil && seg.v.growsDown && uint64(seg.End-ar.End) < min(mm.limits.Stack, minMMapGap)+stackGuardGap
}

// FindVMAByName implements platform.MemoryManager.FindVMAByName.
func (mm *MemoryManager) FindVMAByName(ar hostarch.AddrRange, hint string) (hostarch.Addr, uint64, error) {
	mm.mappingMu.RLock()
	defer mm.mappingMu.RUnlock()
	var found *segment[vma]
	mm.vmas.overlapping(ar, func(seg *segment[vma]) bool {
		if seg.v.hint == hint || seg.v.id != nil && seg.v.id.MappedName() == hint {
			found = seg
		}
		return found == nil
	})
	if found == nil {
		return 0, 0, unix.ENOENT
	}
	return found.Start, found.v.off, nil
}
