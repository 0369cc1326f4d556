package bpf

import (
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// source is where random programs and inputs take their bytes from: a fuzzer's
// input, or a pseudo-random sequence when rnd is set.
type source struct {
	bytes []byte
	rnd   *rand.Rand
}

func (s *source) byte() byte {
	if s.rnd != nil {
		return byte(s.rnd.Uint32())
	}
	if len(s.bytes) == 0 {
		return 0
	}
	b := s.bytes[0]
	s.bytes = s.bytes[1:]
	return b
}

// n returns a number below limit.
func (s *source) n(limit int) int {
	return (int(s.byte()) | int(s.byte())<<8) % limit
}

// constant returns a value that is likely to matter: few distinct ones, so
// that comparisons are sometimes true.
func (s *source) constant() uint32 {
	switch s.n(4) {
	case 0:
		return uint32(s.n(4))
	case 1:
		return 1 << s.n(32)
	case 2:
		return -uint32(s.n(3))
	}
	return uint32(s.byte()) | uint32(s.byte())<<8 | uint32(s.byte())<<16 | uint32(s.byte())<<24
}

func (s *source) wide() uint64 { return uint64(s.constant())<<32 | uint64(s.constant()) }

func (s *source) data() Data {
	d := Data{Nr: s.constant(), Arch: s.constant(), IP: s.wide()}
	for i := range d.Args {
		d.Args[i] = s.wide()
	}
	return d
}

var (
	plainCodes = []uint16{
		Ld | W | Abs, Ld | W | Abs, Ld | W | Abs, Ld | Imm, Ldx | Imm, Ld | Len, Ldx | Len, Ld | Mem, Ldx | Mem, St, Stx,
		Misc | Tax, Misc | Txa, Alu | Neg,
		Alu | Add | K, Alu | Sub | K, Alu | Mul | K, Alu | Div | K, Alu | And | K, Alu | Or | K, Alu | Xor | K, Alu | Lsh | K, Alu | Rsh | K,
		Alu | Add | X, Alu | Sub | X, Alu | Mul | X, Alu | Div | X, Alu | And | X, Alu | Or | X, Alu | Xor | X, Alu | Lsh | X, Alu | Rsh | X,
	}
	jumpCodes = []uint16{
		Jmp | Jeq | K, Jmp | Jgt | K, Jmp | Jge | K, Jmp | Jset | K,
		Jmp | Jeq | X, Jmp | Jgt | X, Jmp | Jge | X, Jmp | Jset | X,
	}
)

// program returns a valid program of n instructions or a few more.
func (s *source) program(n int) Program {
	var p Program
	for i := range scratchWords {
		if i%5 == 0 {
			p = append(p, Stmt(St, uint32(i)))
		}
	}
	for i := range n {
		left := n - i // a return is put at the end
		switch s.n(8) {
		case 0, 1, 2:
			far := min(left, 1+s.n(12))
			p = append(p, JumpStmt(jumpCodes[s.n(len(jumpCodes))], s.constant(), uint8(s.n(far)), uint8(s.n(far))))
		case 3:
			p = append(p, Stmt(Jmp|Ja, uint32(s.n(min(left, 6)))))
		case 4:
			p = append(p, Stmt(Ret|K, uint32(s.n(3))))
		default:
			code, k := plainCodes[s.n(len(plainCodes))], s.constant()
			switch code {
			case Ld | W | Abs:
				k = []uint32{OffNr, OffArg(0), OffHigh(OffArg(0)), OffArg(5)}[k%4]
			case Ld | Mem, Ldx | Mem, St, Stx:
				k = k % 3 * 5
			case Alu | Div | K:
				k |= 1
			case Alu | Lsh | K, Alu | Rsh | K:
				k %= 32
			}
			p = append(p, Stmt(code, k))
		}
	}
	if s.n(2) == 0 {
		return append(p, Stmt(Ret|A, 0))
	}
	return append(p, Stmt(Ret|K, 7))
}

func mustRun(t *testing.T, p Program, d *Data) Result {
	t.Helper()
	r, err := p.Run(d)
	if err != nil {
		t.Fatalf("Run: %v\n%v", err, p)
	}
	return r
}

// checkOptimize compares p with its optimised form on inputs from s.
func checkOptimize(t *testing.T, p Program, s *source, inputs int) {
	t.Helper()
	if err := p.Validate(); err != nil {
		t.Fatalf("the generated program is invalid: %v\n%v", err, p)
	}
	o := Optimize(p)
	if err := o.Validate(); err != nil {
		t.Fatalf("the optimised program is invalid: %v\nfrom\n%v\nto\n%v", err, p, o)
	}
	if len(o) > len(p) {
		t.Fatalf("the optimised program is longer: from\n%v\nto\n%v", p, o)
	}
	for range inputs {
		d := s.data()
		want, got := mustRun(t, p, &d), mustRun(t, o, &d)
		if got.Action != want.Action || got.Executed > want.Executed {
			t.Fatalf("for %+v\ngot %+v, want %+v or fewer instructions\nfrom\n%v\nto\n%v", d, got, want, p, o)
		}
	}
}

func TestOptimizeKeepsMeaning(t *testing.T) {
	s := &source{rnd: rand.New(rand.NewPCG(1, 2))}
	shorter := 0
	for range 3000 {
		p := s.program(5 + s.n(60))
		if len(Optimize(p)) < len(p) {
			shorter++
		}
		checkOptimize(t, p, s, 30)
	}
	if shorter < 1000 {
		t.Errorf("only %d of 3000 programs became shorter: the programs are too tame to test anything", shorter)
	}
	for range 5 {
		checkOptimize(t, s.program(4000), s, 100)
	}
}

// TestOptimizeCorners has programs that random ones seldom are.
func TestOptimizeCorners(t *testing.T) {
	// The last jump in reach leads to a load that is needless on that way
	// only, and the way around it is out of reach.
	far := Program{Stmt(Ld|W|Abs, OffNr), JumpStmt(Jmp|Jeq|K, 1, 255, 0)}
	for range 254 {
		far = append(far, Stmt(Alu|Add|K, 1))
	}
	far = append(far, Stmt(Ld|W|Abs, OffArch), Stmt(Ld|W|Abs, OffNr), Stmt(Ret|A, 0))
	// The same with a condition that is known on that way only.
	farCondition := Program{Stmt(Ld|W|Abs, OffNr), JumpStmt(Jmp|Jeq|K, 1, 255, 0)}
	for range 254 {
		farCondition = append(farCondition, Stmt(Alu|Add|K, 1))
	}
	farCondition = append(farCondition, Stmt(Ld|W|Abs, OffArch), JumpStmt(Jmp|Jeq|K, 1, 0, 1), Stmt(Ret|K, 5), Stmt(Ret|A, 0))
	// A jump to a return, in front of code that reads scratch memory: with the
	// return in its place the kernel would refuse the program.
	scratch := Program{
		Stmt(Ld|W|Abs, OffNr), JumpStmt(Jmp|Jeq|K, 1, 0, 2), Stmt(St, 0), Stmt(Jmp|Ja, 2),
		Stmt(Ld|W|Abs, OffArch), Stmt(Jmp|Ja, 2),
		Stmt(Ld|Mem, 0), Stmt(Alu|Add|K, 1), Stmt(Ret|A, 0),
	}
	for _, p := range []Program{far, farCondition, scratch} {
		checkOptimize(t, p, &source{rnd: rand.New(rand.NewPCG(2, 2))}, 300)
	}
}

func FuzzOptimize(f *testing.F) {
	for i := range uint64(8) {
		r := rand.New(rand.NewPCG(i, 7))
		seed := make([]byte, 500)
		for j := range seed {
			seed[j] = byte(r.Uint32())
		}
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		s := &source{bytes: input}
		checkOptimize(t, s.program(2+s.n(100)), s, 10)
	})
}

