package seccomp

import (
	"math/rand/v2"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/bpf"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// source makes random rules and calls, from a fuzzer's input or, if rnd is
// set, from a pseudo-random sequence.
type source struct {
	bytes []byte
	rnd   *rand.Rand
	// values are numbers in the rules so far: those that matter to calls.
	values []uint64
	// vars, if not empty, are the values of variables in the rules; used are
	// those values that were made with them.
	vars []uint32
	used []uint64
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

// n returns a number below limit, which is at most 256.
func (s *source) n(limit int) int { return int(s.byte()) % limit }

// half returns 32 bits: often small, a power of two, or at the upper end.
func (s *source) half() uint32 {
	switch s.n(6) {
	case 0, 1:
		return uint32(s.n(4))
	case 2:
		return 1 << s.n(32)
	case 3:
		return 0xf0f << s.n(32)
	case 4:
		return -uint32(1 + s.n(2))
	}
	return uint32(s.byte()) | uint32(s.byte())<<8 | uint32(s.byte())<<16 | uint32(s.byte())<<24
}

// wide returns 64 bits, often with a high half of zero.
func (s *source) wide() uint64 {
	v := uint64(s.half())
	if s.n(3) == 0 {
		v |= uint64(s.half()) << 32
	}
	return v
}

// constant returns a value for a rule to compare with.
func (s *source) constant() uint64 {
	if v, ok := s.variable(); ok {
		return v
	}
	if len(s.values) > 0 && s.n(4) == 0 {
		return s.values[s.n(min(256, len(s.values)))] + uint64(s.n(3)) - 1
	}
	v := s.wide()
	s.values = append(s.values, v)
	return v
}

// variable sometimes returns a value of which one or both halves are variables.
func (s *source) variable() (uint64, bool) {
	if len(s.vars) == 0 || s.n(2) == 0 {
		return 0, false
	}
	half := func() uint64 { return uint64(s.vars[s.n(len(s.vars))]) }
	v := half()
	switch s.n(4) {
	case 0:
		v |= half() << 32
	case 1:
		v |= uint64(s.half()) << 32
	case 2:
		v = v<<32 | uint64(s.half())
	}
	s.used = append(s.used, v)
	return v, true
}

// value returns a matcher. kind, if not negative, says of which type.
func (s *source) value(kind, depth int) ValueMatcher {
	if kind < 0 {
		kind = s.n(valueKinds)
		if depth == 0 {
			kind %= len(simpleValues)
		}
	}
	if kind < len(simpleValues) {
		return simpleValues[kind](s)
	}
	list := make([]ValueMatcher, s.n(6))
	for i := range list {
		list[i] = s.value(-1, max(depth-1, 0))
	}
	if kind == len(simpleValues) {
		return AnyOf(list)
	}
	return AllOf(list)
}

var simpleValues = []func(s *source) ValueMatcher{
	func(s *source) ValueMatcher { return AnyValue{} },
	func(s *source) ValueMatcher { return EqualTo(s.constant()) },
	func(s *source) ValueMatcher { return NotEqual(s.constant()) },
	func(s *source) ValueMatcher { return GreaterThan(s.constant()) },
	func(s *source) ValueMatcher { return GreaterThanOrEqual(s.constant()) },
	func(s *source) ValueMatcher { return LessThan(s.constant()) },
	func(s *source) ValueMatcher { return LessThanOrEqual(s.constant()) },
	func(s *source) ValueMatcher {
		mask := s.constant()
		v := s.constant()
		if s.n(8) != 0 && len(s.vars) == 0 {
			v &= mask
			s.values = append(s.values, v)
		}
		return MaskedEqual{mask, v}
	},
	func(s *source) ValueMatcher { return BitsAllowlist(s.constant()) },
}

// valueKinds is the number of matcher types: the simple ones, AnyOf and AllOf.
var valueKinds = len(simpleValues) + 2

func (s *source) rule(depth int) SyscallRule {
	switch k := s.n(8); {
	case k == 0:
		return MatchAll{}
	case k < 6 || depth == 0:
		var p PerArg
		for range 1 + s.n(3) {
			p[s.n(len(p))] = s.value(-1, 2)
		}
		return p
	default:
		list := make([]SyscallRule, s.n(6))
		for i := range list {
			list[i] = s.rule(depth - 1)
		}
		if k == 6 {
			return And(list)
		}
		return Or(list)
	}
}

func (s *source) action() Action {
	return []Action{Allow, Allow, KillProcess, KillThread, Errno(unix.EPERM), Errno(unix.ENOSYS), Trap(3), Trace(4), Log, UserNotif}[s.n(10)]
}

// sample is random rule sets and how to compile them.
type sample struct {
	sets []RuleSet
	o    ProgramOptions
	// numbers are the calls with rules.
	numbers []uint32
}

func (s *source) sample() sample {
	s.values, s.used = nil, nil
	x := sample{o: ProgramOptions{
		Arch:          sysno.Arches()[s.n(2)],
		DefaultAction: s.action(),
		BadArchAction: s.action(),
	}}
	if s.n(4) == 0 {
		x.o.BadArchAction = x.o.DefaultAction
	}
	for range 1 + s.n(3) {
		set := RuleSet{NewSyscallRules(), s.action()}
		for range s.n(24) {
			nr := uintptr(s.n(60))
			if s.n(4) == 0 {
				nr = uintptr(s.half()) % x32Bit
			}
			set.Rules.Add(nr, s.rule(2))
			x.numbers = append(x.numbers, uint32(nr))
		}
		x.sets = append(x.sets, set)
	}
	for range s.n(6) {
		if len(x.numbers) > 0 {
			x.o.HottestSyscalls = append(x.o.HottestSyscalls, uintptr(x.numbers[s.n(min(256, len(x.numbers)))]))
		}
	}
	slices.Sort(x.numbers)
	x.numbers = slices.Compact(x.numbers)
	return x
}

// call returns a call that x is likely to care for.
func (s *source) call(x *sample) bpf.Data {
	d := bpf.Data{Arch: x.o.Arch.AuditArch(), IP: s.argument()}
	switch {
	case s.n(64) == 0:
		d.Arch = s.half()
		d.Nr = s.half()
	case len(x.numbers) == 0 || s.n(16) == 0:
		d.Nr = s.half()
	default:
		d.Nr = x.numbers[(s.n(256)<<8|s.n(256))%len(x.numbers)] + uint32(s.n(9)/8)
		if s.n(64) == 0 {
			d.Nr |= x32Bit
		}
	}
	for i := range d.Args {
		d.Args[i] = s.argument()
	}
	return d
}

// argument returns a value near those in the rules.
func (s *source) argument() uint64 {
	values := s.values
	if len(values) == 0 || len(s.used) > 0 && s.n(2) == 0 {
		values = s.used
	}
	if len(values) == 0 || s.n(8) == 0 {
		return s.wide()
	}
	v := values[(s.n(256)<<8|s.n(256))%len(values)]
	switch s.n(10) {
	case 0:
		v++
	case 1:
		v--
	case 2:
		v ^= 1 << s.n(64)
	case 3:
		v = v<<32 | v>>32
	case 4:
		v = v&(1<<32-1) | uint64(s.half())<<32
	}
	return v
}
