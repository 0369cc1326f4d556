package syscalls

import (
	"testing"

	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

func TestTable(t *testing.T) {
	n := 0
	for _, table := range tables {
		for nr, s := range table {
			if s.Fn == nil && s.Name == "" {
				continue
			}
			n++
			if s.Fn == nil {
				t.Errorf("%d (%s) has no function", nr, s.Name)
			}
			if want := sysno.Native.Name(uintptr(nr)); want != s.Name {
				t.Errorf("%d is called %q, want %q", nr, s.Name, want)
			}
		}
	}
	got := 0
	for _, s := range Table() {
		if s.Fn != nil {
			got++
		}
	}
	if got != n {
		t.Errorf("the table has %d calls, its parts have %d: a number is there twice", got, n)
	}
}
