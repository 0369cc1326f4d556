package systrap

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
)

// The error of several calls is that of the one that failed, and those after it
// are not made.
func TestCalls(t *testing.T) {
	m := newManager(t, syscallLoop)
	f := platformtest.NewMemFile(t, hostarch.PageSize)
	const at = 0x10000000
	if err := m.as.MapFile(at, f, memmap.FileRange{End: hostarch.PageSize}, hostarch.Read, false); err != nil {
		t.Fatal(err)
	}
	unmap := func(addr uint64) call { return call{unix.SYS_MUNMAP, [6]uint64{addr, hostarch.PageSize}} }
	badMap := call{unix.SYS_MMAP, [6]uint64{at, hostarch.PageSize, unix.PROT_READ, unix.MAP_SHARED | unix.MAP_FIXED, 1 << 20, 0}}
	for i := range 3 {
		calls := []call{unmap(at + 2*hostarch.PageSize), unmap(at + 3*hostarch.PageSize)}
		calls = append(slices.Insert(calls, i, badMap), unmap(at))
		_, err := m.as.do(calls...)
		if !errors.Is(err, unix.EBADF) || !strings.Contains(err.Error(), "mmap") {
			t.Fatalf("mmap of a descriptor that is not there, as call %d: %v", i, err)
		}
		maps, err := os.ReadFile("/proc/" + strconv.Itoa(m.as.pid) + "/maps")
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(maps), "10000000-10001000 r--s") {
			t.Fatalf("after an error the calls behind it were made; now there is\n%s", maps)
		}
	}
	full := slices.Repeat([]call{unmap(at)}, maxCalls)
	if _, err := m.as.do(full...); err != nil {
		t.Errorf("%d calls: %v", maxCalls, err)
	}
	if err := m.as.MapFile(hostarch.Addr(m.as.at.slots), f, memmap.FileRange{End: hostarch.PageSize}, hostarch.Read, false); !errors.Is(err, unix.EINVAL) {
		t.Errorf("MapFile over the slots: %v", err)
	}
}

// A stub has as many threads as there were Contexts at a time, and one of its own.
func TestThreadsAreReused(t *testing.T) {
	m := newManager(t, syscallLoop)
	const live = 2*chunkSlots + 1
	for range 5 {
		var cs []*threadContext
		for range live {
			c, ac := &threadContext{}, arch.New()
			ac.SetIP(codeAddr)
			if _, _, err := c.Switch(context.Background(), m, ac, -1); err != nil {
				t.Fatal(err)
			}
			cs = append(cs, c)
		}
		for _, c := range cs {
			c.Release()
		}
	}
	tasks, err := filepath.Glob("/proc/" + strconv.Itoa(m.as.pid) + "/task/*")
	if err != nil || len(tasks) != live+1 {
		t.Errorf("%d threads, %v; want %d", len(tasks), err, live+1)
	}
}

// What the stub must not write it cannot write, and nothing can be both written
// and executed.
func TestStubMemory(t *testing.T) {
	m := newManager(t, syscallLoop)
	b, err := os.ReadFile("/proc/" + strconv.Itoa(m.as.pid) + "/maps")
	if err != nil {
		t.Fatal(err)
	}
	ro := false
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if strings.Contains(f[1], "w") && strings.Contains(f[1], "x") {
			t.Errorf("can be written and executed: %s", line)
		}
		if strings.HasPrefix(line, strconv.FormatUint(uint64(m.as.at.ro), 16)+"-") {
			ro = f[1] == "r--s"
		}
	}
	if !ro {
		t.Errorf("the region at %#x is not read-only:\n%s", m.as.at.ro, b)
	}
}

// Kill ends what runs, although nothing interrupts it.
func TestKill(t *testing.T) {
	m := newManager(t, []byte{0xeb, 0xfe}) // jmp .
	c, ac := &threadContext{}, arch.New()
	defer c.Release()
	ac.SetIP(codeAddr)
	returned := make(chan error, 1)
	go func() {
		_, _, err := c.Switch(context.Background(), m, ac, -1)
		returned <- err
	}()
	select {
	case err := <-returned:
		t.Fatalf("Switch returned before Kill: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	m.as.Kill()
	if err := <-returned; !isContextError(err) || !errors.Is(err, unix.ESRCH) {
		t.Errorf("Switch: %v", err)
	}
	m.as.Kill()
	m.as.Release()
	m.as.Kill()
}
