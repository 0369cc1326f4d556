package stub

import (
	"runtime"
	"sync"
)

// keeper is an OS thread that lives as long as the process: the parent of all
// stubs. A parent-death signal is sent when the parent's thread ends
// (PR_SET_PDEATHSIG(2const)), and a tracer is a thread, too.
type keeper struct {
	once sync.Once
	work chan func()
}

var theKeeper keeper

// OnKeeper runs f on the keeper thread, and returns when it is done. Calls are
// made one after the other. f must not call OnKeeper.
func OnKeeper(f func()) {
	theKeeper.once.Do(func() {
		// Whoever hands something over does not wait until it is taken.
		theKeeper.work = make(chan func(), 1)
		go func() {
			// Never unlocked.
			runtime.LockOSThread()
			for f := range theKeeper.work {
				f()
			}
		}()
	})
	done := make(chan struct{})
	theKeeper.work <- func() {
		defer close(done)
		f()
	}
	<-done
}
