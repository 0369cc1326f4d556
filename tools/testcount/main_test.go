package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestGoTest(t *testing.T) {
	in := strings.Join([]string{
		`{"Action":"start","Package":"p/good"}`,
		`{"Action":"run","Package":"p/good","Test":"TestA"}`,
		`{"Action":"output","Package":"p/good","Test":"TestA","Output":"quiet\n"}`,
		`{"Action":"pass","Package":"p/good","Test":"TestA"}`,
		`{"Action":"pass","Package":"p/good","Elapsed":0.5}`,
		`{"Action":"output","Package":"p/bad","Test":"TestB","Output":"why B failed\n"}`,
		`{"Action":"fail","Package":"p/bad","Test":"TestB"}`,
		`{"Action":"skip","Package":"p/bad","Test":"TestC"}`,
		`{"Action":"fail","Package":"p/bad","Elapsed":1}`,
		`{"ImportPath":"p/broken [p/broken.test]","Action":"build-output","Output":"syntax error\n"}`,
		`{"ImportPath":"p/broken [p/broken.test]","Action":"build-fail"}`,
		`{"Action":"fail","Package":"p/broken","FailedBuild":"p/broken [p/broken.test]"}`,
		`{"Action":"run","Package":"p/panics","Test":"TestD"}`,
		`{"Action":"output","Package":"p/panics","Test":"TestD","Output":"panic: no end event\n"}`,
		`{"Action":"fail","Package":"p/panics"}`,
		`{"Action":"skip","Package":"p/notests"}`,
		`FAIL`,
	}, "\n")
	var out bytes.Buffer
	got, err := goTest(strings.NewReader(in), &out)
	if err != nil {
		t.Fatal(err)
	}
	if want := (count{passed: 1, failed: 4}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for _, want := range []string{"why B failed", "TestC was skipped", "syntax error", "panic: no end event", "ok    p/good: 1 passed", "FAIL  p/bad: 0 passed, 2 failed"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("output lacks %q:\n%s", want, &out)
		}
	}
	if strings.Contains(out.String(), "quiet") {
		t.Errorf("output of a test that passed is shown:\n%s", &out)
	}
}
