package kvm

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/pagetables"
	"github.com/ringfence/ringfence/pkg/sysmsg"
)

// Where leaving the guest is slow, SYSCALL gets to a shim, which does not leave: it
// posts the registers that a system call consists of in a slot, by the protocol of
// package sysmsg, and spins for the answer. It leaves when nobody looks at the slot,
// or the answer does not come in time.
//
// On kvm-pvm the shim runs in ring 3. The application can jump anywhere into it, and
// write its slots: those of its own AddressSpace, no others. What is in them is as
// trustworthy as its registers.

// slot is where a vCPU posts system calls made in one AddressSpace. Its first cache
// line changes hands with every call; the second, with the arguments, only when one of
// them is another than in the call before.
type slot struct {
	word  atomic.Uint32
	spins atomic.Uint32 // how often to look for the answer
	ret   atomic.Uint64
	regs  [numPosted]atomic.Uint64
	_     [slotSize - 16 - 8*numPosted]byte
}

const (
	slotSize     = 256
	slotsPerPage = hostarch.PageSize / slotSize

	// maxShims is how many vCPUs can have one. More than a shim for two CPUs are never
	// in use.
	maxShims = 64

	// slotsAddr is where slots are in every AddressSpace, below all that applications
	// can map: instructions reach them without a register.
	slotsAddr = lowAddr + hostarch.PageSize

	// leaveNow is a state of a slot that sysmsg does not have: the shim is to leave.
	leaveNow = 5
)

// The registers that are posted, by their place in a slot. All others stay in the
// vCPU.
const (
	postedRAX = iota
	postedRSP
	_ // to the end of the cache line
	_
	_
	_
	postedRDI
	postedRSI
	postedRDX
	postedR10
	postedR8
	postedR9
	postedRCX // what RIP was
	postedR11 // what RFLAGS was
	numPosted
)

// postedChanges are the registers that are posted if they are not what they were the
// last time: all but RAX, in which RCX is by then.
var postedChanges = []struct{ at, reg byte }{
	{postedRSP, 4}, {postedRDI, 7}, {postedRSI, 6}, {postedRDX, 2}, {postedR10, 10},
	{postedR8, 8}, {postedR9, 9}, {postedRCX, regAX}, {postedR11, 11},
}

// answerTime is how long an answer takes at least. maxPauses is how often a shim can
// pause for that.
const (
	answerTime = 120 * time.Nanosecond
	maxPauses  = 16
)

// shimSize is the room for a shim.
const shimSize = 512

// assembler makes the code of a shim.
type assembler struct {
	code   []byte
	labels map[string]int
	jumps  map[int]string // places of displacements of 8 bits
	slot   uint32
}

func (a *assembler) emit(b ...byte)    { a.code = append(a.code, b...) }
func (a *assembler) label(name string) { a.labels[name] = len(a.code) }

func (a *assembler) jump(opcode byte, to string) {
	a.emit(opcode, 0)
	a.jumps[len(a.code)-1] = to
}

// slotAt emits the ModRM byte for a register and [offset in the slot].
func (a *assembler) slotAt(reg byte, offset int) {
	a.emit(reg&7<<3|4, 0x25)
	a.code = binary.LittleEndian.AppendUint32(a.code, a.slot+uint32(offset))
}

// move64 emits a move between a register and the slot.
func (a *assembler) move64(opcode, reg byte, offset int) {
	a.emit(0x48|reg>>3<<2, opcode)
	a.slotAt(reg, offset)
}

const (
	opStore = 0x89
	opLoad  = 0x8b
	opJmp   = 0xeb
	opJrcxz = 0xe3
	regAX   = 0
	regCX   = 1
)

// moveChanged emits a move of a register into the slot unless it is there already: a
// write would take the cache line from those who read it. RCX is lost, flags are not.
func (a *assembler) moveChanged(reg byte, offset int) {
	a.move64(opLoad, regCX, offset)
	a.emit(0x48, 0xf7, 0xd1)                           // not rcx
	a.emit(0x48|reg>>3, 0x8d, 0x4c, regCX<<3|reg&7, 1) // lea rcx, [reg+rcx+1]
	a.emit(opJrcxz, 8)                                 // over the move
	a.move64(opStore, reg, offset)
}

// wordLessECX emits LEA ECX, [RCX-n]: unlike SUB it leaves the flags alone.
func (a *assembler) wordLessECX(n byte) { a.emit(0x8d, 0x49, -n) }

// shimLabels are the offsets in a shim that matter: posted is the first instruction
// after the one that posts, leave the one that leaves.
type shimLabels struct{ posted, leave, end uint64 }

