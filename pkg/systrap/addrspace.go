package systrap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/affinity"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
	"github.com/ringfence/ringfence/pkg/stub"
	"github.com/ringfence/ringfence/pkg/sysmsg"
	"github.com/ringfence/ringfence/pkg/usertrap"
)

// addressSpace is a stub process. It implements platform.AddressSpace.
type addressSpace struct {
	platform.NoAddressSpaceIO

	zygote *stub.Zygote
	proc   *stub.Process
	pid    int
	at     layout
	mem    *memory
	// dropFile takes mem's file from the stubs.
	dropFile func()

	// reqMu is held for a request to the system call thread: calls, with the number seq.
	// lastSeq is that of the one before.
	reqMu        sync.Mutex
	calls        []call
	seq, lastSeq uint32
	// caller is the system call thread. It runs on the CPU of whoever makes a request,
	// who is about to sleep for it: to wake a thread on another one, which may be idle,
	// takes several times as long. If looker is a thread of the stub that looks at its
	// slot, it is woken by that, on its CPU (errand).
	caller *affinity.Follower
	looker atomic.Pointer[thread]
	pace   *pace

	// growMu is held while a thread is made. chunks is how many chunks of slots the
	// stub has mapped.
	growMu sync.Mutex
	chunks int

	// patching says that code may be patched, stats counts that. table are the trampolines,
	// once there may be some; noTable says that there never are.
	patching bool
	stats    *usertrap.Stats
	table    atomic.Pointer[usertrap.Table]
	noTable  atomic.Bool

	// gone says that the AddressSpace was released or given up.
	gone atomic.Bool

	// mu is taken after those of proc.
	mu sync.Mutex
	// threads are all that were made, idle those that no Context has.
	threads, idle []*thread
	// waiters are those who want a thread, and would rather have one that exists.
	waiters []chan *thread
}

// cloneThread are the flags of a new thread of a stub.
const cloneThread = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD | unix.CLONE_SYSVSEM

// pollPeriod is how often somebody who waits for a stub looks whether it is alive.
// Only a stub that runs, or that was stopped, is waited for.
const pollPeriod = 100 * time.Millisecond

func newAddressSpace() (*addressSpace, error) {
	t, err := textOf()
	if err != nil {
		return nil, err
	}
	var as *addressSpace
	err = stub.WithShared(t.text, func(z *stub.Zygote) (err error) {
		as, err = newAddressSpaceOf(z, t)
		return err
	})
	return as, err
}

// newAddressSpaceOf returns one whose stub is cloned off zygote, which has the text t.
func newAddressSpaceOf(zygote *stub.Zygote, t stubText) (*addressSpace, error) {
	mem, err := newMemory()
	if err != nil {
		return nil, err
	}
	num, dropFile, err := zygote.Hold(mem)
	if err != nil {
		mem.close()
		return nil, err
	}
	extra := zygote.Layout.Extra
	as := &addressSpace{zygote: zygote, mem: mem, dropFile: dropFile, pace: newPace()}
	as.at.ro = zygote.Layout.Start - roSize
	as.at.hint = as.at.ro - pageSize
	as.at.slots = as.at.hint&^(slotSize-1) - maxSlots*slotSize
	as.at.text, as.at.textEnd = extra, extra+uintptr(len(t.text))
	as.at.entry, as.at.handler = extra, extra+t.handler
	as.at.call, as.at.callArgs, as.at.callState, as.at.makeCall, as.at.callEnd = extra+t.call, extra+t.callArgs, extra+t.callState, extra+t.makeCall, extra+t.callEnd
	if err := as.begin(num); err != nil {
		dropFile()
		mem.close()
		return nil, err
	}
	if err := as.complete(); err != nil {
		as.destroy()
		return nil, fmt.Errorf("starting stub process %d: %w%s", as.pid, err, hint(err))
	}
	return as, nil
}

// begin makes the stub. Its first request is there when it comes to look: it makes
// itself complete, with a thread.
func (as *addressSpace) begin(num int) error {
	if err := as.initRegion(num); err != nil {
		return err
	}
	t, calls, err := as.prepareThread(0)
	if err != nil {
		return err
	}
	as.threads, as.idle = []*thread{t}, []*thread{t}
	as.post(append(as.startCalls(num), calls...))
	pid, tid, err := as.zygote.ForkAt(as.at.entry, uint32(num))
	if err != nil {
		return err
	}
	as.pid, as.caller = pid, affinity.NewFollower(pid, tid)
	as.proc = stub.NewProcess(as.zygote, pid, as.killed)
	return nil
}

