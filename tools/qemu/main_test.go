package main

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ringfence/ringfence/tools/qemu/machine"
)

func TestParse(t *testing.T) {
	files, programs, err := parse("# comment\n\nfile a\n file b/c /x/y \nrun 7 ./a -x 'a  b' 7\n", "/m")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{"a": "/m/a", "b/c": "/x/y"}, files); diff != "" {
		t.Error(diff)
	}
	want := []machine.Program{{Argv: []string{"/bin/sh", "-c", "./a -x 'a  b' 7"}, Timeout: 7 * time.Second}}
	if diff := cmp.Diff(want, programs); diff != "" {
		t.Error(diff)
	}
	for in, want := range map[string]string{
		"what":              "line 1",
		"\nfile":            "line 2",
		"file a b c":        "line 1",
		"run x true":        "seconds",
		"run 0 true":        "seconds",
		"run 1":             "line 1",
		"file a\nrunaway 1": "line 2",
	} {
		if _, _, err := parse(in, ""); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", in, err, want)
		}
	}
}
