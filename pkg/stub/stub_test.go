package stub

import (
	"fmt"
	"os"
	"testing"
)

func TestX(t *testing.T) {
	z, err := Start()
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		pid, _, err := z.Fork()
		if err != nil {
			t.Fatal(err)
		}
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
		t.Logf("%d\n%s", pid, b)
		Kill(pid)
		Reap(pid)
	}
	z.Close()
}
