// Package vfs is the Sentry's view of files: open file descriptions, descriptor
// tables, path resolution through mounts, and the file systems behind them.
//
// It depends on hostarch, memmap, usermem and waiter. It knows nothing of
// tasks: the syscalls package waits and copies on their behalf.
package vfs

import (
	"context"
	"encoding/binary"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// Impl is the part of an open file that differs by kind. What a file can do
// beyond this it says by implementing the interfaces below; a FileDescription
// gives the errno of Linux for what it cannot.
//
// No method blocks: one that would returns unix.EAGAIN, and the caller waits
// for readiness. Methods may be called concurrently.
type Impl interface {
	waiter.Waitable

	// Stat returns the file's attributes.
	Stat(ctx context.Context) (unix.Stat_t, error)

	// Release is called once, when the last reference is gone.
	Release()
}

// StreamReader is implemented by files without an offset of ours: pipes,
// terminals. A file that is a ReaderAt as well keeps its offset itself.
type StreamReader interface {
	// Read reads up to len(p) bytes; 0 and nil mean the end.
	Read(ctx context.Context, p []byte) (int, error)
}

// StreamWriter is the counterpart of StreamReader.
type StreamWriter interface {
	Write(ctx context.Context, p []byte) (int, error)
}

// ReaderAt is implemented by files that can be read at an offset.
type ReaderAt interface {
	// ReadAt reads up to len(p) bytes at off; 0 and nil mean the end.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
}

// WriterAt is implemented by files that can be written at an offset.
type WriterAt interface {
	WriteAt(ctx context.Context, p []byte, off int64) (int, error)

	// Append writes p at the end of the file, atomically, and returns the
	// offset after it.
	Append(ctx context.Context, p []byte) (n int, end int64, err error)
}

// Sizer is implemented by files that have an end for SEEK_END, or data and
// holes.
type Sizer interface {
	// Size returns the file's length in bytes.
	Size(ctx context.Context) (int64, error)
}

// Seeker is implemented by files whose seeking differs from that of a regular
// file (SEEK_DATA, SEEK_HOLE, directories). cur is the offset before the call.
type Seeker interface {
	Seek(ctx context.Context, cur, off int64, whence int) (int64, error)
}

// SeekDir is Seek for a directory, where only offsets that ReadDir gave have a
// meaning: there is no end to seek from.
func SeekDir(cur, off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekStart:
	case io.SeekCurrent:
		off += cur
	default:
		return 0, unix.EINVAL
	}
	if off < 0 {
		return 0, unix.EINVAL
	}
	return off, nil
}

// Dirent is an entry of a directory.
type Dirent struct {
	Name string
	Ino  uint64
	Type uint8 // unix.DT_*
	// NextOff is the directory offset behind this entry.
	NextOff int64
}

// DirReader is implemented by directories.
type DirReader interface {
	// ReadDir calls emit for each entry from offset off on until emit returns
	// false; the entry for which it did counts as not read.
	ReadDir(ctx context.Context, off int64, emit func(Dirent) bool) error
}

// RawDirReader is implemented by directories that have their entries in the
// format of getdents64(2).
type RawDirReader interface {
	// ReadDirRaw fills buf with entries from off on. next is the offset behind
	// them. 0 bytes mean that ReadDir has the rest; EINVAL that buf is too small.
	ReadDirRaw(ctx context.Context, off int64, buf []byte) (n int, next int64, err error)
}

// Truncater is implemented by files whose length can be set.
type Truncater interface {
	Truncate(ctx context.Context, size int64) error
}

// Syncer is implemented by files that have something to write to storage.
type Syncer interface {
	Sync(ctx context.Context) error
}

// Ioctler is implemented by files that know requests of their own (ioctl(2)).
// uio is the caller's memory. Unknown requests give ENOTTY.
type Ioctler interface {
	Ioctl(ctx context.Context, uio usermem.IO, request uint32, arg uintptr) (uintptr, error)
}

// MMapper is implemented by files that can be mapped.
type MMapper interface {
	// ConfigureMMap sets opts.Mappable and opts.MappingIdentity, and narrows
	// opts.MaxPerms to what the file allows, or refuses.
	ConfigureMMap(ctx context.Context, opts *memmap.MMapOpts) error
}

// FlagSetter is implemented by files that must know of changed status flags.
type FlagSetter interface {
	SetStatusFlags(flags uint32) error
}

// settableFlags are the status flags that fcntl(F_SETFL) changes.
const settableFlags = unix.O_APPEND | unix.O_NONBLOCK | unix.O_ASYNC | unix.O_DIRECT | unix.O_NOATIME