// complete waits until the first request is done.
func (as *addressSpace) complete() error {
	as.reqMu.Lock()
	defer as.reqMu.Unlock()
	tid, err := as.finish(0)
	if err == nil {
		as.added(as.threads[0], tid)
	}
	return err
}

// initRegion writes what the stub needs and cannot change.
func (as *addressSpace) initRegion(num int) error {
	m := as.mem
	m.put64(requestFD, uint64(num))
	m.put64(requestHint, uint64(as.at.hint))
	m.put64(constantText, uint64(as.at.text))
	m.put64(constantText+8, uint64(as.at.textEnd-as.at.text))
	as.putActions(m.region[constantAction:])
	off := constantFilter
	progs, err := filters.of(uint64(as.at.text), uint64(as.at.textEnd))
	if err != nil {
		return err
	}
	for i, prog := range progs {
		fprog := constantProgs + i*16
		m.put64(fprog, uint64(len(prog)))
		m.put64(fprog+8, uint64(as.at.ro)+uint64(off))
		for _, ins := range prog {
			b := m.region[off:]
			binary.LittleEndian.PutUint16(b, ins.Code)
			b[2], b[3] = ins.JT, ins.JF
			binary.LittleEndian.PutUint32(b[4:], ins.K)
			off += 8
		}
	}
	return nil
}

// ro returns the address of something in the read-only region.
func (as *addressSpace) ro(off int) uint64 { return uint64(as.at.ro) + uint64(off) }

// startCalls are what makes a new stub complete, but for threads.
func (as *addressSpace) startCalls(num int) []call {
	calls := []call{{unix.SYS_MMAP, [6]uint64{uint64(as.at.hint), pageSize, unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_FIXED, uint64(num), hintOffset}}}
	for i, sig := range handledSignals {
		calls = append(calls, call{unix.SYS_RT_SIGACTION, [6]uint64{uint64(sig), as.ro(constantAction + min(i, 1)*actionSize), 0, 8}})
	}
	return append(calls, call{unix.SYS_SECCOMP, [6]uint64{unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW, as.ro(constantProgs + 16*progSyscallThread)}})
}

// handledSignals are those of Interrupt, of system calls, and of exceptions.
var handledSignals = []unix.Signal{
	unix.Signal(platform.SignalInterrupt), unix.SIGSYS, unix.SIGSEGV, unix.SIGBUS, unix.SIGFPE, unix.SIGILL, unix.SIGTRAP,
}

// enter, leave and fail are those of stub.Process.
func (as *addressSpace) enter() error         { return as.proc.Enter() }
func (as *addressSpace) leave()               { as.proc.Leave() }
func (as *addressSpace) fail(err error) error { return as.proc.Fail(err) }

// Kill implements platform.Killer.Kill. An application can block the interrupt, by
// rt_sigreturn(2) in our text; then this is faster than to wait until it is found out.
func (as *addressSpace) Kill() {
	if as.enter() == nil {
		as.fail(fmt.Errorf("stub process %d was killed on purpose: %w", as.pid, unix.ESRCH))
		as.leave()
	}
}

var _ platform.Killer = (*addressSpace)(nil)

// killed wakes those who wait for the stub, which was killed.
func (as *addressSpace) killed() {
	as.gone.Store(true)
	as.mu.Lock()
	defer as.mu.Unlock()
	for _, t := range as.threads {
		t.word.Abort()
	}
	sysmsg.FutexWake(as.hintWord())
}

// check returns an error if the AddressSpace was given up, or if it must be since
// the stub has died.
func (as *addressSpace) check() error {
	if err := as.proc.Err(); err != nil {
		return err
	}
	if ended, status := hasEnded(as.pid); ended {
		return as.proc.FailKilled(status)
	}
	return nil
}

// hintWord is what the system call thread writes when it has done a request. The
// application can write it, too.
func (as *addressSpace) hintWord() *atomic.Uint32 { return word32(as.mem.region, hintOffset) }

// maxSeq bounds the numbers of requests: the position of a file is an int64.
const maxSeq = 1<<30 - 1

