package platformtest

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

var contractSubjects = []subject{
	{"Constants", testConstants},
	{"OpenDevice", testOpenDevice},
	{"SeccompInfo", testSeccompInfo},
}

// What the platform says of itself is sane, and does not change.
func testConstants(t *T) {
	p := t.s.p
	ar := t.userRange()
	if !ar.IsPageAligned() || ar.Empty() || ar.Start < pageSize {
		t.Errorf("MinUserAddress and MaxUserAddress are %v", ar)
	}
	if !ar.IsSupersetOf(hostarch.AddrRange{Start: textBase, End: 1 << 46}) {
		t.Errorf("the addresses %v leave out what every program uses", ar)
	}
	if u := p.MapUnit(); u != 0 && (u < pageSize || u&(u-1) != 0) {
		t.Errorf("MapUnit is %#x: not a power of two times the page size", u)
	}
	type answers struct {
		io, cooperative, preemption, barrier, tables bool
		unit                                         uint64
		ar                                           hostarch.AddrRange
	}
	ask := func() answers {
		return answers{p.SupportsAddressSpaceIO(), p.CooperativelySchedulesAddressSpace(), p.DetectsCPUPreemption(), p.HaveGlobalMemoryBarrier(), p.OwnsPageTables(), p.MapUnit(), t.userRange()}
	}
	first := ask()
	t.newSpace().newThread(progCount).report()
	if second := ask(); second != first {
		t.Errorf("the platform said %+v and now says %+v", first, second)
	}
	t.s.cfg.Constructor.Requirements()
}

// OpenDevice of what is no device is an error that names it.
func testOpenDevice(t *T) {
	const path = "/nonexistent/device"
	dev, err := t.s.cfg.Constructor.OpenDevice(path)
	if err == nil {
		dev.Close()
		t.Fatalf("OpenDevice(%q) succeeds", path)
	}
	if !strings.Contains(err.Error(), path) {
		t.Errorf("OpenDevice(%q): the error %q does not name it", path, err)
	}
}

func testSeccompInfo(t *T) {
	c := t.s.cfg.Constructor
	info := t.s.p.SeccompInfo()
	if info.ConfigKey() == "" {
		t.Errorf("ConfigKey is empty")
	}
	all := c.PrecompiledSeccompInfo()
	keys := make(map[string]platform.SeccompInfo)
	for _, pi := range all {
		if _, ok := keys[pi.ConfigKey()]; ok {
			t.Errorf("two of PrecompiledSeccompInfo have ConfigKey %q", pi.ConfigKey())
		}
		keys[pi.ConfigKey()] = pi
	}
	pre, ok := keys[info.ConfigKey()]
	if !ok {
		t.Fatalf("ConfigKey %q is none of PrecompiledSeccompInfo's %q", info.ConfigKey(), slices.Sorted(maps.Keys(keys)))
	}
	names := slices.Sorted(maps.Keys(info.Variables()))
	for _, i := range append(all, t.s.p.SeccompInfo()) {
		if got := slices.Sorted(maps.Keys(i.Variables())); !slices.Equal(got, names) {
			t.Errorf("%q has the variables %q, want %q as the others", i.ConfigKey(), got, names)
		}
		hot := i.HottestSyscalls()
		if len(hot) > 12 {
			t.Errorf("%q: %d hottest system calls, want a dozen at most", i.ConfigKey(), len(hot))
		}
		if s := slices.Sorted(slices.Values(hot)); len(slices.Compact(s)) != len(hot) {
			t.Errorf("%q: hottest system calls %d have duplicates", i.ConfigKey(), hot)
		}
		rules := i.SyscallFilters(i.Variables())
		for _, nr := range rules.Numbers() {
			if rules.Get(nr) == nil {
				t.Errorf("%q: system call %d has a nil rule", i.ConfigKey(), nr)
			} else if rules.Get(nr).String() == "" {
				t.Errorf("%q: the rule of system call %d prints as nothing", i.ConfigKey(), nr)
			}
		}
		for _, nr := range hot {
			if rules.Get(nr) == nil {
				t.Errorf("%q: the hot system call %d is not allowed by its filters", i.ConfigKey(), nr)
			}
		}
	}
	for _, pi := range all {
		ai, ok := pi.(platform.ArchSeccompInfo)
		if !ok {
			continue
		}
		own, ok := ai.ForArch(sysno.Native)
		if !ok {
			t.Errorf("%q: ForArch says that the platform does not exist here", pi.ConfigKey())
			continue
		}
		if d := diffRules(own, pi); d != "" {
			t.Errorf("%q: ForArch(%v) %s", pi.ConfigKey(), sysno.Native, d)
		}
		for _, a := range sysno.Arches() {
			if other, ok := ai.ForArch(a); ok && other.ConfigKey() != pi.ConfigKey() {
				t.Errorf("%q: ForArch(%v) has ConfigKey %q", pi.ConfigKey(), a, other.ConfigKey())
			}
		}
	}
	// The rules depend on the configuration and the variables alone.
	if d := diffRules(info, pre); d != "" {
		t.Errorf("%q: the instance %s", info.ConfigKey(), d)
	}
}

// diffRules says how the rules of got differ from want's, for the same values of
// the variables.
func diffRules(got, want platform.SeccompInfo) string {
	vars := maps.Clone(want.Variables())
	for k := range vars {
		vars[k] = 0x12345678
	}
	a, b := got.SyscallFilters(vars), want.SyscallFilters(vars)
	if !slices.Equal(a.Numbers(), b.Numbers()) {
		return fmt.Sprintf("has rules for system calls %d, want %d", a.Numbers(), b.Numbers())
	}
	for _, nr := range a.Numbers() {
		if x, y := a.Get(nr).String(), b.Get(nr).String(); x != y {
			return fmt.Sprintf("has for system call %d the rule %s, want %s", nr, x, y)
		}
	}
	return ""
}
