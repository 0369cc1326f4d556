package vfs

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

type fdEntry struct {
	file    *FileDescription
	cloexec bool
}

// FDTable maps descriptor numbers to open file descriptions. It is shared by
// the threads of a process (CLONE_FILES) and starts with one reference.
type FDTable struct {
	refs  atomic.Int64
	locks atomic.Bool // it has ever held a record lock

	mu sync.RWMutex
	// fds is indexed by descriptor; entries without a file are free.
	fds []fdEntry
	// next is a number below which no descriptor is free.
	next int
}

// NewFDTable returns an empty table.
func NewFDTable() *FDTable {
	t := &FDTable{}
	t.refs.Store(1)
	return t
}

// IncRef adds a reference.
func (t *FDTable) IncRef() { t.refs.Add(1) }

// DecRef drops a reference; the last one closes every descriptor.
func (t *FDTable) DecRef() {
	if t.refs.Add(-1) == 0 {
		t.RemoveRange(0, 1<<31-1)
	}
}

// Fork returns a copy of t that refers to the same open files.
func (t *FDTable) Fork() *FDTable {
	n := NewFDTable()
	t.mu.RLock()
	defer t.mu.RUnlock()
	n.fds = append([]fdEntry(nil), t.fds...)
	n.next = t.next
	for _, e := range n.fds {
		if e.file != nil {
			e.file.IncRef()
		}
	}
	return n
}

// Get returns the file at fd with a reference for the caller, or nil.
func (t *FDTable) Get(fd int32) *FileDescription {
	file, _ := t.GetFlags(fd)
	return file
}

// GetFlags is Get, and says whether the descriptor closes on execve(2).
func (t *FDTable) GetFlags(fd int32) (file *FileDescription, cloexec bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if fd < 0 || int(fd) >= len(t.fds) || t.fds[fd].file == nil {
		return nil, false
	}
	e := t.fds[fd]
	e.file.IncRef()
	return e.file, e.cloexec
}

// NewFD puts file at the lowest free number that is at least min. It takes over
// the caller's reference if it succeeds; it fails with EMFILE if that number
// would not be below limit (RLIMIT_NOFILE).
func (t *FDTable) NewFD(min int32, file *FileDescription, cloexec bool, limit uint64) (int32, error) {
	if min < 0 || uint64(min) >= limit {
		return -1, unix.EINVAL
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	fd := max(int(min), t.next)
	for fd < len(t.fds) && t.fds[fd].file != nil {
		fd++
	}
	if uint64(fd) >= limit {
		return -1, unix.EMFILE
	}
	t.setLocked(fd, fdEntry{file, cloexec})
	if int(min) <= t.next {
		t.next = fd + 1
	}
	return int32(fd), nil
}

// NewFDAt puts file at fd (dup2(2)) and takes over the caller's reference. It
// returns what was there, for the caller to DecRef, or nil.
func (t *FDTable) NewFDAt(fd int32, file *FileDescription, cloexec bool, limit uint64) (*FileDescription, error) {
	if fd < 0 || uint64(fd) >= limit {
		return nil, unix.EBADF
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.setLocked(int(fd), fdEntry{file, cloexec}), nil
}

// setLocked stores e at fd and returns the file that was there.
func (t *FDTable) setLocked(fd int, e fdEntry) *FileDescription {
	for fd >= len(t.fds) {
		t.fds = append(t.fds, fdEntry{})
	}
	old := t.fds[fd].file
	t.fds[fd] = e
	if old != nil {
		t.closed(old)
	}
	return old
}

// SetCloexec changes whether fd closes on execve(2); EBADF if it is not open.
func (t *FDTable) SetCloexec(fd int32, cloexec bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if fd < 0 || int(fd) >= len(t.fds) || t.fds[fd].file == nil {
		return unix.EBADF
	}
	t.fds[fd].cloexec = cloexec
	return nil
}

// Remove frees fd and returns its file, for the caller to DecRef, or nil.
func (t *FDTable) Remove(fd int32) *FileDescription {
	t.mu.Lock()
	defer t.mu.Unlock()
	if fd < 0 || int(fd) >= len(t.fds) {
		return nil
	}
	t.next = min(t.next, int(fd))
	return t.setLocked(int(fd), fdEntry{})
}

// RemoveRange frees the descriptors from first to last, and drops their files
// (close_range(2)).
func (t *FDTable) RemoveRange(first, last int32) {
	t.removeIf(func(fd int, _ fdEntry) bool { return int(first) <= fd && fd <= int(last) })
}

// CloseOnExec frees the descriptors that close on execve(2).
func (t *FDTable) CloseOnExec() {
	t.removeIf(func(_ int, e fdEntry) bool { return e.cloexec })
}

func (t *FDTable) removeIf(f func(fd int, e fdEntry) bool) {
	var files []*FileDescription
	t.mu.Lock()
	for fd, e := range t.fds {
		if e.file != nil && f(fd, e) {
			files = append(files, e.file)
			t.fds[fd] = fdEntry{}
			t.next = min(t.next, fd)
		}
	}
	t.mu.Unlock()
	for _, file := range files { // not under mu: Release may be slow
		t.closed(file)
		file.DecRef()
	}
}

// FDs returns the open descriptors in order.
func (t *FDTable) FDs() []int32 {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var fds []int32
	for fd, e := range t.fds {
		if e.file != nil {
			fds = append(fds, int32(fd))
		}
	}
	return fds
}
