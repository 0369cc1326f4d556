package seccomp

import (
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/bpf"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// longEnv makes tests that try random cases try many more.
const longEnv = "RINGFENCE_LONG"

// programs are the programs of a sample, by how they were made.
type programs map[string]bpf.Program

const (
	built          = "BuildProgram"
	naively        = "the naive compiler"
	naiveOptimized = "the optimiser after the naive compiler"
)

func buildAll(t *testing.T, x *sample) programs {
	t.Helper()
	p, err := BuildProgram(x.sets, x.o)
	if err != nil {
		t.Fatalf("BuildProgram: %v", err)
	}
	n, err := buildNaive(x.sets, x.o)
	if err != nil {
		t.Fatalf("naive: %v", err)
	}
	all := programs{built: p, naively: n, naiveOptimized: bpf.Optimize(n)}
	for how, p := range all {
		if err := p.Validate(); err != nil {
			t.Fatalf("the program of %s is invalid: %v\n%v", how, err, p)
		}
	}
	return all
}

// check compares the answers of all programs to d, and returns them.
func (all programs) check(t *testing.T, x *sample, d *bpf.Data) Action {
	t.Helper()
	want := Evaluate(x.sets, x.o, d)
	for how, p := range all {
		r, err := p.Run(d)
		if err != nil {
			t.Fatalf("the program of %s: %v", how, err)
		}
		if Action(r.Action) != want {
			t.Fatalf("the program of %s answers %v, want %v\nfor %+v\nrules of the call: %s\n%v", how, Action(r.Action), want, *d, x.describe(d.Nr), p)
		}
	}
	return want
}

func (x *sample) describe(nr uint32) string {
	var b strings.Builder
	for _, s := range x.sets {
		if r := s.Rules.Get(uintptr(nr)); r != nil {
			b.WriteString("\n" + s.Action.String() + ": " + r.String())
		}
	}
	return b.String()
}

// TestEquivalence compares compiled programs with the meaning of their rules:
// 200,000 calls, or ten million if RINGFENCE_LONG is set.
func TestEquivalence(t *testing.T) {
	const perSample = 400
	samples := 500
	if os.Getenv(longEnv) != "" {
		samples = 25000
	}
	s := &source{rnd: rand.New(rand.NewPCG(1, 1))}
	var size, naiveSize, decided int
	for range samples {
		x := s.sample()
		p := buildAll(t, &x)
		size += len(p[built])
		naiveSize += len(p[naively])
		for range perSample {
			d := s.call(&x)
			if p.check(t, &x, &d) != x.o.DefaultAction {
				decided++
			}
		}
	}
	t.Logf("%d calls, %d decided by rules; %d instructions, naive %d", samples*perSample, decided, size, naiveSize)
	if total := samples * perSample; decided < total/5 || decided > total*4/5 {
		t.Errorf("%d of %d calls are decided by rules: too one-sided to test much", decided, total)
	}
}

func FuzzEquivalence(f *testing.F) {
	for i := range uint64(16) {
		r := rand.New(rand.NewPCG(i, 9))
		seed := make([]byte, 200+100*i)
		for j := range seed {
			seed[j] = byte(r.Uint32())
		}
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		s := &source{bytes: input}
		x := s.sample()
		p := buildAll(t, &x)
		for range 20 {
			d := s.call(&x)
			p.check(t, &x, &d)
		}
		// What the input is too short for.
		s.rnd = rand.New(rand.NewPCG(uint64(len(input)), 2))
		for range 50 {
			d := s.call(&x)
			p.check(t, &x, &d)
		}
	})
}

// TestOpaque compiles rules with placeholders for variables, replaces those in
// the program, and compares it with the rules made of the final values.
func TestOpaque(t *testing.T) {
	placeholders := []uint32{0x9d1c_33f1, 0x71e4_09b3, 0xe3a6_5c77}
	finals := &source{rnd: rand.New(rand.NewPCG(6, 6))}
	var decided, total int
	for seed := range uint64(400) {
		s := &source{rnd: rand.New(rand.NewPCG(seed, 3)), vars: placeholders}
		x := s.sample()
		x.o.Opaque = placeholders
		template, err := BuildProgram(x.sets, x.o)
		if err != nil {
			t.Fatal(err)
		}
		final := []uint32{finals.half(), finals.half(), finals.half()}
		program := slices.Clone(template)
		for i := range program {
			if v := slices.Index(placeholders, program[i].K); v >= 0 {
				program[i].K = final[v]
			}
		}
		s = &source{rnd: rand.New(rand.NewPCG(seed, 3)), vars: final}
		x = s.sample()
		p := programs{built: program}
		for range 200 {
			d := s.call(&x)
			total++
			if p.check(t, &x, &d) != x.o.DefaultAction {
				decided++
			}
		}
	}
	if decided < total/5 || decided > total*4/5 {
		t.Errorf("%d of %d calls are decided by rules: too one-sided to test much", decided, total)
	}
}

