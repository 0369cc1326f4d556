package kvm

// The host's interface: include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h.

// Requests of ioctl(2) that are made while the platform is set up.
const (
	kvmGetAPIVersion     = 0xae00
	kvmCreateVM          = 0xae01
	kvmCheckExtension    = 0xae03
	kvmGetVCPUMmapSize   = 0xae04
	kvmGetSupportedCPUID = 0xc008ae05
	kvmCreateVCPU        = 0xae41
	kvmSetTSSAddr        = 0xae47
	kvmGetSRegs          = 0x8138ae83
	kvmSetCPUID2         = 0x4008ae90
	kvmSetXCRs           = 0x4188aea7
)

const apiVersion = 12

// Extensions.
const (
	capUserMemory    = 3
	capSetTSSAddr    = 4
	capExtCPUID      = 7
	capNrMemslots    = 10
	capVCPUEvents    = 41
	capXSave         = 55
	capXCRs          = 56
	capMaxVCPUs      = 66
	capSyncRegs      = 74
	capImmediateExit = 136
	capXSave2        = 208
)

// Reasons of an exit.
const (
	exitHLT           = 5
	exitShutdown      = 8
	exitFailEntry     = 9
	exitInternalError = 17
)

// Parts of the registers that are exchanged in the run page.
const (
	syncRegs   = 1 << 0
	syncSRegs  = 1 << 1
	syncEvents = 1 << 2
)

// memoryRegion is struct kvm_userspace_memory_region.
type memoryRegion struct {
	slot, _   uint32
	gpa, size uint64
	hva       uint64
}

// regs is struct kvm_regs.
type regs struct {
	rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp uint64
	r8, r9, r10, r11, r12, r13, r14, r15   uint64
	rip, rflags                            uint64
}

// segment is struct kvm_segment.
type segment struct {
	base                                uint64
	limit                               uint32
	selector                            uint16
	typ, present, dpl, db, s, l, g, avl uint8
	unusable, _                         uint8
}

// dtable is struct kvm_dtable.
type dtable struct {
	base  uint64
	limit uint16
	_     [3]uint16
}

// sregs is struct kvm_sregs.
type sregs struct {
	cs, ds, es, fs, gs, ss, tr, ldt segment
	gdt, idt                        dtable
	cr0, cr2, cr3, cr4, cr8         uint64
	efer, apicBase                  uint64
	interrupts                      [4]uint64
}

// vcpuEvents is struct kvm_vcpu_events.
type vcpuEvents struct {
	exceptionInjected, exceptionNr, exceptionHasError, exceptionPending uint8
	exceptionError                                                      uint32
	interruptInjected, interruptNr, interruptSoft, interruptShadow      uint8
	nmiInjected, nmiPending, nmiMasked, _                               uint8
	_                                                                   [48]byte
}

// pending reports whether an event is on its way into the guest.
func (e *vcpuEvents) pending() bool {
	return e.exceptionInjected|e.exceptionPending|e.interruptInjected|e.nmiInjected != 0
}

// runPage is struct kvm_run.
type runPage struct {
	// control holds immediate_exit in its second byte, and nothing else that we use.
	control uint32
	_       uint32

	exitReason uint32
	_          uint32
	cr8        uint64
	apicBase   uint64

	// exit depends on the reason.
	exit [32]uint64

	validRegs, dirtyRegs uint64

	regs   regs
	sregs  sregs
	events vcpuEvents
}

const immediateExit = 1 << 8

// cpuidEntry is struct kvm_cpuid_entry2.
type cpuidEntry struct {
	function, index, _ uint32
	eax, ebx, ecx, edx uint32
	_                  [3]uint32
}

// maxCPUIDEntries is KVM_MAX_CPUID_ENTRIES.
const maxCPUIDEntries = 256

// cpuidTable is struct kvm_cpuid2.
type cpuidTable struct {
	n, _    uint32
	entries [maxCPUIDEntries]cpuidEntry
}

// xcrs is struct kvm_xcrs.
type xcrs struct {
	n, _ uint32
	xcrs [16]struct {
		xcr, _ uint32
		value  uint64
	}
	_ [16]uint64
}

// msrs is struct kvm_msrs with room for ours.
type msrs struct {
	n, _    uint32
	entries [4]struct {
		index, _ uint32
		value    uint64
	}
}

// Registers and bits of the CPU (Intel SDM vol. 3, 2.5, and vol. 4; AMD APM vol. 2,
// 3.1).
const (
	cr0 = 1<<0 | 1<<1 | 1<<4 | 1<<5 | 1<<16 | 1<<18 | 1<<31 // PE MP ET NE WP AM PG

	cr4PAE      = 1 << 5
	cr4PGE      = 1 << 7
	cr4FXSR     = 1 << 9
	cr4XMMEXCPT = 1 << 10
	cr4FSGSBASE = 1 << 16
	cr4OSXSAVE  = 1 << 18

	efer = 1<<0 | 1<<8 | 1<<10 | 1<<11 // SCE LME LMA NXE

	msrSTAR  = 0xc0000081
	msrLSTAR = 0xc0000082
	msrCSTAR = 0xc0000083
	msrFMASK = 0xc0000084

	flagTF = 1 << 8
	flagIF = 1 << 9
	flagRF = 1 << 16

	// syscallMask are the flags that SYSCALL clears: TF IF DF IOPL NT RF AC.
	syscallMask = flagTF | flagIF | 1<<10 | 3<<12 | 1<<14 | flagRF | 1<<18
)

// Exceptions (Intel SDM vol. 3, 6.15).
const (
	vectorDE = 0
	vectorDB = 1
	vectorBP = 3
	vectorOF = 4
	vectorBR = 5
	vectorUD = 6
	vectorNP = 11
	vectorSS = 12
	vectorGP = 13
	vectorPF = 14
	vectorMF = 16
	vectorAC = 17
	vectorXM = 19
)

// hasErrorCode reports whether the CPU pushes an error code for an exception.
func hasErrorCode(vector int) bool {
	switch vector {
	case 8, 10, vectorNP, vectorSS, vectorGP, vectorPF, vectorAC, 21, 29, 30:
		return true
	}
	return false
}

// Bits of a page fault's error code (Intel SDM vol. 3, 4.7).
const (
	pfPresent = 1 << 0
	pfWrite   = 1 << 1
	pfFetch   = 1 << 4
)
