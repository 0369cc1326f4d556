package kvm

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/pagetables"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
	"github.com/ringfence/ringfence/pkg/sysmsg"
)

// kvm implements platform.Platform.
type kvm struct {
	platform.DoesOwnPageTables
	platform.UseHostProcessMemoryBarrier

	m     *machine
	probe probe
}

// options are those that tests set.
type options struct {
	// vcpus is the size of the pool; 0 means that the number of CPUs decides.
	vcpus int
	// spin is how long a slot is looked at; 0 means the usual time.
	spin time.Duration
}

func newPlatform(device int, o options) (platform.Platform, error) {
	vcpus := o.vcpus
	if vcpus == 0 {
		vcpus = defaultVCPUs(runtime.NumCPU())
	}
	if have, errno := ioctl(device, kvmCheckExtension, capMaxVCPUs); errno == 0 && have > 0 {
		vcpus = min(vcpus, have)
	}
	m, err := newMachine(device, vcpus)
	if err != nil {
		return nil, err
	}
	if o.spin == 0 {
		o.spin = shimSpin
	}
	p := &kvm{m: m}
	if p.probe, err = m.probe(); err == nil && p.probe.roundTrip > slowExit {
		err = m.tryShims(&p.probe, o.spin)
	}
	if err != nil {
		m.close()
		return nil, err
	}
	return p, nil
}

// defaultVCPUs returns the size of the pool for a number of CPUs. A Context that
// finds its vCPU unused since saves the exchange of the floating point state, so
// that there are more than CPUs. Contexts that outnumber vCPUs take turns, which is
// too slow for one that gets a signal every few milliseconds: it would never get
// beyond the handler. 64 take 4 ms of New.
func defaultVCPUs(cpus int) int { return min(max(64, 4*cpus), 256) }

// SupportsAddressSpaceIO implements platform.Platform.SupportsAddressSpaceIO.
func (*kvm) SupportsAddressSpaceIO() bool { return false }

// CooperativelySchedulesAddressSpace implements
// platform.Platform.CooperativelySchedulesAddressSpace.
func (*kvm) CooperativelySchedulesAddressSpace() bool { return false }

// DetectsCPUPreemption implements platform.Platform.DetectsCPUPreemption. The CPUs
// of Contexts are the vCPUs, by their numbers.
func (*kvm) DetectsCPUPreemption() bool { return true }

// PreemptAllCPUs implements platform.Platform.PreemptAllCPUs.
func (p *kvm) PreemptAllCPUs() error {
	p.m.preempts.Add(1)
	for _, v := range p.m.pool.all {
		v.kick()
	}
	return nil
}

// MapUnit implements platform.Platform.MapUnit: pages are cheaper in blocks.
func (*kvm) MapUnit() uint64 { return hostarch.HugePageSize }

// MinUserAddress implements platform.Platform.MinUserAddress.
func (*kvm) MinUserAddress() hostarch.Addr { return minUserAddr() }

// MaxUserAddress implements platform.Platform.MaxUserAddress.
func (*kvm) MaxUserAddress() hostarch.Addr { return maxUserAddr }

// NewAddressSpace implements platform.Platform.NewAddressSpace.
func (p *kvm) NewAddressSpace(any) (platform.AddressSpace, <-chan struct{}, error) {
	as, err := p.m.newAddressSpace()
	if err != nil {
		return nil, nil, fmt.Errorf("NewAddressSpace: %w", withErrno(err))
	}
	return as, nil, nil
}

// NewContext implements platform.Platform.NewContext.
func (p *kvm) NewContext(context.Context) platform.Context { return newContext(p.m) }

// SeccompInfo implements platform.Platform.SeccompInfo.
func (p *kvm) SeccompInfo() platform.SeccompInfo {
	s := seccompInfo{arch: sysno.Native, vm: uint32(p.m.vm), firstVCPU: ^uint32(0)}
	for _, v := range p.m.pool.all {
		s.firstVCPU, s.lastVCPU = min(s.firstVCPU, uint32(v.fd)), max(s.lastVCPU, uint32(v.fd))
	}
	return s
}

// Close frees the virtual machine.
//
// Preconditions: every AddressSpace and Context was released.
func (p *kvm) Close() error {
	p.m.close()
	return nil
}

// Describe says in a few words what kind of KVM this is.
func (p *kvm) Describe() string { return p.probe.String() }

// RoundTrip returns how long a system call that does nothing takes, as measured by
// New. Where ring 0 is emulated, another platform is faster.
func (p *kvm) RoundTrip() time.Duration { return p.probe.roundTrip }

// probe is what New finds out about the host.
type probe struct {
	// ring0 says that SYSCALL reaches ring 0. It does not on kvm-pvm.
	ring0 bool
	// shadow says that KVM shadows page tables and does not see our stores.
	shadow bool
	// roundTrip is the time of a system call, from one KVM_RUN to the next.
	roundTrip time.Duration
	// shim is the time of one that does not leave the guest, 0 without shims.
	shim  time.Duration
	vcpus int
}

// String describes p.
func (p probe) String() string {
	gate, paging := "SYSCALL reaches ring 0", "two-dimensional paging"
	if !p.ring0 {
		gate = "SYSCALL stays in ring 3 (kvm-pvm)"
	}
	if p.shadow {
		paging = "shadow paging"
	}
	shim := "no shim"
	if p.shim > 0 {
		shim = fmt.Sprintf("%.1f us one through the shim", float64(p.shim)/1e3)
	}
	return fmt.Sprintf("%s, %s, %.1f us a system call that leaves the guest, %s, %d vCPUs", gate, paging, float64(p.roundTrip)/1e3, shim, p.vcpus)
}

