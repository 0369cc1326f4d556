package ptrace

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
)

// ptraceCall is ptrace(2).
func ptraceCall(req, tid int, addr, data uintptr) error {
	// None of the requests blocks.
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(req), uintptr(tid), addr, data, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// ptraceMemory is ptraceCall with memory of ours for data.
func ptraceMemory(req, tid int, addr uintptr, data unsafe.Pointer) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(req), uintptr(tid), addr, uintptr(data), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// getRegSet reads a register set into buf, and returns its size or that of buf,
// whichever is less.
func getRegSet(tid int, set uintptr, buf []byte) (int, error) {
	iov := unix.Iovec{Base: unsafe.SliceData(buf), Len: uint64(len(buf))}
	err := ptraceMemory(unix.PTRACE_GETREGSET, tid, set, unsafe.Pointer(&iov))
	return int(iov.Len), err
}

// setRegSet writes a register set.
func setRegSet(tid int, set uintptr, buf []byte) error {
	iov := unix.Iovec{Base: unsafe.SliceData(buf), Len: uint64(len(buf))}
	return ptraceMemory(unix.PTRACE_SETREGSET, tid, set, unsafe.Pointer(&iov))
}

// getSigInfo reads the siginfo of a signal stop.
func getSigInfo(tid int, info *linux.SignalInfo) error {
	return ptraceMemory(unix.PTRACE_GETSIGINFO, tid, 0, unsafe.Pointer(info))
}

// setSigMask writes the mask of blocked signals.
func setSigMask(tid int, mask *uint64) error {
	return ptraceMemory(ptraceSetSigMask, tid, unsafe.Sizeof(*mask), unsafe.Pointer(mask))
}

const ptraceSetSigMask = 0x420b // PTRACE_SETSIGMASK (linux/ptrace.h)

// peek reads a word of the stub's memory.
func peek(tid int, addr uintptr) (uint64, error) {
	var v uint64
	err := ptraceMemory(unix.PTRACE_PEEKDATA, tid, addr, unsafe.Pointer(&v))
	return v, err
}

// wait4 waits for a thread that this OS thread traces.
func wait4(tid int) (unix.WaitStatus, error) {
	for {
		var status int32
		_, _, errno := unix.Syscall6(unix.SYS_WAIT4, uintptr(tid), uintptr(unsafe.Pointer(&status)), unix.WALL|unix.WNOTHREAD, 0, 0, 0)
		switch errno {
		case 0:
			return unix.WaitStatus(uint32(status)), nil
		case unix.EINTR:
			continue
		}
		return 0, errno
	}
}

// syscallInfo is struct ptrace_syscall_info (linux/ptrace.h) for the entry of a
// system call.
type syscallInfo struct {
	Op   uint8
	_    [3]uint8
	Arch uint32
	IP   uint64
	SP   uint64
	Nr   uint64
	Args [6]uint64
	_    [3]uint64 // what other operations may need
}

// getSyscallInfo reads what system call a thread stopped for. EIO means that the
// kernel is older than Linux 5.3.
func getSyscallInfo(tid int, info *syscallInfo) error {
	return ptraceMemory(unix.PTRACE_GET_SYSCALL_INFO, tid, unsafe.Sizeof(*info), unsafe.Pointer(info))
}

// sigaction is the kernel's struct sigaction (asm/signal.h).
type sigaction struct {
	handler, flags, restorer uintptr
	mask                     uint64
}

// noStopSignals stops the kernel from sending this process a SIGCHLD whenever a
// child stops (SA_NOCLDSTOP), which costs as much as a quarter of a Switch. The
// handler, the Go runtime's, stays, and so do the signals for the end of
// children. If it fails, or is undone by signal.Notify, all is well but slower.
func noStopSignals() {
	const setSize = 8
	var act sigaction
	if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(unix.SIGCHLD), 0, uintptr(unsafe.Pointer(&act)), setSize, 0, 0); errno != 0 || act.flags&saNoCldStop != 0 {
		return
	}
	act.flags |= saNoCldStop
	unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(unix.SIGCHLD), uintptr(unsafe.Pointer(&act)), 0, setSize, 0, 0)
}

const saNoCldStop = 1 // SA_NOCLDSTOP (asm-generic/signal-defs.h)
