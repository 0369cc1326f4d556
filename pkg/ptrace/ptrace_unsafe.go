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

// getRegSet reads a register set into buf, and returns its size or that of buf,
// whichever is less.
func getRegSet(tid int, set uintptr, buf []byte) (int, error) {
	iov := unix.Iovec{Base: unsafe.SliceData(buf), Len: uint64(len(buf))}
	err := ptraceCall(unix.PTRACE_GETREGSET, tid, set, uintptr(unsafe.Pointer(&iov)))
	return int(iov.Len), err
}

// setRegSet writes a register set.
func setRegSet(tid int, set uintptr, buf []byte) error {
	iov := unix.Iovec{Base: unsafe.SliceData(buf), Len: uint64(len(buf))}
	return ptraceCall(unix.PTRACE_SETREGSET, tid, set, uintptr(unsafe.Pointer(&iov)))
}

// ptraceRegs is PTRACE_GETREGS or PTRACE_SETREGS.
func ptraceRegs(req, tid int, buf []byte) error {
	return ptraceCall(req, tid, 0, uintptr(unsafe.Pointer(unsafe.SliceData(buf))))
}

// getSigInfo reads the siginfo of a signal stop.
func getSigInfo(tid int, info *linux.SignalInfo) error {
	return ptraceCall(unix.PTRACE_GETSIGINFO, tid, 0, uintptr(unsafe.Pointer(info)))
}

// peek reads a word of the stub's memory.
func peek(tid int, addr uintptr) (uint64, error) {
	var v uint64
	err := ptraceCall(unix.PTRACE_PEEKDATA, tid, addr, uintptr(unsafe.Pointer(&v)))
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

// syscallArch returns the AUDIT_ARCH_ of the system call that a thread stopped
// for.
func syscallArch(tid int) (uint32, error) {
	var info struct { // struct ptrace_syscall_info (linux/ptrace.h)
		op   uint8
		_    [3]uint8
		arch uint32
		_    [10]uint64
	}
	// Since Linux 5.3. What an older kernel cannot tell is not a 64-bit one.
	err := ptraceCall(unix.PTRACE_GET_SYSCALL_INFO, tid, unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)))
	if err == unix.EIO {
		return 0, nil
	}
	return info.arch, err
}