// makeShim returns the code that posts in the slot at an address below 2 GiB, and pauses
// some times before it looks for the answer: a look that is too early takes the cache
// line from the Sentry, which is about to write it. No instruction before the one that
// gives up changes flags, so that in ring 3 a jump is enough to return.
func makeShim(slotAddr uint32, ring0 bool, pauses int) ([]byte, shimLabels) {
	a := &assembler{labels: map[string]int{}, jumps: map[int]string{}, slot: slotAddr}
	const wordAt, spinsAt, retAt, regsAt = 0, 4, 8, 16
	a.move64(opStore, regAX, regsAt+8*postedRAX)
	a.emit(0x48, 0x89, 0xc8) // mov rax, rcx
	for _, p := range postedChanges {
		a.moveChanged(p.reg, regsAt+8*int(p.at))
	}
	a.emit(0xb8, sysmsg.Sentry, 0, 0, 0) // mov eax, Sentry
	a.emit(0x87)                         // xchg [word], eax
	a.slotAt(regAX, wordAt)
	a.label("posted")
	a.emit(0x89, 0xc1) // mov ecx, eax
	a.wordLessECX(sysmsg.Stub)
	a.jump(opJrcxz, "wait")
	a.jump(opJmp, "leave") // nobody looks at it

	a.label("wait")
	a.emit(opLoad) // mov eax, [spins]
	a.slotAt(regAX, spinsAt)
	for range pauses {
		a.emit(0xf3, 0x90) // pause
	}
	a.label("look")
	a.emit(opLoad) // mov ecx, [word]
	a.slotAt(regCX, wordAt)
	a.wordLessECX(sysmsg.Sentry)
	a.jump(opJrcxz, "again")
	a.wordLessECX(sysmsg.Stub - sysmsg.Sentry)
	a.jump(opJrcxz, "answered")
	a.wordLessECX(sysmsg.StubSentryWaits - sysmsg.Stub)
	a.jump(opJrcxz, "answered")
	a.jump(opJmp, "leave")
	a.label("again")
	a.emit(0x89, 0xc1) // mov ecx, eax
	a.jump(opJrcxz, "giveUp")
	a.emit(0x8d, 0x40, 0xff) // lea eax, [rax-1]
	a.emit(0xf3, 0x90)       // pause
	a.jump(opJmp, "look")

	a.label("giveUp")
	a.emit(0xb8, sysmsg.Sentry, 0, 0, 0)          // mov eax, Sentry
	a.emit(0xb9, sysmsg.SentryStubWaits, 0, 0, 0) // mov ecx, SentryStubWaits
	a.emit(0xf0, 0x0f, 0xb1)                      // lock cmpxchg [word], ecx
	a.slotAt(regCX, wordAt)
	a.label("leave")
	a.emit(opcodeHLT) // in ring 3 a general protection fault

	a.label("answered")
	a.move64(opLoad, regAX, retAt)
	// The cache line comes here meanwhile, for the next call.
	a.move64(opStore, regAX, regsAt+8*postedRAX)
	a.move64(opLoad, regCX, regsAt+8*postedRCX)
	if ring0 {
		a.emit(0x48, 0x0f, 0x07) // sysretq
	} else {
		a.emit(0xff, 0xe1) // jmp rcx
	}
	for at, to := range a.jumps {
		a.code[at] = byte(a.labels[to] - at - 1)
	}
	return a.code, shimLabels{uint64(a.labels["posted"]), uint64(a.labels["leave"]), uint64(len(a.code))}
}

// slotAddr and shimAddr return where the slot and the shim of a vCPU are.
func slotAddr(id int) uint64 { return slotsAddr + uint64(id)*slotSize }
func shimAddr(id int) uint64 { return shimsAddr + uint64(id)*shimSize }

// enableShims gives every vCPU a shim that can have one.
func (m *machine) enableShims() error {
	n := min(len(m.pool.all), maxShims)
	const perPage = hostarch.PageSize / shimSize
	pauses := int(min(sysmsg.Spins(answerTime), maxPauses))
	opts := pagetables.MapOpts{Access: hostarch.ReadExec, User: !m.ring0Syscalls.Load()}
	for first := 0; first < n; first += perPage {
		phys, t, err := m.tables.New()
		if err != nil {
			return err
		}
		for id := first; id < min(first+perPage, n); id++ {
			var code []byte
			code, m.shim = makeShim(uint32(slotAddr(id)), m.ring0Syscalls.Load(), pauses)
			copy(bytesOf(t)[(id-first)*shimSize:][:shimSize], code)
		}
		if _, err := m.window.Map(hostarch.Addr(shimAddr(first)), hostarch.PageSize, opts, phys); err != nil {
			return err
		}
	}
	for _, v := range m.pool.all[:n] {
		v.shim = shimAddr(v.id)
		if err := v.setMSRs(); err != nil {
			return err
		}
	}
	m.shims = n
	return nil
}

// disableShims undoes enableShims.
func (m *machine) disableShims() error {
	for _, v := range m.pool.all[:m.shims] {
		v.shim = 0
		if err := v.setMSRs(); err != nil {
			return err
		}
	}
	m.shims = 0
	return nil
}

