package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/bpf"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/seccomp"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
	"github.com/ringfence/ringfence/pkg/sentry"
	"github.com/ringfence/ringfence/pkg/sentry/filter"
	"github.com/ringfence/ringfence/pkg/sentry/filter/programs"
)

const seccompUsage = `Usage: ringfence seccomp COMMAND [OPTIONS] [ARGS...]

Shows the seccomp filters with which ringfence run confines itself. There is one
for each platform and for what may be written of the host's files: no more than
the standard files ("read-only"), which may be opened again ("redirected", for
regular files), or what is below the root ("write").

Commands:
  list                        the filters
  dump NAME                   a filter's rules, what each costs, and its program
  explain NAME CALL [ARGS]    what a filter does with a system call, and why;
                              CALL is a name or number, ARGS are numbers
  test                        check the filters, and try them on this kernel

Options:
  --arch=ARCH     %s (default %s)
  --set=VAR=N     the value of a variable (default 0); may be repeated
  --help          print this

Costs are in instructions of the filter. The kernel does not run it at all for
calls that it allows whatever the arguments.

Examples:
  ringfence seccomp dump ptrace,read-only
  ringfence seccomp explain --arch=arm64 ptrace,write openat 5 0 0x8000
`

// The arguments with which this program starts itself.
const (
	seccompMonitor = "monitor"
	seccompViolate = "violate"
)

// monitorArgv starts the monitor of a sandbox.
var monitorArgv = []string{"ringfence", "seccomp", seccompMonitor}

// confine installs the filter for a sandbox.
func confine(c *sentry.Config, monitor *filter.Monitor, verbose func(string, ...any)) error {
	access := filter.ReadOnly
	for _, fd := range c.Files {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil && (st.Mode&unix.S_IFMT == unix.S_IFREG || st.Mode&unix.S_IFMT == unix.S_IFBLK) {
			access = filter.Redirected
		}
	}
	if c.Write {
		access = filter.Write
	}
	err := filter.Install(filter.Config{
		Platform: c.Platform.SeccompInfo(), Access: access, Programs: programs.Programs, Monitor: monitor, Logf: verbose,
	})
	if err == nil {
		afterConfine()
	}
	return err
}

// afterConfine is for tests.
var afterConfine = func() {}

// seccompOptions are the options of ringfence seccomp, and its arguments.
type seccompOptions struct {
	arch   sysno.Arch
	values precompiled.Values
	args   []string
}