// TestMatchers pins what each matcher means at its boundaries.
func TestMatchers(t *testing.T) {
	const top = ^uint64(0)
	for _, test := range []struct {
		m       ValueMatcher
		yes, no []uint64
	}{
		{AnyValue{}, []uint64{0, 1, top}, nil},
		{EqualTo(5), []uint64{5}, []uint64{0, 4, 6, 5 | 1<<32, top}},
		{EqualTo(5 << 32), []uint64{5 << 32}, []uint64{0, 5, 5<<32 + 1, 4 << 32}},
		{NotEqual(5), []uint64{4, 6, 5 | 1<<32}, []uint64{5}},
		{GreaterThan(1<<32 - 1), []uint64{1 << 32, top}, []uint64{0, 1<<32 - 1}},
		{GreaterThan(top), nil, []uint64{0, top}},
		{GreaterThanOrEqual(0), []uint64{0, top}, nil},
		{GreaterThanOrEqual(1<<32 + 7), []uint64{1<<32 + 7, 2 << 32, top}, []uint64{1<<32 + 6, 7, 0}},
		{LessThan(0), nil, []uint64{0, top}},
		{LessThan(1 << 32), []uint64{0, 1<<32 - 1}, []uint64{1 << 32, top}},
		{LessThanOrEqual(top), []uint64{0, top}, nil},
		{LessThanOrEqual(1 << 33), []uint64{0, 1 << 33}, []uint64{1<<33 + 1}},
		{MaskedEqual{0xff, 0x12}, []uint64{0x12, 0x3412, 0x12 | 1<<63}, []uint64{0x13, 0}},
		{MaskedEqual{0xff << 32, 1 << 32}, []uint64{1 << 32, 1<<32 | 99}, []uint64{0, 2 << 32}},
		{MaskedEqual{0xf0, 0x11}, nil, []uint64{0x11, 0x10, 0}},
		{MaskedEqual{0, 0}, []uint64{0, top}, nil},
		{BitsAllowlist(0x5), []uint64{0, 1, 4, 5}, []uint64{2, 7, 1 << 32, top}},
		{BitsAllowlist(top), []uint64{0, top}, nil},
		{Int32(-1), []uint64{1<<32 - 1, top, 1<<32 - 1 | 7<<32}, []uint64{0, 1<<32 - 2}},
		{NonNegativeFD, []uint64{0, 1<<31 - 1}, []uint64{1 << 31, 1<<32 - 1, 1 << 32, top}},
		{AnyOf{}, nil, []uint64{0, top}},
		{AllOf{}, []uint64{0, top}, nil},
		{AnyOf{EqualTo(1), GreaterThan(8)}, []uint64{1, 9}, []uint64{0, 2, 8}},
		{AllOf{MaskedEqual{0xf0, 0x50}, MaskedEqual{0x0f, 0x05}}, []uint64{0x55, 0x155}, []uint64{0x50, 0x05, 0x5d}},
		{AnyOf{BitsAllowlist(top &^ 3), MaskedEqual{1, 1}}, []uint64{0, 1, 3, 4, 5}, []uint64{2, 6}},
		{AllOf{GreaterThan(1), LessThan(8), NotEqual(4)}, []uint64{2, 7}, []uint64{1, 4, 8}},
	} {
		x := sample{o: ProgramOptions{DefaultAction: Errno(1)}}
		x.sets = []RuleSet{{MakeSyscallRules(map[uintptr]SyscallRule{7: PerArg{nil, test.m}}), Allow}}
		p := buildAll(t, &x)
		for want, values := range map[Action][]uint64{Allow: test.yes, Errno(1): test.no} {
			for _, v := range values {
				d := bpf.Data{Nr: 7, Arch: sysno.Native.AuditArch(), Args: [6]uint64{9, v, 9}}
				if got := p.check(t, &x, &d); got != want {
					t.Errorf("%s for %#x: %v, want %v", PerArg{nil, test.m}, v, got, want)
				}
			}
		}
	}
}

