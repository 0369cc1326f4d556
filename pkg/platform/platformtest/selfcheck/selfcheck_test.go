// Package selfcheck tests package platformtest: it runs the conformance suite on
// a sound platform with one thing broken at a time, and demands that the right
// subtest fails.
//
// It depends on platformtest and on ptrace, which is the sound platform, and has
// nothing but tests.
package selfcheck

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/fd"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/platform/platformtest"
	_ "github.com/ringfence/ringfence/pkg/ptrace"
)

// wrapper makes a platform from ptrace, with hooks. A nil hook does nothing.
type wrapper struct {
	platform.Constructor

	// beforeSwitch and afterSwitch may change what goes in and comes out.
	beforeSwitch func(c *wrapContext, ac *arch.Context64)
	afterSwitch  func(c *wrapContext, ac *arch.Context64, info *linux.SignalInfo, at hostarch.AccessType, err error) (*linux.SignalInfo, hostarch.AccessType, error)

	// These replace the call; they call the inner one if they want to.
	interrupt func(c *wrapContext)
	mapFile   func(as *wrapSpace, addr hostarch.Addr, f memmap.File, fr memmap.FileRange, at hostarch.AccessType, precommit bool) error
	unmap     func(as *wrapSpace, addr hostarch.Addr, length uint64)
	release   func(as *wrapSpace)
	newSpace  func()
	seccomp   func(si platform.SeccompInfo) platform.SeccompInfo
	barrier   func() error

	// optional adds AddressSpaceIO, the detection of CPU preemption and BatchMapper.
	optional bool
	// mapFiles adds BatchMapper as well.
	mapFiles func(as *wrapSpace, ms []platform.FileMapping) error

	// lazy makes Switch fill in no more after a system call than it must, and
	// restore no more than it must: the rest is in saved until PullFullState.
	lazy bool

	// noPull makes PullFullState do nothing.
	noPull bool
}

func (w *wrapper) New(dev *fd.FD) (platform.Platform, error) {
	p, err := w.Constructor.New(dev)
	if err != nil {
		return nil, err
	}
	return &wrapPlatform{Platform: p, w: w}, nil
}

type wrapPlatform struct {
	platform.Platform
	w     *wrapper
	epoch atomic.Int64
	mu    sync.Mutex
	all   map[*wrapContext]bool
}

func (p *wrapPlatform) NewAddressSpace(id any) (platform.AddressSpace, <-chan struct{}, error) {
	if p.w.newSpace != nil {
		p.w.newSpace()
	}
	as, ch, err := p.Platform.NewAddressSpace(id)
	if as == nil || err != nil {
		return nil, ch, err
	}
	space := &wrapSpace{AddressSpace: as, w: p.w}
	if p.w.optional || p.w.mapFiles != nil {
		return &wrapBatchSpace{space}, nil, nil
	}
	return space, nil, nil
}

func (p *wrapPlatform) NewContext(ctx context.Context) platform.Context {
	c := &wrapContext{Context: p.Platform.NewContext(ctx), p: p, epoch: p.epoch.Load()}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.all == nil {
		p.all = make(map[*wrapContext]bool)
	}
	p.all[c] = true
	return c
}

func (p *wrapPlatform) SeccompInfo() platform.SeccompInfo {
	if p.w.seccomp != nil {
		return p.w.seccomp(p.Platform.SeccompInfo())
	}
	return p.Platform.SeccompInfo()
}

func (p *wrapPlatform) GlobalMemoryBarrier() error {
	if p.w.barrier != nil {
		return p.w.barrier()
	}
	return p.Platform.GlobalMemoryBarrier()
}

func (p *wrapPlatform) SupportsAddressSpaceIO() bool { return p.w.optional }
func (p *wrapPlatform) DetectsCPUPreemption() bool   { return p.w.optional }

func (p *wrapPlatform) PreemptAllCPUs() error {
	p.epoch.Add(1)
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.all {
		c.Context.Interrupt()
	}
	return nil
}

// wrapSpace keeps account of mappings, for its AddressSpaceIO.
type wrapSpace struct {
	platform.AddressSpace
	w     *wrapper
	mu    sync.Mutex
	pages map[hostarch.Addr]page
}

type page struct {
	f   memmap.File
	off uint64
	at  hostarch.AccessType
}

