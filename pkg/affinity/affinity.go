// Package affinity says on which CPUs threads run that never run at the same
// time: waking a thread on an idle CPU takes several times as long as a switch
// between two threads on one.
//
// It depends on golang.org/x/sys. It must not know what the threads do.
package affinity
