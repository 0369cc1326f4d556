package stub

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/freestanding"
	"github.com/ringfence/ringfence/pkg/hostarch"
)

// The parts of the image, in bytes.
const (
	pageSize        = 4096
	textSize        = 4096
	infoSize        = 4096
	signalStackSize = 8 * 4096                              // a signal frame with AMX state needs 12 KiB
	imageSize       = textSize + infoSize + signalStackSize // and a backend's text behind it

	// The end of the text page holds what no application must be able to change:
	// a stack_t, and the addresses of park and newThread.
	altStackOffset   = textSize - 24
	parkPointer      = altStackOffset - 8
	newThreadPointer = parkPointer - 8
	textConstants    = newThreadPointer
)

// The info page. The text's assembler knows these names.
const (
	infoName        = 0                         // the process's name, at most 15 bytes
	infoEnd         = 16                        // the end of the image
	infoTaskEnd     = 24                        // the end of the process's addresses
	infoReply       = 32                        // two words
	infoRequest     = 48                        // two words
	infoMsg         = 64                        // struct msghdr
	infoIovec       = 120                       // struct iovec
	infoControl     = 136                       // controlSize bytes
	infoSignals     = infoControl + controlSize // signal numbers, 32 bits each, then 0
	infoAction      = 192                       // struct sigaction of all of them
	infoMask        = 224                       // an empty signal mask
	infoFilter      = 232                       // struct sock_fprog
	infoFilterFlags = 248                       // 32 bits
	infoFullMask    = 256                       // a signal mask with all signals
	infoProgram     = 264                       // the filter's instructions
)

const (
	controlSize = 24 // CMSG_SPACE(sizeof(int))

	stubName = "ringfence-stub"
)

// What the zygote sends in the second word of its replies, below bit 32: the
// stage of its start that it has come to, or the request. The first word is the
// result, or an errno negated. opFork is answered twice: by the zygote with the
// process's id, and by the new stub with the id of its thread.
const (
	stageUnmap   = 101
	stageSignals = 102
	stageSeccomp = 103
	stageReady   = 104

	// opPutFile and the next one have a span of files to close before anything else,
	// or 0.
	opPutFile    = 1
	opCloseFiles = 2
	opFork       = 3
	// opBorn is what a new stub sends, with its process's id above bit 32.
	opBorn = 4
	// opDropFiles is opCloseFiles without a reply.
	opDropFiles = 5
)

// textSymbols returns where this program's linker has put the stub's text.
func textSymbols() (s symbols)

// text returns the stub's text and the symbols in it, relative to its start.
func text() ([]byte, symbols, error) {
	s := textSymbols()
	if !(s.start < s.newThread && s.newThread < s.park && s.park < s.call && s.call < s.clone && s.clone < s.end && s.end-s.start <= textConstants) {
		return nil, s, fmt.Errorf("stub text: the linker has put its parts out of order: %#x", s)
	}
	t := freestanding.Text(s.start, s.end)
	for _, p := range []*uintptr{&s.newThread, &s.park, &s.call, &s.clone, &s.end} {
		*p -= s.start
	}
	s.start = 0
	return t, s, nil
}

// exceptionSignals are those that the CPU's exceptions give and that a signal
// frame tells more about than siginfo.
var exceptionSignals = []unix.Signal{unix.SIGSEGV, unix.SIGBUS, unix.SIGFPE}

// sizeOf returns the size of an image with the backend's text extra, in bytes.
func sizeOf(extra []byte) uint64 {
	return imageSize + (uint64(len(extra))+pageSize-1)&^(pageSize-1)
}

// buildImage returns the program, at base, for a process whose addresses end at
// taskEnd.
func buildImage(base, taskEnd uint64, extra []byte) ([]freestanding.Segment, Layout, error) {
	t, sym, err := text()
	if err != nil {
		return nil, Layout{}, err
	}
	info := base + textSize
	stack := info + infoSize
	at := func(off uintptr) uintptr { return uintptr(base) + off }
	l := Layout{
		Start: at(0), End: at(uintptr(sizeOf(extra))), Extra: at(imageSize),
		Park: at(sym.park), ParkSize: sym.call - sym.park, Handler: at(sym.park),
		Call: at(sym.call), Clone: at(sym.clone),
		AltStack:    at(altStackOffset),
		SignalStack: [2]uintptr{uintptr(stack), at(imageSize)},
	}

	le := binary.LittleEndian
	text := make([]byte, textSize)
	copy(text, t)
	le.PutUint64(text[newThreadPointer:], uint64(at(sym.newThread)))
	le.PutUint64(text[parkPointer:], uint64(l.Park))
	le.PutUint64(text[altStackOffset:], stack)              // ss_sp
	le.PutUint64(text[altStackOffset+16:], signalStackSize) // ss_size

	page := make([]byte, infoSize)
	copy(page[infoName:], stubName)
	le.PutUint64(page[infoEnd:], base+sizeOf(extra))
	le.PutUint64(page[infoTaskEnd:], taskEnd)
	le.PutUint64(page[infoMsg+16:], info+infoIovec) // msg_iov
	le.PutUint64(page[infoMsg+24:], 1)              // msg_iovlen
	le.PutUint64(page[infoMsg+32:], info+infoControl)
	le.PutUint64(page[infoIovec:], info+infoRequest)
	le.PutUint64(page[infoIovec+8:], 16)
	for i, sig := range exceptionSignals {
		le.PutUint32(page[infoSignals+4*i:], uint32(sig))
	}
	le.PutUint64(page[infoAction:], uint64(l.Handler))
	le.PutUint64(page[infoAction+8:], saSigInfo|saOnStack|saNoDefer|saRestorer)
	le.PutUint64(page[infoAction+16:], uint64(l.Handler))
	le.PutUint64(page[infoFullMask:], ^uint64(0))
	prog := filter()
	le.PutUint16(page[infoFilter:], uint16(len(prog)))
	le.PutUint64(page[infoFilter+8:], info+infoProgram)
	// Without this flag older kernels switch a costly mitigation on
	// (Documentation/userspace-api/spec_ctrl.rst): it is for processes that run
	// code they must protect themselves from, and a stub has nothing to protect.
	le.PutUint32(page[infoFilterFlags:], unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW)
	for i, ins := range prog {
		b := page[infoProgram+8*i:]
		le.PutUint16(b, ins.Code)
		b[2], b[3] = ins.Jt, ins.Jf
		le.PutUint32(b[4:], ins.K)
	}

	segments := []freestanding.Segment{
		{Addr: base, Data: text, Access: hostarch.ReadExec},
		{Addr: info, Data: page, Size: infoSize + signalStackSize, Access: hostarch.ReadWrite},
	}
	if len(extra) > 0 {
		segments = append(segments, freestanding.Segment{Addr: base + imageSize, Data: extra, Access: hostarch.ReadExec})
	}
	return segments, l, nil
}

// Flags of struct sigaction (asm-generic/signal-defs.h).
const (
	saSigInfo = 0x4
	saOnStack = 0x08000000
	saNoDefer = 0x40000000
)
