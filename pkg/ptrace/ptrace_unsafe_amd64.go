package ptrace

import "unsafe"

// ptraceRegs is PTRACE_GETREGS or PTRACE_SETREGS.
func ptraceRegs(req, tid int, buf []byte) error {
	return ptraceMemory(req, tid, 0, unsafe.Pointer(unsafe.SliceData(buf)))
}
