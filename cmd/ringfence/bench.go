package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/cmd/ringfence/internal/guest"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/sentry"
)

const benchUsage = `Usage: ringfence bench [OPTIONS]

Measures what application code costs in a sandbox and on the host itself: the
same small program runs natively and under "ringfence run" on each platform, all
in turn, operation by operation. The table has the best batch of each in
nanoseconds per operation, and how many times the native figure that is.

Options:
  --platform=NAMES   some of %s, with commas between
                     (default: all that work here); NAME%s is that with
                     code replaced (--usertrap), NAME without
  --run=TEXT         only the operations whose name contains TEXT
  --rounds=N         batches of each operation; the best counts (default 10)
  --batch=DURATION   how long a batch takes at least (default 10ms)
  --json             print JSON
  --help             print this

Operations:
%s`

// benchOp is an operation that is measured.
type benchOp struct {
	op   guest.Op
	name string
	what string
}

// startOp is no operation of the guest but its whole life.
const startOp = guest.Ops

var benchOps = []benchOp{
	{guest.GetpidPlain, "getpid-plain", "getpid(2) from an instruction that cannot be patched"},
	{guest.GetpidMov, "getpid-mov", "getpid(2), mov $nr,%eax before the instruction"},
	{guest.GetpidCmp, "getpid-cmp", "getpid(2), cmp $-4095,%rax behind it, as in C libraries"},
	{guest.ReadPlain, "read-plain", "read(2) of 1 byte of /dev/zero, as getpid-plain"},
	{guest.ReadCmp, "read-cmp", "read(2) of 1 byte of /dev/zero, as getpid-cmp"},
	{guest.MapTouchUnmap, "mmap-touch-munmap", "64 KiB mapped, each page written, unmapped"},
	{guest.FirstTouch, "first-touch", "first write to a page of a mapping of 4 MiB"},
	{guest.ProtectFault, "mprotect-fault", "mprotect(2), fault, SIGSEGV handler with mprotect(2), return"},
	{guest.SelfSignal, "self-signal", "tgkill(2) to the own thread, empty handler, return"},
	{guest.Raise, "raise", "gettid(2), getpid(2), and that, as raise(3)"},
	{guest.Thread, "thread", "clone(2) of a thread that ends, and futex(2) to join it"},
	{guest.Fork, "fork-wait", "clone(2) of a process that ends, and wait4(2)"},
	{guest.PingPong, "pipe-ping-pong", "a byte through a pipe to another thread, and one back"},
	{startOp, "start", "the program started, run and ended: the whole command"},
}

// benchTimeout bounds a batch of the guest, in which it does no more than about
// twice of what took half of a batch.
const benchTimeout = 30 * time.Second

// usertrapSuffix is what the name of a platform ends with that may patch.
const usertrapSuffix = "+usertrap"

// patchers are the platforms that can patch (platform.TextPatching).
var patchers = []string{"systrap"}

// benchTarget runs the guest natively or on a platform.
type benchTarget struct {
	name string
	argv []string

	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *os.File
	stderr bytes.Buffer
	err    error

	best   map[guest.Op]float64 // nanoseconds
	counts map[guest.Op]uint64
}

// start starts the guest.
func (t *benchTarget) start() error {
	t.cmd = exec.Command(t.argv[0], t.argv[1:]...)
	t.stderr.Reset()
	t.cmd.Stderr = &t.stderr
	in, err := t.cmd.StdinPipe()
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer w.Close()
	t.in, t.out, t.cmd.Stdout = in, r, w
	if err := t.cmd.Start(); err != nil {
		r.Close()
		t.cmd = nil
		return err
	}
	return nil
}

// stop ends the guest and returns why it did not end well.
func (t *benchTarget) stop() error {
	if t.cmd == nil {
		return nil
	}
	t.in.Close()
	timer := time.AfterFunc(benchTimeout, func() { t.cmd.Process.Kill() })
	err := t.cmd.Wait()
	timer.Stop()
	t.out.Close()
	t.cmd = nil
	if err != nil {
		if msg := strings.TrimSpace(t.stderr.String()); msg != "" {
			err = fmt.Errorf("%w: %s", err, msg)
		}
	}
	return err
}