func (as *wrapSpace) MapFile(addr hostarch.Addr, f memmap.File, fr memmap.FileRange, at hostarch.AccessType, precommit bool) error {
	if as.w.mapFile != nil {
		return as.w.mapFile(as, addr, f, fr, at, precommit)
	}
	err := as.AddressSpace.MapFile(addr, f, fr, at, precommit)
	if err == nil && as.w.optional {
		as.mu.Lock()
		defer as.mu.Unlock()
		if as.pages == nil {
			as.pages = make(map[hostarch.Addr]page)
		}
		for off := uint64(0); off < fr.Length(); off += hostarch.PageSize {
			as.pages[addr+hostarch.Addr(off)] = page{f, fr.Start + off, at}
		}
	}
	return err
}

// wrapBatchSpace is a wrapSpace that is a BatchMapper.
type wrapBatchSpace struct{ *wrapSpace }

func (as *wrapBatchSpace) MapFiles(ms []platform.FileMapping) error {
	if as.w.mapFiles != nil {
		return as.w.mapFiles(as.wrapSpace, ms)
	}
	return mapInOrder(as.wrapSpace, ms)
}

// mapInOrder is MapFiles as it should be.
func mapInOrder(as *wrapSpace, ms []platform.FileMapping) error {
	for _, m := range ms {
		if err := as.MapFile(m.Addr, m.File, m.Range, m.Access, m.Precommit); err != nil {
			return err
		}
	}
	return nil
}

func (as *wrapSpace) Unmap(addr hostarch.Addr, length uint64) {
	if as.w.unmap != nil {
		as.w.unmap(as, addr, length)
		return
	}
	as.AddressSpace.Unmap(addr, length)
	as.mu.Lock()
	defer as.mu.Unlock()
	for a := range as.pages {
		if a-addr < hostarch.Addr(length) {
			delete(as.pages, a)
		}
	}
}

func (as *wrapSpace) Release() {
	if as.w.release != nil {
		as.w.release(as)
		return
	}
	as.AddressSpace.Release()
}

// each calls f with the memory at addr, page by page.
func (as *wrapSpace) each(addr hostarch.Addr, n int, write bool, f func(b []byte, done int)) (int, error) {
	as.mu.Lock()
	defer as.mu.Unlock()
	for done := 0; done < n; {
		a := addr + hostarch.Addr(done)
		p, ok := as.pages[a.RoundDown()]
		if !ok || write && !p.at.Write {
			return done, platform.SegmentationFault{Addr: a}
		}
		bs, err := p.f.MapInternal(memmap.FileRange{Start: p.off, End: p.off + hostarch.PageSize}, hostarch.ReadWrite)
		if err != nil {
			return done, err
		}
		b := bs[0][a.PageOffset():]
		b = b[:min(len(b), n-done)]
		f(b, done)
		done += len(b)
	}
	return n, nil
}

func (as *wrapSpace) CopyOut(addr hostarch.Addr, src []byte) (int, error) {
	return as.each(addr, len(src), true, func(b []byte, done int) { copy(b, src[done:]) })
}

func (as *wrapSpace) CopyIn(addr hostarch.Addr, dst []byte) (int, error) {
	return as.each(addr, len(dst), false, func(b []byte, done int) { copy(dst[done:], b) })
}

func (as *wrapSpace) ZeroOut(addr hostarch.Addr, n uintptr) (uintptr, error) {
	done, err := as.each(addr, int(n), true, func(b []byte, _ int) { clear(b) })
	return uintptr(done), err
}

func (as *wrapSpace) SwapUint32(addr hostarch.Addr, v uint32) (old uint32, err error) {
	_, err = as.each(addr, 4, true, func(b []byte, _ int) { old = word32(b).Swap(v) })
	return old, err
}

func (as *wrapSpace) CompareAndSwapUint32(addr hostarch.Addr, old, v uint32) (prev uint32, err error) {
	_, err = as.each(addr, 4, true, func(b []byte, _ int) {
		for {
			if prev = word32(b).Load(); prev != old || word32(b).CompareAndSwap(old, v) {
				return
			}
		}
	})
	return prev, err
}

func (as *wrapSpace) LoadUint32(addr hostarch.Addr) (v uint32, err error) {
	_, err = as.each(addr, 4, false, func(b []byte, _ int) { v = word32(b).Load() })
	return v, err
}

// innerMM shows the inner platform its own AddressSpace.
type innerMM struct{ platform.MemoryManager }

func (mm innerMM) AddressSpace() platform.AddressSpace { return inner(mm.MemoryManager.AddressSpace()) }

