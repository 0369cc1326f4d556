package main

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ringfence/ringfence/pkg/sentry/vfs/rootfs"
)

func TestParseRun(t *testing.T) {
	o, err := parseRun([]string{
		"--platform=ptrace", "--root", "/srv", "--write", "--bind=/a", "--bind", "/b:/c", "--env=A=1", "--env", "B=",
		"--cwd=/d", "--trace", "--strict", "--verbose", "--", "prog", "--flag", "--", "x",
	})
	if err != nil {
		t.Fatal(err)
	}
	if o.platform != "ptrace" || o.root != "/srv" || !o.write || o.cwd != "/d" || !o.trace || !o.strict || !o.verbose {
		t.Errorf("options %+v", o)
	}
	if !slices.Equal(o.binds, []string{"/a", "/b:/c"}) || !slices.Equal(o.env, []string{"A=1", "B="}) {
		t.Errorf("binds %q, env %q", o.binds, o.env)
	}
	if want := []string{"prog", "--flag", "--", "x"}; !slices.Equal(o.argv, want) {
		t.Errorf("argv %q, want %q", o.argv, want)
	}

	// Options end at the program, with or without "--".
	o, err = parseRun([]string{"prog", "--write"})
	if err != nil || o.write || !slices.Equal(o.argv, []string{"prog", "--write"}) {
		t.Errorf("options %+v, %v", o, err)
	}
	if o.platform != "auto" || o.root != "/" {
		t.Errorf("defaults %+v", o)
	}
	if _, err := parseRun([]string{"--help"}); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("--help: %v", err)
	}
	for _, args := range [][]string{nil, {"--"}, {"--no-such", "prog"}, {"--env", "A", "prog"}, {"--env==x", "prog"}, {"--write=maybe", "prog"}} {
		if _, err := parseRun(args); err == nil || !strings.HasPrefix(err.Error(), "run: ") {
			t.Errorf("%q: %v", args, err)
		}
	}
}

func TestEnvironment(t *testing.T) {
	got := environment([]string{"A=1", "AB=2", "C=3"}, []string{"C=4", "A=", "D=5"})
	if want := []string{"A=", "AB=2", "C=4", "D=5"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestParseBinds(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseBinds([]string{"/a", "/a:/b", "x", "x:/y"})
	if err != nil {
		t.Fatal(err)
	}
	x := filepath.Join(wd, "x")
	want := []rootfs.Bind{{Source: "/a", Target: "/a"}, {Source: "/a", Target: "/b"}, {Source: x, Target: x}, {Source: x, Target: "/y"}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
