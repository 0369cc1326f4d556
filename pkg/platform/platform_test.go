package platform

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/fd"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/seccomp"
	precompiledseccomp "github.com/ringfence/ringfence/pkg/seccomp/precompiled"
)

type fakeConstructor struct{ Constructor }

func (fakeConstructor) New(*fd.FD) (Platform, error) { return nil, ErrNotSupported }

// withRegistry runs f with an empty registry.
func withRegistry(t *testing.T, f func()) {
	t.Helper()
	old := registry.constructors
	registry.constructors = nil
	defer func() { registry.constructors = old }()
	f()
}

func TestRegistry(t *testing.T) {
	withRegistry(t, func() {
		if got := List(); len(got) != 0 {
			t.Errorf("List of an empty registry = %q", got)
		}
		if _, err := Lookup("kvm"); err == nil || !strings.Contains(err.Error(), `"kvm"`) || !strings.Contains(err.Error(), "import package platforms") {
			t.Errorf("Lookup in an empty registry: %v", err)
		}
		a, b := &fakeConstructor{}, &fakeConstructor{}
		for _, name := range []string{"zeta", "alpha", "mid"} {
			Register(name, b)
		}
		Register("beta", a)
		if got, want := List(), []string{"alpha", "beta", "mid", "zeta"}; !slices.Equal(got, want) {
			t.Errorf("List = %q, want %q", got, want)
		}
		if c, err := Lookup("beta"); c != Constructor(a) || err != nil {
			t.Errorf("Lookup(beta) = %v, %v", c, err)
		}
		for _, name := range []string{"", "Alpha", "alpha ", "alph"} {
			c, err := Lookup(name)
			if c != nil || err == nil || !strings.Contains(err.Error(), "alpha, beta, mid, zeta") {
				t.Errorf("Lookup(%q) = %v, %v: the error does not list what exists", name, c, err)
			}
		}
		defer func() {
			if r := recover(); r == nil {
				t.Error("registering a name twice does not panic")
			}
			if c, _ := Lookup("alpha"); c != Constructor(b) {
				t.Error("registering a name twice replaced the first")
			}
		}()
		Register("alpha", a)
	})
}

func TestSystemMMapMinAddr(t *testing.T) {
	b, err := os.ReadFile(mmapMinAddrPath)
	if err != nil {
		t.Fatal(err)
	}
	got := SystemMMapMinAddr()
	if want := parseMMapMinAddr(string(b)); got != want {
		t.Errorf("SystemMMapMinAddr = %v, want %v", got, want)
	}
	if m := (&MMapMinAddr{}).MinUserAddress(); m != got {
		t.Errorf("MMapMinAddr.MinUserAddress = %v, want %v", m, got)
	}
	// The host agrees that this address can be mapped.
	if _, _, errno := unix.Syscall6(unix.SYS_MMAP, uintptr(got), hostarch.PageSize, unix.PROT_NONE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED_NOREPLACE, ^uintptr(0), 0); errno != 0 && errno != unix.EEXIST {
		t.Errorf("mmap(%v): %v", got, errno)
	} else if errno == 0 {
		unix.Syscall(unix.SYS_MUNMAP, uintptr(got), hostarch.PageSize, 0)
	}

	for in, want := range map[string]hostarch.Addr{
		"65536\n": 65536, "0\n": 0, "1\n": hostarch.PageSize, "4097": 2 * hostarch.PageSize,
		"": defaultMMapMinAddr, "x": defaultMMapMinAddr, "-1": defaultMMapMinAddr, "18446744073709551615": defaultMMapMinAddr,
	} {
		if got := parseMMapMinAddr(in); got != want {
			t.Errorf("parseMMapMinAddr(%q) = %v, want %v", in, got, want)
		}
	}
}

func TestBarriers(t *testing.T) {
	for name, p := range map[string]interface {
		HaveGlobalMemoryBarrier() bool
		GlobalMemoryBarrier() error
	}{
		"global":  UseHostGlobalMemoryBarrier{},
		"process": UseHostProcessMemoryBarrier{},
	} {
		err := p.GlobalMemoryBarrier()
		if p.HaveGlobalMemoryBarrier() != (err == nil) {
			t.Errorf("%s: HaveGlobalMemoryBarrier = %v, but GlobalMemoryBarrier: %v", name, p.HaveGlobalMemoryBarrier(), err)
		}
		if err != nil && (!strings.Contains(err.Error(), "membarrier") || !errors.As(err, new(unix.Errno))) {
			t.Errorf("%s: %v does not name the operation and the errno", name, err)
		}
	}
	// Any host that Ringfence runs on has these (Linux 4.14).
	if !membarrierHas(membarrierPrivateExpedited) {
		t.Error("no MEMBARRIER_CMD_PRIVATE_EXPEDITED")
	}
	if _, err := membarrier(1 << 30); err != unix.EINVAL {
		t.Errorf("membarrier(1<<30): %v, want EINVAL", err)
	}
}

