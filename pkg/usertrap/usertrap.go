// Package usertrap rewrites system call instructions that an application uses
// often into jumps to trampolines, which save the trap into the kernel. It decides
// what can be patched, makes the trampolines and keeps account of them; the
// platform has the code that they jump to, and hands in the system calls that
// trapped. The memory manager changes the bytes (platform.TextPatcher).
//
// Two patterns are known on amd64; on arm64 nothing is patched yet.
//
//	mov $nr, %eax          b8 nr nr nr nr
//	syscall                0f 05
//
// The mov becomes a jump, and the system call instruction stays: whoever jumps to
// it directly traps as before, and no thread can be between the two. It must be
// proven that the mov is an instruction, and not the end of another one: see
// certain.
//
//	syscall                0f 05
//	cmp $-4095, %rax       48 3d 01 f0 ff ff
//
// Both are instructions, since the one was executed and the other comes next. The
// jump takes the place of the first and half of the second, and the trampoline
// does the cmp. The address between them is in the registers of threads that wait
// in a system call, and in signal frames: the trampoline lies so that the byte
// there, the second one of the distance, is an instruction that does not exist. A
// thread that goes on there gets SIGILL, and the platform lets it go on in the
// trampoline (Continue). A patch by which that happens too often is undone.
//
// All that a patch relies on lies in the page where it is, so that it is undone
// before any of it changes.
//
// A trampoline loads the address behind the system call instruction into RCX, as
// the instruction does, and that where the thread goes on into R11, which the
// instruction destroys as well.
//
// It depends on package platform, and on golang.org/x/arch to decode instructions. It
// must not know of a backend, nor of a Sentry.
package usertrap

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// Why a system call instruction is not patched, besides what a TextPatcher
// refuses.
const (
	// Unknown: the instructions around it are in no pattern.
	Unknown platform.TextRefusal = "instructions in no pattern"
	// Ambiguous: what looks like the mov before it may be the end of another
	// instruction.
	Ambiguous platform.TextRefusal = "what looks like mov may be part of something else"
	// OtherNumber: it was not the mov that gave the number.
	OtherNumber platform.TextRefusal = "mov with another number than that of the call"
	// Sigreturn: debuggers and unwinders look for these bytes.
	Sigreturn platform.TextRefusal = "rt_sigreturn"
	// NoRoom: no space for trampolines is free near it.
	NoRoom platform.TextRefusal = "no free space near the code"
	// Jumped: too many threads go on behind it, each of which costs a signal.
	Jumped platform.TextRefusal = "jumps behind the system call"
	// Failed: the memory manager or the host failed.
	Failed platform.TextRefusal = "failure of memory"
)

// Why a process is not patched any more.
const (
	// SegmentGS: the application wants the register that leads to the slot.
	SegmentGS platform.TextRefusal = "use of GS"
	// SingleStep: the application is executed step by step.
	SingleStep platform.TextRefusal = "single steps"
	// Trapped: a trampoline does not work, or the application runs it by itself.
	Trapped platform.TextRefusal = "trap in a trampoline"
	// Asked: platform.TextPatchStopper.
	Asked platform.TextRefusal = "asked for"
	// AreaGone: the application has mapped something else where the trampolines are.
	AreaGone platform.TextRefusal = "memory of trampolines is gone"
	// Moved: the code that trampolines jump to is not where it was.
	Moved platform.TextRefusal = "code of another stub"
)

// Stats counts what the tables of a platform do. The zero value is ready for use.
type Stats struct {
	patched, jumps   atomic.Uint64
	mu               sync.Mutex
	refused, stopped map[platform.TextRefusal]uint64
}

// Get returns the counts.
func (s *Stats) Get() platform.TextPatches {
	s.mu.Lock()
	defer s.mu.Unlock()
	return platform.TextPatches{Patched: s.patched.Load(), Jumps: s.jumps.Load(), Refused: maps.Clone(s.refused), Stopped: maps.Clone(s.stopped)}
}