func inner(as platform.AddressSpace) platform.AddressSpace {
	if b, ok := as.(*wrapBatchSpace); ok {
		as = b.wrapSpace
	}
	if w, ok := as.(*wrapSpace); ok {
		return w.AddressSpace
	}
	return as
}

type wrapContext struct {
	platform.Context
	p     *wrapPlatform
	epoch int64
	n     atomic.Int64 // what the mutant likes to count

	saved   *arch.Context64 // of a lazy platform, the state at the system call
	changed bool            // FullStateChanged was called
}

func (c *wrapContext) Switch(ctx context.Context, mm platform.MemoryManager, ac *arch.Context64, cpu int32) (*linux.SignalInfo, hostarch.AccessType, error) {
	w := c.p.w
	if w.optional {
		if e := c.p.epoch.Load(); e != c.epoch || cpu >= 1<<16 {
			c.epoch = e
			return nil, hostarch.NoAccess, platform.ErrContextCPUPreempted
		}
	}
	if w.beforeSwitch != nil {
		w.beforeSwitch(c, ac)
	}
	if c.saved != nil && !c.changed {
		ret := ac.Return()
		*ac = *c.saved
		ac.SetReturn(ret)
	}
	c.saved, c.changed = nil, false
	info, at, err := c.Context.Switch(ctx, innerMM{mm}, ac, -1)
	if w.lazy && err == nil {
		c.saved = ac.Fork()
		spoil(ac)
	}
	if w.afterSwitch != nil {
		info, at, err = w.afterSwitch(c, ac, info, at, err)
	}
	if w.optional && err == platform.ErrContextInterrupt {
		if e := c.p.epoch.Load(); e != c.epoch {
			c.epoch = e
			err = platform.ErrContextCPUPreempted
		}
	}
	return info, at, err
}

func (c *wrapContext) PullFullState(as platform.AddressSpace, ac *arch.Context64) error {
	if c.p.w.noPull {
		return nil
	}
	if c.saved != nil && !c.changed {
		ret := ac.Return()
		*ac = *c.saved.Fork()
		ac.SetReturn(ret)
		return nil
	}
	return c.Context.PullFullState(inner(as), ac)
}

func (c *wrapContext) FullStateChanged() {
	c.changed = true
	c.Context.FullStateChanged()
}

func (c *wrapContext) Interrupt() {
	if c.p.w.interrupt != nil {
		c.p.w.interrupt(c)
		return
	}
	c.Context.Interrupt()
}

func (c *wrapContext) Release() {
	c.p.mu.Lock()
	delete(c.p.all, c)
	c.p.mu.Unlock()
	c.Context.Release()
}

// otherSeccompInfo has another ConfigKey.
type otherSeccompInfo struct{ platform.SeccompInfo }

func (otherSeccompInfo) ConfigKey() string { return "other" }

// after returns an afterSwitch hook that calls f after Switches that did not
// fail.
func after(f func(ac *arch.Context64, info *linux.SignalInfo, at *hostarch.AccessType)) func(*wrapContext, *arch.Context64, *linux.SignalInfo, hostarch.AccessType, error) (*linux.SignalInfo, hostarch.AccessType, error) {
	return func(_ *wrapContext, ac *arch.Context64, info *linux.SignalInfo, at hostarch.AccessType, err error) (*linux.SignalInfo, hostarch.AccessType, error) {
		f(ac, info, &at)
		return info, at, err
	}
}

// mutant is a way in which a platform may be broken.
type mutant struct {
	name  string
	wrap  wrapper
	fails []string // the subtests that must fail, "Group/Subject"
	says  string   // a part of what the suite says
}

var leaked sync.Map // what mutants keep

