package programs

import (
	"embed"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ringfence/ringfence/pkg/platform"
	_ "github.com/ringfence/ringfence/pkg/platform/platforms"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled/gen"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
	"github.com/ringfence/ringfence/pkg/sentry/filter"
)

//go:embed programs_amd64.go programs_arm64.go
var checkedIn embed.FS

// TestGenerated compares the files of both architectures with what the generator
// makes now, on whatever host this is.
func TestGenerated(t *testing.T) {
	sources := func(a sysno.Arch) ([]precompiled.Source, error) { return filter.Sources(filter.Platforms(), a) }
	for _, a := range sysno.Arches() {
		name := fmt.Sprintf("programs_%v.go", a)
		want, err := gen.File("programs", a, sources)
		if err != nil {
			t.Fatal(err)
		}
		got, err := checkedIn.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("%s is stale: run go generate ./pkg/sentry/filter/programs: -want +got:\n%s", name, diff)
		}
	}
}

// TestComplete checks that every configuration of every platform has its program
// here.
func TestComplete(t *testing.T) {
	platforms := filter.Platforms()
	if len(platforms) == 0 {
		t.Fatal("no platform is linked in")
	}
	for _, p := range platforms {
		if _, ok := p.(platform.ArchSeccompInfo).ForArch(sysno.Native); !ok {
			continue // is not there on this architecture
		}
		for access := filter.ReadOnly; access <= filter.Write; access++ {
			if _, ok := Programs.Get(filter.Key(p, access)); !ok {
				t.Errorf("there is no program for %q", filter.Key(p, access))
			}
		}
	}
}