// FuzzRun checks that no program, valid or not, makes the package panic, and
// that valid ones run without error.
func FuzzRun(f *testing.F) {
	f.Add([]byte{0x06, 0, 0, 0, 0, 0, 0, 0})
	f.Add(Program{Stmt(Ld|W|Abs, 4), JumpStmt(Jmp|Jeq|K, 3, 1, 0), Stmt(Ret|K, 1), Stmt(Ret|A, 0)}.Encode())
	f.Add(Program{Stmt(Jmp|Ja, 1<<31), Stmt(Ld|Mem, 99), Stmt(Ld|W|Abs, 64), Stmt(0xffff, 0)}.Encode())
	f.Fuzz(func(t *testing.T, input []byte) {
		p, err := Decode(input)
		if err != nil {
			return
		}
		_ = p.String()
		valid := p.Validate() == nil
		r, err := p.Run(&Data{Nr: 3, Arch: 5})
		if valid && err != nil {
			t.Fatalf("a valid program fails: %v\n%v", err, p)
		}
		if valid {
			if o, _ := Optimize(p).Run(&Data{Nr: 3, Arch: 5}); o.Action != r.Action {
				t.Fatalf("optimised gives %#x, want %#x\n%v", o.Action, r.Action, p)
			}
		}
	})
}

