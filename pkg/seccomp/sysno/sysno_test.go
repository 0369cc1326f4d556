package sysno

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestNumbers(t *testing.T) {
	for _, test := range []struct {
		call         Call
		name         string
		amd64, arm64 uintptr
	}{
		{Read, "read", 0, 63},
		{Futex, "futex", 202, 98},
		{RtSigreturn, "rt_sigreturn", 15, 139},
		{Ptrace, "ptrace", 101, 117},
		{EpollPwait2, "epoll_pwait2", 441, 441},
		{Newfstatat, "newfstatat", 262, 79},
		{ArchPrctl, "arch_prctl", 158, None},
		{Fork, "fork", 57, None},
		{Sysctl, "sysctl", 156, None},
	} {
		if got := test.call.String(); got != test.name {
			t.Errorf("name of %s: %q", test.name, got)
		}
		if got := test.call.On(AMD64); got != test.amd64 {
			t.Errorf("%s on amd64: %d, want %d", test.name, got, test.amd64)
		}
		if got := test.call.On(ARM64); got != test.arm64 {
			t.Errorf("%s on arm64: %d, want %d", test.name, got, test.arm64)
		}
		if got, ok := Lookup(test.name); !ok || got != test.call {
			t.Errorf("Lookup(%q): %v, %v", test.name, got, ok)
		}
	}
	if _, ok := Lookup("no_such_call"); ok {
		t.Error("Lookup finds no_such_call")
	}
}

func TestNative(t *testing.T) {
	for c, want := range map[Call]uintptr{
		Read: unix.SYS_READ, Mmap: unix.SYS_MMAP, Clone: unix.SYS_CLONE, Seccomp: unix.SYS_SECCOMP,
		ExitGroup: unix.SYS_EXIT_GROUP, Openat2: unix.SYS_OPENAT2, Ppoll: unix.SYS_PPOLL,
	} {
		if got := c.On(Native); got != want {
			t.Errorf("%v: %d, want %d", c, got, want)
		}
	}
}

func TestFind(t *testing.T) {
	for _, a := range Arches() {
		seen := make(map[uintptr]Call)
		for i := range calls {
			c := Call(i)
			nr := c.On(a)
			if nr == None {
				continue
			}
			if other, ok := seen[nr]; ok {
				t.Errorf("%v: %v and %v both have number %d", a, c, other, nr)
			}
			seen[nr] = c
			if got, ok := a.Find(nr); !ok || got != c {
				t.Errorf("%v: Find(%d) is %v, %v; want %v", a, nr, got, ok, c)
			}
		}
		if len(seen) < 300 {
			t.Errorf("%v has only %d calls", a, len(seen))
		}
		if got, want := a.Name(9999), "syscall 9999"; got != want {
			t.Errorf("Name(9999): %q, want %q", got, want)
		}
		if c, ok := a.Find(None); ok {
			t.Errorf("%v: Find(None) is %v", a, c)
		}
	}
}

func TestArch(t *testing.T) {
	for _, a := range Arches() {
		if got, err := ParseArch(a.String()); err != nil || got != a {
			t.Errorf("ParseArch(%q): %v, %v", a, got, err)
		}
	}
	if _, err := ParseArch("mips"); err == nil {
		t.Error("ParseArch takes mips")
	}
	if got := AMD64.AuditArch(); got != unix.AUDIT_ARCH_X86_64 {
		t.Errorf("amd64: %#x", got)
	}
	if got := ARM64.AuditArch(); got != unix.AUDIT_ARCH_AARCH64 {
		t.Errorf("arm64: %#x", got)
	}
}
