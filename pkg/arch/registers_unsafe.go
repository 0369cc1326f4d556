package arch

import "unsafe"

// PRStatus returns the register set NT_PRSTATUS in place, for PTRACE_GETREGSET
// and PTRACE_SETREGSET: the layout is the kernel's.
func (r *Registers) PRStatus() []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(r)), prstatusSize)
}
