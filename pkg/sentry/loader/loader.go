// Package loader puts programs into an address space: ELF files, their
// interpreters, scripts, and the stack that a program starts with.
//
// It depends on package mm, on abi/linux and cpuid, and sees files through the
// File interface. It must not know of tasks or file systems. Everything in a
// file is hostile.
package loader

import (
	"context"
	"io"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/mm"
)

// File is an open program.
type File interface {
	io.ReaderAt
	// Size returns the length of the file in bytes.
	Size() int64
	// ConfigureMMap sets what the mapping needs of the file.
	ConfigureMMap(ctx context.Context, opts *memmap.MMapOpts) error
	// Path is the absolute path in the application's namespace.
	Path() string
	Close()
}

// Opener opens a program or interpreter in the namespace of the task, if it is
// regular and executable. The error is that of execve(2): EACCES, ENOENT, ELOOP.
type Opener func(ctx context.Context, path string) (File, error)

// Args say what to load.
type Args struct {
	// MM is the empty address space.
	MM *mm.MemoryManager
	// Open opens interpreters.
	Open Opener
	// File is the program; Load does not close it.
	File File
	// Filename is the name as the caller of execve gave it, for AT_EXECFN and
	// scripts.
	Filename string
	Argv     []string
	Envv     []string

	UID, EUID, GID, EGID uint32
	// Secure is AT_SECURE: credentials were raised.
	Secure bool

	// StackLimit is the soft RLIMIT_STACK in bytes; it bounds the arguments.
	StackLimit uint64
}

// Image is a loaded program, ready to run.
type Image struct {
	Entry        hostarch.Addr
	StackPointer hostarch.Addr
	// Name is the program's name as the kernel shows it (comm), at most 15 bytes.
	Name string
}

// InterpreterError says that the interpreter of a program or script cannot be
// opened.
type InterpreterError struct {
	// Program names the file that asks for it, Interpreter what it asks for.
	Program, Interpreter string
	Err                  error
}

// Error implements error.
func (e *InterpreterError) Error() string {
	return "interpreter " + e.Interpreter + " of " + e.Program + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *InterpreterError) Unwrap() error { return e.Err }

// Load maps the program into args.MM and writes its stack. After an error the
// address space is of no use.
//
// Errors wrap those of execve(2): ENOEXEC, ENOENT, EACCES, E2BIG, ELIBBAD,
// ELOOP, ENOMEM.
func Load(ctx context.Context, args Args) (Image, error) { return Image{}, unix.ENOSYS }
