// Package tags checks that tests say what they need of the host: a test target
// carries the tag that selects it exactly if it opens /dev/kvm, calls ptrace(2)
// or uses seccomp's user notification, every tag is documented, and the sets of
// .bazelrc are those of test/README.md and select each test once.
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
	notify = "requires-seccomp-notify"
)

// platformTags are the tags that platform_go_test gives; see tools/bazel/go.bzl.
var platformTags = map[string]string{"kvm": kvm, "ptrace": ptrace}

// platformsDir is the package that imports every backend.
const platformsDir = "pkg/platform/platforms"

// backends are the packages by whose import a test can get at what they need; and
// one that calls ptrace for tests.
var backends = map[string]string{
	module + "/pkg/kvm":           kvm,
	module + "/pkg/ptrace":        ptrace,
	module + "/pkg/stub/stubtest": ptrace,
}

// harmless are packages that import a backend and whose tests yet open no
// platform, with the reason.
var harmless = map[string]string{
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
				if name == "StartMonitor" || name == "InstallWithListener" || slices.ContainsFunc(n.Args, receivesNotification) {
					found[notify] = fileName + " uses seccomp's user notification"
				}
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

// selector returns the two names of a selector like unix.Ptrace; of a plain name
// the first is empty.
func selector(e ast.Expr) (x, sel string) {
	switch e := e.(type) {
	case *ast.SelectorExpr:
		if id, ok := e.X.(*ast.Ident); ok {
			return id.Name, e.Sel.Name
		}
	case *ast.Ident:
		return "", e.Name
	}
	return "", ""
}

// receivesNotification reports whether an argument is the ioctl(2) of a listener.
func receivesNotification(arg ast.Expr) bool {
	_, name := selector(arg)
	return name == "SECCOMP_IOCTL_NOTIF_RECV"
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
	testRule  = regexp.MustCompile(`(?ms)^(\w*_test)\(\n(.*?)^\)$`)
	ruleTags  = regexp.MustCompile(`(?ms)^    tags = \[(.*?)\],$`)
	quoted    = regexp.MustCompile(`"([^"]*)"`)
	platforms = regexp.MustCompile(`(?ms)^    platforms = \[(.*?)\],$`)
)

// list returns the strings of an attribute of a rule, sorted.
func list(attribute *regexp.Regexp, rule string) []string {
	var all []string
	for _, list := range attribute.FindAllStringSubmatch(rule, -1) {
		for _, s := range quoted.FindAllStringSubmatch(list[1], -1) {
			all = append(all, s[1])
		}
	}
	slices.Sort(all)
	return all
}

// carried returns the tags that the test rules of a BUILD file carry together: a
// package has one go_test, or one for each platform.
func carried(build string) map[string]bool {
	tags := map[string]bool{}
	for _, rule := range testRule.FindAllStringSubmatch(build, -1) {
		for _, tag := range list(ruleTags, rule[2]) {
			tags[tag] = true
		}
		// A platform_go_test makes a test for each platform, with its tags.
		for _, p := range list(platforms, rule[2]) {
			if tag := platformTags[p]; tag != "" {
				tags[tag] = true
			}
		}
	}
	return tags
}

// sources parses the workspace's Go files, by directory from the root.
func sources(t *testing.T, root string) map[string]map[string]*ast.File {
	t.Helper()
	packages := map[string]map[string]*ast.File{}
	fset := token.NewFileSet()
	walk(t, root, func(dir, name string) error {
		if filepath.Ext(name) != ".go" {
			return nil
		}
		file, err := parser.ParseFile(fset, filepath.Join(root, dir, name), nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		if packages[dir] == nil {
			packages[dir] = map[string]*ast.File{}
		}
		packages[dir][name] = file
		return nil
	})
	return packages
}

// walk calls f for every file of the workspace.
func walk(t *testing.T, root string, f func(dir, name string) error) {
	t.Helper()
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
		if !d.Type().IsRegular() {
			return nil
		}
		return f(filepath.Dir(rel), d.Name())
	})
	if err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestTestsCarryTheirTags(t *testing.T) {
	root := root(t)
	packages := sources(t, root)
	linked := imports(packages[platformsDir])
	checked := 0
	for _, dir := range slices.Sorted(maps.Keys(packages)) {
		need := needs(path.Join(module, dir), packages[dir], linked)
		build, err := os.ReadFile(filepath.Join(root, dir, "BUILD.bazel"))
		if err != nil && len(need) > 0 {
			t.Errorf("%s: %v\nfix: tools/bazel/bazelw run //tools/bazel:fix", dir, err)
			continue
		}
		tags := carried(string(build))
		for _, tag := range []string{kvm, ptrace, notify} {
			switch {
			case need[tag] != "" && !tags[tag]:
				t.Errorf("%s: its test lacks the tag %s: %s\nfix: add tags = [%q] to the go_test in %s/BUILD.bazel", dir, tag, need[tag], tag, dir)
			case need[tag] == "" && tags[tag]:
				t.Errorf("%s: its test carries the tag %s without need\nfix: take it off in %s/BUILD.bazel, or teach test/tags to see the need", dir, tag, dir)
			case tags[tag]:
				checked++
			}
		}
	}
	if checked == 0 {
		t.Error("no test of the workspace needs anything: the check is broken")
	}
}

// The tables of test/README.md have every tag and every set of tests.
func TestDocumented(t *testing.T) {
	root := root(t)
	readme := read(t, root, "test/README.md")
	tags := firstColumn(t, readme, "| tag |")
	used := map[string]bool{}
	walk(t, root, func(dir, name string) error {
		if name == "BUILD.bazel" {
			maps.Copy(used, carried(read(t, root, dir, name)))
		}
		return nil
	})
	for tag := range used {
		if !slices.Contains(tags, tag) {
			t.Errorf("a test carries the tag %s, which the table of tags in test/README.md does not have", tag)
		}
	}

	configs := firstColumn(t, readme, "| config |")
	filters := testFilters(read(t, root, ".bazelrc"))
	for _, config := range slices.Sorted(maps.Keys(filters)) {
		if !slices.Contains(configs, "--config="+config) {
			t.Errorf(".bazelrc has --config=%s, which the table of configs in test/README.md does not have", config)
		}
		row := fmt.Sprintf("| `--config=%s` | %s |", config, describe(filters[config]))
		if !strings.Contains(readme, row+"\n") {
			t.Errorf("test/README.md lacks the row that says what --config=%s selects:\n%s", config, row)
		}
	}
	for _, config := range configs {
		if _, ok := filters[strings.TrimPrefix(config, "--config=")]; !ok {
			t.Errorf("test/README.md has %s, which .bazelrc does not have", config)
		}
	}
}

// Whatever tags a test carries, exactly one of the sets that are run one after
// the other has it; all has every test.
func TestEverySetExcludesTheOthers(t *testing.T) {
	filters := testFilters(read(t, root(t), ".bazelrc"))
	known := map[string]bool{}
	for _, filter := range filters {
		for _, tag := range filter {
			known[strings.TrimPrefix(tag, "-")] = true
		}
	}
	tags := slices.Sorted(maps.Keys(known))
	if len(tags) < 4 {
		t.Fatalf("the filters of .bazelrc name only the tags %v", tags)
	}
	for bits := range 1 << len(tags) {
		carried := map[string]bool{}
		for i, tag := range tags {
			if bits>>i&1 != 0 {
				carried[tag] = true
			}
		}
		var in []string
		for config, filter := range filters {
			if selects(filter, carried) {
				in = append(in, config)
			}
		}
		slices.Sort(in)
		if len(in) != 2 || in[0] != "all" {
			t.Errorf("a test with the tags %v is in the sets %v, want all and one more", slices.Sorted(maps.Keys(carried)), in)
		}
	}
}

// firstColumn returns the names in backquotes in the first column of the table
// whose first line starts with head.
func firstColumn(t *testing.T, readme, head string) []string {
	t.Helper()
	_, table, ok := strings.Cut(readme, "\n"+head)
	if !ok {
		t.Fatalf("test/README.md has no table that starts with %q", head)
	}
	table, _, _ = strings.Cut(table, "\n\n")
	var names []string
	for _, line := range strings.Split(table, "\n")[2:] {
		cell, _, _ := strings.Cut(strings.TrimPrefix(line, "|"), "|")
		for _, name := range regexp.MustCompile("`([^`]*)`").FindAllStringSubmatch(cell, -1) {
			names = append(names, name[1])
		}
	}
	return names
}

// testFilters returns the --test_tag_filters of each config in a bazelrc.
func testFilters(rc string) map[string][]string {
	filters := map[string][]string{}
	for _, line := range regexp.MustCompile(`(?m)^test:(\w+) --test_tag_filters=(\S*)$`).FindAllStringSubmatch(rc, -1) {
		filters[line[1]] = strings.FieldsFunc(line[2], func(r rune) bool { return r == ',' })
	}
	return filters
}

// selects evaluates --test_tag_filters as Bazel does: one of the tags that it
// asks for, if any, and none of those with a minus sign.
func selects(filter []string, carried map[string]bool) bool {
	asked, has := false, false
	for _, tag := range filter {
		if without, ok := strings.CutPrefix(tag, "-"); ok {
			if carried[without] {
				return false
			}
			continue
		}
		asked, has = true, has || carried[tag]
	}
	return has || !asked
}

// describe puts --test_tag_filters into words.
func describe(filter []string) string {
	var with, without []string
	for _, tag := range filter {
		if name, ok := strings.CutPrefix(tag, "-"); ok {
			without = append(without, "`"+name+"`")
		} else {
			with = append(with, "`"+tag+"`")
		}
	}
	switch {
	case len(filter) == 0:
		return "all"
	case len(with) == 0:
		return "all without " + strings.Join(without, ", ")
	case len(without) == 0:
		return strings.Join(with, ", ")
	}
	return strings.Join(with, ", ") + ", but not " + strings.Join(without, ", ")
}

// Every backend that is linked in, and no other, has its test among those of a
// platform_go_test of each folder that has one.
func TestEveryPlatformIsTested(t *testing.T) {
	root := root(t)
	var linked []string
	for _, imported := range imports(sources(t, root)[platformsDir]) {
		linked = append(linked, path.Base(imported))
	}
	slices.Sort(linked)
	if len(linked) == 0 {
		t.Fatalf("%s imports nothing", platformsDir)
	}
	rules := 0
	walk(t, root, func(dir, name string) error {
		if name != "BUILD.bazel" {
			return nil
		}
		var last []string
		all := false
		for _, rule := range testRule.FindAllStringSubmatch(read(t, root, dir, name), -1) {
			if rule[1] != "platform_go_test" {
				continue
			}
			rules++
			tested := list(platforms, rule[2])
			all = all || slices.Equal(tested, linked)
			last = tested
			for _, p := range tested {
				if !slices.Contains(linked, p) {
					t.Errorf("a test of %s is run on %s, but linked in are %v\nfix: platforms in %s/BUILD.bazel", dir, p, linked, dir)
				}
			}
		}
		if last != nil && !all {
			t.Errorf("%s is run on %v, but linked in are %v\nfix: platforms = %q in %s/BUILD.bazel", dir, last, linked, linked, dir)
		}
		return nil
	})
	if rules == 0 {
		t.Error("there is no platform_go_test")
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
		{"monitor", "a_test.go", `package x; func f() { StartMonitor(nil) }`, []string{notify}},
		{"listener", "a_test.go", header + `func f() { unix.Syscall(unix.SYS_IOCTL, 3, unix.SECCOMP_IOCTL_NOTIF_RECV, 0) }`, []string{notify}},
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
	if want := []string{"local", "requires-kvm", "requires-ptrace", "soak"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := carried(strings.ReplaceAll(build, "_test(", "_binary(")); len(got) != 0 {
		t.Errorf("tags of other rules are counted: %v", got)
	}
}
