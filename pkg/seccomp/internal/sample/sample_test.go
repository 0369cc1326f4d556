package sample

import (
	"embed"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ringfence/ringfence/pkg/seccomp/internal/sample/rules"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled/gen"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

//go:embed programs_amd64.go programs_arm64.go
var checkedIn embed.FS

// TestGenerated compares the files of both architectures with what the
// generator makes now, on whatever host this is.
func TestGenerated(t *testing.T) {
	for _, a := range sysno.Arches() {
		name := fmt.Sprintf("programs_%v.go", a)
		want, err := gen.File("sample", a, rules.Sources)
		if err != nil {
			t.Fatal(err)
		}
		got, err := checkedIn.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("%s is stale: run go generate ./pkg/seccomp/internal/sample: -want +got:\n%s", name, diff)
		}
	}
}

// TestPrograms compares the compiled-in programs with fresh ones.
func TestPrograms(t *testing.T) {
	sources, err := rules.Sources(sysno.Native)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range sources {
		want, err := s.Compile()
		if err != nil {
			t.Fatal(err)
		}
		got, ok := Programs.Get(s.Key)
		if !ok {
			t.Errorf("there is no program for %q", s.Key)
			continue
		}
		if diff := cmp.Diff(&want, got); diff != "" {
			t.Errorf("%q: -want +got:\n%s", s.Key, diff)
		}
	}
	for _, key := range []string{"", "kv", "kvm2", "zzz"} {
		if p, ok := Programs.Get(key); ok {
			t.Errorf("Get(%q) finds %q", key, p.Key)
		}
	}
}

// BenchmarkStart compares what a program with precompiled filters does at its
// start with compiling them.
func BenchmarkStart(b *testing.B) {
	sources, err := rules.Sources(sysno.Native)
	if err != nil {
		b.Fatal(err)
	}
	values := rules.Values()
	for _, s := range sources {
		b.Run(s.Key, func(b *testing.B) {
			const renders = 100
			var fast, slow time.Duration
			for b.Loop() {
				start := time.Now()
				for range renders {
					if err := render(s.Key, values); err != nil {
						b.Fatal(err)
					}
				}
				rendered := time.Now()
				if _, err := s.Build(values); err != nil {
					b.Fatal(err)
				}
				fast += rendered.Sub(start) / renders
				slow += time.Since(rendered)
			}
			b.ReportMetric(0, "ns/op") // of both
			b.ReportMetric(float64(fast.Nanoseconds())/float64(b.N), "ns-precompiled")
			b.ReportMetric(float64(slow.Nanoseconds())/float64(b.N), "ns-compiling")
			b.ReportMetric(float64(slow)/float64(fast), "times-cheaper")
		})
	}
}

func render(key string, values precompiled.Values) error {
	p, ok := Programs.Get(key)
	if !ok {
		return fmt.Errorf("no program for %q", key)
	}
	_, err := p.Render(values)
	return err
}