// call is a system call to be made in the stub.
type call struct {
	nr   uint64
	args [6]uint64
}

// callError says which of several calls failed.
type callError struct {
	call
	errno unix.Errno
}

func (e *callError) Error() string {
	return fmt.Sprintf("%s: %v", sysno.Native.Name(uintptr(e.nr)), e.errno)
}
func (e *callError) Unwrap() error { return e.errno }

// do makes system calls of the host in the stub, until one fails, and returns the
// low 31 bits of the last one's result. The error is a callError when a call
// failed; otherwise the AddressSpace was given up.
func (as *addressSpace) do(calls ...call) (int, error) { return as.doWithin(0, calls...) }

// doWithin is do that gives up after a time, if that is not 0.
func (as *addressSpace) doWithin(timeout time.Duration, calls ...call) (int, error) {
	as.reqMu.Lock()
	defer as.reqMu.Unlock()
	as.pace.request()
	clone := calls[len(calls)-1].nr == unix.SYS_CLONE
	if clone {
		as.caller.Free() // The new thread inherits it.
	}
	as.post(calls)
	if !clone {
		if as.errand() {
			return as.finish(timeout)
		}
		as.caller.Follow()
	}
	sysmsg.FutexWake(word32(as.mem.region, requestSeq))
	return as.finish(timeout)
}

// errand has a thread that looks at its slot wake the system call thread, on the CPU
// that both share, and sleep until that has done the request. So nobody wakes anybody
// on another CPU, and none has to be interrupted because memory has changed. It reports
// whether the request is done.
//
// Preconditions: as.reqMu is held, and the request was posted.
func (as *addressSpace) errand() bool {
	t := as.looker.Load()
	if t == nil {
		return false
	}
	as.caller.Join(t.follower)
	t.setHeader(headerWake, as.ro(requestSeq))
	t.setHeader(headerUntil, uint64(as.at.hint))
	t.setHeader32(headerWhile, as.lastSeq)
	if !t.word.Errand() {
		as.looker.CompareAndSwap(t, nil)
		return false
	}
	if sysmsg.SpinWhile(as.hintWord(), as.lastSeq, maxSpins()) != as.lastSeq {
		return true
	}
	// It takes long, or that CPU has something else to do.
	as.looker.CompareAndSwap(t, nil)
	t.follower.Free()
	return false
}

// post makes a request of calls, which the system call thread sees when it looks.
//
// Preconditions: as.reqMu is held, or nobody else knows as; the last request is done.
func (as *addressSpace) post(calls []call) {
	m := as.mem
	for i, c := range calls {
		off := requestCalls + i*callSize
		m.put64(off, c.nr)
		for j, v := range c.args {
			m.put64(off+8+8*j, v)
		}
	}
	as.calls = append(as.calls[:0], calls...)
	word32(m.region, requestCount).Store(uint32(len(calls)))
	as.lastSeq, as.seq = as.seq, as.seq%maxSeq+1
	word32(m.region, requestSeq).Store(as.seq)
}

// finish waits for the result of the request that was posted, as doWithin.
//
// Preconditions: as.reqMu is held.
func (as *addressSpace) finish(timeout time.Duration) (int, error) {
	r, err := as.await(timeout)
	if err != nil || r >= 0 {
		return int(r), err
	}
	left := int(-r >> resultLeftShift)
	if left < 1 || left > len(as.calls) {
		return 0, as.fail(fmt.Errorf("stub process %d: result %#x of %d system calls: %w", as.pid, r, len(as.calls), unix.EPROTO))
	}
	return 0, &callError{as.calls[len(as.calls)-left], unix.Errno(-r & (1<<resultLeftShift - 1))}
}

