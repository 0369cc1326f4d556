package platform

import (
	"context"

	"github.com/ringfence/ringfence/pkg/hostarch"
)

// TextPatcher is implemented by MemoryManagers that let a platform replace
// instructions of the application by others that do the same in less time. A
// platform leaves the code of a MemoryManager without it alone.
type TextPatcher interface {
	// PatchText replaces what is at addr by new, of the same length, if at that time
	// code is at start: all that the patch relies on, which what is replaced is a part
	// of. No thread ever executes a mixture of old and new, and all that is changed is
	// the application's own copy. The MemoryManager puts back what was there before the
	// application can write there, and keeps patches across fork.
	//
	// The error is a TextRefusal if that cannot be: code is not in one page of
	// a private mapping that can be executed and not written, or is not there.
	// Anything else wraps the host's errno.
	PatchText(ctx context.Context, addr hostarch.Addr, new []byte, start hostarch.Addr, code []byte) error

	// UnpatchText undoes the PatchText at addr, if there is one.
	UnpatchText(ctx context.Context, addr hostarch.Addr) error

	// RestoreText undoes every PatchText.
	RestoreText(ctx context.Context) error

	// TextState returns what the platform knows of the text: the result of create,
	// which is called as long as that is nil, or of Fork in a process that was forked.
	TextState(create func() TextState) TextState
}

// TextState is what a platform keeps with a TextPatcher.
type TextState interface {
	// Fork returns a copy. It is called while the memory is copied.
	Fork() TextState

	// Lose is called before what is mapped in ar changes, or its permissions. If
	// patches need something there it returns a function: the TextPatcher undoes all
	// patches, refuses others from then on, and calls it.
	Lose(ar hostarch.AddrRange) func()
}

// TextRefusal is an error: why code is not patched.
type TextRefusal string

// Error implements error.
func (r TextRefusal) Error() string { return "code is not patched: " + string(r) }

// What PatchText refuses.
const (
	TextShared        TextRefusal = "memory shared with others"
	TextWritable      TextRefusal = "memory that can be written"
	TextNotExecutable TextRefusal = "memory that cannot be executed"
	TextTwoPages      TextRefusal = "an instruction in two pages"
	TextChanged       TextRefusal = "code that has changed"
	TextRestored      TextRefusal = "code that was written after a patch"
	TextFile          TextRefusal = "a file that programs can write"
	TextTooMany       TextRefusal = "too many patches"
)

// TextPatching is implemented by Platforms that patch code.
type TextPatching interface {
	// SetTextPatching allows it, or forbids it, in AddressSpaces to come. At first it is
	// forbidden.
	SetTextPatching(bool)

	// PatchesText reports whether it is allowed. If so, programs should not be told
	// that they can set GS by themselves: patches are undone when they do, but only at
	// the next Switch.
	PatchesText() bool

	// TextPatches counts what was done since the platform was made.
	TextPatches() TextPatches
}

// TextPatches counts patches.
type TextPatches struct {
	// Patched are system call instructions that were patched.
	Patched uint64
	// Jumps are threads that jumped, or came back, to the middle of a patch.
	Jumps uint64
	// Refused are those that were not, or not any more, by reason.
	Refused map[TextRefusal]uint64
	// Stopped are processes in which all patches were undone, by reason.
	Stopped map[TextRefusal]uint64
}

// TextPatchStopper is implemented by Contexts of Platforms that patch code.
type TextPatchStopper interface {
	// StopTextPatches makes the next Switch undo all patches in the process of the
	// thread, and make none any more: for a debugger, or a filter that looks at
	// where system calls are made.
	StopTextPatches()
}
