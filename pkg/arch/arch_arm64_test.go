package arch

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/ringfence/ringfence/pkg/cpuid"
)

// handlerReturns does what a handler's RET and its restorer do.
func handlerReturns(c *Context64) { c.Regs.SyscallNo = 139 }

func randomThread(rng *rand.Rand) *Context64 {
	c := New()
	for _, r := range c.Regs.scRegisters() {
		*r = rng.Uint64()
	}
	c.Regs.Pstate = pstateNZCV
	vl := cpuid.Native().SVEVectorLength()
	c.fpu = randomFPState(rng, vl, vl != 0)
	return c
}

// checkPrivileges fails if after holds what only the kernel may set.
func checkPrivileges(tb testing.TB, before, after *Context64) {
	tb.Helper()
	if v := after.Regs.Pstate &^ pstateUser; v != 0 {
		tb.Fatalf("bits %#x of PSTATE are set", v)
	}
	if after.Regs.TPIDR != before.Regs.TPIDR {
		tb.Fatal("TPIDR changed")
	}
}

func TestSyscallRegisters(t *testing.T) {
	c := New()
	c.Regs.Regs = [31]uint64{0: 99, 1: 3, 2: 4, 3: 5, 4: 6, 5: 7, 8: 64}
	c.Regs.OrigX0, c.Regs.Pc, c.Regs.SyscallNo = 2, 0x1004, 64
	if c.SyscallNo() != 64 || !c.InSyscall() {
		t.Errorf("SyscallNo = %d, in syscall %v", c.SyscallNo(), c.InSyscall())
	}
	for i, a := range c.SyscallArgs() {
		if a.Value != uintptr(i+2) {
			t.Errorf("argument %d = %d", i, a.Value)
		}
	}
	c.RestartSyscall()
	if c.Regs.Pc != 0x1000 || c.Regs.Regs[0] != 2 {
		t.Errorf("restart: PC %#x, X0 %d", c.Regs.Pc, c.Regs.Regs[0])
	}
	c.Regs.Pc += 4
	c.RestartSyscallWithRestartBlock()
	if c.Regs.Pc != 0x1000 || c.Regs.Regs[8] != 128 {
		t.Errorf("restart_syscall: PC %#x, X8 %d", c.Regs.Pc, c.Regs.Regs[8])
	}
}

func TestSanitizeRegs(t *testing.T) {
	for _, test := range []struct {
		in, want uint64
		ok       bool
	}{
		{0, 0, true},
		{0xf0000000, 0xf0000000, true},
		{pstateUser | pstateSS, pstateUser | pstateSS, true},
		{1 << 32, 0, true},           // reserved
		{1 << 20, 0, true},           // IL
		{0x5, 0, false},              // EL1h
		{0x10, 0, false},             // AArch32
		{0x80000080, 1 << 31, false}, // interrupts masked
		{^uint64(0), pstateUser | pstateSS, false},
	} {
		c := New()
		c.Regs.Pstate = test.in
		if ok := c.SanitizeRegs(); ok != test.ok || c.Regs.Pstate != test.want {
			t.Errorf("PSTATE %#x: %v, %#x; want %v, %#x", test.in, ok, c.Regs.Pstate, test.ok, test.want)
		}
	}
}

// The size of the state is the kernel's for the register set NT_ARM_SVE:
// SVE_PT_SIZE in asm/ptrace.h.
func TestFPStateSize(t *testing.T) {
	for vl, want := range map[int]int{0: 544, 16: 592, 32: 1136, 64: 2224, 256: 8768} {
		if got := fpStateSize(vl); got != want {
			t.Errorf("vectors of %d bytes: %d bytes, want %d", vl, got, want)
		}
	}
}

// SVE registers that are zero beyond FPSIMD's are FPSIMD's.
func TestEqualFPState(t *testing.T) {
	const vl = 64
	f := randomFPState(rand.New(rand.NewPCG(1, 1)), vl, false)
	g := newFPState(vl)
	g.setHeader(vl, true)
	for i := range numVRegs {
		copy(g.vreg(i), f.vreg(i))
	}
	copy(g.status(), f.status())
	if !f.Equal(g) || !g.Equal(f) {
		t.Error("the same registers are not equal")
	}
	g.sveRegs()[vl-1] = 1
	if f.Equal(g) {
		t.Error("the upper half of Z0 makes no difference")
	}
	g.sveRegs()[vl-1] = 0
	g.status()[0] ^= 1
	if f.Equal(g) {
		t.Error("FPSR makes no difference")
	}
}