// await waits for the result of the last request, for some time if timeout is not 0.
//
// Preconditions: as.reqMu is held.
func (as *addressSpace) await(timeout time.Duration) (int32, error) {
	hint := as.hintWord()
	start := time.Now()
	for polled := start; ; {
		v := hint.Load()
		if v == as.seq {
			break
		}
		if v != as.lastSeq {
			return 0, as.forged()
		}
		if as.gone.Load() {
			return 0, as.check()
		}
		// The application can wake us for nothing, too.
		if !sysmsg.FutexWait(hint, as.lastSeq, pollPeriod) || time.Since(polled) > pollPeriod {
			polled = time.Now()
			if result, done, err := as.result(); done || err != nil {
				// The thread is slow, or the application has undone what it wrote.
				hint.Store(as.seq)
				return result, err
			}
			if err := as.check(); err != nil {
				return 0, err
			}
			if timeout > 0 && time.Since(start) > timeout {
				return 0, fmt.Errorf("stub process %d does not answer: %w", as.pid, unix.ETIMEDOUT)
			}
		}
	}
	result, done, err := as.result()
	if err == nil && !done {
		err = as.forged()
	}
	return result, err
}

// result returns what came of the request, if it is done.
func (as *addressSpace) result() (result int32, done bool, err error) {
	pos, err := unix.Seek(as.mem.fd, 0, unix.SEEK_CUR)
	if err != nil {
		return 0, false, as.fail(fmt.Errorf("lseek of the memory of stub process %d: %w", as.pid, err))
	}
	if uint32(pos>>32) != as.seq {
		return 0, false, nil
	}
	return int32(pos), true, nil
}

// forged gives the AddressSpace up because the application has written to the hint
// page.
func (as *addressSpace) forged() error {
	return as.fail(fmt.Errorf("stub process %d: %w: %w", as.pid, sysmsg.ErrViolation, unix.EPROTO))
}

// When there are fewThreads for each CPU, a new one is made only if none becomes idle
// for growDelay: programs that start many threads, most of which sleep at once, get by
// with few, and where so many run that is no time.
const (
	fewThreads = 4
	growDelay  = 2 * time.Millisecond
)

// thread returns a thread that no Context has, for one to have.
func (as *addressSpace) thread() (*thread, error) {
	as.mu.Lock()
	if n := len(as.idle); n > 0 {
		t := as.idle[n-1]
		as.idle = as.idle[:n-1]
		as.mu.Unlock()
		return t, nil
	}
	if len(as.threads) >= fewThreads*runtime.NumCPU() {
		given := make(chan *thread, 1)
		as.waiters = append(as.waiters, given)
		as.mu.Unlock()
		select {
		case t := <-given:
			return t, nil
		case <-time.After(growDelay):
		}
		as.mu.Lock()
		i := slices.Index(as.waiters, given)
		if i < 0 {
			as.mu.Unlock()
			return <-given, nil
		}
		as.waiters = slices.Delete(as.waiters, i, i+1)
	}
	as.mu.Unlock()

	as.growMu.Lock()
	defer as.growMu.Unlock()
	// Only the holder of growMu changes threads.
	t, calls, err := as.prepareThread(len(as.threads))
	tid := 0
	if err == nil {
		tid, err = as.do(calls...)
	}
	if err != nil {
		return nil, fmt.Errorf("new thread in stub process %d: %w%s", as.pid, err, hint(err))
	}
	as.added(t, tid)
	as.mu.Lock()
	as.threads = append(as.threads, t)
	as.mu.Unlock()
	return t, nil
}

// putIdle makes t a thread that no Context has.
func (as *addressSpace) putIdle(t *thread) {
	as.mu.Lock()
	defer as.mu.Unlock()
	if len(as.waiters) > 0 {
		as.waiters[0] <- t
		as.waiters = as.waiters[1:]
		return
	}
	as.idle = append(as.idle, t)
}

// checkRange returns an error unless applications may map [addr, addr+length).
func (as *addressSpace) checkRange(addr hostarch.Addr, length uint64) error {
	ar, ok := addr.ToRange(length)
	if !ok || length == 0 || !ar.IsPageAligned() || ar.Start < platform.SystemMMapMinAddr() || ar.End > hostarch.Addr(as.at.slots) {
		return fmt.Errorf("%#x bytes at %v: not whole pages that an application can have: %w", length, addr, unix.EINVAL)
	}
	return nil
}

// MapFile implements platform.AddressSpace.MapFile.
func (as *addressSpace) MapFile(addr hostarch.Addr, f memmap.File, fr memmap.FileRange, at hostarch.AccessType, precommit bool) error {
	return as.MapFiles([]platform.FileMapping{{Addr: addr, File: f, Range: fr, Access: at, Precommit: precommit}})
}

