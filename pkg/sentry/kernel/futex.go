package kernel

import (
	"hash/maphash"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/mm"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// futexTable holds the threads that wait for futexes, in buckets with a lock
// each.
type futexTable struct {
	buckets [64]futexBucket
}

type futexBucket struct {
	index int
	mu    sync.Mutex
	// waiters are in the order in which they came.
	waiters map[mm.Key][]*futexWaiter
}

type futexWaiter struct {
	task   *Task
	bitset uint32
	pi     bool
	woken  chan struct{}

	// bucket is where the waiter is, nil when it has been woken. It changes under
	// the locks of both the old and the new bucket. key is protected by it.
	bucket atomic.Pointer[futexBucket]
	key    mm.Key
}

var futexSeed = maphash.MakeSeed()

func (f *futexTable) bucket(key mm.Key) *futexBucket {
	i := maphash.Comparable(futexSeed, key) % uint64(len(f.buckets))
	b := &f.buckets[i]
	return b
}

// lockTwo locks the buckets of two keys, which may be the same.
func (f *futexTable) lockTwo(k1, k2 mm.Key) (b1, b2 *futexBucket, unlock func()) {
	b1, b2 = f.bucket(k1), f.bucket(k2)
	if b1 == b2 {
		b1.mu.Lock()
		return b1, b2, b1.mu.Unlock
	}
	first, second := b1, b2
	if first.index > second.index {
		first, second = second, first
	}
	first.mu.Lock()
	second.mu.Lock()
	return b1, b2, func() {
		second.mu.Unlock()
		first.mu.Unlock()
	}
}

func (b *futexBucket) add(w *futexWaiter, key mm.Key) {
	if b.waiters == nil {
		b.waiters = make(map[mm.Key][]*futexWaiter)
	}
	w.key = key
	w.bucket.Store(b)
	b.waiters[key] = append(b.waiters[key], w)
}

// setLocked replaces the waiters for key.
func (b *futexBucket) setLocked(key mm.Key, ws []*futexWaiter) {
	if len(ws) == 0 {
		delete(b.waiters, key)
	} else {
		b.waiters[key] = ws
	}
}

// wakeLocked wakes at most n waiters for key whose bitset has one of bitset.
func (b *futexBucket) wakeLocked(key mm.Key, n int, bitset uint32) (woken int) {
	ws := b.waiters[key]
	if len(ws) == 0 || n <= 0 {
		return 0
	}
	ws = slices.DeleteFunc(ws, func(w *futexWaiter) bool {
		if woken >= n || w.bitset&bitset == 0 {
			return false
		}
		woken++
		w.wake()
		return true
	})
	b.setLocked(key, ws)
	return woken
}

func (w *futexWaiter) wake() {
	w.bucket.Store(nil)
	close(w.woken)
}

// remove takes w out of the table. It returns false if w has been woken.
func (w *futexWaiter) remove() bool {
	for {
		b := w.bucket.Load()
		if b == nil {
			return false
		}
		b.mu.Lock()
		if w.bucket.Load() != b {
			b.mu.Unlock()
			continue
		}
		b.setLocked(w.key, slices.DeleteFunc(b.waiters[w.key], func(o *futexWaiter) bool { return o == w }))
		w.bucket.Store(nil)
		b.mu.Unlock()
		return true
	}
}

// futexKey returns the key of the futex at addr.
func (t *Task) futexKey(addr hostarch.Addr, private bool) (mm.Key, error) {
	return t.mm.FutexKey(t, addr, private)
}

// FutexWait waits until the futex at addr is woken, if its value is val
// (FUTEX_WAIT_BITSET). It returns ETIMEDOUT at deadline, unless that is zero.
func (t *Task) FutexWait(addr hostarch.Addr, private bool, val, bitset uint32, deadline time.Time) error {
	if bitset == 0 {
		return unix.EINVAL
	}
	key, err := t.futexKey(addr, private)
	if err != nil {
		return err
	}
	w := &futexWaiter{task: t, bitset: bitset, woken: make(chan struct{})}
	b := t.k.futexes.bucket(key)
	b.mu.Lock()
	v, err := t.mm.LoadUint32(t, addr, usermem.IOOpts{})
	if err == nil && v != val {
		err = unix.EAGAIN
	}
	if err != nil {
		b.mu.Unlock()
		return err
	}
	b.add(w, key)
	b.mu.Unlock()
	if err = t.BlockUntil(w.woken, deadline); err != nil && !w.remove() {
		return nil // woken at the last moment
	}
	return err
}

// FutexWake wakes at most n threads that wait for the futex at addr with a
// bitset that has one of bitset.
func (t *Task) FutexWake(addr hostarch.Addr, private bool, n int, bitset uint32) (int, error) {
	if bitset == 0 {
		return 0, unix.EINVAL
	}
	key, err := t.futexKey(addr, private)
	if err != nil {
		return 0, err
	}
	b := t.k.futexes.bucket(key)
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.wakeLocked(key, n, bitset), nil
}

// FutexRequeue wakes at most wake threads that wait for the futex at from, and
// makes at most requeue others wait for that at to. If cmp is not nil, it fails
// with EAGAIN unless the value at from is *cmp.
func (t *Task) FutexRequeue(from, to hostarch.Addr, private bool, wake, requeue int, cmp *uint32) (woken, requeued int, err error) {
	if wake < 0 || requeue < 0 {
		return 0, 0, unix.EINVAL
	}
	k1, err := t.futexKey(from, private)
	if err != nil {
		return 0, 0, err
	}
	k2, err := t.futexKey(to, private)
	if err != nil {
		return 0, 0, err
	}
	b1, b2, unlock := t.k.futexes.lockTwo(k1, k2)
	defer unlock()
	if cmp != nil {
		v, err := t.mm.LoadUint32(t, from, usermem.IOOpts{})
		if err != nil {
			return 0, 0, err
		}
		if v != *cmp {
			return 0, 0, unix.EAGAIN
		}
	}
	woken = b1.wakeLocked(k1, wake, linux.FUTEX_BITSET_MATCH_ANY)
	ws := b1.waiters[k1]
	if k1 == k2 {
		return woken, min(len(ws), requeue), nil
	}
	requeued = min(len(ws), requeue)
	for _, w := range ws[:requeued] {
		b2.add(w, k2)
	}
	b1.setLocked(k1, slices.Clone(ws[requeued:]))
	return woken, requeued, nil
}

// FutexWakeOp is FUTEX_WAKE_OP: it changes the value at addr2 as op says, wakes
// at most n1 threads at addr1, and n2 at addr2 if the old value compares.
func (t *Task) FutexWakeOp(addr1, addr2 hostarch.Addr, private bool, n1, n2 int, op uint32) (int, error) {
	k1, err := t.futexKey(addr1, private)
	if err != nil {
		return 0, err
	}
	k2, err := t.futexKey(addr2, private)
	if err != nil {
		return 0, err
	}
	b1, b2, unlock := t.k.futexes.lockTwo(k1, k2)
	defer unlock()
	again, err := t.futexOp(addr2, op)
	if err != nil {
		return 0, err
	}
	n := b1.wakeLocked(k1, n1, linux.FUTEX_BITSET_MATCH_ANY)
	if again {
		n += b2.wakeLocked(k2, n2, linux.FUTEX_BITSET_MATCH_ANY)
	}
	return n, nil
}

// futexOp does the operation encoded in op on the word at addr, and returns the
// outcome of the comparison.
func (t *Task) futexOp(addr hostarch.Addr, op uint32) (bool, error) {
	kind := op >> 28
	arg := int32(op<<8) >> 20 // bits 12 to 23, with sign
	cmp := int32(op<<20) >> 20
	if kind&linux.FUTEX_OP_OPARG_SHIFT != 0 {
		kind &^= linux.FUTEX_OP_OPARG_SHIFT
		arg = 1 << (arg & 31)
	}
	old, err := t.mm.LoadUint32(t, addr, usermem.IOOpts{})
	for {
		if err != nil {
			return false, err
		}
		var v uint32
		switch kind {
		case linux.FUTEX_OP_SET:
			v = uint32(arg)
		case linux.FUTEX_OP_ADD:
			v = old + uint32(arg)
		case linux.FUTEX_OP_OR:
			v = old | uint32(arg)
		case linux.FUTEX_OP_ANDN:
			v = old &^ uint32(arg)
		case linux.FUTEX_OP_XOR:
			v = old ^ uint32(arg)
		default:
			return false, unix.ENOSYS
		}
		var was uint32
		was, err = t.mm.CompareAndSwapUint32(t, addr, old, v, usermem.IOOpts{})
		if err == nil && was == old {
			break
		}
		old = was
	}
	a := int32(old)
	switch op >> 24 & 0xf {
	case linux.FUTEX_OP_CMP_EQ:
		return a == cmp, nil
	case linux.FUTEX_OP_CMP_NE:
		return a != cmp, nil
	case linux.FUTEX_OP_CMP_LT:
		return a < cmp, nil
	case linux.FUTEX_OP_CMP_GE:
		return a >= cmp, nil
	case linux.FUTEX_OP_CMP_LE:
		return a <= cmp, nil
	case linux.FUTEX_OP_CMP_GT:
		return a > cmp, nil
	}
	return false, unix.ENOSYS
}

// FutexLockPI takes the lock in the futex at addr, waiting for it unless try is
// set (FUTEX_LOCK_PI). The owner's priority is not raised: all tasks are equal.
func (t *Task) FutexLockPI(addr hostarch.Addr, private, try bool, deadline time.Time) error {
	key, err := t.futexKey(addr, private)
	if err != nil {
		return err
	}
	self := uint32(t.TID())
	b := t.k.futexes.bucket(key)
	for {
		b.mu.Lock()
		got, err := t.tryLockPI(addr, self, try)
		if got || err != nil {
			b.mu.Unlock()
			return err
		}
		w := &futexWaiter{task: t, bitset: linux.FUTEX_BITSET_MATCH_ANY, pi: true, woken: make(chan struct{})}
		b.add(w, key)
		b.mu.Unlock()
		if err := t.BlockUntil(w.woken, deadline); err != nil && w.remove() {
			if err == ERESTARTSYS {
				err = ERESTARTNOINTR
			}
			return err
		}
		// Whoever woke us has made us the owner, or has died.
		if v, err := t.mm.LoadUint32(t, addr, usermem.IOOpts{}); err != nil || v&linux.FUTEX_TID_MASK == self {
			return err
		}
	}
}

// tryLockPI takes the lock if it is free; else it marks it as waited for.
func (t *Task) tryLockPI(addr hostarch.Addr, self uint32, try bool) (bool, error) {
	v, err := t.mm.LoadUint32(t, addr, usermem.IOOpts{})
	for {
		if err != nil {
			return false, err
		}
		owner := v & linux.FUTEX_TID_MASK
		next := v | linux.FUTEX_WAITERS
		switch {
		case owner == self:
			return false, unix.EDEADLK
		case owner == 0:
			next = v | self
		case try:
			return false, unix.EAGAIN
		case t.k.TaskByTID(int32(owner)) == nil:
			return false, unix.ESRCH
		}
		var was uint32
		was, err = t.mm.CompareAndSwapUint32(t, addr, v, next, usermem.IOOpts{})
		if err == nil && was == v {
			return owner == 0, nil
		}
		v = was
	}
}

// FutexUnlockPI gives the lock in the futex at addr to the first that waits for
// it.
func (t *Task) FutexUnlockPI(addr hostarch.Addr, private bool) error {
	key, err := t.futexKey(addr, private)
	if err != nil {
		return err
	}
	b := t.k.futexes.bucket(key)
	b.mu.Lock()
	defer b.mu.Unlock()
	v, err := t.mm.LoadUint32(t, addr, usermem.IOOpts{})
	for {
		if err != nil {
			return err
		}
		if v&linux.FUTEX_TID_MASK != uint32(t.TID()) {
			return unix.EPERM
		}
		var next uint32
		ws := b.waiters[key]
		i := slices.IndexFunc(ws, func(w *futexWaiter) bool { return w.pi })
		if i >= 0 {
			next = uint32(ws[i].task.TID())
			if len(ws) > 1 {
				next |= linux.FUTEX_WAITERS
			}
		}
		var was uint32
		was, err = t.mm.CompareAndSwapUint32(t, addr, v, next, usermem.IOOpts{})
		if err == nil && was == v {
			if i >= 0 {
				ws[i].wake()
				b.setLocked(key, slices.Delete(ws, i, i+1))
			}
			return nil
		}
		v = was
	}
}
