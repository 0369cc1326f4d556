// Package loader puts programs into an address space: ELF files, their
// interpreters, scripts, and the stack that a program starts with.
//
// It depends on package mm, on abi/linux and cpuid, and sees files through the
// File interface. It must not know of tasks or file systems. Everything in a
// file is hostile.
package loader

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/mm"
)

// File is an open program.
type File interface {
	io.ReaderAt
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

// Limits of scripts (execve(2)).
const (
	scriptHead     = 256 // what of the file is looked at
	maxScriptDepth = 5
)

// Load maps the program into args.MM and writes its stack. After an error the
// address space is of no use.
//
// Errors wrap those of execve(2): ENOEXEC, ENOENT, EACCES, E2BIG, ELIBBAD,
// ELOOP, ENOMEM.
func Load(ctx context.Context, args Args) (Image, error) {
	file, argv, name := args.File, args.Argv, args.Filename
	if len(argv) == 0 { // as Linux does since 5.18
		argv = []string{""}
	}
	for depth := 0; ; depth++ {
		head := make([]byte, scriptHead)
		n, err := file.ReadAt(head, 0)
		if err != nil && err != io.EOF {
			return Image{}, fmt.Errorf("read %s: %w", file.Path(), err)
		}
		interp, arg, ok, err := parseScript(head[:n])
		if err != nil {
			return Image{}, fmt.Errorf("%s: the line after #! names no interpreter: %w", file.Path(), err)
		}
		if !ok {
			break
		}
		if depth == maxScriptDepth {
			return Image{}, fmt.Errorf("%s: scripts that are interpreters of scripts, %d deep: %w", file.Path(), depth, unix.ELOOP)
		}
		next := []string{interp}
		if arg != "" {
			next = append(next, arg)
		}
		argv, name = append(append(next, name), argv[1:]...), interp
		f, err := args.Open(ctx, interp)
		if err != nil {
			return Image{}, &InterpreterError{Program: file.Path(), Interpreter: interp, Err: err}
		}
		defer f.Close()
		file = f
	}

	prog, err := readELF(file)
	if err != nil {
		return Image{}, err
	}
	base := hostarch.Addr(0)
	if prog.header.Type == linux.ET_DYN {
		base = args.MM.PIEBase()
	}
	bias, err := prog.load(ctx, args.MM, base)
	if err != nil {
		return Image{}, err
	}
	if err := args.MM.BrkSetup(ctx, (bias + prog.span.End).MustRoundUp()); err != nil {
		return Image{}, fmt.Errorf("%s: set up the heap: %w", file.Path(), err)
	}
	entry := bias + hostarch.Addr(prog.header.Entry)
	image := Image{Entry: entry, Name: commOf(args.Filename)}

	var interpBias hostarch.Addr
	if prog.interp != "" {
		f, err := args.Open(ctx, prog.interp)
		if err != nil {
			return Image{}, &InterpreterError{Program: file.Path(), Interpreter: prog.interp, Err: err}
		}
		defer f.Close()
		interp, err := readELF(f)
		if err != nil {
			return Image{}, &InterpreterError{Program: file.Path(), Interpreter: prog.interp, Err: errors.Join(unix.ELIBBAD, err)}
		}
		if interpBias, err = interp.load(ctx, args.MM, 0); err != nil {
			return Image{}, err
		}
		image.Entry = interpBias + hostarch.Addr(interp.header.Entry)
	}

	if image.StackPointer, err = writeStack(ctx, &args, stackContents{
		argv: argv, execfn: args.Filename, execStack: prog.execStack, path: file.Path(),
		auxv: [][2]uint64{
			{linux.AT_PHDR, uint64(bias) + prog.phdrAddr},
			{linux.AT_PHENT, programSize},
			{linux.AT_PHNUM, uint64(prog.header.Phnum)},
			{linux.AT_BASE, uint64(interpBias)},
			{linux.AT_FLAGS, 0},
			{linux.AT_ENTRY, uint64(entry)},
		},
	}); err != nil {
		return Image{}, err
	}
	return image, nil
}

// commOf returns the last part of path, cut to what the kernel keeps of it.
func commOf(path string) string {
	name := path[strings.LastIndexByte(path, '/')+1:]
	return name[:min(len(name), maxComm)]
}

const maxComm = 15 // TASK_COMM_LEN without the NUL

// parseScript takes the line after "#!" apart, by the rules of the kernel
// (fs/binfmt_script.c): one optional argument, which may hold blanks. ok is
// false if head is not that of a script.
func parseScript(head []byte) (interp, arg string, ok bool, err error) {
	line, ok := bytes.CutPrefix(head, []byte("#!"))
	if !ok {
		return "", "", false, nil
	}
	whole := len(head) < scriptHead // the file ends here
	if i := bytes.IndexAny(line, "\n\x00"); i >= 0 {
		line, whole = line[:i], true
	}
	const blanks = " \t"
	line = bytes.TrimLeft(line, blanks)
	i := bytes.IndexAny(line, blanks)
	if i < 0 && !whole {
		return "", "", true, unix.ENOEXEC // cut off in the interpreter's name
	}
	if i < 0 {
		i = len(line)
	}
	if i == 0 {
		return "", "", true, unix.ENOEXEC
	}
	return string(line[:i]), string(bytes.Trim(line[i:], blanks)), true, nil
}