// MapFiles implements platform.BatchMapper.MapFiles.
func (as *addressSpace) MapFiles(ms []platform.FileMapping) error {
	for _, m := range ms {
		if !m.Range.WellFormed() || m.Range.Start&hostarch.PageMask != 0 || !m.Access.Any() {
			return fmt.Errorf("MapFile of the bytes %v with access %v: %w", m.Range, m.Access, unix.EINVAL)
		}
		if err := as.checkRange(m.Addr, m.Range.Length()); err != nil {
			return fmt.Errorf("MapFile: %w", err)
		}
	}
	if err := as.enter(); err != nil {
		return fmt.Errorf("MapFile: %w", err)
	}
	defer as.leave()
	for batch := range slices.Chunk(ms, maxCalls) {
		err := as.mapFiles(batch, nil)
		if c := (*callError)(nil); errors.As(err, &c) {
			return fmt.Errorf("MapFile: %s of %#x bytes at %v with protection %#x in stub process %d: %w%s", sysno.Native.Name(uintptr(c.nr)), c.args[1], hostarch.Addr(c.args[0]), c.args[2], as.pid, err, hint(err))
		}
		if err != nil {
			return fmt.Errorf("MapFile in stub process %d: %w%s", as.pid, err, hint(err))
		}
	}
	return nil
}

// changesAccess reports whether all that m asks for is another access to what is mapped.
func changesAccess(m *platform.FileMapping) bool { return m.Mapped && !m.Precommit }

// mapFiles makes calls and maps ms, no more than maxCalls in all, in one request.
// Every file is held until that is done.
func (as *addressSpace) mapFiles(ms []platform.FileMapping, calls []call) error {
	for len(ms) > 0 && changesAccess(&ms[0]) {
		m := &ms[0]
		calls = append(calls, call{unix.SYS_MPROTECT, [6]uint64{uint64(m.Addr), m.Range.Length(), uint64(m.Access.Prot())}})
		ms = ms[1:]
	}
	if len(ms) == 0 {
		_, err := as.do(calls...)
		return err
	}
	return as.zygote.WithFile(ms[0].File, func(num int) error {
		n := 0
		for n < len(ms) && ms[n].File == ms[0].File && !changesAccess(&ms[n]) {
			m := &ms[n]
			flags := uint64(unix.MAP_SHARED | unix.MAP_FIXED)
			if m.Precommit {
				flags |= unix.MAP_POPULATE
			}
			calls = append(calls, call{unix.SYS_MMAP, [6]uint64{uint64(m.Addr), m.Range.Length(), uint64(m.Access.Prot()), flags, uint64(num), m.Range.Start}})
			n++
		}
		return as.mapFiles(ms[n:], calls)
	})
}

// Unmap implements platform.AddressSpace.Unmap.
func (as *addressSpace) Unmap(addr hostarch.Addr, length uint64) {
	if as.enter() != nil {
		return // Nothing runs in it any more.
	}
	defer as.leave()
	err := as.checkRange(addr, length)
	if err == nil {
		_, err = as.do(call{unix.SYS_MUNMAP, [6]uint64{uint64(addr), length}})
	}
	if err != nil {
		as.fail(fmt.Errorf("munmap of %#x bytes at %v in stub process %d: %w", length, addr, as.pid, err))
	}
}

// PreFork implements platform.AddressSpace.PreFork.
func (*addressSpace) PreFork() {}

// PostFork implements platform.AddressSpace.PostFork.
func (*addressSpace) PostFork() {}

// probe runs a thread that faults at once, and checks that its frame is where and
// what we expect.
func (as *addressSpace) probe() error {
	c := &threadContext{}
	defer c.Release()
	ac := arch.New()
	ac.SetIP(0)
	ac.SetStack(math.MaxInt32)
	info, _, err := c.switchIn(as, ac)
	if err != platform.ErrContextSignal {
		return fmt.Errorf("a thread that jumps to 0: %w", errors.Join(err, platform.ErrNotSupported))
	}
	if unix.Signal(info.Signo) != unix.SIGSEGV || !slices.Equal([]uintptr{ac.IP(), ac.Stack()}, []uintptr{0, math.MaxInt32}) {
		return fmt.Errorf("a thread that jumps to 0 gets %v at %#x: %w", info, ac.IP(), platform.ErrNotSupported)
	}
	return c.thread.checkFrame()
}
