// Package guest holds the program that `ringfence bench` measures: a static ELF
// file of a page of Go assembler, without a runtime, so that it does the same
// whether the host or a sandbox runs it.
//
// The program reads 16 bytes from descriptor 0, an operation and how often to do
// it, answers with 8 bytes on descriptor 1, the nanoseconds that took by
// CLOCK_MONOTONIC, and ends at the end of its input. It depends on pkg/freestanding,
// and must know no platform.
package guest

import (
	"encoding/binary"
	"fmt"

	"github.com/ringfence/ringfence/pkg/freestanding"
	"github.com/ringfence/ringfence/pkg/hostarch"
)

// Op is an operation of the program.
type Op uint64

// The operations. "Plain" is a system call instruction that cannot be patched:
// neither is its number a constant before it nor its result compared behind it.
const (
	// GetpidPlain is getpid(2) from a plain system call instruction.
	GetpidPlain Op = iota
	// GetpidMov has the number as a constant before the instruction.
	GetpidMov
	// GetpidCmp has the comparison of the result behind the instruction, as the
	// C libraries do.
	GetpidCmp
	// ReadPlain reads 1 byte of /dev/zero.
	ReadPlain
	// ReadCmp is that with the comparison.
	ReadCmp
	// MapTouchUnmap maps 64 KiB of anonymous memory, writes to each page, and
	// unmaps it.
	MapTouchUnmap
	// FirstTouch is the first write to a page of a mapping of 4 MiB.
	FirstTouch
	// ProtectFault writes to a page that is read-only: SIGSEGV, whose handler
	// calls mprotect(2), then mprotect(2) back.
	ProtectFault
	// SelfSignal is tgkill(2) to the own thread, the handler, which does nothing,
	// and rt_sigreturn(2).
	SelfSignal
	// Raise is that after gettid(2) and getpid(2), as raise(3) does.
	Raise
	// Thread makes a thread that ends at once, and waits for it in futex(2).
	Thread
	// Fork makes a process that ends at once, and waits for it.
	Fork
	// PingPong sends a byte through a pipe to another thread and gets one back
	// through another pipe.
	PingPong

	// Ops is the number of operations.
	Ops
)

// The image: text, and behind it data that the text finds by its distance.
const (
	base     = 0x400000
	pageSize = 0x10000 // the largest page size of any kernel
	dataSize = 3 * pageSize

	// In the data.
	dataRequest  = 0  // operation and count
	dataResult   = 16 // nanoseconds
	dataTime0    = 32 // struct timespec
	dataTime1    = 48
	dataZeroFD   = 64 // of /dev/zero
	dataPipes    = 72 // two pairs of descriptors, 32 bits each
	dataTID      = 88 // of the second thread; 0 when it has ended
	dataPID      = 96 // 32 bits
	dataMainTID  = 100
	dataBuf      = 104
	dataZeroName = 128
	dataAction   = 160          // struct sigaction of SIGUSR1
	dataFault    = 192          // struct sigaction of SIGSEGV
	dataPage     = pageSize     // the page that ProtectFault writes to
	dataStack    = 3 * pageSize // the end of the second thread's stack
)

// symbols are addresses in this program.
type symbols struct{ start, handler, faultHandler, restorer, end uintptr }

// Image returns the program as an ELF file.
func Image() ([]byte, error) {
	s := textSymbols()
	if s.start == 0 {
		return nil, fmt.Errorf("the measured program is not written for this architecture yet")
	}
	if !(s.start < s.handler && s.handler < s.faultHandler && s.faultHandler < s.restorer && s.restorer < s.end && s.end-s.start <= pageSize) {
		return nil, fmt.Errorf("measured program: the linker has put its parts out of order: %#x", s)
	}
	le := binary.LittleEndian
	data := make([]byte, pageSize)
	copy(data[dataZeroName:], "/dev/zero")
	for off, handler := range map[int]uintptr{dataAction: s.handler, dataFault: s.faultHandler} {
		le.PutUint64(data[off:], base+uint64(handler-s.start))
		le.PutUint64(data[off+8:], saRestorer)
		le.PutUint64(data[off+16:], base+uint64(s.restorer-s.start))
	}
	return freestanding.Image(base, []freestanding.Segment{
		{Addr: base, Data: freestanding.Text(s.start, s.end), Access: hostarch.ReadExec},
		{Addr: base + pageSize, Data: data, Size: dataSize, Access: hostarch.ReadWrite},
	}), nil
}
