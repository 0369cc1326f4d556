package vfs

import (
	"context"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/waiter"
)

// lockable is a file that has only locks.
type lockable struct {
	waiter.AlwaysReady
	locks *Locks
}

func (lockable) Stat(context.Context) (unix.Stat_t, error) { return unix.Stat_t{}, nil }
func (lockable) Release()                                  {}
func (l lockable) Locks() *Locks                           { return l.locks }

func newLockable(l *Locks) *FileDescription {
	return NewFileDescription(lockable{locks: l}, unix.O_RDWR, func() string { return "" })
}

func TestFlock(t *testing.T) {
	var l Locks
	a, b := newLockable(&l), newLockable(&l)
	defer b.DecRef()
	for i, step := range []struct {
		f    *FileDescription
		ex   bool
		want error
	}{
		{a, false, nil}, {b, false, nil}, {a, true, unix.EWOULDBLOCK}, {b, true, unix.EWOULDBLOCK},
	} {
		if err := l.Flock(step.f, step.ex); err != step.want {
			t.Errorf("step %d: %v, want %v", i, err, step.want)
		}
	}
	e, c := waiter.NewChannelEntry(waiter.EventIn)
	l.EventRegister(e)
	a.DecRef() // gives it up
	select {
	case <-c:
	default:
		t.Error("nobody was told of a lock that is free")
	}
	if err := l.Flock(b, true); err != nil {
		t.Errorf("exclusive lock: %v", err)
	}
}

func TestRecordLocks(t *testing.T) {
	var l Locks
	t1, t2 := NewFDTable(), NewFDTable()
	defer t2.DecRef()
	set := func(owner any, start, end uint64, ex bool) error {
		return l.Set(RecordLock{Start: start, End: end, Exclusive: ex, Owner: owner})
	}
	f := newLockable(&l)
	f.IncRef()
	fd, err := t1.NewFD(0, f, false, 10)
	if err != nil {
		t.Fatal(err)
	}
	for i, step := range []struct {
		err  error
		want error
	}{
		{set(t1, 0, 100, true), nil},
		{set(t2, 50, 60, false), unix.EAGAIN},
		{set(t2, 100, 200, true), nil},
		{set(t1, 40, 60, false), nil}, // downgrades the middle
		{set(t2, 50, 55, false), nil},
		{set(t2, 30, 45, false), unix.EAGAIN},
		{set(t1, 40, 60, true), unix.EAGAIN},
		{set(f, 0, 10, false), unix.EAGAIN},
		{set(f, 45, 50, false), nil},
		{set(t1, 150, EndOfFile, false), unix.EAGAIN},
	} {
		if step.err != step.want {
			t.Errorf("step %d: %v, want %v", i, step.err, step.want)
		}
	}
	if o, busy := l.Test(RecordLock{Start: 0, End: 30, Owner: t2}); !busy || o.Start != 0 || o.End != 40 || !o.Exclusive {
		t.Errorf("lock in the way: %+v, %v", o, busy)
	}
	l.Unset(t2, 120, 130)
	if _, busy := l.Test(RecordLock{Start: 121, End: 129, Exclusive: true, Owner: t1}); busy {
		t.Error("the hole is locked")
	}
	// Closing any descriptor of the file gives up all of the process's locks.
	t1.Remove(fd).DecRef()
	if _, busy := l.Test(RecordLock{Start: 0, End: 44, Exclusive: true, Owner: t2}); busy {
		t.Error("locks are left after close")
	}
	// Those of an open file description go with it.
	if _, busy := l.Test(RecordLock{Start: 45, End: 50, Exclusive: true, Owner: t2}); !busy {
		t.Error("the description's lock is gone")
	}
	f.DecRef()
	if _, busy := l.Test(RecordLock{Start: 45, End: 50, Exclusive: true, Owner: t2}); busy {
		t.Error("the description's lock is left")
	}
	// Neighbours are joined.
	l.Unset(t2, 0, EndOfFile)
	for i := range uint64(100) {
		if err := set(t2, i*10, i*10+10, true); err != nil {
			t.Fatal(err)
		}
	}
	if len(l.recs) != 1 {
		t.Errorf("%d records for one range", len(l.recs))
	}
}
