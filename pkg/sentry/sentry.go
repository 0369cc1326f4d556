// Package sentry runs a program in a sandbox: it puts memory, files, tasks and
// system calls together on a platform. It is a reference: small enough to read,
// complete enough to run unmodified programs, and a place to start from.
//
// It depends on every package of the Sentry but filter, and on the platform registry.
// It must not import a backend: the command links those in.
package sentry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
	"github.com/ringfence/ringfence/pkg/sentry/loader"
	"github.com/ringfence/ringfence/pkg/sentry/pgalloc"
	"github.com/ringfence/ringfence/pkg/sentry/syscalls"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/hostfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/rootfs"
)

// Config says what to run, and in what surroundings.
type Config struct {
	// Platform runs the application's code. The caller keeps it.
	Platform platform.Platform

	// Root is the host directory that the program sees as "/".
	Root string
	// Write lets the program change files below Root and in Binds. Without, all
	// it can write is its own /tmp.
	Write bool
	// Binds are host directories and files to be seen at other places.
	Binds []rootfs.Bind

	// Argv are the program and its arguments. A name without a slash is looked
	// up in the directories that PATH in Env names.
	Argv []string
	// Env is the program's whole environment, as "KEY=value".
	Env []string
	// Cwd is the directory in which the program starts; it must exist. Empty
	// means that of the host process if the program can see it, else "/".
	Cwd string

	// Files are the descriptors of this process that become the program's 0, 1,
	// 2 and so on; negative ones, and those that are not open, stay closed.
	Files []int

	// Hostname is what the program sees; empty means the host's.
	Hostname string

	// Signals are those that this process gets (signal.Notify); of them, the
	// program gets the ForwardedSignals, and this process stops when it does, as a
	// shell would expect of the program itself. Nil keeps them apart.
	Signals <-chan os.Signal
	// Ignored are those of the ForwardedSignals that the program ignores at first, as
	// it would if this process had executed it (signal(7), execve(2)): those for which
	// signal.Ignored was true before signal.Notify.
	Ignored []os.Signal

	// Confine, unless it is nil, is called when all is set up, before the program
	// is loaded and executes its first instruction.
	Confine func() error

	// Trace gets a line per system call, unless it is nil.
	Trace io.Writer
	// Strict ends the program at its first system call that is not supported.
	Strict bool
	// Log gets messages about the host failing the program; nil drops them.
	Log *log.Logger
}

// Result is how a program ended.
type Result struct {
	// Status is as wait4(2) gives it.
	Status unix.WaitStatus
	// Unknown counts the system calls that are not supported, by number.
	Unknown map[uintptr]uint64
}

// ProgramError says that the program could not be started.
type ProgramError struct {
	// NotFound says that there is no such program; otherwise it is there, but
	// cannot be executed.
	NotFound bool
	Err      error
}

// Error implements error.
func (e *ProgramError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *ProgramError) Unwrap() error { return e.Err }

// Run runs a program until it ends. Then every other process of the sandbox is
// killed, and nothing is left of it. When ctx ends before, so does the sandbox.
//
// The error is a *ProgramError if the program cannot be started; anything else
// is a failure of the configuration or the host. Errors say what would help.
func Run(ctx context.Context, c Config) (Result, error) {
	if len(c.Argv) == 0 {
		return Result{}, errors.New("no program to run")
	}
	ignored, err := ignoredSignals(c.Ignored)
	if err != nil {
		return Result{}, err
	}
	if c.Log == nil {
		c.Log = log.New(io.Discard, "", 0)
	}
	if c.Hostname == "" {
		c.Hostname, _ = os.Hostname() // a sandbox without a name will do
	}
	mf, err := pgalloc.New("ringfence-memory")
	if err != nil {
		return Result{}, fmt.Errorf("application memory: %w", err)
	}
	defer mf.Destroy()
	poller, err := hostfs.NewPoller()
	if err != nil {
		return Result{}, fmt.Errorf("poller of files: %w", err)
	}
	defer poller.Close()

	fdt := vfs.NewFDTable()
	var files []*vfs.FileDescription
	for i, fd := range c.Files {
		if fd < 0 {
			continue
		}
		f, err := hostfs.NewFile(poller, fd)
		if errors.Is(err, unix.EBADF) {
			continue
		}
		if err != nil {
			fdt.DecRef()
			return Result{}, fmt.Errorf("file descriptor %d: %w", fd, err)
		}
		files = append(files, f)
		fdt.NewFDAt(int32(i), f, false, uint64(len(c.Files)))
	}

	config := kernel.Config{
		Platform:   c.Platform,
		MemoryFile: mf,
		Syscalls:   syscalls.Table(),
		Hostname:   c.Hostname,
		Trace:      c.Trace,
		Strict:     c.Strict,
		Ignored:    ignored,
		Log:        c.Log,
	}
	var signals *forwarder
	if c.Signals != nil {
		signals = newForwarder()
		config.Stopped = signals.stop
	}
	k := kernel.New(config)
	root, err := rootfs.New(rootfs.Config{
		Root: c.Root, Write: c.Write, Binds: c.Binds, Proc: k, Stdio: files,
	})
	if err != nil {
		fdt.DecRef()
		return Result{}, err
	}
	defer root.Close()

	if signals != nil {
		signals.k = k
		defer signals.close()
	}
	fs := vfs.NewFSContext(root.Namespace)
	program, err := prepare(ctx, &c, fs)
	if err == nil && c.Confine != nil {
		err = c.Confine()
	}
	if err == nil {
		err = k.Start(&kernel.ExecArgs{Path: program, Filename: program, Argv: c.Argv, Envv: c.Env}, fdt, fs)
		if err != nil {
			err = explain(ctx, fs, program, err)
		}
	}
	if err != nil {
		fdt.DecRef()
		fs.DecRef()
		return Result{}, err
	}
	if signals != nil {
		go signals.forward(c.Signals)
	}
	stop := context.AfterFunc(ctx, func() { k.Abort(context.Cause(ctx)) })
	defer stop()
	status, err := k.Wait()
	return Result{unix.WaitStatus(status), k.UnknownSyscalls()}, err
}

