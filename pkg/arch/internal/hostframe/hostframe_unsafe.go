package hostframe

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
)

// What the handler and trigger read and write: the handler has no other way.
var (
	frameAddr uint64
	frameTop  uint64
	//lint:ignore U1000 the handler reads it
	frameBuf *byte
	//lint:ignore U1000 the handler reads it
	frameCap uint64
	entry    Entry
	// skip is added to the instruction pointer, to go on behind a fault.
	//lint:ignore U1000 the handler reads it
	skip uint64
	//lint:ignore U1000 trigger keeps its stack pointer there
	savedSP uint64
	//lint:ignore U1000 trigger keeps its frame pointer there
	savedBP uint64
)

const stackSize = 128 << 10

// Capture raises a signal as req says and returns its frame. The calling thread
// is borrowed, and so is the process's handler of the signal; callers must not
// run concurrently.
func Capture(req Request) (*Frame, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	handler, restorer := addresses()
	f := &Frame{Handler: uint64(handler), Restorer: uint64(restorer)}
	mem, err := unix.Mmap(-1, 0, 2*stackSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	defer unix.Munmap(mem)
	stack, alt := mem[:stackSize], mem[stackSize:]
	f.SP = uint64(uintptr(unsafe.Pointer(&stack[stackSize-512])))
	frameTop = f.SP
	buf := make([]byte, stackSize)
	frameBuf, frameCap = &buf[0], stackSize

	sig := linux.SIGUSR2
	fault := uintptr(0)
	skip = 0
	if req.Fault {
		sig, fault, skip = linux.SIGSEGV, FaultAddr, faultSize
	}
	act := linux.SigAction{Handler: f.Handler, Flags: linux.SA_SIGINFO | linux.SA_RESTORER, Restorer: f.Restorer, Mask: ^linux.SignalSet(0)}

	// Nothing of Go's may see this thread as it is until it is as it was.
	var oldMask uint64
	f.Mask = ^uint64(linux.UnblockableSignals | linux.SignalSetOf(sig))
	if err := sigprocmask(f.Mask, &oldMask); err != nil {
		return nil, err
	}
	defer sigprocmask(oldMask, nil)
	if req.AltStack {
		act.Flags |= linux.SA_ONSTACK
		f.AltAddr, f.AltSize = uint64(uintptr(unsafe.Pointer(&alt[0]))), uint64(len(alt))
		frameTop = f.AltAddr + f.AltSize
		ss := linux.SignalStack{Addr: f.AltAddr, Size: f.AltSize, Flags: req.AltFlags}
		old, err := sigaltstack(ss)
		if err != nil {
			return nil, err
		}
		defer sigaltstack(old)
	}
	oldAct, err := sigaction(sig, act)
	if err != nil {
		return nil, err
	}
	defer sigaction(sig, oldAct)

	raise(req, uintptr(f.SP), uintptr(unix.Getpid()), uintptr(unix.Gettid()), uintptr(sig), fault)

	f.Addr, f.Entry = frameAddr, entry
	n := frameTop - frameAddr
	if n > stackSize {
		return nil, fmt.Errorf("frame of %d bytes", n)
	}
	f.Bytes = buf[:n]
	runtime.KeepAlive(req.FP)
	return f, nil
}

func sigprocmask(set uint64, old *uint64) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, linux.SIG_SETMASK, uintptr(unsafe.Pointer(&set)), uintptr(unsafe.Pointer(old)), linux.SignalSetSize, 0, 0)
	if errno != 0 {
		return fmt.Errorf("rt_sigprocmask: %w", errno)
	}
	return nil
}

func sigaction(sig linux.Signal, act linux.SigAction) (old linux.SigAction, err error) {
	var in, out [32]byte
	act.MarshalBytes(in[:])
	_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&in)), uintptr(unsafe.Pointer(&out)), linux.SignalSetSize, 0, 0)
	if errno != 0 {
		return old, fmt.Errorf("rt_sigaction: %w", errno)
	}
	old.UnmarshalBytes(out[:])
	return old, nil
}

func sigaltstack(ss linux.SignalStack) (old linux.SignalStack, err error) {
	var in, out [24]byte
	ss.MarshalBytes(in[:])
	_, _, errno := unix.RawSyscall(unix.SYS_SIGALTSTACK, uintptr(unsafe.Pointer(&in)), uintptr(unsafe.Pointer(&out)), 0)
	if errno != 0 {
		return old, fmt.Errorf("sigaltstack: %w", errno)
	}
	old.UnmarshalBytes(out[:])
	return old, nil
}