func TestCost(t *testing.T) {
	p := Program{
		Stmt(Ld|W|Abs, OffArch), JumpStmt(Jmp|Jeq|K, 7, 1, 0), Stmt(Ret|K, 0),
		Stmt(Ld|W|Abs, OffNr), JumpStmt(Jmp|Jgt|K, 10, 0, 1), Stmt(Ret|K, 1),
		JumpStmt(Jmp|Jset|K, 8, 0, 2), Stmt(Jmp|Ja, 0), Stmt(Ret|K, 2),
		Stmt(Ld|W|Abs, OffArg(0)), JumpStmt(Jmp|Jge|K, 3, 0, 3), Stmt(Alu|And|K, 1), JumpStmt(Jmp|Jeq|K, 1, 0, 1), Stmt(Ret|K, 3), Stmt(Ret|K, 4),
	}
	if err := p.Validate(); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		nr, arch    uint32
		least, most int
	}{{0, 0, 3, 3}, {11, 7, 5, 5}, {8, 7, 7, 7}, {2, 7, 8, 10}} {
		if least, most := p.Cost(test.nr, test.arch); least != test.least || most != test.most {
			t.Errorf("number %d, architecture %d: %d to %d, want %d to %d", test.nr, test.arch, least, most, test.least, test.most)
		}
	}
	s := &source{rnd: rand.New(rand.NewPCG(9, 9))}
	for range 300 {
		p := s.program(5 + s.n(40))
		for i, in := range p {
			if in.Code == Alu|Div|X {
				p[i].Code = Alu | Mul | X // ends the program if X is 0
			}
		}
		for range 20 {
			d := s.data()
			least, most := p.Cost(d.Nr, d.Arch)
			if r := mustRun(t, p, &d); r.Executed < least || r.Executed > most {
				t.Fatalf("%d instructions executed, bounds %d and %d\n%v", r.Executed, least, most, p)
			}
		}
	}
}

