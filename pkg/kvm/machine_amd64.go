package kvm

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/cpuid"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/pagetables"
)

// machine is a VM with its memory and vCPUs.
type machine struct {
	vm    int
	cpuid *cpuidTable

	// cr4 and xcr0 are what vCPUs run with. xsaveSize is the size of what
	// KVM_GET_XSAVE2 writes, 0 if there is only KVM_GET_XSAVE.
	cr4, xcr0 uint64
	xsaveSize int

	// runSize is the size of a vCPU's mapping.
	runSize int

	// pid is this process.
	pid int

	// preempts counts the calls of PreemptAllCPUs.
	preempts atomic.Uint64

	slots   slots
	tables  tableMemory
	regions regions
	pool    pool
	runners runners

	// spins is how often a shim and Switch look at a slot, entrySpins how many looks
	// leaving and entering the guest takes.
	spins, entrySpins uint32

	// maxLull is the longest lull of a Context: what a system call through the shim
	// takes, and the Sentry may look for one.
	maxLull uint32

	// omit are protecting steps that tests leave out, to show what they protect from.
	omit struct{ flush, settle bool }
	// fail is what tests have requests fail with, or nil.
	fail func(req uintptr) unix.Errno

	// shims is how many vCPUs have a shim, shim what is where in it.
	shims int
	shim  shimLabels

	// walked says that the CPU walks our page tables, flushes counts the flushes then.
	walked  bool
	flushes atomic.Uint64

	flushMu   sync.Mutex
	dummy     []byte
	dummySlot uint32
	dummyGPA  uint64

	// window are page tables with the kernel window, and nothing else.
	window *pagetables.PageTables
	// ring0Syscalls says that SYSCALL was seen to reach ring 0.
	ring0Syscalls atomic.Bool

	// low is the guest-physical address of the page for system calls of 32-bit code.
	low uint64
}

