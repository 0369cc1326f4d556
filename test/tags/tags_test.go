// Package tags checks that tests say what they need of the host: every test
// target that opens /dev/kvm or calls ptrace(2) carries the tag that selects it
// (see test/README.md).
//
// It reads the workspace's sources and BUILD files and depends on the standard
// library alone.
package tags

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	module = "github.com/ringfence/ringfence"
	kvm    = "requires-kvm"
	ptrace = "requires-ptrace"
)

// platformsDir is the package that imports every backend.
const platformsDir = "pkg/platform/platforms"

// backends are the packages by whose import a test can get at what they need.
var backends = map[string]string{
	module + "/pkg/kvm":    kvm,
	module + "/pkg/ptrace": ptrace,
}

// harmless are packages that import a backend and whose tests yet open no
// platform, with the reason.
var harmless = map[string]string{
	module + "/cmd/ringfence":              "the command line is parsed, e2e runs it",
	module + "/pkg/sentry/filter/programs": "rules are compiled, for either architecture",
}

// root returns the workspace. In a Bazel test MODULE.bazel is a link into it.
func root(t *testing.T) string {
	t.Helper()
	link, err := filepath.EvalSymlinks("../../MODULE.bazel")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := filepath.Abs(filepath.Dir(link))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// imports returns what files import.
func imports(files map[string]*ast.File) []string {
	var paths []string
	for _, file := range files {
		for _, spec := range file.Imports {
			imported, _ := strconv.Unquote(spec.Path.Value)
			paths = append(paths, imported)
		}
	}
	return paths
}

// needs returns what a test package needs, with the evidence: its own files, test
// files or not, are what counts. linked is what platformsDir imports.
func needs(pkg string, files map[string]*ast.File, linked []string) map[string]string {
	found := map[string]string{}
	hasTests := false
	for fileName, file := range files {
		hasTests = hasTests || strings.HasSuffix(fileName, "_test.go")
		imported := imports(map[string]*ast.File{fileName: file})
		if slices.Contains(imported, module+"/"+platformsDir) {
			imported = append(imported, linked...)
		}
		for _, path := range imported {
			if tag := backends[path]; tag != "" && harmless[pkg] == "" {
				found[tag] = fileName + " imports " + path
			}
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.BasicLit:
				if n.Kind == token.STRING && strings.Contains(n.Value, "/dev/kvm") && opensFiles(file) {
					found[kvm] = fileName + " has " + n.Value
				}
			case *ast.CallExpr:
				pkg, name := selector(n.Fun)
				if pkg != "unix" && pkg != "syscall" {
					break
				}
				raw := strings.Contains(name, "Syscall") && len(n.Args) > 0
				if raw {
					_, number := selector(n.Args[0])
					raw = number == "SYS_PTRACE"
				}
				if raw || strings.HasPrefix(name, "Ptrace") {
					found[ptrace] = fmt.Sprintf("%s calls ptrace by %s.%s", fileName, pkg, name)
				}
			case *ast.KeyValueExpr:
				k, ok := n.Key.(*ast.Ident)
				v, isIdent := n.Value.(*ast.Ident)
				if ok && isIdent && k.Name == "Ptrace" && v.Name == "true" {
					found[ptrace] = fileName + " sets SysProcAttr.Ptrace"
				}
			}
			return true
		})
	}
	if !hasTests {
		return nil
	}
	return found
}

// selector returns the two names of a selector like unix.Ptrace.
func selector(e ast.Expr) (x, sel string) {
	if s, ok := e.(*ast.SelectorExpr); ok {
		if id, ok := s.X.(*ast.Ident); ok {
			return id.Name, s.Sel.Name
		}
	}
	return "", ""
}

// opensFiles reports whether the file calls something named Open, OpenFile,
// Openat or OpenDevice, or a raw system call: the mere mention of a path, in a
// message say, needs nothing.
func opensFiles(file *ast.File) bool {
	found := false
	ast.Inspect(file, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok {
			switch s.Sel.Name {
			case "Open", "OpenFile", "Openat", "Openat2", "OpenDevice", "Syscall", "Syscall6", "RawSyscall", "RawSyscall6":
				found = true
			}
		}
		return true
	})
	return found
}

var (
	testRule  = regexp.MustCompile(`(?ms)^(\w*go_test)\(\n(.*?)^\)$`)
	ruleTags  = regexp.MustCompile(`(?ms)^    tags = \[(.*?)\],$`)
	quoted    = regexp.MustCompile(`"([^"]*)"`)
	platforms = regexp.MustCompile(`(?ms)^    platforms = \[(.*?)\],$`)
)

// carried returns the tags that every go_test of a BUILD file carries together:
// a package has one, or one for each platform.
func carried(build string) map[string]bool {
	tags := map[string]bool{}
	for _, rule := range testRule.FindAllStringSubmatch(build, -1) {
		for _, list := range ruleTags.FindAllStringSubmatch(rule[2], -1) {
			for _, tag := range quoted.FindAllStringSubmatch(list[1], -1) {
				tags[tag[1]] = true
			}
		}
		// A platform_go_test makes a test for each platform, with its tags.
		for _, list := range platforms.FindAllStringSubmatch(rule[2], -1) {
			for _, p := range quoted.FindAllStringSubmatch(list[1], -1) {
				tags["requires-"+p[1]] = true
			}
		}
	}
	return tags
}

