// Package platformtest is the conformance suite of package platform: any
// backend, one of Ringfence's or a third party's, runs it with its Constructor.
//
//	func TestConformance(t *testing.T) {
//		c, err := platform.Lookup("ptrace")
//		if err != nil {
//			t.Fatal(err)
//		}
//		platformtest.Run(t, platformtest.Config{Constructor: c})
//	}
//
// It runs raw machine code through Context.Switch, from an AddressSpace into
// which it has mapped its own memory files, and compares what happens with what
// package platform promises and with what the CPU and Linux do natively. It
// plays the malicious application as well. Every subtest is bounded in time, and
// checks that nothing is left behind when it is over: process, thread, file
// descriptor, mapping, goroutine.
//
// It depends on package platform and what that depends on. It must never import
// a backend, and holds nothing of a backend's but what Config says.
package platformtest

import (
	"os"
	"slices"
	"testing"
	"time"

	"github.com/ringfence/ringfence/pkg/platform"
)

// Config says what to test.
type Config struct {
	// Constructor makes the platform.
	Constructor platform.Constructor

	// DevicePath is handed to Constructor.OpenDevice; empty means the default.
	DevicePath string

	// NoStubProcesses says that application code does not run in processes of its
	// own, as with kvm. The subtests of group Stub are left out.
	NoStubProcesses bool

	// Stubs returns the ids of the processes that run the application code of as.
	// If it is nil, these are the descendants of this process that came into being
	// when as was made and first used.
	Stubs func(as platform.AddressSpace) ([]int, error)

	// Timeout bounds every subtest; 0 means the duration that the variable
	// PLATFORMTEST_TIMEOUT holds, for slow machines, or one minute.
	Timeout time.Duration
}

// subject is a subtest.
type subject struct {
	name string
	run  func(t *T)
}

// group is a list of subtests under one name.
type group struct {
	name     string
	subjects []subject
}

// Run runs the suite, one subtest per subject: "Group/Subject" below t's name.
// Nothing else should run in the process meanwhile, or it is taken for a leak.
func Run(t *testing.T, cfg Config) {
	s := newSuite(t, cfg)
	s.warmUp(t)
	for _, g := range s.groups() {
		t.Run(g.name, func(t *testing.T) {
			for _, sub := range g.subjects {
				t.Run(sub.name, func(t *testing.T) { s.runSubject(t, sub) })
			}
		})
	}
}

// groups returns what is to be run on this platform.
func (s *suite) groups() []group {
	gs := []group{
		{"Syscall", syscallSubjects},
		{"State", append(slices.Clone(stateSubjects), archStateSubjects...)},
		{"Fault", append(slices.Clone(faultSubjects), archFaultSubjects...)},
		{"Memory", memorySubjects},
		{"Interrupt", interruptSubjects},
		{"Many", manySubjects},
		{"Lifecycle", lifecycleSubjects},
		{"Hostile", append(slices.Clone(hostileSubjects), archHostileSubjects...)},
		{"Contract", contractSubjects},
	}
	if s.p.SupportsAddressSpaceIO() {
		gs = append(gs, group{"AddressSpaceIO", addressSpaceIOSubjects})
	}
	if s.p.DetectsCPUPreemption() {
		gs = append(gs, group{"CPUPreemption", preemptionSubjects})
	}
	if s.p.HaveGlobalMemoryBarrier() {
		gs = append(gs, group{"MemoryBarrier", barrierSubjects})
	}
	if s.batches {
		gs = append(gs, group{"BatchMapper", batchSubjects})
	}
	if !s.cfg.NoStubProcesses {
		gs = append(gs, group{"Stub", stubSubjects})
	}
	return append(gs, group{"Leak", leakSubjects})
}

// suite is one run of the suite.
type suite struct {
	cfg  Config
	p    platform.Platform
	text *textFile
	// batches says that AddressSpaces are BatchMappers.
	batches bool
}

func newSuite(tb testing.TB, cfg Config) *suite {
	tb.Helper()
	if cfg.Timeout == 0 {
		cfg.Timeout = time.Minute
		if value := os.Getenv("PLATFORMTEST_TIMEOUT"); value != "" {
			var err error
			if cfg.Timeout, err = time.ParseDuration(value); err != nil {
				tb.Fatalf("PLATFORMTEST_TIMEOUT: %v", err)
			}
		}
	}
	dev, err := cfg.Constructor.OpenDevice(cfg.DevicePath)
	if err != nil {
		tb.Fatalf("OpenDevice(%q): %v", cfg.DevicePath, err)
	}
	type made struct {
		p   platform.Platform
		err error
	}
	done := make(chan made, 1)
	go func() {
		p, err := cfg.Constructor.New(dev)
		done <- made{p, err}
	}()
	var m made
	select {
	case m = <-done:
	case <-time.After(cfg.Timeout):
		tb.Fatalf("New: not done after %v; all goroutines:\n%s", cfg.Timeout, goroutines())
	}
	if m.err != nil {
		tb.Fatalf("New: %v", m.err)
	}
	text, err := newTextFile()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := text.close(); err != nil {
			tb.Error(err)
		}
	})
	return &suite{cfg: cfg, p: m.p, text: text}
}

// warmUp uses the platform once, so that what is made only once is there before
// the first look for leaks.
func (s *suite) warmUp(tb testing.TB) {
	tb.Helper()
	t := s.newT(tb)
	t.run(func(t *T) {
		s.batches = t.mapsBatches()
		th := t.newSpace().newThread(progCount)
		for range 3 {
			th.syscall()
			th.c.Interrupt()
		}
	})
	if tb.Failed() {
		tb.FailNow()
	}
	// The runtime's own descriptors and threads.
	r, w, err := os.Pipe()
	if err != nil {
		tb.Fatal(err)
	}
	r.Close()
	w.Close()
}

// runSubject runs one subtest and looks for what it left behind.
func (s *suite) runSubject(tb *testing.T, sub subject) {
	before, err := takeCensus()
	if err != nil {
		tb.Fatal(err)
	}
	if !s.newT(tb).run(sub.run) {
		return // The hung goroutine holds things.
	}
	if err := before.compareSettled(); err != nil {
		tb.Errorf("left behind: %v", err)
	}
}
