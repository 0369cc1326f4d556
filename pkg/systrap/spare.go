package systrap

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Stubs come and go off the path of whoever forks: one that is complete is made
// ahead while there are others, and what is left of those that are released is
// reaped in the background.

// stubs are those of this process.
var stubs = stubSet{reaping: make(chan struct{}, maxReaping)}

// maxReaping is how many AddressSpaces are reaped in the background at a time;
// more are by whoever releases them.
const maxReaping = 8

// fewForks is after how many AddressSpaces one is made ahead: until then it is likely
// that no other will be needed. A shell that runs one program has taken four, that of
// the probe included.
const fewForks = 4

type stubSet struct {
	// reaping has an element for each AddressSpace that is being reaped.
	reaping chan struct{}

	mu sync.Mutex
	// taken is the number of AddressSpaces that were handed out, up to fewForks.
	taken int
	// live is the number of AddressSpaces that were handed out and not released.
	live int
	// making says that spare is being made.
	making bool
	made   sync.Cond
	spare  *addressSpace
	// expiry ends what keep has kept.
	expiry *time.Timer
}

// take returns a complete AddressSpace.
func (s *stubSet) take() (*addressSpace, error) {
	s.mu.Lock()
	s.made.L = &s.mu
	for s.making {
		s.made.Wait()
	}
	as := s.spare
	s.spare = nil
	if s.expiry != nil {
		s.expiry.Stop() // a process that sleeps is not to be woken for it
	}
	s.live++
	if s.taken < fewForks {
		s.taken++
	} else if s.live > 1 {
		s.making = true
		go s.make()
	}
	s.mu.Unlock()

	if as != nil {
		if as.check() == nil && as.zygote.Alive() {
			return as, nil
		}
		as.destroy()
	}
	as, err := newAddressSpace()
	if err != nil {
		s.released()
	}
	return as, err
}

// keepTime is for how long a spare is kept that nobody has asked for.
const keepTime = time.Second

// keep makes as, which was taken and has not run an application, the spare.
func (s *stubSet) keep(as *addressSpace) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.making || s.spare != nil {
		go as.Release()
		return
	}
	s.spare = as
	s.live--
	s.expiry = time.AfterFunc(keepTime, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.spare == as && s.live == 0 {
			s.spare = nil
			as.destroy()
		}
	})
}

// make makes a spare AddressSpace.
func (s *stubSet) make() {
	as, err := newAddressSpace()
	if err != nil {
		as = nil // Whoever needs one will see.
	}
	s.mu.Lock()
	s.making = false
	s.spare = as
	s.made.Broadcast()
	s.mu.Unlock()
}

// released notes that an AddressSpace was released, or was not to be had. Nothing
// is left after the last one.
func (s *stubSet) released() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live--
	if s.live > 0 {
		return
	}
	for s.making {
		s.made.Wait()
	}
	if s.spare != nil && s.live == 0 {
		s.spare.destroy()
		s.spare = nil
	}
	for range maxReaping {
		s.reaping <- struct{}{}
	}
	for range maxReaping {
		<-s.reaping
	}
}

// clearTimeout bounds how long a stub that is released may take to unmap
// everything. It may be stopped.
const clearTimeout = 100 * time.Millisecond

// Release implements platform.AddressSpace.Release.
func (as *addressSpace) Release() {
	first, intact := as.proc.Retire()
	if !first {
		return
	}
	defer stubs.released()
	if intact {
		// When the memory is unmapped the Sentry may use it for something else, even
		// if the process is still about to end.
		_, err := as.doWithin(clearTimeout, call{unix.SYS_MUNMAP, [6]uint64{0, uint64(as.at.slots)}})
		intact = err == nil
	}
	as.proc.Kill()
	if intact {
		select {
		case stubs.reaping <- struct{}{}:
			go func() {
				as.reap()
				<-stubs.reaping
			}()
			return
		default:
		}
	}
	as.reap()
}

// destroy is Release of an AddressSpace that stubs has not handed out.
func (as *addressSpace) destroy() {
	as.proc.Retire()
	as.proc.Kill()
	as.reap()
}

// reap waits for the end of the stub, which was killed.
func (as *addressSpace) reap() {
	as.dropFile()
	as.proc.Reap()
	as.mem.close()
}