func mutants() []mutant {
	return append(archMutants(), []mutant{
		{
			name: "WrongFaultAddress",
			wrap: wrapper{afterSwitch: after(func(_ *arch.Context64, info *linux.SignalInfo, _ *hostarch.AccessType) {
				if info != nil {
					info.SetAddr(uint64(hostarch.Addr(info.Addr()).RoundDown()))
				}
			})},
			fails: []string{"Fault/Read", "Fault/Write"},
			says:  "si_addr",
		}, {
			name: "WrongAccessType",
			wrap: wrapper{afterSwitch: after(func(_ *arch.Context64, _ *linux.SignalInfo, at *hostarch.AccessType) {
				if at.Write {
					*at = hostarch.Read
				}
			})},
			fails: []string{"Fault/Write"},
			says:  "access type",
		}, {
			name:  "NoFaultInfo",
			wrap:  wrapper{afterSwitch: after(func(ac *arch.Context64, _ *linux.SignalInfo, _ *hostarch.AccessType) { ac.Fault = arch.FaultInfo{} })},
			fails: []string{"Fault/Read"},
			says:  "Fault.",
		}, {
			name: "LosesInterrupts",
			wrap: wrapper{interrupt: func(c *wrapContext) {
				if c.n.Add(1)%5 != 0 {
					c.Context.Interrupt()
				}
			}},
			fails: []string{"Interrupt/NotLostSpinning"},
			says:  "not done after",
		}, {
			name: "LosesEarlyInterrupts",
			wrap: wrapper{
				beforeSwitch: func(c *wrapContext, _ *arch.Context64) { c.n.Store(1) },
				afterSwitch: func(c *wrapContext, _ *arch.Context64, info *linux.SignalInfo, at hostarch.AccessType, err error) (*linux.SignalInfo, hostarch.AccessType, error) {
					c.n.Store(0)
					return info, at, err
				},
				interrupt: func(c *wrapContext) {
					if c.n.Load() == 1 {
						c.Context.Interrupt()
					}
				},
			},
			fails: []string{"Interrupt/Before", "Interrupt/Between", "Interrupt/NotLostInSyscalls"},
		}, {
			name: "LosesSyscalls",
			wrap: wrapper{afterSwitch: func(c *wrapContext, _ *arch.Context64, info *linux.SignalInfo, at hostarch.AccessType, err error) (*linux.SignalInfo, hostarch.AccessType, error) {
				if err == nil && c.n.Add(1)%50 == 0 {
					err = platform.ErrContextInterrupt
				}
				return info, at, err
			}},
			fails: []string{"Interrupt/SyscallsNotLost"},
		}, {
			name: "InterruptsForEver",
			wrap: wrapper{afterSwitch: func(c *wrapContext, _ *arch.Context64, info *linux.SignalInfo, at hostarch.AccessType, err error) (*linux.SignalInfo, hostarch.AccessType, error) {
				if c.n.Add(1) > 5 {
					err = platform.ErrContextInterrupt
				}
				return info, at, err
			}},
			fails: []string{"Syscall/Result"},
			says:  "without cause in a row",
		}, {
			name: "Hangs",
			wrap: wrapper{beforeSwitch: func(c *wrapContext, _ *arch.Context64) {
				if c.n.Add(1) > 10 {
					select {}
				}
			}},
			fails: []string{"Syscall/Arguments"},
			says:  "goroutines",
		}, {
			name: "IgnoresPermissions",
			wrap: wrapper{mapFile: func(as *wrapSpace, addr hostarch.Addr, f memmap.File, fr memmap.FileRange, _ hostarch.AccessType, pre bool) error {
				return as.AddressSpace.MapFile(addr, f, fr, hostarch.AnyAccess, pre)
			}},
			fails: []string{"Memory/PermissionChanges", "Fault/Write", "Fault/Execute", "Memory/DowngradeStopsOtherContext"},
		}, {
			name:  "UnmapDoesNothing",
			wrap:  wrapper{unmap: func(*wrapSpace, hostarch.Addr, uint64) {}},
			fails: []string{"Fault/Read", "Memory/UnmapPart", "Memory/UnmapStopsOtherContext"},
		}, {
			name: "UnmapLate",
			wrap: wrapper{unmap: func(as *wrapSpace, addr hostarch.Addr, length uint64) {
				time.AfterFunc(20*time.Millisecond, func() { as.AddressSpace.Unmap(addr, length) })
			}},
			fails: []string{"Memory/UnmapStopsOtherContext"},
		}, {
			name: "SwapsFileOffsets",
			wrap: wrapper{mapFile: func(as *wrapSpace, addr hostarch.Addr, f memmap.File, fr memmap.FileRange, at hostarch.AccessType, pre bool) error {
				if fr.Length() == hostarch.PageSize && fr.Start >= 3*hostarch.PageSize {
					fr.Start, fr.End = fr.Start-hostarch.PageSize, fr.End-hostarch.PageSize
				}
				return as.AddressSpace.MapFile(addr, f, fr, at, pre)
			}},
			fails: []string{"Memory/SeveralFiles", "Memory/RemapLoop"},
		}, {
			name: "SwallowsMapErrors",
			wrap: wrapper{mapFile: func(as *wrapSpace, addr hostarch.Addr, f memmap.File, fr memmap.FileRange, at hostarch.AccessType, pre bool) error {
				as.AddressSpace.MapFile(addr, f, fr, at, pre)
				return nil
			}},
			fails: []string{"Memory/MapFileError"},
		}, {
			name: "BatchBackwards",
			wrap: wrapper{mapFiles: func(as *wrapSpace, ms []platform.FileMapping) error {
				for _, m := range slices.Backward(ms) {
					if err := as.MapFile(m.Addr, m.File, m.Range, m.Access, m.Precommit); err != nil {
						return err
					}
				}
				return nil
			}},
			fails: []string{"BatchMapper/MapFiles"},
		}, {
			name:  "BatchDoesNothing",
			wrap:  wrapper{mapFiles: func(*wrapSpace, []platform.FileMapping) error { return nil }},
			fails: []string{"BatchMapper/MapFiles", "BatchMapper/StopsOtherContext", "BatchMapper/Error"},
		}, {
			name: "LeaksDescriptors",
			wrap: wrapper{newSpace: func() {
				n, err := unix.Open("/dev/zero", unix.O_RDONLY|unix.O_CLOEXEC, 0)
				leaked.Store(n, err)
			}},
			fails: []string{"Lifecycle/ReleaseUnused", "Leak/Cycles"},
			says:  "/dev/zero",
		}, {
			name:  "LeaksProcesses",
			wrap:  wrapper{release: func(*wrapSpace) {}},
			fails: []string{"Lifecycle/ReleaseUnused", "Leak/Cycles"},
			says:  "left behind: ",
		}, {
			name:  "LeaksGoroutines",
			wrap:  wrapper{newSpace: func() { go func() { select {} }() }},
			fails: []string{"Lifecycle/ReleaseUnused"},
			says:  "more goroutines",
		}, {
			name: "LeaksMappings",
			wrap: wrapper{mapFile: func(as *wrapSpace, addr hostarch.Addr, f memmap.File, fr memmap.FileRange, at hostarch.AccessType, pre bool) error {
				b, err := unix.Mmap(f.FD(), int64(fr.Start), int(fr.Length()), unix.PROT_READ, unix.MAP_SHARED)
				leaked.Store(&b, err)
				return as.AddressSpace.MapFile(addr, f, fr, at, pre)
			}},
			fails: []string{"Lifecycle/ReleaseWithMappings"},
			says:  "more mappings of",
		}, {
			name: "LeaksReferences",
			wrap: wrapper{mapFile: func(as *wrapSpace, addr hostarch.Addr, f memmap.File, fr memmap.FileRange, at hostarch.AccessType, pre bool) error {
				if addr == 0x1000_0000 { // dataBase: not while the suite warms up
					f.IncRef(fr)
				}
				return as.AddressSpace.MapFile(addr, f, fr, at, pre)
			}},
			fails: []string{"Lifecycle/ReleaseWithMappings"},
			says:  "reference counts",
		}, {
			name: "ContextErrorWithoutErrno",
			wrap: wrapper{afterSwitch: func(_ *wrapContext, _ *arch.Context64, info *linux.SignalInfo, at hostarch.AccessType, err error) (*linux.SignalInfo, hostarch.AccessType, error) {
				if ce, ok := err.(*platform.ContextError); ok {
					ce.Errno = 0
				}
				return info, at, err
			}},
			fails: []string{"Stub/Killed", "Lifecycle/ReleaseWhileRunning"},
			says:  "without an errno",
		}, {
			name: "OneDeathIsAll",
			wrap: wrapper{afterSwitch: func(_ *wrapContext, _ *arch.Context64, info *linux.SignalInfo, at hostarch.AccessType, err error) (*linux.SignalInfo, hostarch.AccessType, error) {
				var ce *platform.ContextError
				if errors.As(err, &ce) {
					leaked.Store("dead", ce)
				}
				if dead, ok := leaked.Load("dead"); ok {
					err = dead.(error)
				}
				return info, at, err
			}},
			fails: []string{"Stub/Killed", "Stub/KilledWhileIdle"},
		}, {
			name: "StepsAreLost",
			wrap: wrapper{beforeSwitch: func(c *wrapContext, ac *arch.Context64) {
				if ac.SingleStep() && c.n.Add(1)%5 == 0 {
					ac.ClearSingleStep()
					c.FullStateChanged()
				}
			}},
			fails: []string{"Fault/SingleStep"},
		}, {
			name:  "NeverCompletesTheState",
			wrap:  wrapper{lazy: true, noPull: true},
			fails: []string{"State/GeneralSentryView", "State/Fork", "State/VectorFork"},
		}, {
			name:  "SeccompKeyUnknown",
			wrap:  wrapper{seccomp: func(si platform.SeccompInfo) platform.SeccompInfo { return otherSeccompInfo{si} }},
			fails: []string{"Contract/SeccompInfo"},
			says:  "ConfigKey",
		}, {
			name: "Panics",
			wrap: wrapper{beforeSwitch: func(_ *wrapContext, ac *arch.Context64) {
				if ac.IP() == 0 {
					panic("mutant")
				}
			}},
			fails: []string{"Hostile/WildIP"},
			says:  "panic: mutant",
		},
	}...)
}