// FileDescription is an open file description: what open(2) makes, and dup(2)
// and fork(2) share. It starts with one reference.
type FileDescription struct {
	impl  Impl
	refs  atomic.Int64
	flags atomic.Uint32
	path  func() string
	// dentry is where the file was opened; nil if it has no place in a Namespace.
	dentry *Dentry
	fifo   *fifoWait
	locks  atomic.Bool // it has ever held an advisory lock

	// watchMu protects watchers, which hear of the last DecRef: epoll instances
	// forget a file when it is closed.
	watchMu  sync.Mutex
	watchers map[any]func()

	offMu sync.Mutex // held during reads and writes at the offset, as Linux does
	off   int64
}

// NewFileDescription returns a FileDescription for impl. flags are the access
// mode and status flags of open(2); path gives its name in /proc/PID/fd.
func NewFileDescription(impl Impl, flags uint32, path func() string) *FileDescription {
	f := &FileDescription{impl: impl, path: path}
	f.flags.Store(flags)
	f.refs.Store(1)
	return f
}

// NewFileAt returns a FileDescription for impl, opened at d, which now belongs
// to it.
func NewFileAt(impl Impl, flags uint32, d *Dentry) *FileDescription {
	f := NewFileDescription(impl, statusFlags(flags), d.String)
	f.dentry = d.use()
	return f
}

// Impl returns the file behind f.
func (f *FileDescription) Impl() Impl { return f.impl }

// Path returns the name that /proc/PID/fd shows.
func (f *FileDescription) Path() string { return f.path() }

// IncRef adds a reference. The caller must hold one.
func (f *FileDescription) IncRef() { f.refs.Add(1) }

