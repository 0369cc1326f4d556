package sentry

import (
	"fmt"
	"slices"
	"strings"

	"github.com/ringfence/ringfence/pkg/platform"
)

// preference lists the platforms from the best to the most modest.
var preference = []string{"systrap", "kvm", "ptrace"}

// NewPlatform makes the platform called name, or for "auto" the best that works
// here. logf is told which platforms were tried and why they do not work.
func NewPlatform(name string, logf func(format string, args ...any)) (platform.Platform, string, error) {
	if name != "auto" {
		p, err := newPlatform(name)
		return p, name, err
	}
	names := slices.DeleteFunc(slices.Clone(preference), func(n string) bool { return !slices.Contains(platform.List(), n) })
	for _, n := range platform.List() {
		if !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	var why []string
	for _, n := range names {
		p, err := newPlatform(n)
		if err == nil {
			logf("platform %s: chosen, the first of %s that works here", n, strings.Join(names, ", "))
			return p, n, nil
		}
		logf("platform %s: %v", n, err)
		why = append(why, fmt.Sprintf("%s: %v", n, err))
	}
	if len(why) == 0 {
		return nil, "", fmt.Errorf("no platform is linked into this program: import package platforms")
	}
	return nil, "", fmt.Errorf("no platform works here: %s", strings.Join(why, "; "))
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