// request makes the guest do op n times, and returns the nanoseconds it took.
func (t *benchTarget) request(op guest.Op, n uint64) (float64, error) {
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:], uint64(op))
	binary.LittleEndian.PutUint64(b[8:], n)
	_, err := t.in.Write(b[:])
	if err == nil {
		t.out.SetReadDeadline(time.Now().Add(benchTimeout))
		_, err = io.ReadFull(t.out, b[:8])
	}
	if err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.cmd.Process.Kill()
			t.stop()
			return 0, fmt.Errorf("no answer within %v", benchTimeout)
		}
		if e := t.stop(); e != nil {
			err = e
		}
		return 0, err
	}
	return float64(binary.LittleEndian.Uint64(b[:])), nil
}

// measure does a batch of op.
func (t *benchTarget) measure(op guest.Op, batch time.Duration) error {
	if op == startOp {
		s := &benchTarget{argv: t.argv}
		begin := time.Now()
		if err := s.start(); err != nil {
			return err
		}
		if err := s.stop(); err != nil {
			return err
		}
		t.note(op, float64(time.Since(begin)))
		return nil
	}
	n := max(t.counts[op], 1)
	for {
		ns, err := t.request(op, n)
		if err != nil {
			return err
		}
		t.note(op, ns/float64(n))
		t.counts[op] = n
		if ns >= float64(batch)/2 {
			return nil
		}
		n = min(n*10, uint64(float64(n)*float64(batch)/max(ns, 1))+1)
	}
}

func (t *benchTarget) note(op guest.Op, ns float64) {
	if best, ok := t.best[op]; !ok || ns < best {
		t.best[op] = ns
	}
}

// benchResult is what is printed with --json.
type benchResult struct {
	Kernel     string           `json:"kernel"`
	Arch       string           `json:"arch"`
	CPUs       int              `json:"cpus"`
	Rounds     int              `json:"rounds"`
	Operations []benchOperation `json:"operations"`
	// About has what platforms say of the host: for kvm, what leaving the guest costs.
	About map[string]string `json:"about,omitempty"`
	// Failed has why a platform could not be measured, or not to the end.
	Failed map[string]string `json:"failed,omitempty"`
}

type benchOperation struct {
	Name      string                 `json:"name"`
	What      string                 `json:"what"`
	NativeNS  float64                `json:"native_ns"`
	Platforms map[string]benchFigure `json:"platforms"`
}

type benchFigure struct {
	NS    float64 `json:"ns"`
	Ratio float64 `json:"ratio"` // to native
}

func benchMain(args []string) int {
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	platforms := fs.String("platform", "", "")
	match := fs.String("run", "", "")
	rounds := fs.Int("rounds", 10, "")
	batch := fs.Duration("batch", 10*time.Millisecond, "")
	asJSON := fs.Bool("json", false, "")
	switch err := fs.Parse(args); {
	case err == flag.ErrHelp:
		var ops strings.Builder
		for _, op := range benchOps {
			fmt.Fprintf(&ops, "  %-18s %s\n", op.name, op.what)
		}
		fmt.Printf(benchUsage, strings.Join(platform.List(), ", "), usertrapSuffix, ops.String())
		return 0
	case err != nil:
		return fail(exitError, fmt.Errorf("bench: %w: see ringfence bench --help", err))
	case fs.NArg() > 0:
		return fail(exitError, fmt.Errorf("bench: unexpected argument %q: see ringfence bench --help", fs.Arg(0)))
	case *rounds < 1 || *batch <= 0 || *batch > benchTimeout/10:
		return fail(exitError, fmt.Errorf("bench: --rounds must be at least 1, --batch more than 0 and at most %v", benchTimeout/10))
	}
	ops := slices.DeleteFunc(slices.Clone(benchOps), func(op benchOp) bool { return !strings.Contains(op.name, *match) })
	if len(ops) == 0 {
		return fail(exitError, fmt.Errorf("bench: no operation has %q in its name: see ringfence bench --help", *match))
	}
	var names []string
	for _, name := range platform.List() {
		names = append(names, name)
		if slices.Contains(patchers, name) {
			names = append(names, name+usertrapSuffix)
		}
	}
	if *platforms != "" {
		names = strings.Split(*platforms, ",")
		for _, name := range names {
			if _, err := platform.Lookup(strings.TrimSuffix(name, usertrapSuffix)); err != nil {
				return fail(exitError, fmt.Errorf("bench: %w", err))
			}
		}
	}
	result, err := bench(names, ops, *rounds, *batch)
	if err != nil {
		return fail(exitError, fmt.Errorf("bench: %w", err))
	}
	if *asJSON {
		e := json.NewEncoder(os.Stdout)
		e.SetIndent("", "  ")
		err = e.Encode(result)
	} else {
		err = result.print(os.Stdout, names)
	}
	if err != nil {
		return fail(exitError, err)
	}
	status := 0
	for _, name := range names {
		if why, ok := result.Failed[name]; ok {
			fail(0, fmt.Errorf("bench: platform %s: %s", name, why))
			if *platforms != "" {
				status = exitError
			}
		}
	}
	return status
}

