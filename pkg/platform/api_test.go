package platform

import (
	"bytes"
	"embed"
	"flag"
	"fmt"
	"go/ast"
	"go/build"
	"go/parser"
	"go/printer"
	"go/token"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// sources are this package's files: a test that is run elsewhere lacks them.
//
//go:embed *.go
var sources embed.FS

var update = flag.Bool("update", false, "rewrite testdata/api.txt")

// surface lists the exported surface of this package for an architecture, one
// line each, sorted: names with types, without the names of parameters.
func surface(t *testing.T, goarch string) []string {
	t.Helper()
	ctx := build.Default
	ctx.GOOS, ctx.GOARCH, ctx.CgoEnabled = "linux", goarch, false
	ctx.OpenFile = func(path string) (io.ReadCloser, error) { return sources.Open(filepath.Base(path)) }
	files, err := sources.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	var s lister
	for _, file := range files {
		name := file.Name()
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		if ok, err := ctx.MatchFile(".", name); err != nil || !ok {
			if err != nil {
				t.Fatal(err)
			}
			continue
		}
		src, err := sources.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		f, err := parser.ParseFile(&s.fset, name, src, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			s.decl(d)
		}
	}
	slices.Sort(s.lines)
	return s.lines
}

type lister struct {
	fset  token.FileSet
	lines []string
}

func (s *lister) add(format string, args ...any) {
	s.lines = append(s.lines, fmt.Sprintf(format, args...))
}

func (s *lister) text(n ast.Node) string {
	var b bytes.Buffer
	if err := printer.Fprint(&b, &s.fset, n); err != nil {
		return err.Error()
	}
	return b.String()
}

func (s *lister) decl(d ast.Decl) {
	switch d := d.(type) {
	case *ast.FuncDecl:
		if !d.Name.IsExported() {
			return
		}
		if d.Recv == nil {
			s.add("func %s%s", d.Name, s.signature(d.Type))
			return
		}
		recv := s.text(d.Recv.List[0].Type)
		if ast.IsExported(strings.TrimPrefix(recv, "*")) {
			s.add("func (%s) %s%s", recv, d.Name, s.signature(d.Type))
		}
	case *ast.GenDecl:
		for _, spec := range d.Specs {
			switch spec := spec.(type) {
			case *ast.ValueSpec:
				for _, n := range spec.Names {
					if !n.IsExported() {
						continue
					}
					line := fmt.Sprintf("%v %s", d.Tok, n)
					if spec.Type != nil {
						line += " " + s.text(spec.Type)
					}
					if d.Tok == token.CONST && len(spec.Values) > 0 {
						line += " = " + s.text(spec.Values[0])
					}
					s.add("%s", line)
				}
			case *ast.TypeSpec:
				if spec.Name.IsExported() {
					s.typeSpec(spec)
				}
			}
		}
	}
}

func (s *lister) typeSpec(spec *ast.TypeSpec) {
	name := spec.Name.Name
	switch typ := spec.Type.(type) {
	case *ast.StructType:
		s.add("type %s struct", name)
		for _, f := range typ.Fields.List {
			for _, n := range f.Names {
				if n.IsExported() {
					s.add("field %s.%s %s", name, n, s.text(f.Type))
				}
			}
			if f.Names == nil {
				s.add("embed %s %s", name, s.text(f.Type))
			}
		}
	case *ast.InterfaceType:
		s.add("type %s interface", name)
		for _, m := range typ.Methods.List {
			if f, ok := m.Type.(*ast.FuncType); ok {
				s.add("method %s.%s%s", name, m.Names[0], s.signature(f))
			} else {
				s.add("embed %s %s", name, s.text(m.Type))
			}
		}
	default:
		s.add("type %s %s", name, s.text(typ))
	}
}

// signature returns the types of a function: "(int, string) (bool, error)".
func (s *lister) signature(f *ast.FuncType) string {
	list := func(fields *ast.FieldList) (types []string) {
		if fields == nil {
			return nil
		}
		for _, p := range fields.List {
			for range max(1, len(p.Names)) {
				types = append(types, s.text(p.Type))
			}
		}
		return types
	}
	sig := "(" + strings.Join(list(f.Params), ", ") + ")"
	switch r := list(f.Results); len(r) {
	case 0:
		return sig
	case 1:
		return sig + " " + r[0]
	default:
		return sig + " (" + strings.Join(r, ", ") + ")"
	}
}

func readLines(t *testing.T, name string) []string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
}

// TestAPI fails when the exported surface changes: it is what backends and
// Sentries outside this module compile against.
func TestAPI(t *testing.T) {
	const golden = "testdata/api.txt"
	got := surface(t, "amd64")
	if *update {
		if err := os.WriteFile(golden, []byte(strings.Join(got, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want := readLines(t, golden)
	for _, line := range want {
		if !slices.Contains(got, line) {
			t.Errorf("gone or changed: %s", line)
		}
	}
	for _, line := range got {
		if !slices.Contains(want, line) {
			t.Errorf("not in %s: %s\nif it is meant to be there: go test ./pkg/platform -run TestAPI -update", golden, line)
		}
	}
	if arm64 := surface(t, "arm64"); !slices.Equal(arm64, got) {
		t.Errorf("the surface on arm64 is another one:\n%s", strings.Join(arm64, "\n"))
	}
}

// TestContract checks that everything of the API that Ringfence promises to
// implement is there, with the types promised.
func TestContract(t *testing.T) {
	got := surface(t, "amd64")
	contract := readLines(t, "testdata/contract.txt")
	if len(contract) < 90 {
		t.Fatalf("%d lines in the contract: it is cut short", len(contract))
	}
	for _, line := range contract {
		if !slices.Contains(got, line) {
			t.Errorf("missing: %s", line)
		}
	}
}