// TestArchitectures checks who is a stranger to a program, for both
// architectures.
func TestArchitectures(t *testing.T) {
	const i386 = 0x40000003
	for _, a := range sysno.Arches() {
		rules := MakeSyscallRules(map[uintptr]SyscallRule{sysno.Getpid.On(a): MatchAll{}, sysno.Read.On(a): MatchAll{}})
		x := sample{
			sets: []RuleSet{{rules, Allow}},
			o: ProgramOptions{Arch: a, DefaultAction: Errno(unix.EPERM), BadArchAction: KillProcess,
				HottestSyscalls: []uintptr{sysno.Getpid.On(a)}},
		}
		p := buildAll(t, &x)
		getpid := uint32(sysno.Getpid.On(a))
		x32 := KillProcess
		if a == sysno.ARM64 {
			x32 = Errno(unix.EPERM)
		}
		for _, test := range []struct {
			nr, arch uint32
			want     Action
		}{
			{getpid, a.AuditArch(), Allow},
			{getpid + 1, a.AuditArch(), Errno(unix.EPERM)},
			{getpid, i386, KillProcess},
			{getpid, (sysno.AMD64 + sysno.ARM64 - a).AuditArch(), KillProcess},
			{getpid | x32Bit, a.AuditArch(), x32},
			{x32Bit, a.AuditArch(), x32},
			{x32Bit - 1, a.AuditArch(), Errno(unix.EPERM)},
			{^uint32(0), a.AuditArch(), x32},
		} {
			d := bpf.Data{Nr: test.nr, Arch: test.arch}
			if got := p.check(t, &x, &d); got != test.want {
				t.Errorf("%v: nr %#x, arch %#x: %v, want %v", a, test.nr, test.arch, got, test.want)
			}
		}
	}
}

// TestOrderOfSets checks that the first set that matches decides.
func TestOrderOfSets(t *testing.T) {
	x := sample{
		sets: []RuleSet{
			{MakeSyscallRules(map[uintptr]SyscallRule{1: PerArg{EqualTo(0)}}), KillProcess},
			{MakeSyscallRules(map[uintptr]SyscallRule{1: PerArg{LessThan(10)}, 2: MatchAll{}}), Allow},
			{MakeSyscallRules(map[uintptr]SyscallRule{1: MatchAll{}, 2: MatchAll{}, 3: MatchAll{}}), Trap(1)},
		},
		o: ProgramOptions{DefaultAction: Errno(unix.ENOSYS)},
	}
	p := buildAll(t, &x)
	for _, test := range []struct {
		nr   uint32
		arg  uint64
		want Action
	}{{1, 0, KillProcess}, {1, 9, Allow}, {1, 10, Trap(1)}, {2, 0, Allow}, {3, 0, Trap(1)}, {4, 0, Errno(unix.ENOSYS)}} {
		d := bpf.Data{Nr: test.nr, Arch: sysno.Native.AuditArch(), Args: [6]uint64{test.arg}}
		if got := p.check(t, &x, &d); got != test.want {
			t.Errorf("call %d, argument %d: %v, want %v", test.nr, test.arg, got, test.want)
		}
	}
}

