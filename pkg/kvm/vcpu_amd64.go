package kvm

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/pagetables"
	"github.com/ringfence/ringfence/pkg/platform"
)

// vcpu is a virtual CPU. But for kick and readXSave, it belongs to the Context that
// took it from the pool.
type vcpu struct {
	m   *machine
	id  int
	fd  int
	mem []byte
	run *runPage

	// page is the vCPU's own page. The CPU pushes an exception's frame at its end.
	page *pagetables.Table

	// sregs is what application code runs with, but for what every Context has its
	// own of.
	sregs sregs

	// tid is the OS thread that runs it, or did.
	tid atomic.Int32

	// shim is where its shim is, or 0.
	shim uint64

	// interrupted says that the last exit was for a signal.
	interrupted bool

	// holder is the Context that has the vCPU.
	holder atomic.Pointer[vcpuContext]

	// runs is odd while kvmRun is under way. awaited is what it was when a flush began,
	// and belongs to that; flushed is the machine's flushes when kvmRun last began.
	runs             atomic.Uint64
	awaited, flushed uint64

	// yield says that a Context waits for a vCPU.
	yield atomic.Bool

	// entered says that the Context which has the vCPU has come to run it.
	entered atomic.Bool

	// slices is how many the Context can run it at least.
	slices atomic.Uint32

	// since orders vCPUs by when they were taken, seen is what it was when askFor last
	// found that the Context runs it, for a number of slices; the pool's lock protects
	// them.
	since, seen uint64
	ran         uint32

	// owner is the Context that it ran last, whose floating point state it may hold.
	owner *vcpuContext

	// failed says that events may be left over from a Context that ended badly.
	failed bool

	// xsave is room for a floating point state.
	xsave []byte
}

// newVCPU makes a vCPU. The result is not nil if there is something to close.
func (m *machine) newVCPU(id int) (*vcpu, error) {
	fd, errno := ioctl(m.vm, kvmCreateVCPU, uintptr(id))
	if errno != 0 {
		return nil, fmt.Errorf("ioctl(KVM_CREATE_VCPU): %w", errno)
	}
	unix.CloseOnExec(fd)
	v := &vcpu{m: m, id: id, fd: fd, xsave: make([]byte, max(4096, m.xsaveSize))}
	phys, _, _, _ := m.window.Lookup(hostarch.Addr(vcpuPage(id)))
	v.page = m.tables.Lookup(phys)
	var err error
	if v.mem, err = unix.Mmap(fd, 0, m.runSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return v, fmt.Errorf("mmap of the run page: %w", err)
	}
	v.run = runPageOf(v.mem)
	if errno := ioctlStruct(fd, kvmSetCPUID2, m.cpuid); errno != 0 {
		return v, fmt.Errorf("ioctl(KVM_SET_CPUID2): %w", errno)
	}
	x := xcrs{n: 1}
	x.xcrs[0].value = m.xcr0
	if errno := ioctlStruct(fd, kvmSetXCRs, &x); errno != 0 {
		return v, fmt.Errorf("ioctl(KVM_SET_XCRS) of %#x: %w", m.xcr0, errno)
	}
	if err := v.setMSRs(); err != nil {
		return v, err
	}
	s := &v.sregs
	if errno := ioctlStruct(fd, kvmGetSRegs, s); errno != 0 {
		return v, fmt.Errorf("ioctl(KVM_GET_SREGS): %w", errno)
	}
	s.cr0, s.cr4, s.efer = cr0, m.cr4, efer
	s.gdt = dtable{base: gdtAddr, limit: uint16(len(gdt)*8 - 1)}
	s.idt = dtable{base: idtAddr, limit: numVectors*16 - 1}
	s.tr = segment{base: vcpuPage(id), limit: tssSize - 1, selector: tssSel, typ: 11, present: 1}
	s.ldt = segment{unusable: 1}
	s.ss = dataSegment(userDS, 0)
	tss := bytesOf(v.page)
	binary.LittleEndian.PutUint64(tss[4:], vcpuPage(id)+hostarch.PageSize) // RSP0
	binary.LittleEndian.PutUint16(tss[102:], tssSize)                      // no I/O permissions
	v.run.validRegs = syncRegs | syncSRegs | syncEvents
	return v, nil
}

