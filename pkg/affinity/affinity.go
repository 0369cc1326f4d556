// Package affinity decides for two threads that alternate whether they run on one
// CPU or on two. Waking a thread on an idle CPU takes several times as long as a
// switch between two threads on the same one, where Linux's scheduler would not leave
// them; threads that look for each other instead of sleeping need two. RATIONALE.md
// has the figures.
//
// It depends on golang.org/x/sys. It must not know what the threads do.
package affinity
