package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/platform"
	_ "github.com/ringfence/ringfence/pkg/platform/platforms"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
	"github.com/ringfence/ringfence/pkg/sentry"
	"github.com/ringfence/ringfence/pkg/sentry/filter"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/rootfs"
)

const runUsage = `Usage: ringfence run [OPTIONS] [--] PROGRAM [ARGS...]

Runs PROGRAM in a sandbox. It sees the files below the root directory, which it
cannot change, and has /tmp, /dev and /proc of its own, and no network. It gets
the environment, terminal and standard files of this command, and its signals.

Options:
  --platform=NAME    how to run its code: auto (the best that works here), or
                     one of %s (default auto)
  --root=DIR         the host directory that it sees as / (default /)
  --write            let it change files below the root, and in binds
  --bind=SRC[:DST]   show the host's SRC at DST, or at the same place; may be
                     repeated
  --cwd=DIR          where it starts, a directory below the root (default: the
                     current directory if it is there, else /)
  --env=KEY=VALUE    set a variable of its environment; may be repeated
  --clear-env        start from an empty environment instead of this one's
  --hostname=NAME    the host name that it sees (default: the host's)
  --trace            print its system calls on standard error
  --trace-file=FILE  write its system calls to FILE
  --strict           end it at the first system call that is not supported
  --no-self-filter   let it run without the seccomp filter that confines ringfence
                     itself: for debugging only
  --usertrap=false   do not replace system call instructions that it uses often
                     by jumps, which makes them faster where the platform can
  --verbose          say which platform was chosen and why, which system calls
                     were not supported, and what of its code was replaced
  --help             print this

The exit status is that of PROGRAM, or 128+N if signal N ended it. It is 127 if
PROGRAM is not found, 126 if it cannot be executed, and 125 for any other error.

Examples:
  ringfence run ls -l /usr
  ringfence run --platform=ptrace --trace -- /bin/echo hello
  ringfence run --bind "$PWD" --write --cwd "$PWD" -- make test
  ringfence run --root=/srv/alpine --clear-env --env PATH=/bin -- sh
`

// Exit statuses of env(1) and chroot(1) for a program that cannot be started.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

// list is a flag that may be repeated.
type list []string

func (l *list) String() string { return strings.Join(*l, " ") }

func (l *list) Set(v string) error {
	*l = append(*l, v)
	return nil
}

// runOptions are the options of the command line.
type runOptions struct {
	platform, root, cwd, hostname, traceFile string
	write, clearEnv, trace, strict, verbose  bool
	noSelfFilter, usertrap                   bool
	binds, env                               list
	argv                                     []string
}

// errHelp says that --help was given.
var errHelp = flag.ErrHelp

func parseRun(args []string) (*runOptions, error) {
	o := &runOptions{}
	fs := flag.NewFlagSet("run", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&o.platform, "platform", "auto", "")
	fs.StringVar(&o.root, "root", "/", "")
	fs.StringVar(&o.cwd, "cwd", "", "")
	fs.StringVar(&o.hostname, "hostname", "", "")
	fs.StringVar(&o.traceFile, "trace-file", "", "")
	fs.BoolVar(&o.write, "write", false, "")
	fs.BoolVar(&o.clearEnv, "clear-env", false, "")
	fs.BoolVar(&o.trace, "trace", false, "")
	fs.BoolVar(&o.strict, "strict", false, "")
	fs.BoolVar(&o.noSelfFilter, "no-self-filter", false, "")
	fs.BoolVar(&o.usertrap, "usertrap", true, "")
	fs.BoolVar(&o.verbose, "verbose", false, "")
	fs.Var(&o.binds, "bind", "")
	fs.Var(&o.env, "env", "")
	if err := fs.Parse(args); err != nil {
		if err == errHelp {
			return nil, err
		}
		return nil, fmt.Errorf("run: %w: see ringfence run --help", err)
	}
	if o.argv = fs.Args(); len(o.argv) == 0 {
		return nil, errors.New("run: no PROGRAM to run: see ringfence run --help")
	}
	for _, kv := range o.env {
		if !strings.Contains(kv, "=") || kv[0] == '=' {
			return nil, fmt.Errorf("run: --env=%s: write it as KEY=VALUE", kv)
		}
	}
	return o, nil
}

// environment returns base with the variables of set added or replaced.
func environment(base, set []string) []string {
	env := slices.Clone(base)
	for _, kv := range set {
		key := kv[:strings.Index(kv, "=")+1]
		if i := slices.IndexFunc(env, func(e string) bool { return strings.HasPrefix(e, key) }); i >= 0 {
			env[i] = kv
		} else {
			env = append(env, kv)
		}
	}
	return env
}

