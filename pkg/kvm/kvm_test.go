package kvm

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/fd"
)

func TestOpenDevice(t *testing.T) {
	c := constructor{}
	absent := filepath.Join(t.TempDir(), "kvm")
	_, err := c.OpenDevice(absent)
	if !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), absent) || !strings.Contains(err.Error(), "load the module") {
		t.Errorf("absent: %v", err)
	}
	for _, e := range []struct {
		err  error
		want string
	}{
		{unix.EACCES, "group"}, {unix.EPERM, "group"}, {unix.ENODEV, "firmware"}, {unix.ENXIO, "firmware"},
	} {
		if err := deviceError(e.err); !errors.Is(err, e.err) || !strings.Contains(err.Error(), e.want) {
			t.Errorf("%v: %q does not say %q", e.err, err, e.want)
		}
	}
}

// New of something else is an error with an errno, and closes it.
func TestNewErrors(t *testing.T) {
	c := constructor{}
	if _, err := c.New(nil); !errors.Is(err, unix.EBADF) {
		t.Errorf("no device: %v", err)
	}
	null, err := fd.Open("/dev/null", unix.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.New(null); !errors.Is(err, wantOfNull) {
		t.Errorf("/dev/null: %v, want %v", err, wantOfNull)
	}
	if null.FD() != -1 {
		t.Error("the device is still open")
	}
}
