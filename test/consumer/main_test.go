package main

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/platform"
)

func TestSandbox(t *testing.T) {
	var out strings.Builder
	status, err := run("ptrace", program, &out)
	if err != nil {
		t.Fatal(err)
	}
	if out.String() != "hello\n" || status != int(unix.EPERM) {
		t.Errorf("output %q, status %d; want %q, %d", out.String(), status, "hello\n", unix.EPERM)
	}
}

// A fault of the program is an error of its own sandbox, no more.
func TestFault(t *testing.T) {
	status, err := run("ptrace", nil, &strings.Builder{}) // zeros are no valid code
	if err == nil {
		t.Errorf("a program without code ended with status %d", status)
	} else if !strings.Contains(err.Error(), "signal") {
		t.Errorf("%v; want a signal", err)
	}
}

func TestUnknownPlatform(t *testing.T) {
	_, err := run("none", program, &strings.Builder{})
	if err == nil || !strings.Contains(err.Error(), strings.Join(platform.List(), ", ")) {
		t.Errorf("%v; want an error that lists %v", err, platform.List())
	}
}