// mapSlots gives a new AddressSpace its slots.
func (as *addressSpace) mapSlots() error {
	opts := pagetables.MapOpts{Access: hostarch.ReadWrite, User: !as.m.ring0Syscalls.Load()}
	for i := 0; i*slotsPerPage < as.m.shims; i++ {
		phys, t, err := as.m.tables.New()
		if err != nil {
			return err
		}
		as.slotPages = append(as.slotPages, phys)
		as.slots = append(as.slots, slotsOf(t)...)
		if _, err := as.pt.Map(slotsAddr+hostarch.Addr(i)*hostarch.PageSize, hostarch.PageSize, opts, phys); err != nil {
			return err
		}
	}
	return nil
}

// freeSlots frees the slots. No vCPU is going to reach them any more.
func (as *addressSpace) freeSlots() {
	for _, phys := range as.slotPages {
		as.m.tables.freeLater(phys)
	}
	as.slotPages, as.slots = nil, nil
}

// inShim reports whether an address is behind the instruction of the vCPU's shim
// that posts.
func (v *vcpu) inShim(rip uint64) bool {
	return v.shim != 0 && rip >= v.shim+v.m.shim.posted && rip < v.shim+v.m.shim.end
}

// leftShim reports whether the vCPU stopped in its shim with a system call posted,
// and reads its registers into r: all but those that the shim uses.
func (v *vcpu) leftShim(r *arch.Registers) bool {
	if v.shim == 0 {
		return false
	}
	g, leave := &v.run.regs, v.shim+v.m.shim.leave
	if v.interrupted {
		if v.run.events.pending() || !v.inShim(g.rip) {
			return false
		}
		v.saveUser(r)
		return true
	}
	switch {
	case g.rip == leave+1:
		v.saveUser(r)
		return true
	case g.rip == stubsAddr+vectorGP*stubSize+1:
		v.saveFrame(r, vectorGP)
		return r.Rip == leave && r.Cs == userCS
	}
	return false
}

// copyPosted reads what was posted into r.
func (s *slot) copyPosted(r *arch.Registers) {
	r.Rdi, r.Rsi, r.Rdx = s.regs[postedRDI].Load(), s.regs[postedRSI].Load(), s.regs[postedRDX].Load()
	r.R10, r.R8, r.R9 = s.regs[postedR10].Load(), s.regs[postedR8].Load(), s.regs[postedR9].Load()
	r.Rcx, r.R11, r.Rsp = s.regs[postedRCX].Load(), s.regs[postedR11].Load(), s.regs[postedRSP].Load()
	r.Ss = userDS
	r.Rax = s.regs[postedRAX].Load()
	madeSyscall(r)
}

// copyCall copies what copyPosted sets.
func copyCall(r, from *arch.Registers) {
	r.Rdi, r.Rsi, r.Rdx = from.Rdi, from.Rsi, from.Rdx
	r.R10, r.R8, r.R9 = from.R10, from.R8, from.R9
	r.Rcx, r.R11, r.Rsp = from.Rcx, from.R11, from.Rsp
	r.Ss, r.Rax, r.Orig_rax = from.Ss, from.Rax, from.Orig_rax
	r.Rip, r.Eflags, r.Cs = from.Rip, from.Eflags, from.Cs
}

// copyRest reads into r what is not posted.
func copyRest(r, from *arch.Registers) {
	r.Rbx, r.Rbp = from.Rbx, from.Rbp
	r.R12, r.R13, r.R14, r.R15 = from.R12, from.R13, from.R14, from.R15
	r.Ds, r.Es, r.Fs, r.Gs = from.Ds, from.Es, from.Fs, from.Gs
	r.Fs_base, r.Gs_base = from.Fs_base, from.Gs_base
}

// shimSpin is how long a shim and the Sentry look at a slot before they give up: less
// than leaving takes twice.
const shimSpin = 50 * time.Microsecond

// errForged is when a vCPU is not where its slot says.
var errForged = fmt.Errorf("the vCPU is not in the shim: %w", sysmsg.ErrViolation)

// equalButRAX compares registers one by one: nearly all were written shortly before, and
// a comparison in larger pieces would wait for that.
func equalButRAX(a, b *arch.Registers) bool {
	return a.R15 == b.R15 && a.R14 == b.R14 && a.R13 == b.R13 && a.R12 == b.R12 &&
		a.Rbp == b.Rbp && a.Rbx == b.Rbx && a.R11 == b.R11 && a.R10 == b.R10 &&
		a.R9 == b.R9 && a.R8 == b.R8 && a.Rcx == b.Rcx && a.Rdx == b.Rdx &&
		a.Rsi == b.Rsi && a.Rdi == b.Rdi && a.Orig_rax == b.Orig_rax && a.Rip == b.Rip &&
		a.Cs == b.Cs && a.Eflags == b.Eflags && a.Rsp == b.Rsp && a.Ss == b.Ss &&
		a.Fs_base == b.Fs_base && a.Gs_base == b.Gs_base && a.Ds == b.Ds && a.Es == b.Es &&
		a.Fs == b.Fs && a.Gs == b.Gs
}