// TryIncRef adds a reference unless the last one is gone.
func (f *FileDescription) TryIncRef() bool {
	for {
		n := f.refs.Load()
		if n <= 0 {
			return false
		}
		if f.refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// DecRef drops a reference; the last one releases the file.
func (f *FileDescription) DecRef() {
	switch n := f.refs.Add(-1); {
	case n == 0:
		f.watchMu.Lock()
		watchers := f.watchers
		f.watchers = nil
		f.watchMu.Unlock()
		for _, gone := range watchers {
			gone()
		}
		f.dropLocks()
		f.impl.Release()
		if f.dentry != nil {
			f.dentry.Drop()
		}
	case n < 0:
		panic("vfs: FileDescription.DecRef without a reference")
	}
}

// watchRelease makes gone be called before the file is released, unless
// unwatchRelease(key) comes first. The caller must hold a reference.
func (f *FileDescription) watchRelease(key any, gone func()) {
	f.watchMu.Lock()
	defer f.watchMu.Unlock()
	if f.watchers == nil {
		f.watchers = make(map[any]func())
	}
	f.watchers[key] = gone
}

func (f *FileDescription) unwatchRelease(key any) {
	f.watchMu.Lock()
	delete(f.watchers, key)
	f.watchMu.Unlock()
}

// StatusFlags returns the access mode and status flags (fcntl(F_GETFL)).
func (f *FileDescription) StatusFlags() uint32 { return f.flags.Load() }

// SetStatusFlags replaces those flags that fcntl(F_SETFL) can change.
func (f *FileDescription) SetStatusFlags(flags uint32) error {
	new := f.flags.Load()&^settableFlags | flags&settableFlags
	if s, ok := f.impl.(FlagSetter); ok {
		if err := s.SetStatusFlags(new); err != nil {
			return err
		}
	}
	f.flags.Store(new)
	return nil
}

// Nonblocking reports whether O_NONBLOCK is set.
func (f *FileDescription) Nonblocking() bool { return f.flags.Load()&unix.O_NONBLOCK != 0 }

// Readable reports whether the file was opened for reading.
func (f *FileDescription) Readable() bool {
	flags := f.flags.Load()
	return flags&unix.O_ACCMODE != unix.O_WRONLY && flags&unix.O_PATH == 0
}

// Writable reports whether the file was opened for writing.
func (f *FileDescription) Writable() bool {
	flags := f.flags.Load()
	return flags&unix.O_ACCMODE != unix.O_RDONLY && flags&unix.O_PATH == 0
}

// Read reads at the offset and moves it (read(2)).
func (f *FileDescription) Read(ctx context.Context, p []byte) (int, error) {
	if !f.Readable() {
		return 0, unix.EBADF
	}
	switch impl := f.impl.(type) {
	case StreamReader:
		return impl.Read(ctx, p)
	case ReaderAt:
		f.offMu.Lock()
		defer f.offMu.Unlock()
		n, err := impl.ReadAt(ctx, p, f.off)
		f.off += int64(n)
		return n, err
	case DirReader:
		return 0, unix.EISDIR
	}
	return 0, unix.EINVAL
}

// Write writes at the offset and moves it, or appends (write(2)).
func (f *FileDescription) Write(ctx context.Context, p []byte) (int, error) {
	if !f.Writable() {
		return 0, unix.EBADF
	}
	switch impl := f.impl.(type) {
	case StreamWriter:
		return impl.Write(ctx, p)
	case WriterAt:
		f.offMu.Lock()
		defer f.offMu.Unlock()
		if f.flags.Load()&unix.O_APPEND != 0 {
			n, end, err := impl.Append(ctx, p)
			if n > 0 {
				f.off = end
			}
			return n, err
		}
		n, err := impl.WriteAt(ctx, p, f.off)
		f.off += int64(n)
		return n, err
	}
	return 0, unix.EINVAL
}

// PRead reads at off and leaves the offset alone (pread(2)).
func (f *FileDescription) PRead(ctx context.Context, p []byte, off int64) (int, error) {
	if !f.Readable() {
		return 0, unix.EBADF
	}
	if off < 0 {
		return 0, unix.EINVAL
	}
	switch impl := f.impl.(type) {
	case ReaderAt:
		return impl.ReadAt(ctx, p, off)
	case DirReader:
		return 0, unix.EISDIR
	}
	return 0, unix.ESPIPE
}

// PWrite writes at off and leaves the offset alone (pwrite(2)).
func (f *FileDescription) PWrite(ctx context.Context, p []byte, off int64) (int, error) {
	if !f.Writable() {
		return 0, unix.EBADF
	}
	if off < 0 {
		return 0, unix.EINVAL
	}
	impl, ok := f.impl.(WriterAt)
	if !ok {
		return 0, unix.ESPIPE
	}
	if f.flags.Load()&unix.O_APPEND != 0 { // pwrite(2), BUGS
		n, _, err := impl.Append(ctx, p)
		return n, err
	}
	return impl.WriteAt(ctx, p, off)
}

// Seek moves the offset (lseek(2)).
func (f *FileDescription) Seek(ctx context.Context, off int64, whence int) (int64, error) {
	f.offMu.Lock()
	defer f.offMu.Unlock()
	pos, err := f.seekLocked(ctx, off, whence)
	if err != nil {
		return 0, err
	}
	f.off = pos
	return pos, nil
}

func (f *FileDescription) seekLocked(ctx context.Context, off int64, whence int) (int64, error) {
	if s, ok := f.impl.(Seeker); ok {
		return s.Seek(ctx, f.off, off, whence)
	}
	sizer, ok := f.impl.(Sizer)
	if !ok {
		return 0, unix.ESPIPE
	}
	switch whence {
	case io.SeekStart:
	case io.SeekCurrent:
		off += f.off
	case io.SeekEnd, unix.SEEK_DATA, unix.SEEK_HOLE:
		size, err := sizer.Size(ctx)
		if err != nil {
			return 0, err
		}
		switch whence {
		case io.SeekEnd:
			off += size
		default: // one extent of data, then a hole at the end
			if off < 0 || off >= size {
				return 0, unix.ENXIO
			}
			if whence == unix.SEEK_HOLE {
				off = size
			}
		}
	default:
		return 0, unix.EINVAL
	}
	if off < 0 {
		return 0, unix.EINVAL
	}
	return off, nil
}

// ReadDir calls emit for entries from the offset on, and moves the offset past
// those that it took (getdents64(2)).
func (f *FileDescription) ReadDir(ctx context.Context, emit func(Dirent) bool) error {
	d, ok := f.impl.(DirReader)
	if !ok {
		return unix.ENOTDIR
	}
	f.offMu.Lock()
	defer f.offMu.Unlock()
	return d.ReadDir(ctx, f.off, func(e Dirent) bool {
		if !emit(e) {
			return false
		}
		f.off = e.NextOff
		return true
	})
}

// Stat returns the file's attributes (fstat(2)).
func (f *FileDescription) Stat(ctx context.Context) (unix.Stat_t, error) {
	if f.dentry != nil && f.dentry.node.Mode()&unix.S_IFMT == unix.S_IFIFO {
		return f.dentry.node.Stat(ctx) // the inode, not the pipe behind it
	}
	return f.impl.Stat(ctx)
}

// ReadDirRaw fills buf with entries in the format of getdents64(2) and returns
// how many bytes that made; 0 is the end. EINVAL means that buf is too small for
// one entry.
func (f *FileDescription) ReadDirRaw(ctx context.Context, buf []byte) (int, error) {
	if _, ok := f.impl.(DirReader); !ok {
		return 0, unix.ENOTDIR
	}
	if raw, ok := f.impl.(RawDirReader); ok {
		f.offMu.Lock()
		n, next, err := raw.ReadDirRaw(ctx, f.off, buf)
		if n > 0 {
			f.off = next
		}
		f.offMu.Unlock()
		if n > 0 || err != nil {
			return n, err
		}
		// What is left, if anything, is not the host's.
	}
	n, full := 0, false
	err := f.ReadDir(ctx, func(e Dirent) bool {
		m := PutDirent(buf[n:], e)
		n += m
		full = full || m == 0
		return m > 0
	})
	if n == 0 && full && err == nil {
		err = unix.EINVAL
	}
	return n, err
}

// direntHeader is the size of struct linux_dirent64 before the name.
const direntHeader = 19

// PutDirent encodes e for getdents64(2) and returns its length, or 0 if it does
// not fit into buf.
func PutDirent(buf []byte, e Dirent) int {
	n := (direntHeader + len(e.Name) + 1 + 7) &^ 7
	if n > len(buf) {
		return 0
	}
	binary.LittleEndian.PutUint64(buf, e.Ino)
	binary.LittleEndian.PutUint64(buf[8:], uint64(e.NextOff))
	binary.LittleEndian.PutUint16(buf[16:], uint16(n))
	buf[18] = e.Type
	clear(buf[direntHeader+copy(buf[direntHeader:n], e.Name) : n])
	return n
}

// Truncate sets the file's length (ftruncate(2)).
func (f *FileDescription) Truncate(ctx context.Context, size int64) error {
	t, ok := f.impl.(Truncater)
	if !f.Writable() || !ok || size < 0 {
		return unix.EINVAL
	}
	return t.Truncate(ctx, size)
}

// Sync writes the file to storage (fsync(2)).
func (f *FileDescription) Sync(ctx context.Context) error {
	if s, ok := f.impl.(Syncer); ok {
		return s.Sync(ctx)
	}
	return unix.EINVAL
}

// Ioctl does a request of the file's own (ioctl(2)).
func (f *FileDescription) Ioctl(ctx context.Context, uio usermem.IO, request uint32, arg uintptr) (uintptr, error) {
	if i, ok := f.impl.(Ioctler); ok {
		return i.Ioctl(ctx, uio, request, arg)
	}
	return 0, unix.ENOTTY
}

// ConfigureMMap prepares opts for a mapping of the file (mmap(2)).
func (f *FileDescription) ConfigureMMap(ctx context.Context, opts *memmap.MMapOpts) error {
	if !f.Readable() {
		return unix.EACCES
	}
	if !f.Writable() && !opts.Private {
		if opts.Perms.Write {
			return unix.EACCES
		}
		opts.MaxPerms.Write = false
	}
	m, ok := f.impl.(MMapper)
	if !ok {
		return unix.ENODEV
	}
	return m.ConfigureMMap(ctx, opts)
}

// ContextWaitable is implemented by files whose readiness depends on who asks.
type ContextWaitable interface {
	// For returns the readiness for the task of ctx.
	For(ctx context.Context) waiter.Waitable
}

// For returns what the task of ctx waits for to use f.
func (f *FileDescription) For(ctx context.Context) waiter.Waitable {
	if c, ok := f.impl.(ContextWaitable); ok {
		return c.For(ctx)
	}
	return f
}

// Readiness implements waiter.Waitable.
func (f *FileDescription) Readiness(mask waiter.EventMask) waiter.EventMask {
	return f.impl.Readiness(mask)
}

// EventRegister implements waiter.Waitable.
func (f *FileDescription) EventRegister(e *waiter.Entry) error { return f.impl.EventRegister(e) }

// EventUnregister implements waiter.Waitable.
func (f *FileDescription) EventUnregister(e *waiter.Entry) { f.impl.EventUnregister(e) }

// Fallocater is implemented by files that can reserve or punch space.
type Fallocater interface {
	Fallocate(ctx context.Context, mode uint32, off, length int64) error
}

// Adviser is implemented by files that pass posix_fadvise(2) on.
type Adviser interface {
	Advise(ctx context.Context, off, length int64, advice int) error
}

// Sealer is implemented by files with seals (fcntl(F_ADD_SEALS)).
type Sealer interface {
	Seals() (uint32, error)
	AddSeals(seals uint32) error
}

// Terminal is implemented by files that may be the terminal of a session. What
// ioctl_tty(2) asks of sessions and process groups is not answered by them.
type Terminal interface {
	IsTerminal() bool
}
