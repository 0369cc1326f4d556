// Command testcount reads what `go test -json` prints, or the build events of
// `bazel test`, shows what failed and one line per package or target, and writes
// the numbers of passed and failed tests to a file. It depends on the standard
// library alone.
//
// A skipped test counts as failed: tests are selected by tags, so a test that
// runs and then declines to test anything is a mistake. A package or target that
// fails without a failing test of its own (it does not build, panics or runs out
// of time) counts as one failed test.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("testcount: ")
	counts := flag.String("counts", "", "`file` to write \"PASSED FAILED\" to")
	bep := flag.String("bep", "", "`file` of bazel's --build_event_json_file; default: go test -json on standard input")
	flag.Parse()
	if *counts == "" || flag.NArg() != 0 {
		log.Fatal("usage: go test -json PACKAGES | testcount -counts FILE, or testcount -bep FILE -counts FILE")
	}
	var c count
	if *bep != "" {
		f, err := os.Open(*bep)
		if err != nil {
			log.Fatal(err)
		}
		if c, err = bazelTest(f, os.Stdout); err != nil {
			log.Fatalf("reading %s: %v", *bep, err)
		}
	} else {
		var err error
		if c, err = goTest(os.Stdin, os.Stdout); err != nil {
			log.Fatalf("reading go test's output: %v", err)
		}
	}
	if err := os.WriteFile(*counts, fmt.Appendf(nil, "%d %d\n", c.passed, c.failed), 0o644); err != nil {
		log.Fatal(err)
	}
}

type count struct{ passed, failed int }

// event is a line of `go test -json`; see `go doc test2json` and `go help buildjson`.
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64 // seconds
}

// goTest counts the events of r and shows on w what failed.
func goTest(r io.Reader, w io.Writer) (count, error) {
	var total count
	output := map[[2]string][]byte{} // of a package and test that has not ended
	perPackage := map[string]*count{}
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) != nil {
				w.Write(line) // not an event: the go command speaks for itself
			} else {
				total.add(e, output, perPackage, w)
			}
		}
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

func (total *count) add(e event, output map[[2]string][]byte, perPackage map[string]*count, w io.Writer) {
	key := [2]string{e.Package, e.Test}
	p := perPackage[e.Package]
	if p == nil {
		p = &count{}
		perPackage[e.Package] = p
	}
	switch e.Action {
	case "output":
		output[key] = append(output[key], e.Output...)
		return
	case "build-output":
		io.WriteString(w, e.Output)
		return
	case "pass", "fail", "skip":
	default:
		return
	}
	text := output[key]
	delete(output, key)
	switch {
	case e.Test != "" && e.Action == "pass":
		p.passed++
		total.passed++
	case e.Test != "":
		w.Write(text)
		if e.Action == "skip" {
			fmt.Fprintf(w, "%s %s was skipped, which counts as failed: select tests by tags instead\n", e.Package, e.Test)
		}
		p.failed++
		total.failed++
	case e.Action == "pass":
		fmt.Fprintf(w, "ok    %s: %d passed (%.1f s)\n", e.Package, p.passed, e.Elapsed)
	case e.Action == "fail":
		if p.failed == 0 {
			w.Write(text)
			// The test that was running has no end of its own.
			for k, t := range output {
				if k[0] == e.Package {
					w.Write(t)
				}
			}
			p.failed++
			total.failed++
		}
		fmt.Fprintf(w, "FAIL  %s: %d passed, %d failed (%.1f s)\n", e.Package, p.passed, p.failed, e.Elapsed)
	}
}