// The ways in which a frame describes its records.
func TestRestoreRecords(t *testing.T) {
	le := binary.LittleEndian
	next := func(b []byte) []byte { return b[le.Uint32(b[4:]):] }
	for _, test := range []struct {
		name string
		edit func(frame, rec []byte)
		ok   bool
	}{
		{"unchanged", func(frame, rec []byte) {}, true},
		{"no records", func(frame, rec []byte) { clear(rec[:8]) }, false},
		{"a terminator with a size", func(frame, rec []byte) { le.PutUint32(rec, 0) }, false},
		{"an unknown record", func(frame, rec []byte) { rec[0] ^= 1 }, false},
		{"two FPSIMD records", func(frame, rec []byte) {
			copy(next(rec), append([]byte(nil), rec[:fpsimdRecordSize]...))
			clear(rec[2*fpsimdRecordSize:][:16])
		}, false},
		{"an FPSIMD record that is too small", func(frame, rec []byte) {
			le.PutUint32(rec[4:], fpsimdRecordSize-16)
			clear(rec[fpsimdRecordSize-16:][:8])
		}, false},
		{"a record without a header's size", func(frame, rec []byte) { le.PutUint32(rec[4:], 0) }, false},
		{"a record that is not aligned", func(frame, rec []byte) { le.PutUint32(rec[4:], fpsimdRecordSize+8) }, false},
		{"a record beyond the end", func(frame, rec []byte) { le.PutUint32(rec[4:], 1<<31) }, false},
		{"records without an end", func(frame, rec []byte) {
			r := next(rec)
			for i := 0; i+16 <= recordsSize-fpsimdRecordSize; i += 16 {
				putHeader(r[i:], esrMagic, esrRecordSize)
			}
		}, false},
		{"SVE registers of another length", func(frame, rec []byte) {
			r := next(rec)
			putHeader(r, sveMagic, sveRecordRegs)
			le.PutUint16(r[recordHeader:], 48)
			clear(r[sveRecordRegs:][:8])
		}, false},
		{"extra space elsewhere", func(frame, rec []byte) {
			r := next(rec)
			putHeader(r, extraMagic, extraRecordSize)
			le.PutUint64(r[8:], testStackBase)
			le.PutUint32(r[16:], 32)
			clear(r[extraRecordSize:][:16])
		}, false},
		{"PSTATE of the kernel", func(frame, rec []byte) { frame[frameUC+ucContext+scPstate] = 5 }, false},
		{"PSTATE of AArch32", func(frame, rec []byte) { frame[frameUC+ucContext+scPstate] = 0x10 }, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, m := frameBytes(t, 9)
			frame := m.at(c.Regs.Sp)
			test.edit(frame, frame[frameRecords:])
			if err := checkRestore(t, c, m); (err == nil) != test.ok {
				t.Errorf("SignalRestore: %v, accepted should be %v", err, test.ok)
			}
		})
	}
	c, m := frameBytes(t, 9)
	c.Regs.Sp += 8
	if err := checkRestore(t, c, m); err == nil {
		t.Error("a stack pointer that is not aligned is accepted")
	}
}

// Extra space right behind the records is followed.
func TestRestoreExtraSpace(t *testing.T) {
	le := binary.LittleEndian
	c, m := frameBytes(t, 9)
	frame := m.at(c.Regs.Sp)
	rec := frame[frameRecords:]
	fpsimd := append([]byte(nil), rec[:fpsimdRecordSize]...)
	data := frameRecords + extraRecordSize + terminatorSize
	clear(rec[:recordsSize])
	putHeader(rec, extraMagic, extraRecordSize)
	le.PutUint64(rec[8:], c.Regs.Sp+uint64(data))
	le.PutUint32(rec[16:], fpsimdRecordSize+terminatorSize)
	copy(frame[data:], fpsimd)
	clear(frame[data+fpsimdRecordSize:][:terminatorSize])
	if err := checkRestore(t, c, m); err != nil {
		t.Fatal(err)
	}
	for i := range numVRegs {
		if string(c.fpu.vreg(i)) != string(fpsimd[recordHeader+fpStatusBytes+16*i:][:16]) {
			t.Fatalf("V%d not restored", i)
		}
	}
	// A second extra record in it is one too many.
	c, m = frameBytes(t, 9)
	frame = m.at(c.Regs.Sp)
	rec = frame[frameRecords:]
	clear(rec[:recordsSize])
	putHeader(rec, extraMagic, extraRecordSize)
	le.PutUint64(rec[8:], c.Regs.Sp+uint64(data))
	le.PutUint32(rec[16:], 256)
	putHeader(frame[data:], extraMagic, extraRecordSize)
	if err := checkRestore(t, c, m); err == nil {
		t.Error("extra space within extra space is accepted")
	}
}