// setMSRs makes SYSCALL lead to the stubs, or to the shim.
func (v *vcpu) setMSRs() error {
	lstar, mask := lstarAddr, uint64(syscallMask)
	if v.shim != 0 {
		lstar = v.shim
		if !v.m.ring0Syscalls.Load() {
			// In ring 3 the flags stay as they are, but for single steps: these do not go
			// through the shim.
			mask = flagTF | flagRF
		}
	}
	r := msrs{n: 4}
	for i, e := range [4][2]uint64{
		{msrSTAR, userCS32<<48 | kernelCS<<32},
		{msrLSTAR, lstar},
		{msrCSTAR, cstarAddr},
		{msrFMASK, mask},
	} {
		r.entries[i].index, r.entries[i].value = uint32(e[0]), e[1]
	}
	n, errno := ioctlMSRs(v.fd, &r)
	if errno != 0 {
		return fmt.Errorf("ioctl(KVM_SET_MSRS) of vCPU %d: %w", v.id, errno)
	}
	if n != int(r.n) {
		return fmt.Errorf("ioctl(KVM_SET_MSRS) of vCPU %d: %d of %d registers set: %w", v.id, n, r.n, unix.EINVAL)
	}
	return nil
}

// codeSegment returns the segment of 64-bit or 32-bit code of ring 3.
func codeSegment(sel uint64) segment {
	s := segment{limit: 0xffffffff, selector: uint16(sel), typ: 11, present: 1, dpl: 3, s: 1, g: 1}
	if sel == userCS {
		s.l = 1
	} else {
		s.db = 1
	}
	return s
}

// dataSegment returns a data segment of ring 3; a null selector's is unusable, and
// its base still counts.
func dataSegment(sel, base uint64) segment {
	if sel <= 3 {
		return segment{selector: uint16(sel), base: base, unusable: 1}
	}
	return segment{base: base, limit: 0xffffffff, selector: uint16(sel), typ: 3, present: 1, dpl: 3, db: 1, s: 1, g: 1}
}

// load makes the vCPU run r, which is sanitised, in the page tables at root.
func (v *vcpu) load(r *arch.Registers, root uint64) {
	g := &v.run.regs
	g.rax, g.rbx, g.rcx, g.rdx = r.Rax, r.Rbx, r.Rcx, r.Rdx
	g.rsi, g.rdi, g.rsp, g.rbp = r.Rsi, r.Rdi, r.Rsp, r.Rbp
	g.r8, g.r9, g.r10, g.r11 = r.R8, r.R9, r.R10, r.R11
	g.r12, g.r13, g.r14, g.r15 = r.R12, r.R13, r.R14, r.R15
	g.rip, g.rflags = r.Rip, r.Eflags&^flagRF
	s := &v.run.sregs
	*s = v.sregs
	s.cs = codeSegment(r.Cs)
	s.ds, s.es = dataSegment(r.Ds, 0), dataSegment(r.Es, 0)
	s.fs, s.gs = dataSegment(r.Fs, r.Fs_base), dataSegment(r.Gs, r.Gs_base)
	s.cr3 = root
	v.run.dirtyRegs = syncRegs | syncSRegs
	if v.failed {
		v.failed = false
		v.run.events = vcpuEvents{}
		v.run.dirtyRegs |= syncEvents
	}
}

