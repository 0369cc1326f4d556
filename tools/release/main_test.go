package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func write(t *testing.T, path, text string, mode os.FileMode) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// The same files under other names, at another time and in another order give
// the same bytes.
func TestArchiveIsReproducible(t *testing.T) {
	var outs [2]bytes.Buffer
	for i := range outs {
		dir := t.TempDir()
		a := write(t, filepath.Join(dir, "a"), "text", 0o644)
		b := write(t, filepath.Join(dir, "b"), "program", 0o755)
		files := []string{"doc/a.md=" + a, "bin/b=" + b}
		if i == 1 {
			files[0], files[1] = files[1], files[0]
			os.Chtimes(a, time.Unix(1, 0), time.Unix(1, 0))
			os.Chmod(a, 0o600)
		}
		if err := archive(&outs[i], "p", files); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(outs[0].Bytes(), outs[1].Bytes()) {
		t.Error("the two archives differ")
	}
	z, err := gzip.NewReader(&outs[0])
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, _ := io.ReadAll(r)
		got = append(got, h.Name, h.FileInfo().Mode().String(), string(content))
	}
	if got, want := strings.Join(got, " "), "p/bin/b -rwxr-xr-x program p/doc/a.md -rw-r--r-- text"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestSums(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	if err := sums(&out, []string{write(t, filepath.Join(dir, "b"), "", 0o644), write(t, filepath.Join(dir, "a"), "", 0o644)}); err != nil {
		t.Fatal(err)
	}
	const empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	if want := empty + "  a\n" + empty + "  b\n"; out.String() != want {
		t.Errorf("got %q, want %q", &out, want)
	}
}

func TestBOM(t *testing.T) {
	dir := t.TempDir()
	b := bom{
		version:   "1.2.3",
		goVersion: "1.26.8",
		goMod:     write(t, filepath.Join(dir, "go.mod"), "module x\nrequire a.org/one v1.0.0\nrequire (\n\ta.org/two/v2 v2.1.0 // indirect\n\ta.org/unused v1.0.0\n)\n", 0o644),
		goSum:     write(t, filepath.Join(dir, "go.sum"), "a.org/one v1.0.0 h1:AAAA\na.org/one v1.0.0/go.mod h1:BBBB\na.org/two/v2 v2.1.0 h1:CCCC\n", 0o644),
		imports:   write(t, filepath.Join(dir, "imports"), modulePath+"/pkg/x\na.org/one\na.org/two/v2/sub/pkg\n", 0o644),
	}
	var out bytes.Buffer
	if err := b.write(&out, []string{write(t, filepath.Join(dir, "artifact"), "", 0o644)}); err != nil {
		t.Fatal(err)
	}
	var d document
	if err := json.Unmarshal(out.Bytes(), &d); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, c := range d.Components {
		names = append(names, c.Name+"@"+c.Version)
	}
	if got, want := strings.Join(names, " "), "std@go1.26.8 a.org/one@v1.0.0 a.org/two/v2@v2.1.0 artifact@"; got != want {
		t.Errorf("components %q, want %q", got, want)
	}

	write(t, b.imports, "b.org/unknown\n", 0o644)
	if err := b.write(&out, nil); err == nil || !strings.Contains(err.Error(), "b.org/unknown") {
		t.Errorf("a package of no required module: got %v", err)
	}
}
