package kvm

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/affinity"
	"github.com/ringfence/ringfence/pkg/sysmsg"
)

// runner is an OS thread that runs vCPUs while the thread that called Switch looks at
// a slot. It is handed over like a slot: the Context has it (sysmsg.Sentry), or it
// runs a vCPU for the Context (sysmsg.Stub).
type runner struct {
	state atomic.Uint32
	word  sysmsg.Word

	// tid is the thread, 0 if it is not known yet. cpus are those that it may run on,
	// away the one of the Context, which it must not.
	tid  atomic.Int32
	cpus unix.CPUSet
	away int

	// v is what to run, nil to end.
	v *vcpu
	// entering is 1 once the thread has come to run v.
	entering atomic.Uint32
	// errno is what became of it.
	errno unix.Errno
}

// runnerPoll is how long a Context sleeps before it looks whether something is wrong.
const runnerPoll = 10 * time.Millisecond

func (r *runner) loop() {
	// Without UnlockOSThread the thread ends with the goroutine.
	runtime.LockOSThread()
	tid := int32(unix.Gettid())
	r.tid.Store(tid)
	var spinner sysmsg.Spinner
	for {
		spins := spinner.Next(sysmsg.Spins(shimSpin))
		outcome := sysmsg.Spun
		sysmsg.SpinWhile(&r.state, sysmsg.Sentry, spins)
		s := r.state.Load() // which the race detector sees
		for s == sysmsg.Sentry || s == sysmsg.SentryStubWaits {
			outcome = sysmsg.Slept
			r.state.CompareAndSwap(sysmsg.Sentry, sysmsg.SentryStubWaits)
			sysmsg.FutexWait(&r.state, sysmsg.SentryStubWaits, time.Hour)
			s = r.state.Load()
		}
		spinner.Report(outcome)
		if r.v == nil {
			return
		}
		r.v.tid.Store(tid)
		r.entering.Store(1)
		r.errno = r.v.enter()
		if r.state.Swap(sysmsg.Sentry) == sysmsg.StubSentryWaits {
			sysmsg.FutexWake(&r.state)
		}
	}
}

// start makes the runner run v, on another CPU than the caller's: on the same one
// neither can look at what the other does. The scheduler does not know that.
func (r *runner) start(v *vcpu) {
	if cpu, err := affinity.CurrentCPU(); err == nil && cpu != r.away && r.tid.Load() != 0 {
		others := r.cpus
		others.Clear(cpu)
		if unix.SchedSetaffinity(int(r.tid.Load()), &others) == nil {
			r.away = cpu
		}
	}
	r.v = v
	r.entering.Store(0)
	r.word.Resume()
}

// exited reports whether the runner runs nothing.
func (r *runner) exited() bool {
	s := r.state.Load()
	return s == sysmsg.Sentry || s == sysmsg.SentryStubWaits
}

// runners are all runners: as many as there are pairs of CPUs, since it takes two for
// one to look at what the other does.
type runners struct {
	mu   sync.Mutex
	idle []*runner
	n    int
	max  int
}

// maxRunners returns how many runners this machine can have.
func maxRunners() int { return min(runtime.NumCPU(), runtime.GOMAXPROCS(0), 2*maxShims) / 2 }

// take returns a runner, or nil if all are in use.
func (rs *runners) take() *runner {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if n := len(rs.idle); n > 0 {
		r := rs.idle[n-1]
		rs.idle = rs.idle[:n-1]
		return r
	}
	if rs.n >= rs.max {
		return nil
	}
	rs.n++
	r := &runner{away: -1}
	if unix.SchedGetaffinity(0, &r.cpus) != nil {
		r.cpus.Fill()
	}
	r.word = sysmsg.NewWord(&r.state, runnerPoll)
	r.word.Init()
	go r.loop()
	return r
}

func (rs *runners) put(r *runner) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	rs.idle = append(rs.idle, r)
}

// close ends all runners, which must be idle.
func (rs *runners) close() {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	for _, r := range rs.idle {
		r.start(nil)
	}
	rs.idle, rs.n, rs.max = nil, 0, 0
}