func TestTestsCarryTheirTags(t *testing.T) {
	root := root(t)
	packages := map[string]map[string]*ast.File{} // by directory from the root
	fset := token.NewFileSet()
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		if d.IsDir() {
			if name := d.Name(); rel != "." && (strings.HasPrefix(name, ".") || name == "testdata" || rel == "out" || rel == "test/consumer") {
				return filepath.SkipDir
			}
			return nil
		}
		if !d.Type().IsRegular() || filepath.Ext(p) != ".go" {
			return nil
		}
		file, err := parser.ParseFile(fset, p, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir := filepath.Dir(rel)
		if packages[dir] == nil {
			packages[dir] = map[string]*ast.File{}
		}
		packages[dir][d.Name()] = file
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	linked := imports(packages[platformsDir])
	checked := 0
	for _, dir := range slices.Sorted(maps.Keys(packages)) {
		need := needs(path.Join(module, dir), packages[dir], linked)
		if len(need) == 0 {
			continue
		}
		build, err := os.ReadFile(filepath.Join(root, dir, "BUILD.bazel"))
		if err != nil {
			t.Errorf("%s: %v\nfix: tools/bazel/bazelw run //tools/bazel:fix", dir, err)
			continue
		}
		tags := carried(string(build))
		for _, tag := range slices.Sorted(maps.Keys(need)) {
			checked++
			if !tags[tag] {
				t.Errorf("%s: its test lacks the tag %s: %s\nfix: add tags = [%q] to the go_test in %s/BUILD.bazel", dir, tag, need[tag], tag, dir)
			}
		}
	}
	t.Logf("%d needs found", checked)
}

// Every backend that is linked in has its test among each platform_go_test's.
func TestEveryPlatformIsTested(t *testing.T) {
	root := root(t)
	build, err := os.ReadFile(filepath.Join(root, "test/e2e/BUILD.bazel"))
	if err != nil {
		t.Fatal(err)
	}
	tested := carried(string(build))
	sources, err := filepath.Glob(filepath.Join(root, platformsDir, "*.go"))
	if err != nil || len(sources) == 0 {
		t.Fatalf("sources of %s: %v, %v", platformsDir, sources, err)
	}
	for _, source := range sources {
		file, err := parser.ParseFile(token.NewFileSet(), source, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, imported := range imports(map[string]*ast.File{source: file}) {
			if name := path.Base(imported); !tested["requires-"+name] {
				t.Errorf("test/e2e is not run on %s\nfix: add %q to platforms in test/e2e/BUILD.bazel", name, name)
			}
		}
	}
}

func TestNeeds(t *testing.T) {
	const header = "package x\nimport (\"os\"; \"syscall\"; \"golang.org/x/sys/unix\")\n"
	for _, test := range []struct {
		name, file, source string
		want               []string
	}{
		{"opens kvm", "a_test.go", header + `var f, _ = os.OpenFile("/dev/kvm", os.O_RDWR, 0)`, []string{kvm}},
		{"says kvm", "a_test.go", header + `var s = "open /dev/kvm: permission denied"`, nil},
		{"wrapper", "a_test.go", header + `var e = unix.PtraceAttach(1)`, []string{ptrace}},
		{"number", "a_test.go", header + `var a = map[int]bool{unix.SYS_PTRACE: true}; var r unix.PtraceRegs`, nil},
		{"raw", "a_test.go", header + `func f() { unix.RawSyscall6(unix.SYS_PTRACE, 0, 0, 0, 0, 0, 0) }`, []string{ptrace}},
		{"exec", "a_test.go", header + `var a = syscall.SysProcAttr{Ptrace: true}`, []string{ptrace}},
		{"backend", "a_test.go", `package x; import _ "` + module + `/pkg/kvm"`, []string{kvm}},
		{"every backend", "a_test.go", `package x; import _ "` + module + `/pkg/platform/platforms"`, []string{ptrace}},
		{"no test", "a.go", header + `var e = unix.PtraceAttach(1)`, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			file, err := parser.ParseFile(token.NewFileSet(), test.file, test.source, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			got := slices.Sorted(maps.Keys(needs("x", map[string]*ast.File{test.file: file}, []string{module + "/pkg/ptrace"})))
			if !slices.Equal(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
		})
	}
}

func TestCarried(t *testing.T) {
	build := `load("x", "y")

go_library(
    name = "l",
    tags = ["requires-kvm"],
)

go_test(
    name = "a_test",
    srcs = ["a_test.go"],
    tags = ["requires-ptrace"],
)

platform_go_test(
    name = "b_test",
    platforms = [
        "kvm",
        "systrap",
    ],
    tags = [
        "local",
        "soak",
    ],
)
`
	got := slices.Sorted(maps.Keys(carried(build)))
	if want := []string{"local", "requires-kvm", "requires-ptrace", "requires-systrap", "soak"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := carried(strings.ReplaceAll(build, "go_test", "go_binary")); len(got) != 0 {
		t.Errorf("tags of other rules are counted: %v", got)
	}
}