// probeRounds is how often a system call is timed.
const probeRounds = 20

// probe runs a few system calls.
func (m *machine) probe() (p probe, err error) {
	t, err := m.newProbeThread()
	if err != nil {
		return p, err
	}
	defer t.release()
	if p.roundTrip, err = t.roundTrip(probeRounds); err != nil {
		return p, err
	}
	p.ring0 = m.ring0Syscalls.Load()
	p.vcpus = len(m.pool.all)

	// A page that is gone, for all that the CPU can know: its own TLB is flushed by the
	// change of CR4.
	if _, err := t.as.pt.Unmap(probeData, hostarch.PageSize); err != nil {
		return p, err
	}
	for _, v := range m.pool.all {
		v.sregs.cr4 ^= cr4PGE
	}
	err = t.run()
	for _, v := range m.pool.all {
		v.sregs.cr4 ^= cr4PGE
	}
	switch err {
	case nil:
		p.shadow = true
	case platform.ErrContextSignal:
	default:
		return p, fmt.Errorf("a page fault in the guest gives %w: %w", err, platform.ErrNotSupported)
	}
	m.walked = !p.shadow
	// And with the flush it must be gone.
	if _, err := t.as.pt.Map(probeData, hostarch.PageSize, probeOpts, t.phys); err != nil {
		return p, err
	}
	t.ac.SetIP(probeCode)
	if err := t.run(); err != nil {
		return p, fmt.Errorf("a system call in the guest gives %w: %w", err, platform.ErrNotSupported)
	}
	if _, err := t.as.pt.Unmap(probeData, hostarch.PageSize); err != nil {
		return p, err
	}
	if err := m.flush(); err != nil {
		return p, err
	}
	if err := t.run(); err != platform.ErrContextSignal {
		return p, fmt.Errorf("a page can be used after it was unmapped and flushed (%v): %w", err, unix.ENOTSUP)
	}
	return p, nil
}

// slowExit is when leaving the guest is so slow that the shim is tried.
const slowExit = 10 * time.Microsecond

// tryShims enables the shims, unless they gain nothing here.
func (m *machine) tryShims(p *probe, spin time.Duration) error {
	m.runners.max = maxRunners()
	m.spins, m.entrySpins = sysmsg.Spins(spin), sysmsg.Spins(p.roundTrip)
	if m.runners.max == 0 {
		return nil // nobody could look at what is posted
	}
	if err := m.enableShims(); err != nil {
		return err
	}
	took, err := m.shimRoundTrip()
	if err == nil && took < p.roundTrip {
		p.shim, m.maxLull = took, sysmsg.Spins(min(took, spin))
		return nil
	}
	m.runners.close()
	return errors.Join(err, m.disableShims())
}

// shimRoundTrip measures a system call through the shim.
func (m *machine) shimRoundTrip() (time.Duration, error) {
	t, err := m.newProbeThread()
	if err != nil {
		return 0, err
	}
	defer t.release()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	t.c.BindThread()
	return t.roundTrip(10 * probeRounds)
}

// probeThread is a thread that loads a word and makes a system call, again and again.
type probeThread struct {
	m    *machine
	as   *addressSpace
	c    *vcpuContext
	ac   *arch.Context64
	phys uint64
}

const probeCode, probeData = 0x40_0000, 0x40_1000

var probeOpts = pagetables.MapOpts{Access: hostarch.ReadExec, User: true}

func (m *machine) newProbeThread() (*probeThread, error) {
	as, err := m.newAddressSpace()
	if err != nil {
		return nil, err
	}
	phys, mem, err := m.tables.New()
	if err != nil {
		as.Release()
		return nil, err
	}
	t := &probeThread{m, as, newContext(m), arch.New(), phys}
	// mov (%rdi), %rax; syscall; jmp to the start
	copy(bytesOf(mem), []byte{0x48, 0x8b, 0x07, 0x0f, 0x05, 0xeb, 0xf9})
	for _, addr := range []hostarch.Addr{probeCode, probeData} {
		if _, err := as.pt.Map(addr, hostarch.PageSize, probeOpts, phys); err != nil {
			t.release()
			return nil, err
		}
	}
	t.ac.SetIP(probeCode)
	t.ac.Regs.Rdi = probeData
	return t, nil
}

func (t *probeThread) release() {
	t.c.Release()
	t.as.Release()
	t.m.tables.Free(t.phys)
}

func (t *probeThread) run() error {
	_, _, err := t.c.Switch(context.Background(), probeMemory{as: t.as}, t.ac, -1)
	return err
}

// roundTrip returns how long a system call takes, the best of n.
func (t *probeThread) roundTrip(n int) (time.Duration, error) {
	best := time.Hour
	for range n {
		start := time.Now()
		if err := t.run(); err != nil {
			return 0, fmt.Errorf("a system call in the guest gives %w: %w", err, platform.ErrNotSupported)
		}
		best = min(best, time.Since(start))
	}
	return best, nil
}

// probeMemory is a platform.MemoryManager that has an AddressSpace, and nothing else.
type probeMemory struct {
	platform.MemoryManager
	as *addressSpace
}

// AddressSpace implements platform.MemoryManager.AddressSpace.
func (m probeMemory) AddressSpace() platform.AddressSpace { return m.as }