// TestProgramText pins whole programs, so that a change for the worse is seen.
func TestProgramText(t *testing.T) {
	for _, test := range []struct {
		name  string
		rules map[uintptr]SyscallRule
		hot   []uintptr
		want  string
	}{{
		name: "constant action",
		want: "0: return 0x0\n",
	}, {
		name:  "hot call, then neighbours as one range",
		rules: map[uintptr]SyscallRule{1: MatchAll{}, 2: MatchAll{}, 3: MatchAll{}, 9: MatchAll{}},
		hot:   []uintptr{9},
		want: `
0: A = arch
1: if A == 0xc00000b7 goto 2 else 6
2: A = nr
3: if A == 0x9 goto 7 else 4
4: if A == 0x0 goto 6 else 5
5: if A >= 0x4 goto 6 else 7
6: return 0x0
7: return 0x7fff0000
`,
	}, {
		name: "values with one high half, one test of it",
		rules: map[uintptr]SyscallRule{5: Or{
			PerArg{NonNegativeFD, EqualTo(0x10)}, PerArg{NonNegativeFD, EqualTo(0x20)}, PerArg{NonNegativeFD, EqualTo(0x21)}}},
		want: `
0: A = arch
1: if A == 0xc00000b7 goto 2 else 14
2: A = nr
3: if A == 0x5 goto 4 else 14
4: A = arg0.hi
5: if A == 0x0 goto 6 else 14
6: A = arg0.lo
7: if A >= 0x80000000 goto 14 else 8
8: A = arg1.hi
9: if A == 0x0 goto 10 else 14
10: A = arg1.lo
11: if A >= 0x20 goto 12 else 13
12: if A >= 0x22 goto 14 else 15
13: if A == 0x10 goto 15 else 14
14: return 0x0
15: return 0x7fff0000
`,
	}, {
		name:  "two calls with the same rule",
		rules: map[uintptr]SyscallRule{5: PerArg{EqualTo(1)}, 8: PerArg{EqualTo(1)}},
		want: `
0: A = arch
1: if A == 0xc00000b7 goto 2 else 10
2: A = nr
3: if A >= 0x6 goto 4 else 5
4: if A == 0x8 goto 6 else 10
5: if A == 0x5 goto 6 else 10
6: A = arg0.hi
7: if A == 0x0 goto 8 else 10
8: A = arg0.lo
9: if A == 0x1 goto 11 else 10
10: return 0x0
11: return 0x7fff0000
`,
	}} {
		t.Run(test.name, func(t *testing.T) {
			o := ProgramOptions{Arch: sysno.ARM64, HottestSyscalls: test.hot}
			p, err := BuildProgram([]RuleSet{{MakeSyscallRules(test.rules), Allow}}, o)
			if err != nil {
				t.Fatal(err)
			}
			var lines []string
			for line := range strings.Lines(p.String()) {
				lines = append(lines, strings.TrimLeft(line, " "))
			}
			if got, want := strings.Join(lines, ""), strings.TrimLeft(test.want, "\n"); got != want {
				t.Errorf("got\n%swant\n%s", got, want)
			}
		})
	}
}

func TestBuildErrors(t *testing.T) {
	type strange struct{ MatchAll }
	for _, test := range []struct {
		name  string
		rules map[uintptr]SyscallRule
		arch  sysno.Arch
		want  string
	}{
		{"missing call", map[uintptr]SyscallRule{sysno.Fork.On(sysno.ARM64): MatchAll{}}, sysno.ARM64, "a system call that arm64 does not have"},
		{"x32 number", map[uintptr]SyscallRule{x32Bit | 1: MatchAll{}}, sysno.AMD64, "0x40000001 is not the number of a 64-bit system call"},
		{"nil rule", map[uintptr]SyscallRule{1: nil}, sysno.AMD64, "write: rule of unknown type <nil>"},
		{"nil in or", map[uintptr]SyscallRule{1: Or{MatchAll{}, nil}}, sysno.AMD64, "write: rule of unknown type <nil>"},
		{"foreign rule type", map[uintptr]SyscallRule{1: And{strange{}}}, sysno.AMD64, "rule of unknown type seccomp.strange"},
		{"nil matcher", map[uintptr]SyscallRule{1: PerArg{2: AnyOf{nil}}}, sysno.AMD64, "argument 2: matcher of unknown type <nil>"},
		{"architecture", nil, sysno.Arch(9), "unknown architecture"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := BuildProgram([]RuleSet{{MakeSyscallRules(test.rules), Allow}}, ProgramOptions{Arch: test.arch})
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("BuildProgram: %v, want an error about %q", err, test.want)
			}
		})
	}
}

// manyMasks returns a rule that cannot be made short: n pairs of masks and
// values without anything in common.
func manyMasks(n int) SyscallRule {
	r := rand.New(rand.NewPCG(uint64(n), 3))
	var or Or
	for range n {
		mask := r.Uint64()
		or = append(or, PerArg{MaskedEqual{mask, mask & r.Uint64()}})
	}
	return or
}

