package sentry

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/ringfence/ringfence/pkg/platform"
)

// preference lists the platforms from the best to the most modest.
var preference = []string{"systrap", "kvm", "ptrace"}

// NewPlatform makes the platform called name, or for "auto" the best that works
// here. logf is told which platforms were tried and why they do not work.
func NewPlatform(name string, logf func(format string, args ...any)) (platform.Platform, string, error) {
	if name != "auto" {
		p, err := newPlatform(name)
		if err == nil && describe(p) != "" {
			logf("platform %s: %s", name, describe(p))
		}
		return p, name, err
	}
	return choose(candidates(), newPlatform, logf)
}

// candidates returns the platforms that are linked in, in the order in which "auto"
// tries them.
func candidates() []string {
	names := slices.DeleteFunc(slices.Clone(preference), func(n string) bool { return !slices.Contains(platform.List(), n) })
	for _, n := range platform.List() {
		if !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return names
}

// choose makes the first of the named platforms that works, but a slow one only if no
// other does.
func choose(names []string, open func(name string) (platform.Platform, error), logf func(format string, args ...any)) (platform.Platform, string, error) {
	var why []string
	var slow platform.Platform
	var slowName string
	for _, n := range names {
		p, err := open(n)
		if err == nil && isSlow(p) {
			logf("platform %s: %s: only if nothing else works", n, describe(p))
			if slow == nil {
				slow, slowName = p, n
			} else {
				discard(p)
			}
			continue
		}
		if err == nil {
			discard(slow)
			logf("platform %s: chosen, the first of %s that works here%s", n, strings.Join(names, ", "), in(describe(p)))
			return p, n, nil
		}
		logf("platform %s: %v", n, err)
		why = append(why, fmt.Sprintf("%s: %v", n, err))
	}
	if slow != nil {
		logf("platform %s: chosen, nothing else works here", slowName)
		return slow, slowName, nil
	}
	if len(why) == 0 {
		return nil, "", fmt.Errorf("no platform is linked into this program: import package platforms")
	}
	return nil, "", fmt.Errorf("no platform works here: %s", strings.Join(why, "; "))
}

// Diagnosis is what a platform is like here.
type Diagnosis struct {
	Name string
	// Err is why it does not work, with what would help, or nil.
	Err error
	// About is what the platform has found out about the host, if anything.
	About string
	// Slow says that "auto" takes it only if no other works.
	Slow bool
}

// Diagnose tries those of the platforms that are linked in that are called names, or
// all if there are no names, in the order of "auto".
func Diagnose(names ...string) []Diagnosis {
	var all []Diagnosis
	for _, n := range candidates() {
		if len(names) > 0 && !slices.Contains(names, n) {
			continue
		}
		d := Diagnosis{Name: n}
		p, err := newPlatform(n)
		if d.Err = err; err == nil {
			d.About, d.Slow = describe(p), isSlow(p)
			discard(p)
		}
		all = append(all, d)
	}
	return all
}

// slowRoundTrip is when a virtual machine is so slow to leave that ptrace is better.
const slowRoundTrip = 10 * time.Microsecond

// isSlow reports whether p has measured that a system call takes long.
func isSlow(p platform.Platform) bool {
	m, ok := p.(interface{ RoundTrip() time.Duration })
	return ok && m.RoundTrip() > slowRoundTrip
}

// describe returns what p has found out about the host, if anything.
func describe(p platform.Platform) string {
	if d, ok := p.(interface{ Describe() string }); ok {
		return d.Describe()
	}
	return ""
}

// in returns s in parentheses, unless it is empty.
func in(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}

// discard frees a platform that is not going to be used.
func discard(p platform.Platform) {
	if c, ok := p.(io.Closer); ok {
		c.Close()
	}
}

func newPlatform(name string) (platform.Platform, error) {
	c, err := platform.Lookup(name)
	if err != nil {
		return nil, err
	}
	device, err := c.OpenDevice("")
	if err != nil {
		return nil, err
	}
	p, err := c.New(device)
	if err != nil {
		return nil, fmt.Errorf("platform %s: %w", name, err)
	}
	return p, nil
}