// needed are the extensions without which nothing works.
var needed = []struct {
	cap  uintptr
	name string
}{
	{capUserMemory, "KVM_CAP_USER_MEMORY"},
	{capExtCPUID, "KVM_CAP_EXT_CPUID"},
	{capXSave, "KVM_CAP_XSAVE"},
	{capXCRs, "KVM_CAP_XCRS"},
	{capVCPUEvents, "KVM_CAP_VCPU_EVENTS"},
	{capSyncRegs, "KVM_CAP_SYNC_REGS"},
	{capImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"},
}

// checkDevice reports whether a descriptor is that of a KVM with all that we need.
func checkDevice(device int) error {
	v, errno := ioctl(device, kvmGetAPIVersion, 0)
	if errno != 0 {
		return fmt.Errorf("ioctl(KVM_GET_API_VERSION): %w: is the device %s?", errno, defaultDevice)
	}
	if v != apiVersion {
		return fmt.Errorf("API version %d instead of %d: use a kernel of this century: %w", v, apiVersion, unix.ENOTSUP)
	}
	for _, n := range needed {
		have, errno := ioctl(device, kvmCheckExtension, n.cap)
		if errno != 0 {
			return fmt.Errorf("ioctl(KVM_CHECK_EXTENSION, %s): %w", n.name, errno)
		}
		if have == 0 || n.cap == capSyncRegs && have&(syncRegs|syncSRegs|syncEvents) != syncRegs|syncSRegs|syncEvents {
			return fmt.Errorf("this kernel's KVM lacks %s: use Linux 4.17 or later: %w", n.name, unix.ENOTSUP)
		}
	}
	return nil
}

// newMachine makes a VM with the given number of vCPUs.
func newMachine(device, vcpus int) (_ *machine, err error) {
	if err := checkDevice(device); err != nil {
		return nil, err
	}
	m := &machine{vm: -1, pid: os.Getpid()}
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	for m.vm < 0 {
		fd, errno := ioctl(device, kvmCreateVM, 0)
		switch errno {
		case 0:
			m.vm = fd
		case unix.EINTR:
		case unix.EBUSY:
			return nil, fmt.Errorf("ioctl(KVM_CREATE_VM): %w: another hypervisor (VirtualBox, VMware) has the CPU's virtualisation: stop it", errno)
		default:
			return nil, fmt.Errorf("ioctl(KVM_CREATE_VM): %w", errno)
		}
	}
	unix.CloseOnExec(m.vm)
	// KVM on Intel wants some pages that the guest does not use.
	if have, _ := ioctl(m.vm, kvmCheckExtension, capSetTSSAddr); have > 0 {
		if _, errno := ioctl(m.vm, kvmSetTSSAddr, 0xfffbd000); errno != 0 {
			return nil, fmt.Errorf("ioctl(KVM_SET_TSS_ADDR): %w", errno)
		}
	}
	max, errno := ioctl(m.vm, kvmCheckExtension, capNrMemslots)
	if errno != 0 || max < 32 {
		return nil, fmt.Errorf("a VM has %d memory slots: too few (error %d): %w", max, errno, unix.ENOTSUP)
	}
	m.slots.max = uint32(max)
	m.xsaveSize, _ = ioctl(m.vm, kvmCheckExtension, capXSave2)
	if m.runSize, errno = ioctl(device, kvmGetVCPUMmapSize, 0); errno != 0 || m.runSize < runPageSize {
		return nil, fmt.Errorf("ioctl(KVM_GET_VCPU_MMAP_SIZE) gives %d (error %d), want %d at least: %w", m.runSize, errno, runPageSize, unix.ENOTSUP)
	}
	if err := m.readCPUID(device); err != nil {
		return nil, err
	}
	m.tables.m, m.regions.m = m, m
	m.regions.byKey = make(map[regionKey]*region)
	if m.dummy, err = unix.Mmap(-1, 0, hostarch.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	m.dummyGPA = dummyBase
	if m.dummySlot, err = m.addSlot(m.dummyGPA, m.dummy); err != nil {
		return nil, err
	}
	if err := m.makeWindow(vcpus); err != nil {
		return nil, err
	}
	for id := range vcpus {
		v, err := m.newVCPU(id)
		if v != nil {
			m.pool.add(v)
		}
		if err != nil {
			return nil, fmt.Errorf("vCPU %d of %d: %w", id, vcpus, err)
		}
	}
	return m, nil
}

// close frees everything. No vCPU may be in use.
func (m *machine) close() {
	m.runners.close()
	for _, v := range m.pool.all {
		if v.mem != nil {
			unix.Munmap(v.mem)
		}
		unix.Close(v.fd)
	}
	if m.vm >= 0 {
		unix.Close(m.vm)
	}
	for _, mem := range append(m.tables.mapped, m.regions.windows...) {
		unix.Munmap(mem)
	}
	if m.dummy != nil {
		unix.Munmap(m.dummy)
	}
}

// restrict removes what the application is not told of, and what a guest is told about
// its hypervisor: there is nothing to talk to.
func (t *cpuidTable) restrict(fs *cpuid.FeatureSet) {
	kept := t.entries[:0]
	for _, e := range t.entries[:t.n] {
		if e.function>>28 == 4 {
			continue
		}
		_, b, c, d := fs.Emulate(e.function, e.index)
		switch {
		case e.function == 7 && e.index == 0:
			e.ebx &= b
			fallthrough
		case e.function == 1, e.function == 0x80000001:
			e.ecx &= c
			e.edx &= d
		}
		kept = append(kept, e)
	}
	t.n = uint32(len(kept))
}

// readCPUID finds out what CPU the guest can have: the host's, as far as KVM lets it.
func (m *machine) readCPUID(device int) error {
	m.cpuid = &cpuidTable{n: maxCPUIDEntries}
	if errno := ioctlStruct(device, kvmGetSupportedCPUID, m.cpuid); errno != 0 {
		return fmt.Errorf("ioctl(KVM_GET_SUPPORTED_CPUID): %w", errno)
	}
	m.cpuid.restrict(cpuid.Native())
	find := func(function, index uint32) cpuidEntry {
		for _, e := range m.cpuid.entries[:m.cpuid.n] {
			if e.function == function && e.index == index {
				return e
			}
		}
		return cpuidEntry{}
	}
	// Intel SDM vol. 2, CPUID. kvm-pvm offers ring 0 neither XSAVE nor FSGSBASE;
	// ring 3 has them, since it runs on the CPU as the host set that up.
	m.cr4 = cr4PAE | cr4FXSR | cr4XMMEXCPT
	if find(1, 0).ecx&(1<<26) != 0 {
		m.cr4 |= cr4OSXSAVE
	}
	if find(7, 0).ebx&1 != 0 {
		m.cr4 |= cr4FSGSBASE
	}
	x := find(0xd, 0)
	m.xcr0 = (uint64(x.edx)<<32 | uint64(x.eax)) & cpuid.Native().UserXFeatures()
	// Protection keys would need a state that nobody keeps.
	m.xcr0 &^= cpuid.XFeaturePKRU
	if legacy := uint64(cpuid.XFeatureX87 | cpuid.XFeatureSSE); m.xcr0&legacy != legacy {
		return fmt.Errorf("guests have the state components %#x, without x87 or SSE: %w", m.xcr0, unix.ENOTSUP)
	}
	bits := find(0x80000008, 0).eax & 0xff
	if bits < 37 {
		bits = 37
	}
	m.regions.max = min((1<<min(bits, 47)-regionsBase)/regionSize, 1<<20)
	return nil
}

// The kernel window: what ring 0 consists of.
const (
	windowBase = uint64(0xffff_ff80_0000_0000) // the last entry of the top table

	stubsAddr  = windowBase // a stub of 16 bytes for every vector
	stubSize   = 16
	lstarAddr  = windowBase + 1*hostarch.PageSize + 0x40
	idtAddr    = windowBase + 2*hostarch.PageSize
	gdtAddr    = windowBase + 3*hostarch.PageSize
	shimsAddr  = windowBase + 4*hostarch.PageSize  // up to 8 pages of shims
	vcpusAddr  = windowBase + 16*hostarch.PageSize // a page for every vCPU
	opcodeHLT  = 0xf4
	numVectors = 256

	// cstarAddr is where 32-bit code gets with SYSCALL, in a page of every
	// AddressSpace below all that applications can map: kvm-pvm drops the upper half
	// of the address.
	lowAddr   = 0x9000
	cstarAddr = lowAddr + 0x60

	// tssSize is the size of a TSS (Intel SDM vol. 3, 7.7).
	tssSize = 104
)

// Selectors, as Linux has them (arch/x86/include/asm/segment.h).
const (
	kernelCS = 0x10
	userCS32 = 0x23
	userDS   = 0x2b
	userCS   = 0x33
	tssSel   = 0x40
)

var gdt = []uint64{
	kernelCS / 8:   0x00af9b000000ffff,
	kernelCS/8 + 1: 0x00cf93000000ffff,
	userCS32 / 8:   0x00cffb000000ffff,
	userDS / 8:     0x00cff3000000ffff,
	userCS / 8:     0x00affb000000ffff,
}

var (
	kernelCode = pagetables.MapOpts{Access: hostarch.ReadExec}
	kernelData = pagetables.MapOpts{Access: hostarch.ReadWrite}
)

// makeWindow builds the kernel window.
func (m *machine) makeWindow(vcpus int) error {
	w, err := pagetables.New(&m.tables, 4)
	if err != nil {
		return err
	}
	m.window = w
	page := func(addr uint64, opts pagetables.MapOpts) (uint64, []byte, error) {
		phys, t, err := m.tables.New()
		if err == nil && addr != 0 {
			_, err = w.Map(hostarch.Addr(addr).RoundDown(), hostarch.PageSize, opts, phys)
		}
		if err != nil {
			return 0, nil, err
		}
		return phys, bytesOf(t), nil
	}
	_, stubs, err := page(stubsAddr, kernelCode)
	if err != nil {
		return err
	}
	_, lstar, err := page(lstarAddr, kernelCode)
	if err != nil {
		return err
	}
	_, idt, err := page(idtAddr, kernelData)
	if err != nil {
		return err
	}
	_, g, err := page(gdtAddr, kernelData)
	if err != nil {
		return err
	}
	low, cstar, err := page(0, kernelCode)
	if err != nil {
		return err
	}
	m.low = low
	lstar[lstarAddr%hostarch.PageSize] = opcodeHLT
	cstar[cstarAddr%hostarch.PageSize] = opcodeHLT
	for i := range numVectors {
		stubs[i*stubSize] = opcodeHLT
		// An interrupt gate (Intel SDM vol. 3, 6.14.1).
		addr, gate := uint64(stubsAddr)+uint64(i*stubSize), idt[i*16:]
		attr := byte(0x8e)
		if i == vectorBP || i == vectorOF {
			attr |= 3 << 5
		}
		binary.LittleEndian.PutUint16(gate[0:], uint16(addr))
		binary.LittleEndian.PutUint16(gate[2:], kernelCS)
		gate[5] = attr
		binary.LittleEndian.PutUint16(gate[6:], uint16(addr>>16))
		binary.LittleEndian.PutUint32(gate[8:], uint32(addr>>32))
	}
	for i, d := range gdt {
		binary.LittleEndian.PutUint64(g[i*8:], d)
	}
	for id := range vcpus {
		if _, _, err := page(vcpuPage(id), kernelData); err != nil {
			return err
		}
	}
	return nil
}

// vcpuPage returns the address of a vCPU's page: its TSS and, at the end, its
// stack.
func vcpuPage(id int) uint64 { return vcpusAddr + uint64(id)*hostarch.PageSize }