func parseSeccomp(args []string) (*seccompOptions, error) {
	o := &seccompOptions{values: make(precompiled.Values)}
	fs := flag.NewFlagSet("seccomp", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	var set list
	arch := fs.String("arch", sysno.Native.String(), "")
	fs.Var(&set, "set", "")
	// Options may stand anywhere, but negative numbers are no options.
	for len(args) > 0 {
		if _, err := parseArg(args[0]); err == nil || !strings.HasPrefix(args[0], "-") {
			o.args, args = append(o.args, args[0]), args[1:]
			continue
		}
		if err := fs.Parse(args); err != nil {
			return nil, err
		}
		args = fs.Args()
	}
	for _, kv := range set {
		name, value, _ := strings.Cut(kv, "=")
		n, err := strconv.ParseUint(value, 0, 32)
		if err != nil {
			return nil, fmt.Errorf("--set=%s: write it as VAR=N, with a number of 32 bits", kv)
		}
		o.values[name] = uint32(n)
	}
	var err error
	o.arch, err = sysno.ParseArch(*arch)
	return o, err
}

// parseArg parses an argument of a system call.
func parseArg(s string) (uint64, error) {
	if n, err := strconv.ParseInt(s, 0, 64); err == nil {
		return uint64(n), nil
	}
	return strconv.ParseUint(s, 0, 64)
}

func seccompMain(args []string) int {
	if len(args) == 1 && args[0] == seccompMonitor {
		return filter.MonitorMain(os.Stderr)
	}
	if len(args) == 2 && args[0] == seccompViolate {
		return fail(exitError, violate(args[1]))
	}
	var b bytes.Buffer
	err := seccompRun(&b, args)
	os.Stdout.Write(b.Bytes())
	if err != nil {
		return fail(exitError, fmt.Errorf("seccomp: %w", err))
	}
	return 0
}

func seccompRun(w io.Writer, args []string) error {
	o, err := parseSeccomp(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintf(w, seccompUsage, archNames(), sysno.Native)
		return nil
	case err != nil:
		return fmt.Errorf("%w: see ringfence seccomp --help", err)
	case len(o.args) == 0:
		return errors.New("no command: see ringfence seccomp --help")
	}
	command := o.args[0]
	o.args = o.args[1:]
	switch n := len(o.args); {
	case command == "list" && n == 0:
		return seccompList(w)
	case command == "dump" && n == 1:
		return seccompDump(w, o)
	case command == "explain" && n >= 2 && n <= 8:
		return seccompExplain(w, o)
	case command == "test" && n == 0:
		return seccompTest(w)
	}
	return fmt.Errorf("%q with %d arguments: see ringfence seccomp --help", command, len(o.args))
}

func archNames() string {
	var names []string
	for _, a := range sysno.Arches() {
		names = append(names, a.String())
	}
	return strings.Join(names, " or ")
}

// compiled is a filter and the program that comes of it with values.
type compiled struct {
	precompiled.Source
	values  precompiled.Values
	program bpf.Program
}

func compile(s precompiled.Source, values precompiled.Values) (*compiled, error) {
	c := &compiled{s, make(precompiled.Values), nil}
	for _, name := range s.Variables {
		c.values[name] = values[name]
	}
	for name := range values {
		if !slices.Contains(s.Variables, name) {
			return nil, fmt.Errorf("--set: %s has no variable %s, only %s", s.Key, name, strings.Join(s.Variables, ", "))
		}
	}
	p, err := s.Compile() // and not Build: this is what was compiled at build time
	if err != nil {
		return nil, err
	}
	c.program, err = p.Render(c.values)
	return c, err
}

// find returns the filter of the given name.
func (o *seccompOptions) find(name string) (*compiled, error) {
	sources, err := filter.Sources(filter.Platforms(), o.arch)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, s := range sources {
		if s.Key == name {
			return compile(s, o.values)
		}
		names = append(names, s.Key)
	}
	return nil, fmt.Errorf("there is no filter %q for %v: use one of %s", name, o.arch, strings.Join(names, " "))
}

// numbers returns the calls that the filter has a rule for.
func (c *compiled) numbers() []uintptr {
	var all []uintptr
	for _, set := range c.Rules(c.values) {
		all = append(all, set.Rules.Numbers()...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// rule returns the rules for a call as text, a line each.
func (c *compiled) rule(nr uintptr) []string {
	var lines []string
	for _, set := range c.Rules(c.values) {
		r := set.Rules.Get(nr)
		if or, ok := r.(seccomp.Or); ok {
			for _, each := range or {
				lines = append(lines, fmt.Sprintf("%v if %v", set.Action, each))
			}
		} else if _, ok := r.(seccomp.MatchAll); ok {
			lines = append(lines, set.Action.String())
		} else if r != nil {
			lines = append(lines, fmt.Sprintf("%v if %v", set.Action, r))
		}
	}
	return lines
}

// cost returns what the filter costs for a call: "7" or "5-12".
func (c *compiled) cost(nr uintptr) string {
	least, most := c.program.Cost(uint32(nr), c.Options.Arch.AuditArch())
	if least == most {
		return strconv.Itoa(least)
	}
	return fmt.Sprintf("%d-%d", least, most)
}

func seccompList(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tARCH\tCALLS\tINSTRUCTIONS\tPRECOMPILED\tVARIABLES")
	for _, a := range sysno.Arches() {
		sources, err := filter.Sources(filter.Platforms(), a)
		if err != nil {
			return err
		}
		for _, s := range sources {
			c, err := compile(s, nil)
			if err != nil {
				return err
			}
			pre := "-" // not in this binary
			if a == sysno.Native {
				pre = "no"
				if _, ok := programs.Programs.Get(s.Key); ok {
					pre = "yes"
				}
			}
			fmt.Fprintf(t, "%s\t%v\t%d\t%d\t%s\t%s\n", s.Key, a, len(c.numbers()), len(c.program), pre, strings.Join(s.Variables, " "))
		}
	}
	return t.Flush()
}

func seccompDump(w io.Writer, o *seccompOptions) error {
	c, err := o.find(o.args[0])
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "%s on %v: %d system calls have a rule; others: %v\n\n", c.Key, o.arch, len(c.numbers()), c.Options.DefaultAction)
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "CALL\tNR\tCOST\tRULE")
	for _, nr := range c.numbers() {
		for i, line := range c.rule(nr) {
			if i == 0 {
				fmt.Fprintf(t, "%s\t%d\t%s\t%s\n", o.arch.Name(nr), nr, c.cost(nr), line)
			} else {
				fmt.Fprintf(t, "\t\t\t%s\n", line)
			}
		}
	}
	t.Flush()
	fmt.Fprintf(w, "\nThe program: %d instructions\n%v", len(c.program), c.program)
	return nil
}

func seccompExplain(w io.Writer, o *seccompOptions) error {
	c, err := o.find(o.args[0])
	if err != nil {
		return err
	}
	nr, err := callNumber(o.arch, o.args[1])
	if err != nil {
		return err
	}
	d := bpf.Data{Nr: uint32(nr), Arch: o.arch.AuditArch()}
	for i, s := range o.args[2:] {
		if d.Args[i], err = parseArg(s); err != nil {
			return fmt.Errorf("argument %d of the system call, %q, is no number of 64 bits", i, s)
		}
	}
	r, err := c.program.Run(&d)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "%s(%#x, %#x, %#x, %#x, %#x, %#x) on %v under %s: %v\n", o.arch.Name(nr),
		d.Args[0], d.Args[1], d.Args[2], d.Args[3], d.Args[4], d.Args[5], o.arch, c.Key, seccomp.Action(r.Action))
	if seccomp.Action(r.Action) == seccomp.UserNotif {
		fmt.Fprintln(w, "  that is: the monitor names the call and kills the Sentry")
	}
	lines := c.rule(nr)
	if len(lines) == 0 {
		lines = []string{"none: the default, " + c.Options.DefaultAction.String()}
	}
	fmt.Fprintf(w, "rules:\n  %s\n", strings.Join(lines, "\n  "))
	fmt.Fprintf(w, "cost: %d instructions; with any arguments %s\n", r.Executed, c.cost(nr))
	return nil
}

// callNumber returns the number of a call that is given by name or number.
func callNumber(a sysno.Arch, s string) (uintptr, error) {
	if nr, err := strconv.ParseUint(s, 0, 32); err == nil {
		return uintptr(nr), nil
	}
	if call, ok := sysno.Lookup(s); ok {
		if nr := call.On(a); nr != sysno.None {
			return nr, nil
		}
	}
	return 0, fmt.Errorf("%v has no system call %q", a, s)
}

// seccompTest checks all filters, and tries those for this machine.
func seccompTest(w io.Writer) error {
	failed := 0
	check := func(what string, err error) {
		result := "ok"
		if err != nil {
			result, failed = err.Error(), failed+1
		}
		fmt.Fprintf(w, "%-60s %s\n", what, result)
	}
	for _, f := range []seccomp.Feature{seccomp.FeatureTSync, seccomp.FeatureKillProcess, seccomp.FeatureTSyncListener} {
		check("the kernel has "+f.String(), seccomp.Probe(f))
	}
	for _, a := range sysno.Arches() {
		sources, err := filter.Sources(filter.Platforms(), a)
		if err != nil {
			return err
		}
		for _, s := range sources {
			p, err := s.Compile()
			if err == nil {
				err = p.Code.Validate()
			}
			check(fmt.Sprintf("%s on %v compiles to a valid program", s.Key, a), err)
			if a != sysno.Native || err != nil {
				continue
			}
			check(fmt.Sprintf("%s is compiled in as it is", s.Key), isCompiledIn(&p))
			check(fmt.Sprintf("%s kills and names a forbidden call", s.Key), tryViolation(s.Key))
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d checks failed", failed)
	}
	return nil
}

// isCompiledIn compares p with what was compiled at build time.
func isCompiledIn(p *precompiled.Program) error {
	got, ok := programs.Programs.Get(p.Key)
	if !ok || !slices.Equal(got.Code, p.Code) {
		return errors.New("it is not: run go generate ./pkg/sentry/filter/programs")
	}
	return nil
}

// forbidden is a call that no filter allows.
const forbidden = "getppid"

// tryViolation confines another process, which then makes a forbidden call.
func tryViolation(key string) error {
	cmd := exec.Command("/proc/self/exe", "seccomp", seccompViolate, key)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return fmt.Errorf("the process was not killed: %v, %q", err, out)
	}
	if ws := exit.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != unix.SIGKILL || !bytes.Contains(out, []byte(forbidden)) {
		return fmt.Errorf("the process ended with %v and the message %q", err, out)
	}
	return nil
}

// violate confines this process and makes a forbidden call. It returns only if
// that does not work.
func violate(key string) error {
	for _, info := range filter.Platforms() {
		for access := filter.ReadOnly; access <= filter.Write; access++ {
			if filter.Key(info, access) != key {
				continue
			}
			return violateUnder(info, access)
		}
	}
	return fmt.Errorf("there is no filter %q", key)
}

func violateUnder(info platform.SeccompInfo, access filter.Access) error {
	monitor, err := filter.StartMonitor(monitorArgv)
	if err != nil {
		return err
	}
	defer monitor.Stop()
	err = filter.Install(filter.Config{
		Platform: info, Access: access, Programs: programs.Programs, Monitor: monitor,
		Logf: func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) },
	})
	if err != nil {
		return err
	}
	return fmt.Errorf("%s returned %d under the filter", forbidden, unix.Getppid())
}
