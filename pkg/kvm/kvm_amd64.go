package kvm

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/pagetables"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// kvm implements platform.Platform.
type kvm struct {
	platform.DoesOwnPageTables
	platform.UseHostProcessMemoryBarrier

	m     *machine
	probe probe
}

func newPlatform(device, vcpus int) (platform.Platform, error) {
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
	p := &kvm{m: m}
	if p.probe, err = m.probe(); err != nil {
		m.close()
		return nil, err
	}
	return p, nil
}

// defaultVCPUs returns the size of the pool for a number of CPUs. A Context that
// finds its vCPU unused since saves the exchange of the floating point state, so
// that there are more than CPUs.
func defaultVCPUs(cpus int) int { return min(max(8, 4*cpus), 256) }

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
	vcpus     int
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
	return fmt.Sprintf("%s, %s, %.1f us a system call, %d vCPUs", gate, paging, float64(p.roundTrip)/1e3, p.vcpus)
}

// probeRounds is how often a system call is timed.
const probeRounds = 20

// probe runs a few system calls.
func (m *machine) probe() (p probe, err error) {
	as, err := m.newAddressSpace()
	if err != nil {
		return p, err
	}
	defer as.Release()
	const code, data = 0x40_0000, 0x40_1000
	phys, t, err := m.tables.New()
	if err != nil {
		return p, err
	}
	defer m.tables.Free(phys)
	// mov (%rdi), %rax; syscall; jmp to the start
	copy(bytesOf(t), []byte{0x48, 0x8b, 0x07, 0x0f, 0x05, 0xeb, 0xf9})
	user := pagetables.MapOpts{Access: hostarch.ReadExec, User: true}
	for _, addr := range []hostarch.Addr{code, data} {
		if _, err := as.pt.Map(addr, hostarch.PageSize, user, phys); err != nil {
			return p, err
		}
	}
	c := newContext(m)
	defer c.Release()
	mm := probeMemory{as: as}
	ac := arch.New()
	ac.SetIP(code)
	ac.Regs.Rdi = data
	p.roundTrip = time.Hour
	for range probeRounds {
		start := time.Now()
		info, _, err := c.Switch(context.Background(), mm, ac, -1)
		p.roundTrip = min(p.roundTrip, time.Since(start))
		if err != nil {
			return p, fmt.Errorf("a system call in the guest gives %w %v: %w", err, info, platform.ErrNotSupported)
		}
	}
	p.ring0 = m.ring0Syscalls.Load()
	p.vcpus = len(m.pool.all)

	// A page that is gone, for all that the CPU can know: its own TLB is flushed by the
	// change of CR4.
	if _, err := as.pt.Unmap(data, hostarch.PageSize); err != nil {
		return p, err
	}
	for _, v := range m.pool.all {
		v.sregs.cr4 ^= cr4PGE
	}
	_, _, err = c.Switch(context.Background(), mm, ac, -1)
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
	// And with the flush it must be gone.
	if _, err := as.pt.Map(data, hostarch.PageSize, user, phys); err != nil {
		return p, err
	}
	ac.SetIP(code)
	if _, _, err := c.Switch(context.Background(), mm, ac, -1); err != nil {
		return p, fmt.Errorf("a system call in the guest gives %w: %w", err, platform.ErrNotSupported)
	}
	if _, err := as.pt.Unmap(data, hostarch.PageSize); err != nil {
		return p, err
	}
	if err := m.flush(); err != nil {
		return p, err
	}
	if _, _, err := c.Switch(context.Background(), mm, ac, -1); err != platform.ErrContextSignal {
		return p, fmt.Errorf("a page can be used after it was unmapped (%v), since this KVM ignores moves of memory slots: %w", err, unix.ENOTSUP)
	}
	return p, nil
}

// probeMemory is a platform.MemoryManager that has an AddressSpace, and nothing else.
type probeMemory struct {
	platform.MemoryManager
	as *addressSpace
}

// AddressSpace implements platform.MemoryManager.AddressSpace.
func (m probeMemory) AddressSpace() platform.AddressSpace { return m.as }
