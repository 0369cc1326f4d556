package machine

import (
	"bufio"
	"debug/elf"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// archive writes an initramfs, which is a cpio archive in the format newc (Linux
// Documentation/driver-api/early-userspace/buffer-format.rst). The first error
// sticks; close returns it.
type archive struct {
	w   *bufio.Writer
	err error
	n   int // entries
}

func newArchive(w io.Writer) *archive { return &archive{w: bufio.NewWriter(w)} }

// entry writes the header of a file with the st_mode of stat(2), to be followed by
// size bytes.
func (a *archive) entry(name string, mode uint32, size int64) {
	if a.err != nil {
		return
	}
	if size >= 1<<32 {
		a.err = fmt.Errorf("%s is larger than 4 GiB", name)
		return
	}
	a.n++
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.n, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0, name)
	_, a.err = a.w.WriteString(head)
	a.pad(int64(len(head)))
}

// pad writes what makes n a multiple of 4.
func (a *archive) pad(n int64) {
	if a.err == nil {
		_, a.err = a.w.Write(make([]byte, -n&3))
	}
}

func (a *archive) dir(name string) { a.entry(name, 0o40755, 0) }

func (a *archive) bytes(name string, mode uint32, b []byte) {
	a.entry(name, 0o100000|mode, int64(len(b)))
	if a.err == nil {
		_, a.err = a.w.Write(b)
	}
	a.pad(int64(len(b)))
}

// file copies a file of the host.
func (a *archive) file(name, from string) {
	if a.err != nil {
		return
	}
	f, err := os.Open(from)
	if err != nil {
		a.err = err
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		a.err = err
		return
	}
	a.entry(name, 0o100000|uint32(st.Mode().Perm()), st.Size())
	if a.err == nil {
		_, a.err = io.CopyN(a.w, f, st.Size())
	}
	a.pad(st.Size())
}

// tree copies a file or a folder of the host, following links. A program of
// another architecture is an error: it would only fail later, and not as clearly.
func (a *archive) tree(name, from, arch string) error {
	st, err := os.Stat(from)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		if f, err := elf.Open(from); err == nil {
			defer f.Close()
			if want := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[arch]; f.Machine != want {
				return fmt.Errorf("%s is a program for %v: build it for %s", from, f.Machine, arch)
			}
		}
		a.parents(name)
		a.file(name, from)
		return a.err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	a.parents(name)
	a.dir(name)
	for _, e := range entries {
		if e.Type()&(fs.ModeDevice|fs.ModeNamedPipe|fs.ModeSocket) != 0 {
			continue
		}
		if err := a.tree(name+"/"+e.Name(), filepath.Join(from, e.Name()), arch); err != nil {
			return err
		}
	}
	return nil
}

// parents makes the folders above name, which may be there already.
func (a *archive) parents(name string) {
	if dir := filepath.Dir(name); dir != "." {
		a.parents(dir)
		a.dir(dir)
	}
}

func (a *archive) close() error {
	a.entry("TRAILER!!!", 0, 0)
	if a.err == nil {
		a.err = a.w.Flush()
	}
	return a.err
}