func parseBinds(args []string) ([]rootfs.Bind, error) {
	var binds []rootfs.Bind
	for _, arg := range args {
		src, dst, _ := strings.Cut(arg, ":")
		src, err := filepath.Abs(src)
		if err != nil {
			return nil, fmt.Errorf("--bind=%s: %w", arg, err)
		}
		if dst == "" {
			dst = src
		}
		binds = append(binds, rootfs.Bind{Source: src, Target: dst})
	}
	return binds, nil
}

func runMain(args []string) int {
	o, err := parseRun(args)
	if err == errHelp {
		fmt.Printf(runUsage, strings.Join(platform.List(), ", "))
		return 0
	}
	if err != nil {
		return fail(exitError, err)
	}
	status, err := run(o)
	var program *sentry.ProgramError
	switch {
	case errors.As(err, &program) && program.NotFound:
		return fail(exitNotFound, err)
	case errors.As(err, &program):
		return fail(exitNotExecutable, err)
	case err != nil:
		return fail(exitError, err)
	}
	return status
}

// run runs the program, and returns its exit status as a shell gives it.
func run(o *runOptions) (int, error) {
	// A pipe that nobody reads is the program's to hear of, not ours.
	signal.Ignore(unix.SIGPIPE)
	logger := log.New(os.Stderr, "ringfence: ", 0)
	verbose := func(string, ...any) {}
	if o.verbose {
		verbose = logger.Printf
	}
	binds, err := parseBinds(o.binds)
	if err != nil {
		return 0, err
	}
	root, err := filepath.Abs(o.root)
	if err != nil {
		return 0, fmt.Errorf("--root=%s: %w", o.root, err)
	}
	config := sentry.Config{
		Root: root, Write: o.write, Binds: binds,
		Argv: o.argv, Cwd: o.cwd,
		Files:    []int{0, 1, 2},
		Hostname: o.hostname,
		Strict:   o.strict,
		Log:      logger,
	}
	if !o.clearEnv {
		config.Env = os.Environ()
	}
	config.Env = environment(config.Env, o.env)
	if o.trace {
		config.Trace = os.Stderr
	}
	if o.traceFile != "" {
		f, err := os.Create(o.traceFile)
		if err != nil {
			return 0, fmt.Errorf("trace file: %w", err)
		}
		defer f.Close()
		config.Trace = f
	}
	if !o.noSelfFilter {
		monitor, err := filter.StartMonitor(monitorArgv)
		if err != nil {
			return 0, fmt.Errorf("%w, or use --no-self-filter", err)
		}
		defer monitor.Stop()
		config.Confine = func() error { return confine(&config, monitor, verbose) }
	}
	if config.Platform, _, err = sentry.NewPlatform(o.platform, verbose); err != nil {
		return 0, err
	}
	patching, _ := config.Platform.(platform.TextPatching)
	if patching != nil {
		patching.SetTextPatching(o.usertrap)
	}
	// Never undone: it would take as long, and this process is about to end then.
	signals := make(chan os.Signal, 16)
	for _, s := range sentry.ForwardedSignals {
		if signal.Ignored(s) { // as nohup(1) wants it, and shells without job control
			config.Ignored = append(config.Ignored, s)
		}
	}
	signal.Notify(signals, sentry.ForwardedSignals...)
	config.Signals = signals
	result, err := sentry.Run(context.Background(), config)
	for _, nr := range slices.Sorted(maps.Keys(result.Unknown)) {
		verbose("system call %d (%s) is not supported; it was made %d times", nr, sysno.Native.Name(nr), result.Unknown[nr])
	}
	if patching != nil && o.usertrap {
		reportPatches(patching.TextPatches(), verbose)
	}
	if err != nil {
		return 0, err
	}
	if result.Status.Signaled() {
		return 128 + int(result.Status.Signal()), nil
	}
	return result.Status.ExitStatus(), nil
}

// reportPatches says what the platform has patched, and what not.
func reportPatches(p platform.TextPatches, verbose func(string, ...any)) {
	verbose("%d system call instructions were replaced", p.Patched)
	for _, why := range slices.Sorted(maps.Keys(p.Refused)) {
		verbose("%d were not: %s", p.Refused[why], string(why))
	}
	for _, why := range slices.Sorted(maps.Keys(p.Stopped)) {
		verbose("%d processes were to stay as they are: %s", p.Stopped[why], string(why))
	}
}