func (s *Stats) count(m *map[platform.TextRefusal]uint64, why platform.TextRefusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if *m == nil {
		*m = make(map[platform.TextRefusal]uint64)
	}
	(*m)[why]++
}

// Threshold is how often a system call instruction traps before it is patched: a
// patch costs as much as some ten traps. Tests of platforms lower it.
var Threshold uint32 = 64

// Counts finds the system call instructions that a thread uses often. The zero
// value is ready for use.
type Counts struct {
	entries [64]struct {
		ip   uint64
		nr   uint64
		n    uint32 // traps
		same uint32 // in a row with the number nr
	}
}

// Hot counts a trap of the system call nr at the instruction before ip. It returns
// true when it is time to try a patch; same says that the number was always the
// same.
func (c *Counts) Hot(ip, nr uint64) (hot, same bool) {
	e := &c.entries[(ip^ip>>6)%uint64(len(c.entries))]
	if e.ip != ip {
		e.ip, e.nr, e.n, e.same = ip, nr, 0, 0
	}
	if e.nr != nr {
		e.nr, e.same = nr, 0
	}
	e.n++
	e.same++
	// Now and then it is tried again.
	return e.n == Threshold || e.n%(64*Threshold) == 0, e.same >= Threshold
}

// areaSize is the size of a block of trampolines, in bytes, and its alignment.
const areaSize = 64 << 10

const (
	maxAreas = 16
	maxSites = 4096
)

// area is a block of trampolines, each of trampolineSize. In place of the first one
// is the address that they jump to.
type area struct {
	start uint64
	used  [areaSize / trampolineSize]bool
}

// site is a patched system call.
type site struct {
	pattern pattern
	// addr is the address of the patch, trampoline where it jumps to.
	addr, trampoline uint64
	old, new         [patchSize]byte
	// after is the code behind the system call instruction.
	after string
}

// Table are the trampolines of one process. It implements platform.TextState.
type Table struct {
	call  uint64
	stats *Stats
	off   atomic.Bool
	// changes counts when code with patches has changed, or may have.
	changes atomic.Uint32

	// patchMu is held while something is patched, mu for what follows.
	patchMu sync.Mutex
	mu      sync.Mutex
	areas   []*area
	// sites are ordered by trampoline, byAddr the same by address. refused are
	// addresses behind system call instructions that were counted as refused.
	sites   []*site
	byAddr  map[uint64]*site
	refused map[uint64]struct{}
	// jumps counts, by the address of the patch, threads that went on behind the
	// system call instruction.
	jumps map[uint64]*jumps
}

// jumps are those of a second, at one patch.
type jumps struct {
	since time.Time
	n     uint32
	// undone says that there were too many: it is not patched again.
	undone bool
}

// maxJumps is how many threads may go on behind a patched system call instruction
// in a second. Each costs a few µs, so that these are less than a hundredth of the
// time.
const maxJumps = 1000

// tooMany counts one more.
func (j *jumps) tooMany() bool {
	if now := time.Now(); now.Sub(j.since) > time.Second {
		j.since, j.n = now, 0
	}
	j.n++
	return j.n > maxJumps
}

// NewTable returns a table for trampolines that jump to call. It counts in stats.
func NewTable(call uint64, stats *Stats) *Table {
	t := &Table{call: call, stats: stats, byAddr: make(map[uint64]*site), refused: make(map[uint64]struct{}), jumps: make(map[uint64]*jumps)}
	t.off.Store(!supported)
	return t
}

// Call returns what NewTable was given.
func (t *Table) Call() uint64 { return t.call }

// Fork implements platform.TextState.Fork.
func (t *Table) Fork() platform.TextState {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := NewTable(t.call, t.stats)
	n.off.Store(t.off.Load())
	for _, a := range t.areas {
		c := *a
		n.areas = append(n.areas, &c)
	}
	n.sites = slices.Clone(t.sites) // they never change
	n.byAddr = maps.Clone(t.byAddr)
	n.refused = maps.Clone(t.refused)
	for addr, j := range t.jumps {
		n.jumps[addr] = &jumps{undone: j.undone}
	}
	return n
}

