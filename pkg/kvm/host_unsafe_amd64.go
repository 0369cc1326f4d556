package kvm

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/pagetables"
)

// ioctl is ioctl(2) with a number as the argument.
func ioctl(fd int, req, arg uintptr) (int, unix.Errno) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, arg)
	return int(r), errno
}

// ioctlStruct is ioctl(2) with *arg as the argument.
func ioctlStruct[T any](fd int, req uintptr, arg *T) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(unsafe.Pointer(arg)))
	return errno
}

// ioctlMSRs is KVM_SET_MSRS; the result is the number of registers that were set.
func ioctlMSRs(fd int, arg *msrs) (int, unix.Errno) {
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), kvmSetMSRs, uintptr(unsafe.Pointer(arg)))
	return int(n), errno
}

// ioctlBytes is ioctl(2) with the memory of b as the argument.
func ioctlBytes(fd int, req uintptr, b []byte) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(unsafe.Pointer(&b[0])))
	return errno
}

// runPageOf returns the run page at the beginning of a vCPU's mapping.
func runPageOf(mem []byte) *runPage { return (*runPage)(unsafe.Pointer(&mem[0])) }

// runPageSize is what runPageOf needs.
const runPageSize = int(unsafe.Sizeof(runPage{}))

// hostAddress returns where mem lies.
func hostAddress(mem []byte) uint64 { return uint64(uintptr(unsafe.Pointer(&mem[0]))) }

// tablesOf returns mem, which is page-aligned, as page tables.
func tablesOf(mem []byte) *[tablesPerChunk]pagetables.Table {
	return (*[tablesPerChunk]pagetables.Table)(unsafe.Pointer(&mem[:tablesPerChunk*4096][0]))
}

// bytesOf returns the memory of a table.
func bytesOf(t *pagetables.Table) []byte {
	return (*[4096]byte)(unsafe.Pointer(t))[:]
}

// setImmediateExit makes the next KVM_RUN, or the one under way if a signal comes,
// return at once.
func (r *runPage) setImmediateExit() { atomic.StoreUint32(&r.control, immediateExit) }

// clearImmediateExit undoes it.
func (r *runPage) clearImmediateExit() { atomic.StoreUint32(&r.control, 0) }

// slotsOf returns the slots in a page that is a table for its allocator.
func slotsOf(t *pagetables.Table) []*slot {
	slots := (*[slotsPerPage]slot)(unsafe.Pointer(t))
	p := make([]*slot, len(slots))
	for i := range slots {
		p[i] = &slots[i]
	}
	return p
}

// mapOver replaces what is mapped at mem, whole pages that are ours (mmap(2),
// MAP_FIXED).
func mapOver(mem []byte, fd int, offset int64, prot, flags int) error {
	_, err := unix.MmapPtr(fd, offset, unsafe.Pointer(&mem[0]), uintptr(len(mem)), prot, flags|unix.MAP_FIXED)
	return err
}