func TestOptimize(t *testing.T) {
	for _, test := range []struct {
		name     string
		in, want Program
	}{{
		name: "jump chain",
		in:   Program{Stmt(Ld|W|Abs, 0), JumpStmt(Jmp|Jeq|K, 1, 0, 2), Stmt(Jmp|Ja, 2), Stmt(Ret|K, 1), Stmt(Ret|K, 2), Stmt(Ret|K, 3)},
		want: Program{Stmt(Ld|W|Abs, 0), JumpStmt(Jmp|Jeq|K, 1, 1, 0), Stmt(Ret|K, 2), Stmt(Ret|K, 3)},
	}, {
		name: "second load of the same field",
		in:   Program{Stmt(Ld|W|Abs, 0), JumpStmt(Jmp|Jeq|K, 1, 0, 1), Stmt(Ret|K, 1), Stmt(Ld|W|Abs, 0), JumpStmt(Jmp|Jeq|K, 2, 0, 1), Stmt(Ret|K, 2), Stmt(Ret|K, 3)},
		want: Program{Stmt(Ld|W|Abs, 0), JumpStmt(Jmp|Jeq|K, 1, 0, 1), Stmt(Ret|K, 1), JumpStmt(Jmp|Jeq|K, 2, 0, 1), Stmt(Ret|K, 2), Stmt(Ret|K, 3)},
	}, {
		name: "condition already decided",
		in:   Program{Stmt(Ld|W|Abs, 0), JumpStmt(Jmp|Jeq|K, 1, 1, 0), Stmt(Ret|K, 1), Stmt(Ld|W|Abs, 4), Stmt(Ld|W|Abs, 0), JumpStmt(Jmp|Jeq|K, 1, 0, 1), Stmt(Ret|K, 2), Stmt(Ret|K, 3)},
		want: Program{Stmt(Ld|W|Abs, 0), JumpStmt(Jmp|Jeq|K, 1, 1, 0), Stmt(Ret|K, 1), Stmt(Ret|K, 2)},
	}, {
		name: "equal tails",
		in: Program{Stmt(Ld|W|Abs, 0),
			JumpStmt(Jmp|Jeq|K, 1, 0, 3),
			Stmt(Ld|W|Abs, 16), JumpStmt(Jmp|Jeq|K, 5, 5, 0), Stmt(Ret|K, 1),
			JumpStmt(Jmp|Jeq|K, 2, 0, 4),
			Stmt(Ld|W|Abs, 16), JumpStmt(Jmp|Jeq|K, 5, 1, 0), Stmt(Ret|K, 1),
			Stmt(Ret|K, 2),
			Stmt(Ret|K, 3)},
		want: Program{Stmt(Ld|W|Abs, 0),
			JumpStmt(Jmp|Jeq|K, 1, 1, 0),
			JumpStmt(Jmp|Jeq|K, 2, 0, 4),
			Stmt(Ld|W|Abs, 16), JumpStmt(Jmp|Jeq|K, 5, 1, 0), Stmt(Ret|K, 1),
			Stmt(Ret|K, 2),
			Stmt(Ret|K, 3)},
	}, {
		name: "both ways alike",
		in: Program{Stmt(Ld|W|Abs, 0), JumpStmt(Jmp|Jeq|K, 1, 0, 2),
			Stmt(Ld|W|Abs, 16), Stmt(Ret|A, 0),
			Stmt(Ld|W|Abs, 16), Stmt(Ret|A, 0)},
		want: Program{Stmt(Ld|W|Abs, 16), Stmt(Ret|A, 0)},
	}} {
		t.Run(test.name, func(t *testing.T) {
			if diff := cmp.Diff(test.want.String(), Optimize(test.in).String()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	ret := Stmt(Ret|K, 0)
	tooLong := make(Program, MaxInstructions+1)
	for i := range tooLong {
		tooLong[i] = ret
	}
	for _, test := range []struct {
		name   string
		p      Program
		reason string // "" for valid
	}{
		{"empty", nil, "empty"},
		{"longest", tooLong[1:], ""},
		{"too long", tooLong, "more than 4096"},
		{"no return", Program{Stmt(Ld|Imm, 0)}, "not a return"},
		{"unknown code", Program{Stmt(0x28, 0), ret}, "not one that seccomp allows"},
		{"modulo", Program{Stmt(Alu|0x90|K, 3), ret}, "not one that seccomp allows"},
		{"load past the end", Program{Stmt(Ld|W|Abs, 64), ret}, "offset 64"},
		{"unaligned load", Program{Stmt(Ld|W|Abs, 6), ret}, "offset 6"},
		{"last load", Program{Stmt(Ld|W|Abs, 60), ret}, ""},
		{"division by zero", Program{Stmt(Alu|Div|K, 0), ret}, "division by zero"},
		{"long shift", Program{Stmt(Alu|Lsh|K, 32), ret}, "shift by 32"},
		{"scratch", Program{Stmt(St, 16), ret}, "scratch word 16"},
		{"unwritten scratch", Program{Stmt(Ld|Mem, 1), ret}, "read before it is written"},
		{"scratch written on one way", Program{JumpStmt(Jmp|Jeq|K, 0, 0, 1), Stmt(St, 1), Stmt(Ld|Mem, 1), ret}, "read before it is written"},
		{"scratch written on both ways", Program{JumpStmt(Jmp|Jeq|K, 0, 0, 2), Stmt(St, 1), Stmt(Jmp|Ja, 1), Stmt(Stx, 1), Stmt(Ld|Mem, 1), ret}, ""},
		{"jump past the end", Program{Stmt(Jmp|Ja, 1), ret}, "jump out"},
		{"jump far past the end", Program{Stmt(Jmp|Ja, 1<<32-1), ret}, "jump out"},
		{"branch past the end", Program{JumpStmt(Jmp|Jeq|K, 0, 0, 1), ret}, "jump out"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := test.p.Validate()
			if test.reason == "" {
				if err != nil {
					t.Errorf("Validate: %v", err)
				}
				return
			}
			var invalid *InvalidError
			if !errors.As(err, &invalid) || !strings.Contains(err.Error(), test.reason) {
				t.Errorf("Validate: %v, want an InvalidError about %q", err, test.reason)
			}
		})
	}
}

func TestBuilder(t *testing.T) {
	// Both ways of the first jump are out of reach of 8 bits, one to a return.
	var b Builder
	far, end := b.NewLabel("far"), b.NewLabel("end")
	b.Stmt(Ld|W|Abs, OffNr)
	b.JumpIf(Jmp|Jeq|K, 1, far, end)
	for range 300 {
		b.Stmt(Alu|Add|K, 1)
	}
	b.Place(far)
	b.Stmt(Alu|Add|K, 41)
	b.JumpIf(Jmp|Jeq|K, 42, Next, end)
	b.Stmt(Ret|A, 0)
	b.Place(end)
	b.Stmt(Ret|K, 9)
	p, err := b.Build()
	if err != nil {
		t.Fatal(err)
	}
	for nr, want := range map[uint32]Result{1: {42, 6}, 2: {9, 3}} {
		if got := mustRun(t, p, &Data{Nr: nr}); got != want {
			t.Errorf("for %d: got %+v, want %+v\n%v", nr, got, want, p)
		}
	}
}

// TestBuilderDistances tries all distances around the reach of 8 bits, with
// jumps whose own lengthening pushes others out of reach.
func TestBuilderDistances(t *testing.T) {
	for fill := 240; fill < 260; fill++ {
		var b Builder
		var ends [8]Label
		b.Stmt(Ld|W|Abs, OffNr)
		for i := range ends {
			ends[i] = b.NewLabel("end")
			b.JumpIf(Jmp|Jeq|K, uint32(i), ends[i], Next)
		}
		for range fill {
			b.Stmt(Ld|Imm, 0)
		}
		b.Stmt(Ret|K, 100)
		for i := range ends {
			b.Place(ends[i])
			b.Stmt(Ld|Imm, uint32(i))
			b.Stmt(Ret|A, 0)
		}
		p, err := b.Build()
		if err != nil {
			t.Fatal(err)
		}
		for i := range uint32(len(ends) + 1) {
			want := i
			if i == uint32(len(ends)) {
				want = 100
			}
			if got := mustRun(t, p, &Data{Nr: i}); got.Action != want {
				t.Fatalf("fill %d: for %d got %d", fill, i, got.Action)
			}
		}
	}
}

func TestBuilderErrors(t *testing.T) {
	for _, test := range []struct {
		name  string
		build func(b *Builder)
		want  string
	}{
		{"not placed", func(b *Builder) { b.Jump(b.NewLabel("lost")); b.Stmt(Ret|K, 0) }, `no instruction follows label "lost"`},
		{"placed at the end", func(b *Builder) { l := b.NewLabel("late"); b.Jump(l); b.Place(l) }, `no instruction follows label "late"`},
		{"backwards", func(b *Builder) {
			l := b.NewLabel("loop")
			b.Place(l)
			b.Stmt(Ld|Imm, 0)
			b.JumpIf(Jmp|Jeq|K, 0, l, Next)
			b.Stmt(Ret|K, 0)
		}, `jump to "loop" at instruction 1 goes backwards`},
		{"next of the last", func(b *Builder) { b.JumpIf(Jmp|Jeq|K, 0, Next, Next) }, "goes nowhere"},
		{"foreign label", func(b *Builder) { b.Jump(5); b.Stmt(Ret|K, 0) }, "not from this builder"},
		{"no return", func(b *Builder) { b.Stmt(Ld|Imm, 0) }, "not a return"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var b Builder
			test.build(&b)
			if _, err := b.Build(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Build: %v, want an error about %q", err, test.want)
			}
		})
	}
}

func TestEncode(t *testing.T) {
	p := Program{JumpStmt(Jmp|Jeq|K, 0x01020304, 5, 6), Stmt(Ret|K, 0x7fff0000)}
	want := []byte{0x15, 0, 5, 6, 4, 3, 2, 1, 6, 0, 0, 0, 0, 0, 0xff, 0x7f}
	if diff := cmp.Diff(want, p.Encode()); diff != "" {
		t.Errorf("Encode: -want +got:\n%s", diff)
	}
	got, err := Decode(want)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(p, got); diff != "" {
		t.Errorf("Decode: -want +got:\n%s", diff)
	}
	if _, err := Decode(want[:9]); err == nil {
		t.Error("Decode of nine bytes succeeds")
	}
}

func TestDisassemble(t *testing.T) {
	p := Program{
		Stmt(Ld|W|Abs, OffArch), Stmt(Ld|W|Abs, OffHigh(OffIP)), Stmt(Ld|W|Abs, OffArg(2)), Stmt(Ld|W|Abs, OffHigh(OffArg(5))),
		Stmt(Ld|Imm, 5), Stmt(Ldx|Imm, 6), Stmt(Ld|Len, 0), Stmt(Ldx|Len, 0), Stmt(St, 3), Stmt(Stx, 4), Stmt(Ld|Mem, 3), Stmt(Ldx|Mem, 4),
		Stmt(Misc|Tax, 0), Stmt(Misc|Txa, 0), Stmt(Alu|Neg, 0), Stmt(Alu|And|K, 255), Stmt(Alu|Rsh|X, 0),
		JumpStmt(Jmp|Jset|K, 8, 1, 0), Stmt(Jmp|Ja, 1), JumpStmt(Jmp|Jge|X, 0, 0, 1), Stmt(Ret|A, 0), Stmt(Ret|K, 0x7fff0000),
	}
	want := `   0: A = arch
   1: A = ip.hi
   2: A = arg2.lo
   3: A = arg5.hi
   4: A = 0x5
   5: X = 0x6
   6: A = len
   7: X = len
   8: M[3] = A
   9: M[4] = X
  10: A = M[3]
  11: X = M[4]
  12: X = A
  13: A = X
  14: A = -A
  15: A &= 0xff
  16: A >>= X
  17: if A & 0x8 goto 19 else 18
  18: goto 20
  19: if A >= X goto 20 else 21
  20: return A
  21: return 0x7fff0000
`
	if diff := cmp.Diff(want, p.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got, want := p[17].String(), "if A & 0x8 goto +1 else +0"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := Stmt(0xbeef, 1).String(); !strings.HasPrefix(got, "invalid") {
		t.Errorf("an invalid instruction reads %q", got)
	}
}
