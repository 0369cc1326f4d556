package main

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestBench(t *testing.T) {
	forEachPlatform(t, func(t *testing.T, name string) {
		ws, stdout, stderr := runCommand(t, "none", "bench", "--platform="+name, "--rounds=1", "--batch=100us", "--json")
		var r benchResult
		if err := json.Unmarshal([]byte(stdout), &r); ws != 0 || err != nil || stderr != "" {
			t.Fatalf("status %#x, %v, stderr %q", ws, err, stderr)
		}
		if len(r.Operations) != len(benchOps) || len(r.Failed) != 0 {
			t.Errorf("%d operations of %d, failed %v", len(r.Operations), len(benchOps), r.Failed)
		}
		if got := r.About[name]; strings.Contains(got, "leaves the guest") != (name == "kvm") {
			t.Errorf("about the platform: %q", got)
		}
		for _, op := range r.Operations {
			if f := op.Platforms[name]; op.NativeNS <= 0 || f.NS <= 0 || f.Ratio <= 0 {
				t.Errorf("%s: native %v ns, %s %v", op.Name, op.NativeNS, name, f)
			}
		}
	})
}

func TestBenchTable(t *testing.T) {
	for _, test := range []struct {
		args   []string
		status int
		stdout string
		stderr string
	}{
		{[]string{"--help"}, 0, "mprotect-fault", ""},
		{[]string{"--run=getpid-plain", "--rounds=1", "--batch=100us"}, 0, "getpid-plain", ""},
		{[]string{"--platform=none"}, exitError, "", `unknown platform "none"`},
		{[]string{"--run=none"}, exitError, "", `no operation has "none" in its name`},
		{[]string{"--rounds=0"}, exitError, "", "--rounds must be at least 1"},
		{[]string{"x"}, exitError, "", `unexpected argument "x"`},
		{[]string{"--none"}, exitError, "", "see ringfence bench --help"},
	} {
		ws, stdout, stderr := runCommand(t, "none", append([]string{"bench"}, test.args...)...)
		if ws.ExitStatus() != test.status || !strings.Contains(stdout, test.stdout) || !strings.Contains(stderr, test.stderr) || (test.stdout == "" && stdout != "") {
			t.Errorf("%q: status %d, stdout %q, stderr %q", test.args, ws.ExitStatus(), stdout, stderr)
		}
	}
}