// bench measures ops natively and on the platforms called names.
func bench(names []string, ops []benchOp, rounds int, batch time.Duration) (*benchResult, error) {
	image, err := guest.Image()
	if err != nil {
		return nil, err
	}
	root, err := os.MkdirTemp("", "ringfence-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(root)
	program := filepath.Join(root, "program")
	if err := os.WriteFile(program, image, 0o755); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	about := make(map[string]string)
	for _, d := range sentry.Diagnose(names...) {
		if d.About != "" {
			about[d.Name] = d.About
		}
	}
	targets := []*benchTarget{{name: "native", argv: []string{program}}}
	for _, name := range names {
		argv := []string{self, "run", "--root=" + root}
		if plain, ok := strings.CutSuffix(name, usertrapSuffix); ok {
			argv = append(argv, "--platform="+plain, "--usertrap")
		} else {
			argv = append(argv, "--platform="+name, "--usertrap=false")
		}
		targets = append(targets, &benchTarget{name: name, argv: append(argv, "--", "/program")})
	}
	for _, t := range targets {
		t.best, t.counts = make(map[guest.Op]float64), make(map[guest.Op]uint64)
		if t.err = t.start(); t.err == nil {
			_, t.err = t.request(guest.GetpidPlain, 1)
		}
		defer t.stop()
	}
	if err := targets[0].err; err != nil {
		return nil, fmt.Errorf("%s: %w: set TMPDIR to a directory in which programs may be executed", program, err)
	}
	// The processes that are not measured wait for their input meanwhile.
	for range rounds {
		for _, op := range ops {
			for _, t := range targets {
				if t.err != nil {
					continue
				}
				if err := t.measure(op.op, batch); err != nil {
					t.err = fmt.Errorf("%s: %w", op.name, err)
				}
			}
		}
	}

	r := &benchResult{Arch: runtime.GOARCH, CPUs: runtime.NumCPU(), Rounds: rounds, About: about, Failed: make(map[string]string)}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		r.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	if err := targets[0].err; err != nil {
		return nil, fmt.Errorf("native: %w", err)
	}
	for _, op := range ops {
		o := benchOperation{op.name, op.what, targets[0].best[op.op], make(map[string]benchFigure)}
		for _, t := range targets[1:] {
			if ns, ok := t.best[op.op]; ok {
				o.Platforms[t.name] = benchFigure{ns, math.Round(100*ns/o.NativeNS) / 100}
			}
		}
		r.Operations = append(r.Operations, o)
	}
	for _, t := range targets[1:] {
		if t.err != nil {
			r.Failed[t.name] = t.err.Error()
		}
	}
	return r, nil
}

// print prints a table.
func (r *benchResult) print(w io.Writer, names []string) error {
	fmt.Fprintf(w, "ns per operation, best of %d batches, and times native; %s, %d CPUs, Linux %s\n\n", r.Rounds, r.Arch, r.CPUs, r.Kernel)
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(tw, "operation\tnative\t")
	for _, name := range names {
		fmt.Fprintf(tw, "%s\t\t", name)
	}
	fmt.Fprintln(tw)
	for _, op := range r.Operations {
		fmt.Fprintf(tw, "%s\t%.0f\t", op.Name, op.NativeNS)
		for _, name := range names {
			if f, ok := op.Platforms[name]; ok {
				fmt.Fprintf(tw, "%.0f\t%.2fx\t", f.NS, f.Ratio)
			} else {
				fmt.Fprint(tw, "-\t-\t")
			}
		}
		fmt.Fprintln(tw)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for _, name := range names {
		if what, ok := r.About[name]; ok {
			fmt.Fprintf(w, "\n%s: %s\n", name, what)
		}
	}
	return nil
}