func mustPanic(t *testing.T, name string, f func()) {
	t.Helper()
	defer func() {
		if recover() == nil {
			t.Errorf("%s does not panic", name)
		}
	}()
	f()
}

func TestEmbedded(t *testing.T) {
	if !(DoesOwnPageTables{}).OwnsPageTables() || (DoesNotOwnPageTables{}).OwnsPageTables() {
		t.Error("OwnsPageTables")
	}
	if (NoCPUPreemptionDetection{}).DetectsCPUPreemption() {
		t.Error("NoCPUPreemptionDetection detects it")
	}
	mustPanic(t, "PreemptAllCPUs", func() { _ = NoCPUPreemptionDetection{}.PreemptAllCPUs() })
	var io AddressSpaceIO = NoAddressSpaceIO{}
	mustPanic(t, "CopyOut", func() { _, _ = io.CopyOut(0, nil) })
	mustPanic(t, "CopyIn", func() { _, _ = io.CopyIn(0, nil) })
	mustPanic(t, "ZeroOut", func() { _, _ = io.ZeroOut(0, 0) })
	mustPanic(t, "SwapUint32", func() { _, _ = io.SwapUint32(0, 0) })
	mustPanic(t, "CompareAndSwapUint32", func() { _, _ = io.CompareAndSwapUint32(0, 0, 0) })
	mustPanic(t, "LoadUint32", func() { _, _ = io.LoadUint32(0) })

	info := StaticSeccompInfo{PlatformName: "p", Filters: seccomp.MakeSyscallRules(map[uintptr]seccomp.SyscallRule{7: seccomp.MatchAll{}}), HotSyscalls: []uintptr{1, 2}}
	var s SeccompInfo = info
	if s.ConfigKey() != "p" || len(s.Variables()) != 0 || !slices.Equal(s.HottestSyscalls(), []uintptr{1, 2}) {
		t.Errorf("StaticSeccompInfo: %q, %v, %v", s.ConfigKey(), s.Variables(), s.HottestSyscalls())
	}
	if got := s.SyscallFilters(precompiledseccomp.Values{"unused": 1}).Numbers(); !slices.Equal(got, []uintptr{7}) {
		t.Errorf("StaticSeccompInfo.SyscallFilters has rules for %v, want 7", got)
	}
}

func TestErrors(t *testing.T) {
	var err error = &ContextError{Err: errors.New("stub 7 was killed"), Errno: unix.ESRCH}
	if s := err.Error(); !strings.Contains(s, "stub 7 was killed") || !strings.Contains(s, unix.ESRCH.Error()) {
		t.Errorf("ContextError = %q", s)
	}
	cause := errors.New("cause")
	err = &ContextError{Err: cause, Errno: unix.EIO}
	if !errors.Is(err, cause) {
		t.Error("a ContextError does not wrap its cause")
	}
	var ce *ContextError
	if !errors.As(error(err), &ce) || ce.Errno != unix.EIO {
		t.Error("a ContextError is not found by errors.As")
	}
	if s := (SegmentationFault{Addr: 0xdead000}).Error(); !strings.Contains(s, "0xdead000") {
		t.Errorf("SegmentationFault = %q", s)
	}
	errs := []error{ErrContextSignal, ErrContextInterrupt, ErrContextCPUPreempted, ErrNotSupported}
	for i, a := range errs {
		for j, b := range errs {
			if errors.Is(a, b) != (i == j) {
				t.Errorf("%v is %v", a, b)
			}
		}
	}
	if SignalInterrupt != linux.SIGCHLD || int(SignalInterrupt) != int(unix.SIGCHLD) {
		t.Errorf("SignalInterrupt = %v", SignalInterrupt)
	}
}

type fakePlatform struct{ Platform }

func TestFromContext(t *testing.T) {
	ctx := context.Background()
	if p := FromContext(ctx); p != nil {
		t.Errorf("FromContext without a Platform = %v", p)
	}
	p := &fakePlatform{}
	if got := FromContext(context.WithValue(ctx, CtxPlatform, p)); got != Platform(p) {
		t.Errorf("FromContext = %v", got)
	}
	if got := FromContext(context.WithValue(ctx, CtxPlatform, 7)); got != nil {
		t.Errorf("FromContext of something else = %v", got)
	}
}
