// Package affinity puts two threads that never run at the same time on one CPU:
// waking a thread on an idle one takes several times as long as a switch between
// two on the same. Linux's scheduler does the opposite. RATIONALE.md has the
// figures.
//
// It depends on golang.org/x/sys. It must not know what the threads do.
package affinity
