package stub

import (
	"bytes"
	"debug/elf"
	"testing"
)

// A backend's text lies behind everything else, and cannot be written.
func TestExtraText(t *testing.T) {
	const base, end = 0x7000_0000_0000, 0x7fff_ffff_f000
	extra := bytes.Repeat([]byte{0xcc}, pageSize+1)
	image, l, err := buildImage(base, end, extra)
	if err != nil {
		t.Fatal(err)
	}
	if l.Extra != base+imageSize || l.End != l.Extra+2*pageSize || l.SignalStack[1] != l.Extra {
		t.Errorf("layout %+v", l)
	}
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, p := range f.Progs {
		if p.Vaddr != uint64(l.Extra) {
			continue
		}
		found = true
		if p.Flags != elf.PF_R|elf.PF_X {
			t.Errorf("flags %v", p.Flags)
		}
		got := make([]byte, 2*pageSize)
		if _, err := p.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[:len(extra)], extra) {
			t.Error("another text")
		}
	}
	if !found {
		t.Errorf("no segment at %#x", l.Extra)
	}
}