// prepare enters the working directory, and returns the path of the program.
func prepare(ctx context.Context, c *Config, fs *vfs.FSContext) (string, error) {
	if c.Cwd != "" {
		if err := fs.Chdir(ctx, c.Cwd); err != nil {
			return "", fmt.Errorf("working directory %s: %w: name one that exists below the root", c.Cwd, err)
		}
	} else if wd, err := unix.Getwd(); err == nil {
		if rest, ok := strings.CutPrefix(wd, strings.TrimSuffix(c.Root, "/")); ok && (rest == "" || rest[0] == '/') {
			fs.Chdir(ctx, path.Clean("/"+rest)) // else it starts in "/"
		}
	}

	name := c.Argv[0]
	if strings.Contains(name, "/") {
		return name, nil
	}
	dirs := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, kv := range c.Env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			dirs = v
		}
	}
	var found error
	for _, dir := range strings.Split(dirs, ":") {
		if dir == "" {
			dir = "."
		}
		p := path.Join(dir, name)
		if dir == "." {
			p = "./" + name
		}
		f, err := fs.OpenExecutable(ctx, nil, p, 0)
		if err == nil {
			f.Close()
			return p, nil
		}
		if st, e := fs.StatAt(ctx, nil, p, 0); e == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && found == nil {
			found = explain(ctx, fs, p, err)
		}
	}
	if found != nil {
		return "", found
	}
	return "", &ProgramError{true, fmt.Errorf("%s: not found in PATH (%s): give its path, or change PATH with --env", name, dirs)}
}

// explain returns a ProgramError that says why a program cannot be started, and
// what would help.
func explain(ctx context.Context, fs *vfs.FSContext, program string, err error) error {
	var interp *loader.InterpreterError
	switch {
	case errors.As(err, &interp):
		return &ProgramError{errors.Is(err, unix.ENOENT), fmt.Errorf("%s: %w: it must exist below the root and be executable", program, err)}
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return &ProgramError{true, fmt.Errorf("%s: %w: name a program that exists below the root", program, err)}
	case errors.Is(err, unix.EACCES):
		hint := "it must be executable (chmod +x), and the directories above it accessible"
		if st, e := fs.StatAt(ctx, nil, program, 0); e == nil {
			switch st.Mode & unix.S_IFMT {
			case unix.S_IFREG:
			case unix.S_IFDIR:
				err, hint = unix.EISDIR, "name a program"
			default:
				hint = "it is not a regular file"
			}
		}
		return &ProgramError{false, fmt.Errorf("%s: %w: %s", program, err, hint)}
	case errors.Is(err, unix.ENOEXEC):
		return &ProgramError{false, fmt.Errorf("%s: %w: it must start with #! if it is a script, or be an ELF program for %s", program, err, linux.MachineName)}
	case errors.Is(err, unix.E2BIG), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ELIBBAD), errors.Is(err, unix.EINVAL):
		return &ProgramError{false, fmt.Errorf("%s: %w", program, err)}
	}
	return fmt.Errorf("start %s: %w", program, err)
}
