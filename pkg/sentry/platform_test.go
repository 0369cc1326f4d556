package sentry

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ringfence/ringfence/pkg/platform"
)

// fakePlatform has measured a round trip.
type fakePlatform struct {
	platform.Platform
	roundTrip time.Duration
	closed    *bool
}

func (p fakePlatform) RoundTrip() time.Duration { return p.roundTrip }
func (p fakePlatform) Close() error             { *p.closed = true; return nil }

// Whatever works here, the best is tried first.
func TestCandidates(t *testing.T) {
	want := slices.DeleteFunc([]string{"systrap", "kvm", "ptrace"}, func(n string) bool { return !slices.Contains(platform.List(), n) })
	if got := candidates(); len(want) < 2 || !slices.Equal(got, want) {
		t.Errorf("candidates are %q, want %q", got, want)
	}
}

// A platform that is slow is taken only if no other works, and freed otherwise.
func TestChoose(t *testing.T) {
	broken := time.Duration(-1)
	for _, test := range []struct {
		roundTrips []time.Duration // of platforms a, b, c
		want       string
		closed     string
	}{
		{[]time.Duration{1000, 1000, 1000}, "a", ""},
		{[]time.Duration{broken, 30000, 1000}, "c", "b"},
		{[]time.Duration{broken, 30000, broken}, "b", ""},
		{[]time.Duration{30000, 40000, broken}, "a", "b"},
		{[]time.Duration{broken, 9000, 1000}, "b", ""},
		{[]time.Duration{broken, broken, broken}, "", ""},
	} {
		closed := make([]bool, 3)
		open := func(name string) (platform.Platform, error) {
			i := int(name[0] - 'a')
			if test.roundTrips[i] == broken {
				return nil, errors.New("broken " + name)
			}
			return fakePlatform{roundTrip: test.roundTrips[i], closed: &closed[i]}, nil
		}
		_, name, err := choose([]string{"a", "b", "c"}, open, t.Logf)
		if name != test.want || (err == nil) != (test.want != "") {
			t.Errorf("%v: %q, %v; want %q", test.roundTrips, name, err, test.want)
		}
		if err != nil && (!strings.Contains(err.Error(), "a: broken a") || !strings.Contains(err.Error(), "c: broken c")) {
			t.Errorf("the error does not say what is wrong with each: %v", err)
		}
		for i, c := range closed {
			if c != (test.closed == string(rune('a'+i))) {
				t.Errorf("%v: platform %c closed: %v", test.roundTrips, 'a'+i, c)
			}
		}
	}
}