// save reads into r what is the application's whatever the vCPU stopped for.
func (v *vcpu) save(r *arch.Registers) {
	g, s := &v.run.regs, &v.run.sregs
	r.Rax, r.Rbx, r.Rcx, r.Rdx = g.rax, g.rbx, g.rcx, g.rdx
	r.Rsi, r.Rdi, r.Rbp = g.rsi, g.rdi, g.rbp
	r.R8, r.R9, r.R10, r.R11 = g.r8, g.r9, g.r10, g.r11
	r.R12, r.R13, r.R14, r.R15 = g.r12, g.r13, g.r14, g.r15
	r.Ds, r.Es = uint64(s.ds.selector), uint64(s.es.selector)
	r.Fs, r.Gs = uint64(s.fs.selector), uint64(s.gs.selector)
	r.Fs_base, r.Gs_base = s.fs.base, s.gs.base
	r.Ss = userDS
	r.Orig_rax = noSyscall
}

// saveUser reads into r all of a vCPU that stopped in ring 3.
func (v *vcpu) saveUser(r *arch.Registers) {
	v.save(r)
	g := &v.run.regs
	r.Rip, r.Rsp, r.Eflags = g.rip, g.rsp, g.rflags
	r.Cs = uint64(v.run.sregs.cs.selector)
}

// saveFrame reads into r all of a vCPU whose application got an exception, and
// returns the error code.
func (v *vcpu) saveFrame(r *arch.Registers, vector int) (code uint64) {
	v.save(r)
	f := v.page[len(v.page)-6:]
	if hasErrorCode(vector) {
		code = f[0]
	}
	r.Rip, r.Cs, r.Eflags, r.Rsp = f[1], f[2]&0xffff, f[3], f[4]
	return code
}

const noSyscall = ^uint64(0)

// clean reports whether a vCPU that was interrupted stopped between two
// instructions of the application. If not, it must go on: it will get to a stub by
// itself, or post in its slot.
func (v *vcpu) clean() bool {
	rip := v.run.regs.rip
	return !v.run.events.pending() && v.run.sregs.cs.selector&3 == 3 && rip != lstarAddr &&
		(v.shim == 0 || rip < v.shim || rip >= v.shim+shimSize)
}

// enter runs the guest until it exits. EINTR means that it was interrupted between two
// instructions of the application, or in its shim after it had posted.
func (v *vcpu) enter() unix.Errno {
	for {
		errno := v.kvmRun()
		v.interrupted = errno == unix.EINTR
		if !v.interrupted || v.m.omit.settle || v.clean() || v.inShim(v.run.regs.rip) && !v.run.events.pending() {
			return errno
		}
		v.run.clearImmediateExit()
	}
}

// runError returns the error for a KVM_RUN that failed.
func (v *vcpu) runError(errno unix.Errno) error {
	v.failed = true
	return fmt.Errorf("ioctl(KVM_RUN) of vCPU %d: %w", v.id, errno)
}

// kick makes an enter that is under way, or the next one, return.
func (v *vcpu) kick() {
	v.run.setImmediateExit()
	if tid := v.tid.Load(); tid != 0 {
		// If it fails the thread is gone, and runs nothing.
		unix.Tgkill(v.m.pid, int(tid), unix.Signal(platform.SignalInterrupt))
	}
}

// readXSave reads the floating point state into b, which is as large as v.xsave.
func (v *vcpu) readXSave(b []byte) error {
	req := uintptr(kvmGetXSave)
	if v.m.xsaveSize > 0 {
		req = kvmGetXSave2
	}
	errno := v.m.failure(req)
	if errno == 0 {
		errno = ioctlBytes(v.fd, req, b)
	}
	if errno != 0 {
		return fmt.Errorf("ioctl(KVM_GET_XSAVE) of vCPU %d: %w", v.id, errno)
	}
	return nil
}

// writeXSave sets the floating point state.
func (v *vcpu) writeXSave(b []byte) error {
	errno := v.m.failure(kvmSetXSave)
	if errno == 0 {
		errno = ioctlBytes(v.fd, kvmSetXSave, b)
	}
	if errno != 0 {
		return fmt.Errorf("ioctl(KVM_SET_XSAVE) of vCPU %d: %w", v.id, errno)
	}
	return nil
}

