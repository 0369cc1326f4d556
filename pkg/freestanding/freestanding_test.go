package freestanding_test

import (
	"debug/elf"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/freestanding"
	"github.com/ringfence/ringfence/pkg/hostarch"
)

const base = 1 << 20

var machine = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// A program runs from its memory file, with what its segments say in its memory, and
// nobody can change the file.
func TestProgram(t *testing.T) {
	f, err := freestanding.Program("exits", base+16, []freestanding.Segment{
		{Addr: base, Data: append(make([]byte, 16), exitText...), Access: hostarch.ReadExec},
		{Addr: base + 0x2000, Data: []byte{42}, Size: 0x2000, Access: hostarch.ReadWrite},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0}, base); !errors.Is(err, unix.EPERM) {
		t.Errorf("a write to the program: %v, want EPERM", err)
	}
	e, err := elf.NewFile(f)
	if err != nil {
		t.Fatal(err)
	}
	if len(e.Progs) != 3 || e.Machine != machine[runtime.GOARCH] {
		t.Errorf("header %+v, %d program headers, want 3", e.FileHeader, len(e.Progs))
	}
	for _, p := range e.Progs {
		if p.Type == elf.PT_GNU_STACK && p.Flags&elf.PF_X != 0 {
			t.Error("the stack can be executed")
		}
	}
	cmd := exec.Command(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	var exit *exec.ExitError
	if err := cmd.Run(); !errors.As(err, &exit) || exit.ExitCode() != 42 {
		t.Errorf("the program: %v, want exit status 42", err)
	}
}
