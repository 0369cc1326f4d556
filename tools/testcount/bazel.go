package main

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"
)

// buildEvent is the part that matters here of a line of bazel's build events;
// see build_event_stream.proto.
type buildEvent struct {
	ID struct {
		TestResult *struct{ Label string }
		// TargetCompleted is of a target that was built, or was not.
		TargetCompleted *struct{ Label string }
	}
	TestResult *struct {
		Status        string
		CachedLocally bool
		ExecutionInfo struct{ CachedRemotely bool }
		// TestAttemptDuration is in Bazel's JSON for durations: "1.5s".
		TestAttemptDuration string
		TestActionOutput    []struct{ Name, URI string }
	}
	Completed *struct{ Success bool }
	Aborted   *struct{ Reason, Description string }
}

// bazelTest counts the tests in the test.xml files that the build events of r
// name. What failed is on bazel's own output already (--test_output=errors).
func bazelTest(r io.Reader, w io.Writer) (count, error) {
	var total count
	events := json.NewDecoder(r)
	for {
		var e buildEvent
		if err := events.Decode(&e); err == io.EOF {
			return total, nil
		} else if err != nil {
			return total, err
		}
		switch {
		case e.ID.TestResult != nil && e.TestResult != nil:
			c, err := e.count(w)
			if err != nil {
				return total, err
			}
			total.passed += c.passed
			total.failed += c.failed
		case e.ID.TargetCompleted != nil && (e.Completed == nil || !e.Completed.Success):
			if e.Aborted != nil && e.Aborted.Reason == "SKIPPED" {
				continue // not for this platform: target_compatible_with
			}
			total.failed++
			fmt.Fprintf(w, "FAIL  %s: not built\n", e.ID.TargetCompleted.Label)
		}
	}
}

// count counts the tests of one test target.
func (e *buildEvent) count(w io.Writer) (count, error) {
	var c count
	label, result := e.ID.TestResult.Label, e.TestResult
	for _, output := range result.TestActionOutput {
		if output.Name != "test.xml" {
			continue
		}
		u, err := url.Parse(output.URI)
		if err != nil || u.Scheme != "file" {
			return c, fmt.Errorf("%s: its test.xml is at %q, which is not a local file: %v", label, output.URI, err)
		}
		f, err := os.Open(u.Path)
		if err != nil {
			return c, err
		}
		c, err = junit(f, w)
		f.Close()
		if err != nil {
			return c, fmt.Errorf("%s: %w", u.Path, err)
		}
	}
	if result.Status == "PASSED" && c.failed == 0 {
		if c.passed == 0 {
			c.passed = 1 // a test without cases of its own
		}
		from := ""
		if result.CachedLocally || result.ExecutionInfo.CachedRemotely {
			from = ", from the cache"
		}
		fmt.Fprintf(w, "ok    %s: %d passed (%s%s)\n", label, c.passed, result.TestAttemptDuration, from)
		return c, nil
	}
	if c.failed == 0 {
		c.failed = 1
	}
	fmt.Fprintf(w, "FAIL  %s: %s: %d passed, %d failed (%s)\n", label, strings.ToLower(result.Status), c.passed, c.failed, result.TestAttemptDuration)
	return c, nil
}

// junit counts the cases of a test.xml file.
func junit(r io.Reader, w io.Writer) (count, error) {
	var suites struct {
		Suites []struct {
			Name  string `xml:"name,attr"`
			Cases []struct {
				Name    string    `xml:"name,attr"`
				Failure *struct{} `xml:"failure"`
				Error   *struct{} `xml:"error"`
				Skipped *struct{} `xml:"skipped"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	var c count
	if err := xml.NewDecoder(r).Decode(&suites); err != nil {
		return c, err
	}
	for _, s := range suites.Suites {
		for _, t := range s.Cases {
			switch {
			case t.Skipped != nil:
				fmt.Fprintf(w, "%s %s was skipped, which counts as failed: select tests by tags instead\n", s.Name, t.Name)
				c.failed++
			case t.Failure != nil || t.Error != nil:
				c.failed++
			default:
				c.passed++
			}
		}
	}
	return c, nil
}
