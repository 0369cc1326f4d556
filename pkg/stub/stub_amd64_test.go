package stub

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

var filterCases = map[uint64]uint32{
	0x400000:              unix.SECCOMP_RET_ALLOW,
	0x7fff_ff60_0000:      unix.SECCOMP_RET_ALLOW,
	0xff60_0000:           unix.SECCOMP_RET_ALLOW,
	vsyscallStart - 1:     unix.SECCOMP_RET_ALLOW,
	vsyscallStart:         unix.SECCOMP_RET_TRAP,
	vsyscallStart + 0x400: unix.SECCOMP_RET_TRAP,
	vsyscallEnd - 1:       unix.SECCOMP_RET_TRAP,
	vsyscallEnd:           unix.SECCOMP_RET_ALLOW,
}

// A stub that dies before it has sent anything is an error of that Fork alone, and
// leaves nothing behind.
func TestStillborn(t *testing.T) {
	z := newZygote(t)
	text := make([]byte, textSize)
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", z.pid), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if _, err := mem.ReadAt(text, int64(z.Layout.Start)); err != nil {
		t.Fatal(err)
	}
	// The first that a stub does: PR_SET_PDEATHSIG, SIGKILL.
	first := bytes.Index(text, []byte{0xbf, 1, 0, 0, 0, 0xbe, 9, 0, 0, 0})
	if first < 0 {
		t.Fatal("the text does not set the parent-death signal")
	}
	at := int64(z.Layout.Start) + int64(first)
	before := children(t)
	for range 2 {
		if _, err := mem.WriteAt([]byte{0x0f, 0x0b}, at); err != nil { // UD2
			t.Fatal(err)
		}
		if _, _, err := z.Fork(); !errors.Is(err, unix.EAGAIN) {
			t.Errorf("Fork of a stub that dies at once: %v, want EAGAIN", err)
		}
		if after := children(t); len(after) != len(before) {
			t.Errorf("children were %v and are %v", before, after)
		}
		if _, err := mem.WriteAt(text[first:first+2], at); err != nil {
			t.Fatal(err)
		}
		pid, _ := fork(t, z)
		z.Release(pid)
	}
}