func TestTooLong(t *testing.T) {
	rules := NewSyscallRules()
	for nr := range uintptr(100) {
		rules.Add(nr, PerArg{EqualTo(nr), MaskedEqual{0xff, uint64(nr)}})
	}
	rules.Add(sysno.Ioctl.On(sysno.AMD64), manyMasks(900))
	rules.Add(sysno.Mmap.On(sysno.AMD64), manyMasks(300))
	_, err := BuildProgram([]RuleSet{{rules, Allow}}, ProgramOptions{Arch: sysno.AMD64})
	var tooLong *TooLongError
	if !errors.As(err, &tooLong) {
		t.Fatalf("BuildProgram: %v, want a TooLongError", err)
	}
	if tooLong.Length <= bpf.MaxInstructions {
		t.Errorf("the length is %d", tooLong.Length)
	}
	if !strings.Contains(err.Error(), "the kernel takes 4096: simplify the biggest rules: ioctl (1") {
		t.Errorf("the error does not say what to do: %v", err)
	}
	var names []string
	for _, r := range tooLong.Biggest {
		names = append(names, r.Name)
	}
	if len(names) != 5 || names[0] != "ioctl" || names[1] != "mmap" {
		t.Errorf("the biggest rules are %v", names)
	}
}

// TestLongPrograms tries programs in which jumps do not reach with 8 bits.
func TestLongPrograms(t *testing.T) {
	for _, n := range []int{50, 120, 200, 350} {
		s := &source{rnd: rand.New(rand.NewPCG(uint64(n), 5))}
		x := sample{o: ProgramOptions{Arch: sysno.AMD64, DefaultAction: Errno(5), BadArchAction: KillProcess, HottestSyscalls: []uintptr{30, 2}}}
		rules := NewSyscallRules()
		for nr := range uintptr(60) {
			rules.Add(nr, PerArg{AnyOf{EqualTo(s.constant()), EqualTo(s.constant())}, GreaterThan(s.constant()), MaskedEqual{s.constant(), 0}})
			x.numbers = append(x.numbers, uint32(nr))
		}
		rules.Add(30, manyMasks(n))
		x.sets = []RuleSet{{rules, Allow}}
		p := buildAll(t, &x)
		if len(p[built]) < 500 {
			t.Errorf("%d masks: only %d instructions", n, len(p[built]))
		}
		for range 5000 {
			d := s.call(&x)
			p.check(t, &x, &d)
		}
	}
}

// TestSimplifyBudget gives rules to the compiler on which deciding conditions
// early would grow without bound.
func TestSimplifyBudget(t *testing.T) {
	s := &source{rnd: rand.New(rand.NewPCG(8, 8))}
	var and And
	for range 60 {
		var p PerArg
		for i := range p {
			p[i] = AnyOf{MaskedEqual{Mask: 3 << s.n(60), Value: 0}, MaskedEqual{Mask: 6 << s.n(60)}, NotEqual(s.constant())}
		}
		var less, bits PerArg
		less[s.n(7)] = LessThan(s.constant())
		bits[s.n(7)] = BitsAllowlist(s.constant())
		and = append(and, Or{p, less, bits})
	}
	x := sample{
		sets:    []RuleSet{{MakeSyscallRules(map[uintptr]SyscallRule{1: and}), Allow}},
		o:       ProgramOptions{Arch: sysno.AMD64, DefaultAction: Trap(0)},
		numbers: []uint32{1},
	}
	c := newCompiler(x.sets, &x.o)
	c.calls(true)
	if c.budget != 0 {
		t.Errorf("%d of %d steps are left: the rules are too tame", c.budget, maxSimplify)
	}
	program, err := BuildProgram(x.sets, x.o)
	if err != nil {
		t.Fatal(err)
	}
	p := programs{built: program}
	for range 5000 {
		d := s.call(&x)
		p.check(t, &x, &d)
	}
}

// TestDeterministic builds the same program from rules that were added in
// another order.
func TestDeterministic(t *testing.T) {
	s := &source{rnd: rand.New(rand.NewPCG(4, 4))}
	for range 50 {
		x := s.sample()
		want, err := BuildProgram(x.sets, x.o)
		if err != nil {
			t.Fatal(err)
		}
		again := slices.Clone(x.sets)
		for i := range again {
			copied := NewSyscallRules()
			for _, nr := range slices.Backward(again[i].Rules.Numbers()) {
				copied.Add(nr, again[i].Rules.Get(nr))
			}
			again[i].Rules = copied
		}
		got, err := BuildProgram(again, x.o)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got, want) {
			t.Fatalf("two programs of the same rules:\n%v\n%v", want, got)
		}
	}
}
