package sysmsg

import (
	"sync"
	"sync/atomic"
	"time"
)

// spinWhile loads the word at p until it is not v, at most n times and once at
// least, with a pause between two loads that leaves the core to its other
// hardware thread. It returns what it has loaded last.
func spinWhile(p *atomic.Uint32, v, n uint32) uint32

// SpinWhile loads the word at p until it is not v, at most n times and once at
// least. It returns what it has loaded last.
func SpinWhile(p *atomic.Uint32, v, n uint32) uint32 { return spinWhile(p, v, n) }

// Spins returns how many loads of SpinWhile take d.
func Spins(d time.Duration) uint32 { return uint32(float64(d) / nsPerSpin()) }

// nsPerSpin is how long one load takes: from 5 to 150 ns, as CPUs differ in how
// long they pause.
var nsPerSpin = sync.OnceValue(func() float64 {
	var word atomic.Uint32
	const spins = 200
	best := time.Hour
	for range 5 {
		start := time.Now()
		spinWhile(&word, 0, spins)
		best = min(best, time.Since(start))
	}
	return max(float64(best)/spins, 0.1)
})

// Spinner adapts how long a side spins to how long it has had to wait before. The
// zero value spins as long as it may at first. It is not safe for concurrent use.
type Spinner struct {
	// halvings is how often the longest time is halved.
	halvings uint8
	// skipped counts the waits without spinning.
	skipped uint8
}

const (
	// maxHalvings is when spinning is given up.
	maxHalvings = 4
	// retryAfter is after how many waits it is tried again. Programs repeat themselves:
	// with a prime every one of the waits of a loop gets its turn.
	retryAfter = 31
)

// Next returns for how many loads to spin, max at most.
func (s *Spinner) Next(max uint32) uint32 {
	if s.halvings < maxHalvings {
		return max >> s.halvings
	}
	if s.skipped++; s.skipped < retryAfter {
		return 0
	}
	s.skipped = 0
	return max
}

// GaveUp reports whether spinning is not worth it, but for a try now and then.
func (s *Spinner) GaveUp() bool { return s.halvings == maxHalvings }

// Report tells what came of it.
func (s *Spinner) Report(o Outcome) {
	switch {
	case o == Spun:
		s.halvings = 0
	case s.halvings < maxHalvings:
		s.halvings++
	}
}
