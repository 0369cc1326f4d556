package stub

import (
	"bytes"
	"slices"
	"testing"

	"github.com/ringfence/ringfence/pkg/freestanding"
	"github.com/ringfence/ringfence/pkg/hostarch"
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
	i := slices.IndexFunc(image, func(s freestanding.Segment) bool { return s.Addr == uint64(l.Extra) })
	if i < 0 {
		t.Fatalf("no segment at %#x", l.Extra)
	}
	if s := image[i]; s.Access != hostarch.ReadExec || !bytes.Equal(s.Data, extra) {
		t.Errorf("access %v, or another text", s.Access)
	}
}
