package machine

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// What programs print and their statuses come apart again, however it arrives.
func TestSplitter(t *testing.T) {
	const mark = "\nMARK "
	const in = "one\ntwo" + mark + "0\n" + "\n\nMAR" + mark + "137\n" + mark + "3\nrest\nMARK"
	for size := 1; size <= len(in); size++ {
		var out bytes.Buffer
		var statuses []int
		s := &splitter{mark: []byte(mark), out: &out, done: func(i, status int) {
			if i != len(statuses) {
				t.Fatalf("program %d after %v", i, statuses)
			}
			statuses = append(statuses, status)
		}}
		for chunk := range slices.Chunk([]byte(in), size) {
			if n, err := s.Write(chunk); n != len(chunk) || err != nil {
				t.Fatalf("Write of %d: %d, %v", len(chunk), n, err)
			}
		}
		if got := out.String() + string(s.held); got != "one\ntwo\n\nMARrest\nMARK" || !slices.Equal(statuses, []int{0, 137, 3}) {
			t.Fatalf("by %d: %q, %v", size, got, statuses)
		}
		if !bytes.HasPrefix([]byte(mark), s.held) {
			t.Fatalf("by %d: %q is held", size, s.held)
		}
	}
	s := &splitter{mark: []byte(mark), out: new(bytes.Buffer)}
	if _, err := s.Write([]byte(mark + "x\n")); err == nil {
		t.Error("a status that is no number is no error")
	}
}

// A shell takes words for what they are.
func TestPlan(t *testing.T) {
	dir := t.TempDir()
	p := Program{Argv: []string{"printf", "%s|", "a b", "it's", "$HOME", `\`, "é"}, Env: []string{"X=a 'b'"}, Dir: dir}
	script := strings.ReplaceAll(string(plan([]Program{p, {Argv: []string{"sh", "-c", "exit 9"}, Dir: dir}}, "\nMARK ")), "(kill -9 -1)\n", "")
	out, err := exec.Command("sh", "-c", script).CombinedOutput()
	if want := "a b|it's|$HOME|\\|é|\nMARK 0\n\nMARK 9\n"; err != nil || string(out) != want {
		t.Errorf("%q, %v, want %q; script:\n%s", out, err, want, script)
	}
}

func TestArchive(t *testing.T) {
	src := t.TempDir()
	for name, content := range map[string]string{"a/b": "12345", "a/c/d": "", "top": "x"} {
		path := filepath.Join(src, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	a := newArchive(&b)
	a.bytes("init", 0o755, []byte("hello"))
	if err := a.tree("test/x/y", src, "amd64"); err != nil {
		t.Fatal(err)
	}
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for r := b.Bytes(); len(r) > 0; {
		var f [13]uint64
		if string(r[:6]) != "070701" || len(r)%4 != 0 {
			t.Fatalf("entry begins with %q", r[:6])
		}
		for i := range f {
			for _, c := range r[6+8*i : 14+8*i] {
				f[i] = f[i]<<4 | uint64(strings.IndexByte("0123456789abcdef", c))
			}
		}
		round := func(n uint64) uint64 { return (n + 3) &^ 3 }
		size, nameSize := f[6], f[11]
		head := round(110 + nameSize)
		name := string(r[110 : 110+nameSize-1])
		got[name] = string(r[head : head+size])
		if f[1]&0o170000 == 0o040000 {
			got[name] = "dir"
		}
		r = r[head+round(size):]
	}
	want := map[string]string{"init": "hello", "test": "dir", "test/x": "dir", "test/x/y": "dir", "test/x/y/a": "dir",
		"test/x/y/a/b": "12345", "test/x/y/a/c": "dir", "test/x/y/a/c/d": "", "test/x/y/top": "x", "TRAILER!!!": ""}
	for name, content := range want {
		if c, ok := got[name]; !ok || c != content {
			t.Errorf("%s is %q, want %q", name, c, content)
		}
		delete(got, name)
	}
	if len(got) > 0 {
		t.Errorf("more entries: %q", got)
	}
}

// A program for another architecture is an error that says so.
func TestWrongArchitecture(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for arch, want := range map[string]string{"amd64": "", "arm64": ""} {
		err := newArchive(new(bytes.Buffer)).tree("x", self, arch)
		if arch != runtime.GOARCH {
			want = "build it for " + arch
		}
		if (err != nil) != (want != "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", arch, err, want)
		}
	}
}

// What cannot be had is an error that names it, and leaves nothing half done.
func TestFetchErrors(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := (Machine{Arch: "riscv64"}).Fetch(ctx); err == nil || !strings.Contains(err.Error(), "riscv64") {
		t.Errorf("riscv64: %v", err)
	}
	if err := (Machine{Arch: "arm64"}).Fetch(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("cancelled: %v", err)
	}
	left, err := filepath.Glob(filepath.Join(os.Getenv("XDG_CACHE_HOME"), "ringfence/*/*"))
	if err != nil || len(left) != 1 || filepath.Base(left[0]) != "lock" {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