// mutantVar names the mutant that a child process of the test is to run.
const mutantVar = "RINGFENCE_PLATFORMTEST_MUTANT"

// TestMutant is run by TestMutants, in a process of its own.
func TestMutant(t *testing.T) {
	name := os.Getenv(mutantVar)
	if name == "" {
		return
	}
	w := wrapper{mapFiles: mapInOrder}
	if i := slices.IndexFunc(mutants(), func(m mutant) bool { return m.name == name }); i >= 0 {
		w = mutants()[i].wrap
	} else if name != soundName {
		t.Fatalf("no mutant %q", name)
	}
	c, err := platform.Lookup("ptrace")
	if err != nil {
		t.Fatal(err)
	}
	w.Constructor = c
	cfg := platformtest.Config{Constructor: &w}
	if name != soundName {
		cfg.Timeout = 3 * time.Second
	}
	platformtest.Run(t, cfg)
}

// soundName is the mutant that is none.
const soundName = "Sound"

// runMutant runs subtests of the suite on a mutant and returns what it says.
func runMutant(t *testing.T, name string, subtests []string) (string, error) {
	t.Helper()
	var groups, subjects []string
	for _, s := range subtests {
		g, sub, _ := strings.Cut(s, "/")
		groups, subjects = append(groups, g), append(subjects, sub)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	pattern := fmt.Sprintf("^TestMutant$/^(%s)$/^(%s)$", strings.Join(groups, "|"), strings.Join(subjects, "|"))
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.v", "-test.run="+pattern)
	cmd.Env = append(os.Environ(), mutantVar+"="+name)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestMutants checks that the suite finds what it is made to find.
func TestMutants(t *testing.T) {
	var all []string
	for _, m := range mutants() {
		all = append(all, m.fails...)
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			out, err := runMutant(t, m.name, m.fails)
			if err == nil {
				t.Fatalf("the suite passes:\n%s", out)
			}
			for _, f := range m.fails {
				if !strings.Contains(out, "--- FAIL: TestMutant/"+f+" ") {
					t.Errorf("%s does not fail:\n%s", f, out)
				}
			}
			if !strings.Contains(out, m.says) {
				t.Errorf("the suite does not say %q:\n%s", m.says, out)
			}
		})
	}
	t.Run(soundName, func(t *testing.T) {
		t.Parallel()
		out, err := runMutant(t, soundName, all)
		if err != nil {
			t.Fatalf("a sound platform fails: %v\n%s", err, out)
		}
		for _, f := range all {
			if !strings.Contains(out, "--- PASS: TestMutant/"+f+" ") {
				t.Errorf("%s does not pass on a sound platform:\n%s", f, out)
			}
		}
	})
}

// TestOptional runs the groups that ptrace has no use for, on a wrapper that adds
// what they test.
func TestOptional(t *testing.T) {
	c, err := platform.Lookup("ptrace")
	if err != nil {
		t.Fatal(err)
	}
	platformtest.Run(t, platformtest.Config{Constructor: &wrapper{Constructor: c, optional: true}})
}

// TestLazy runs the suite on a platform that fills in as little as it may: the
// suite must not rely on more.
func TestLazy(t *testing.T) {
	c, err := platform.Lookup("ptrace")
	if err != nil {
		t.Fatal(err)
	}
	platformtest.Run(t, platformtest.Config{Constructor: &wrapper{Constructor: c, lazy: true}})
}
