package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/ringfence/ringfence/pkg/sentry"
)

func TestDiagnose(t *testing.T) {
	broken := sentry.Diagnosis{Name: "a", Err: errors.New("open /dev/a:\nload the module")}
	slow := sentry.Diagnosis{Name: "b", About: "33.0 us", Slow: true}
	fast := sentry.Diagnosis{Name: "c"}
	for _, test := range []struct {
		all    []sentry.Diagnosis
		status int
		want   []string
	}{
		{nil, 1, []string{"no platform works"}},
		{[]sentry.Diagnosis{broken}, 1, []string{"a          does not work: open /dev/a: load the module", "no platform works"}},
		{[]sentry.Diagnosis{broken, slow}, 0, []string{"b          works, slow", "33.0 us", "auto takes b"}},
		{[]sentry.Diagnosis{broken, slow, fast}, 0, []string{"c          works\n", "auto takes c"}},
	} {
		var b bytes.Buffer
		if status := diagnose(&b, test.all); status != test.status {
			t.Errorf("%v: status %d", test.all, status)
		}
		for _, want := range test.want {
			if !strings.Contains(b.String(), want) {
				t.Errorf("%v: %q is not in %q", test.all, want, b.String())
			}
		}
	}
}

// The command says of every platform whether it works.
func TestDoctor(t *testing.T) {
	forEachPlatform(t, func(t *testing.T, name string) {
		ws, stdout, stderr := runCommand(t, "none", "doctor")
		if ws != 0 || stderr != "" {
			t.Errorf("status %#x, stderr %q", ws, stderr)
		}
		for _, want := range []string{"\nkernel ", "\nCPUs ", "\nseccomp ", "\n" + name + strings.Repeat(" ", 11-len(name)) + "works"} {
			if !strings.Contains(stdout, want) {
				t.Errorf("%q is not in %q", want, stdout)
			}
		}
		if name == "kvm" && !strings.Contains(stdout, " us a system call that leaves the guest, ") {
			t.Errorf("no cost of leaving the guest in %q", stdout)
		}
	})
	if ws, _, stderr := runCommand(t, "none", "doctor", "x"); ws.ExitStatus() != exitError || !strings.Contains(stderr, "--help") {
		t.Errorf("with an argument: status %#x, stderr %q", ws, stderr)
	}
	if ws, stdout, _ := runCommand(t, "none", "doctor", "--help"); ws != 0 || stdout != doctorUsage {
		t.Errorf("--help: status %#x, %q", ws, stdout)
	}
}
