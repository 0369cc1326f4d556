package platformtest

import (
	"bytes"
	"encoding/binary"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/cpuid"
	"github.com/ringfence/ringfence/pkg/platform"
)

// CPUID either faults, and TryCPUIDEmulate answers, or the CPU answers. Here the
// application asks for the vendor, which is the host's in both cases.
func testCPUID(t *T) {
	th := t.newSpace().newThread(progCPUID)
	ask := func(leaf uint64) (a [6]uint64, emulated bool) {
		th.start(progCPUID, leaf, 0)
		e := th.next()
		if e.signal() == linux.SIGSEGV {
			emulated = true
			th.pull()
			if !platform.TryCPUIDEmulate(t.ctx, th.sp, th.ac) {
				t.Fatalf("got %v at IP %#x, and TryCPUIDEmulate says that this is no CPUID", e, th.ac.IP())
			}
			th.c.FullStateChanged()
			e = th.next()
		}
		if e.err != nil || th.ac.SyscallNo() != nrReport {
			t.Fatalf("got %v after CPUID", e)
		}
		return th.args(), emulated
	}
	a, emulated := ask(0)
	t.Logf("emulated: %v", emulated)
	vendor := make([]byte, 12)
	for i, r := range []uint64{a[1], a[3], a[2]} {
		binary.LittleEndian.PutUint32(vendor[4*i:], uint32(r))
	}
	if !bytes.Equal(vendor, []byte(cpuid.Native().VendorID())) {
		t.Errorf("vendor %q, want %q", vendor, cpuid.Native().VendorID())
	}
	if a[0] < 1 {
		t.Errorf("highest leaf is %d", a[0])
	}
	for leaf := uint64(1); leaf <= min(a[0], 0x20); leaf++ {
		if _, em := ask(leaf); em != emulated {
			t.Errorf("leaf %d is emulated: %v; leaf 0: %v", leaf, em, emulated)
		}
	}

	// Called by hand: it emulates CPUID, and nothing else.
	th.start(progNops)
	before := th.ac.Fork()
	if platform.TryCPUIDEmulate(t.ctx, th.sp, th.ac) {
		t.Errorf("TryCPUIDEmulate says that NOP is CPUID")
	}
	if d := diffRegs(th.ac, before); d != "" {
		t.Errorf("TryCPUIDEmulate of NOP: %s", d)
	}
	th.ac.SetIP(uintptr(mmapBase))
	if platform.TryCPUIDEmulate(t.ctx, th.sp, th.ac) {
		t.Errorf("TryCPUIDEmulate says that there is CPUID where nothing is mapped")
	}
}
