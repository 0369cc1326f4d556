package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestBazelTest(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return "file://" + path
	}
	good := file("good.xml", `<testsuites><testsuite name="p/good"><testcase name="A"/><testcase name="B"/></testsuite></testsuites>`)
	bad := file("bad.xml", `<testsuites><testsuite name="p/bad"><testcase name="A"><failure message="x"/></testcase><testcase name="B"><skipped/></testcase><testcase name="C"/></testsuite></testsuites>`)
	killed := file("killed.xml", `<testsuites><testsuite name="p/killed"></testsuite></testsuites>`)
	in := strings.Join([]string{
		`{"id":{"started":{}},"started":{}}`,
		`{"id":{"targetCompleted":{"label":"//p:good"}},"completed":{"success":true}}`,
		`{"id":{"testResult":{"label":"//p:good"}},"testResult":{"status":"PASSED","cachedLocally":true,"testAttemptDuration":"0.5s","testActionOutput":[{"name":"test.log","uri":"file:///x"},{"name":"test.xml","uri":"` + good + `"}]}}`,
		`{"id":{"testResult":{"label":"//p:bad"}},"testResult":{"status":"FAILED","testActionOutput":[{"name":"test.xml","uri":"` + bad + `"}]}}`,
		`{"id":{"testResult":{"label":"//p:killed"}},"testResult":{"status":"TIMEOUT","testActionOutput":[{"name":"test.xml","uri":"` + killed + `"}]}}`,
		`{"id":{"targetCompleted":{"label":"//p:broken"}},"completed":{"failureDetail":{}}}`,
		`{"id":{"targetCompleted":{"label":"//p:unknown"}},"aborted":{"reason":"ANALYSIS_FAILURE"}}`,
		`{"id":{"targetCompleted":{"label":"//p:arm64"}},"aborted":{"reason":"SKIPPED"}}`,
	}, "\n")
	var out bytes.Buffer
	got, err := bazelTest(strings.NewReader(in), &out)
	if err != nil {
		t.Fatal(err)
	}
	// bad: A and B; killed, broken and unknown: one each.
	if want := (count{passed: 3, failed: 5}); got != want {
		t.Errorf("got %+v, want %+v; output:\n%s", got, want, &out)
	}
	for _, want := range []string{"ok    //p:good: 2 passed (0.5s, from the cache)", "p/bad B was skipped", "FAIL  //p:bad: failed: 1 passed, 2 failed", "FAIL  //p:killed: timeout", "FAIL  //p:broken: not built", "FAIL  //p:unknown: not built"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("output lacks %q:\n%s", want, &out)
		}
	}
}