// Changes returns a number that is another one once code with patches has changed, or
// its permissions, or there are no patches any more: a thread that is in a system call
// from there must not go on in a trampoline, but behind the system call instruction.
func (t *Table) Changes() uint32 {
	if t == nil {
		return 0
	}
	return t.changes.Load()
}

// On reports whether code may be patched, or is.
func (t *Table) On() bool { return t != nil && !t.off.Load() }

// Stop undoes all patches, and lets nobody make more. It reports whether that was
// not so before. Threads may still be in trampolines when it returns; the error is
// that of RestoreText.
func (t *Table) Stop(ctx context.Context, mm platform.TextPatcher, why platform.TextRefusal) (bool, error) {
	if !t.On() {
		return false, nil
	}
	t.patchMu.Lock()
	defer t.patchMu.Unlock()
	// Whoever sees that it is off relies on it: that comes last.
	err := mm.RestoreText(ctx)
	return t.stop(why), err
}

// Lose implements platform.TextState.Lose.
func (t *Table) Lose(ar hostarch.AddrRange) func() {
	if !t.On() {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if slices.ContainsFunc(t.sites, func(s *site) bool { return ar.Contains(hostarch.Addr(s.addr)) }) {
		t.changes.Add(1)
	}
	for _, a := range t.areas {
		if ar.Start < hostarch.Addr(a.start+areaSize) && ar.End > hostarch.Addr(a.start) {
			return func() { t.stop(AreaGone) }
		}
	}
	return nil
}

// stop notes that there are no patches any more. It reports whether that was not so
// before.
func (t *Table) stop(why platform.TextRefusal) bool {
	t.changes.Add(1) // the trampolines may be about to go
	if t.off.Swap(true) {
		return false
	}
	t.stats.count(&t.stats.stopped, why)
	return true
}

// Settle returns where a thread would be without patches that is at ip, if that is
// in a trampoline: what was not executed of it is executed again.
func (t *Table) Settle(ip uint64) (uint64, bool) {
	if t == nil {
		return 0, false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	i, ok := slices.BinarySearchFunc(t.sites, ip, func(s *site, ip uint64) int {
		switch {
		case ip < s.trampoline:
			return 1
		case ip >= s.trampoline+trampolineSize:
			return -1
		}
		return 0
	})
	if !ok {
		return 0, false
	}
	return t.sites[i].settle(ip)
}

// Continue returns where a thread goes on that got SIGILL at ip because a patch is
// there, or was when it got it: in a trampoline, or at ip.
func (t *Table) Continue(ctx context.Context, mm platform.MemoryManager, ip uint64) (uint64, bool) {
	if t == nil {
		return 0, false
	}
	t.mu.Lock()
	s := t.byAddr[ip-syscallSize]
	t.mu.Unlock()
	if s == nil || s.pattern != syscallCmp {
		return 0, false
	}
	var b [patchSize]byte
	if n, err := mm.CopyIn(ctx, hostarch.Addr(s.addr), b[:], usermem.IOOpts{}); n != len(b) || err != nil {
		return 0, false
	}
	switch b {
	case s.new:
		t.jumped(ctx, mm, s)
		return s.trampoline + trampolineCmp, true
	case s.old:
		return ip, true // undone meanwhile
	}
	return 0, false
}

// jumped counts a thread that went on behind the system call instruction of s, and
// undoes the patch if there are too many.
func (t *Table) jumped(ctx context.Context, mm platform.MemoryManager, s *site) {
	t.stats.jumps.Add(1)
	t.mu.Lock()
	j := t.jumps[s.addr]
	if j == nil {
		j = new(jumps)
		t.jumps[s.addr] = j
	}
	undo := j.tooMany() && !j.undone
	t.mu.Unlock()
	text, ok := mm.(platform.TextPatcher)
	if !undo || !ok {
		return
	}
	t.patchMu.Lock()
	defer t.patchMu.Unlock()
	if j.undone || text.UnpatchText(ctx, hostarch.Addr(s.addr)) != nil {
		return // another thread was faster, or it works as it is
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	j.undone = true
	t.refused[s.addr+syscallSize] = struct{}{}
	t.stats.count(&t.stats.refused, Jumped)
}

// Patch tries to patch the system call instruction before ip, with which the
// application has called nr; same says that it is always nr.
func (t *Table) Patch(ctx context.Context, mm platform.MemoryManager, ip, nr uint64, same bool) {
	text, ok := mm.(platform.TextPatcher)
	if !ok || !t.On() {
		return
	}
	t.patchMu.Lock()
	defer t.patchMu.Unlock()
	if t.off.Load() {
		return
	}
	err := t.patch(ctx, mm, text, ip, nr, same)
	switch err {
	case nil:
		t.stats.patched.Add(1)
		return
	case errPatched:
		return
	}
	var why platform.TextRefusal
	if !errors.As(err, &why) {
		why = Failed
	}
	t.mu.Lock()
	_, known := t.refused[ip]
	if !known && len(t.refused) < maxSites {
		t.refused[ip] = struct{}{}
	}
	t.mu.Unlock()
	if !known {
		t.stats.count(&t.stats.refused, why)
	}
}

// errPatched says that there is a patch already: another thread was faster, or one
// jumps to the system call instruction behind a mov.
var errPatched = errors.New("patched already")

// patch is Patch. The error wraps a platform.TextRefusal if it is one.
//
// Preconditions: t.patchMu is held.
func (t *Table) patch(ctx context.Context, mm platform.MemoryManager, text platform.TextPatcher, ip, nr uint64, same bool) error {
	code, pos, err := t.read(ctx, mm, ip)
	if err != nil {
		return err
	}
	if t.patched(code, pos, ip) {
		return errPatched
	}
	p, err := decide(code, pos, nr, same)
	if err != nil {
		return err
	}
	s := &site{pattern: p, addr: ip - syscallSize}
	if p == movSyscall {
		s.addr -= patchSize
	}
	start, end := relied(p, ip)
	if hostarch.Addr(start).RoundDown() != hostarch.Addr(end-1).RoundDown() {
		return platform.TextTwoPages
	}
	at := pos - int(ip-s.addr)
	copy(s.old[:], code[at:])
	if p == syscallCmp {
		s.after = string(code[pos:])
	}

	t.mu.Lock()
	if j := t.jumps[s.addr]; j != nil && j.undone {
		t.mu.Unlock()
		return Jumped
	}
	was := t.byAddr[s.addr]
	full := len(t.sites) >= maxSites
	t.mu.Unlock()
	if was != nil && was.pattern == p && was.old == s.old && was.after == s.after {
		s = was // its trampoline is there
	} else {
		if full {
			return platform.TextTooMany
		}
		if err := t.trampoline(ctx, mm, s); err != nil {
			return err
		}
	}
	if err := text.PatchText(ctx, hostarch.Addr(s.addr), s.new[:], hostarch.Addr(start), code[pos-int(ip-start):pos+int(end-ip)]); err != nil {
		return err
	}
	t.mu.Lock()
	delete(t.refused, ip)
	t.mu.Unlock()
	return nil
}

// patched reports whether code, in which the system call instruction before ip ends
// at pos, has a patch of that instruction.
func (t *Table) patched(code []byte, pos int, ip uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	has := func(p pattern, size int) bool {
		s := t.byAddr[ip-uint64(size)]
		return s != nil && s.pattern == p && pos >= size && bytes.HasPrefix(code[pos-size:], s.new[:])
	}
	return has(movSyscall, patchSize+syscallSize) || has(syscallCmp, syscallSize)
}

// read returns the code around ip, which is at pos.
func (t *Table) read(ctx context.Context, mm platform.MemoryManager, ip uint64) (code []byte, pos int, err error) {
	b := make([]byte, codeBefore+codeAfter)
	// The pages before and after may not be there.
	for _, start := range []uint64{ip - codeBefore, max(ip-codeBefore, uint64(hostarch.Addr(ip-1).RoundDown()))} {
		var n int
		n, err = mm.CopyIn(ctx, hostarch.Addr(start), b[:ip-start+codeAfter], usermem.IOOpts{})
		if uint64(n) >= ip-start {
			return b[:n], int(ip - start), nil
		}
	}
	return nil, 0, errors.Join(err, unix.EFAULT)
}

// trampoline makes one for s, and completes s.
func (t *Table) trampoline(ctx context.Context, mm platform.MemoryManager, s *site) error {
	a, at, err := t.allocate(ctx, mm, s)
	if err != nil {
		return err
	}
	s.trampoline = at
	copy(s.new[:], jump(s.addr, at))
	code := s.code(a.start)
	// The application may have mapped something else there.
	var head [8]byte
	room := make([]byte, len(code))
	if _, err := mm.CopyIn(ctx, hostarch.Addr(a.start), head[:], usermem.IOOpts{}); err != nil {
		return err
	}
	if _, err := mm.CopyIn(ctx, hostarch.Addr(at), room, usermem.IOOpts{}); err != nil {
		return err
	}
	if binary.LittleEndian.Uint64(head[:]) != t.call || !bytes.Equal(room, make([]byte, len(room))) {
		return NoRoom
	}
	if n, err := mm.CopyOut(ctx, hostarch.Addr(at), code, usermem.IOOpts{IgnorePermissions: true}); n != len(code) {
		return errors.Join(err, unix.EFAULT)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	i, _ := slices.BinarySearchFunc(t.sites, at, func(s *site, at uint64) int {
		switch {
		case s.trampoline < at:
			return -1
		case s.trampoline > at:
			return 1
		}
		return 0
	})
	t.sites = slices.Insert(t.sites, i, s)
	t.byAddr[s.addr] = s
	return nil
}

// allocate returns room for a trampoline that s can jump to.
func (t *Table) allocate(ctx context.Context, mm platform.MemoryManager, s *site) (*area, uint64, error) {
	t.mu.Lock()
	for _, a := range t.areas {
		if at, ok := a.take(s); ok {
			t.mu.Unlock()
			return a, at, nil
		}
	}
	full := len(t.areas) >= maxAreas
	t.mu.Unlock()
	if full {
		return nil, 0, platform.TextTooMany
	}
	a, err := t.newArea(ctx, mm, s.addr)
	if err != nil {
		return nil, 0, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.areas = append(t.areas, a)
	at, ok := a.take(s)
	if !ok {
		return nil, 0, NoRoom
	}
	return a, at, nil
}

// take takes room for a trampoline.
func (a *area) take(s *site) (uint64, bool) {
	for i := 1; i < len(a.used); i++ {
		at := a.start + uint64(i)*trampolineSize
		if !a.used[i] && reaches(s, at) {
			a.used[i] = true
			return at, true
		}
	}
	return 0, false
}

// newArea maps an area near addr: below it if possible, where nothing grows.
func (t *Table) newArea(ctx context.Context, mm platform.MemoryManager, addr uint64) (*area, error) {
	const reach = 1<<31 - 4*areaSize
	base := addr &^ (areaSize - 1)
	for _, up := range []bool{false, true} {
		for d := uint64(areaSize); d < reach; d += max(areaSize, d/4&^(areaSize-1)) {
			start := base - d
			if up {
				start = base + d
			}
			if up == (start < base) { // it wraps around
				break
			}
			_, err := mm.MMap(ctx, memmap.MMapOpts{
				Length: areaSize, Addr: hostarch.Addr(start), Fixed: true, Private: true,
				Perms: hostarch.ReadExec, MaxPerms: hostarch.AnyAccess, Hint: "[usertrap]",
			})
			if err != nil {
				continue
			}
			var b [8]byte
			binary.LittleEndian.PutUint64(b[:], t.call)
			if n, err := mm.CopyOut(ctx, hostarch.Addr(start), b[:], usermem.IOOpts{IgnorePermissions: true}); n != len(b) {
				return nil, errors.Join(err, unix.EFAULT)
			}
			return &area{start: start}, nil
		}
	}
	return nil, NoRoom
}
