package vfs

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/waiter"
)

// Locks are the advisory locks on one file. Tasks of the sandbox see them, the
// host does not. The zero value holds none.
type Locks struct {
	waiter.Queue // told whenever a lock is given up

	mu    sync.Mutex
	flock map[*FileDescription]bool // true: exclusive
	recs  []RecordLock
}

// Locker is implemented by files that can be locked.
type Locker interface {
	Locks() *Locks
}

// RecordLock is a lock on the bytes [Start, End) of a file (fcntl(F_SETLK)).
type RecordLock struct {
	Start, End uint64
	Exclusive  bool
	// Owner is the *FDTable of a process, or the *FileDescription of an open file
	// description lock.
	Owner any
	PID   int32 // of who took it; -1 for open file description locks
}

// EndOfFile is the End of a lock up to the end of the file, wherever that is.
const EndOfFile = 1 << 63

// Flock takes or changes the lock of f (flock(2)): EWOULDBLOCK if that of
// another is in the way.
func (l *Locks) Flock(f *FileDescription, exclusive bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for g, ex := range l.flock {
		if g != f && (ex || exclusive) {
			return unix.EWOULDBLOCK
		}
	}
	if l.flock == nil {
		l.flock = map[*FileDescription]bool{}
	}
	was, held := l.flock[f]
	l.flock[f] = exclusive
	f.locks.Store(true)
	if held && was && !exclusive {
		defer l.Notify(waiter.EventIn)
	}
	return nil
}

// Funlock gives up the lock of f.
func (l *Locks) Funlock(f *FileDescription) {
	l.mu.Lock()
	_, held := l.flock[f]
	delete(l.flock, f)
	l.mu.Unlock()
	if held {
		l.Notify(waiter.EventIn)
	}
}

func (r *RecordLock) conflicts(o *RecordLock) bool {
	return r.Owner != o.Owner && (r.Exclusive || o.Exclusive) && r.Start < o.End && o.Start < r.End
}

// Test returns a lock that keeps r from being taken (F_GETLK).
func (l *Locks) Test(r RecordLock) (RecordLock, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, o := range l.recs {
		if r.conflicts(&o) {
			return o, true
		}
	}
	return RecordLock{}, false
}

// Set takes r, replacing what the owner had there (F_SETLK): EAGAIN if a lock
// of another is in the way.
func (l *Locks) Set(r RecordLock) error {
	if _, busy := l.Test(r); busy { // decided again below, under the lock
		return unix.EAGAIN
	}
	l.mu.Lock()
	for i := range l.recs {
		if r.conflicts(&l.recs[i]) {
			l.mu.Unlock()
			return unix.EAGAIN
		}
	}
	l.cutLocked(r.Owner, r.Start, r.End)
	// Join with neighbours of the same kind, so that the list stays short.
	keep := l.recs[:0]
	for _, o := range l.recs {
		if o.Owner == r.Owner && o.Exclusive == r.Exclusive && (o.End == r.Start || o.Start == r.End) {
			r.Start, r.End = min(r.Start, o.Start), max(r.End, o.End)
			continue
		}
		keep = append(keep, o)
	}
	l.recs = append(keep, r)
	l.mu.Unlock()
	switch owner := r.Owner.(type) {
	case *FDTable:
		owner.locks.Store(true)
	case *FileDescription:
		owner.locks.Store(true)
	}
	l.Notify(waiter.EventIn) // a write lock may have become a read lock
	return nil
}

// Unset gives up what owner holds of [start, end).
func (l *Locks) Unset(owner any, start, end uint64) {
	l.mu.Lock()
	n := len(l.recs)
	changed := n > 0
	if changed {
		l.cutLocked(owner, start, end)
	}
	l.mu.Unlock()
	if changed {
		l.Notify(waiter.EventIn)
	}
}

func (l *Locks) cutLocked(owner any, start, end uint64) {
	var out []RecordLock
	for _, o := range l.recs {
		if o.Owner != owner || o.End <= start || end <= o.Start {
			out = append(out, o)
			continue
		}
		if o.Start < start {
			left := o
			left.End = start
			out = append(out, left)
		}
		if end < o.End {
			right := o
			right.Start = end
			out = append(out, right)
		}
	}
	l.recs = out
}

// LocksOf returns the locks on the file behind f, or nil.
func LocksOf(f *FileDescription) *Locks {
	if l, ok := f.impl.(Locker); ok {
		return l.Locks()
	}
	return nil
}

// dropLocks gives up the locks that go with the last use of f.
func (f *FileDescription) dropLocks() {
	if !f.locks.Load() {
		return
	}
	if l := LocksOf(f); l != nil {
		l.Funlock(f)
		l.Unset(f, 0, EndOfFile)
	}
}

// closed gives up the record locks of t on file, which one of its descriptors
// no longer refers to (fcntl_locking(2): any close gives up all).
func (t *FDTable) closed(file *FileDescription) {
	if !t.locks.Load() {
		return
	}
	if l := LocksOf(file); l != nil {
		l.Unset(t, 0, EndOfFile)
	}
}