// pool holds the vCPUs.
type pool struct {
	all []*vcpu

	mu sync.Mutex
	// idle are those that nobody has, the one that is idle longest first.
	idle    []*vcpu
	waiters []chan *vcpu
	// wanted is how many waiters there are.
	wanted atomic.Int32
	taken  uint64

	// timer calls askFor while there are waiters.
	timer *time.Timer
}

// add adds a new vCPU.
func (p *pool) add(v *vcpu) {
	p.all = append(p.all, v)
	p.idle = append(p.idle, v)
}

// slice is how long a Context waits for a vCPU before one that others have is asked
// for, and how long these can run it at least. On a host that is busy, or slow, that may
// not be enough to get anywhere: who had to give up its vCPU has twice as long the next
// time, up to 1<<maxYields slices.
const (
	slice     = 2 * time.Millisecond
	maxYields = 5
)

// take returns a vCPU, preferred if it is idle; or nil when wake is signalled first.
func (p *pool) take(preferred *vcpu, wake <-chan struct{}) *vcpu {
	p.mu.Lock()
	if len(p.idle) > 0 {
		i := 0
		for k, v := range p.idle {
			if v == preferred {
				i = k
			}
		}
		v := p.idle[i]
		p.idle = append(p.idle[:i], p.idle[i+1:]...)
		p.tookLocked(v)
		p.mu.Unlock()
		return v
	}
	ch := make(chan *vcpu, 1)
	p.waiters = append(p.waiters, ch)
	switch {
	case p.timer == nil:
		p.timer = time.AfterFunc(slice, p.askFor)
	case len(p.waiters) == 1:
		p.timer.Reset(slice)
	}
	p.wanted.Store(int32(len(p.waiters)))
	p.mu.Unlock()
	p.reclaim()
	select {
	case v := <-ch:
		return v
	case <-wake:
	}
	p.mu.Lock()
	i := slices.Index(p.waiters, ch)
	if i >= 0 {
		p.waiters = slices.Delete(p.waiters, i, i+1)
		p.wanted.Store(int32(len(p.waiters)))
	}
	p.mu.Unlock()
	if i < 0 {
		p.put(<-ch) // it was handed over already
	}
	return nil
}

// reclaim takes a vCPU from a Context that keeps it while the Sentry answers.
func (p *pool) reclaim() {
	for _, v := range p.all {
		if c := v.holder.Load(); c != nil && p.wanted.Load() > 0 {
			c.tryLeave(nil)
		}
	}
}

func (p *pool) tookLocked(v *vcpu) {
	p.taken++
	v.since = p.taken
	v.entered.Store(false)
	v.yield.Store(false)
}

// put gives a vCPU back.
func (p *pool) put(v *vcpu) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.waiters) > 0 {
		ch := p.waiters[0]
		p.waiters = p.waiters[1:]
		p.wanted.Store(int32(len(p.waiters)))
		p.tookLocked(v)
		ch <- v
		return
	}
	p.idle = append(p.idle, v)
}

// askFor asks Contexts to give up their vCPUs, as many as there are waiters, the one
// that has its vCPU longest first. Each has run it for a slice before: when threads
// wait for CPUs a Context may get a vCPU long before it can run it, and would give it
// up without having run.
func (p *pool) askFor() {
	p.ask()
	p.reclaim()
}

// ask is askFor for Contexts in Switch.
func (p *pool) ask() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.waiters) == 0 {
		return
	}
	p.timer.Reset(slice)
	var ripe []*vcpu
	for _, v := range p.all {
		switch {
		case v.yield.Load() || !v.entered.Load():
		case v.seen != v.since:
			v.seen, v.ran = v.since, 1
		case v.ran < v.slices.Load():
			v.ran++
		default:
			ripe = append(ripe, v)
		}
	}
	slices.SortFunc(ripe, func(a, b *vcpu) int { return cmp.Compare(a.since, b.since) })
	for _, v := range ripe[:min(len(ripe), len(p.waiters))] {
		v.yield.Store(true)
		v.kick()
	}
}
