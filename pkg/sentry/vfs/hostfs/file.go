package hostfs

import (
	"context"
	"io"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
)

// regular is an open regular file.
type regular struct {
	waiter.AlwaysReady
	*node
	d     *vfs.Dentry
	inode *inode
	flags uint32 // of open(2); the access mode never changes
}

// Release implements vfs.Impl. The node goes with the Dentry.
func (f *regular) Release() { f.inode.DecRef() }

// Locks implements vfs.Locker.
func (f *regular) Locks() *vfs.Locks { return &f.inode.locks }

// ReadAt implements vfs.ReaderAt.
func (f *regular) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	return retry(func() (int, error) { return unix.Pread(f.fd, p, off) })
}

// WriteAt implements vfs.WriterAt.
func (f *regular) WriteAt(_ context.Context, p []byte, off int64) (int, error) {
	return retry(func() (int, error) { return unix.Pwrite(f.fd, p, off) })
}

// Append implements vfs.WriterAt. The descriptor has O_APPEND as well.
func (f *regular) Append(_ context.Context, p []byte) (int, int64, error) {
	n, err := retry(func() (int, error) { return unix.Write(f.fd, p) })
	if err != nil {
		return 0, 0, err
	}
	end, err := unix.Seek(f.fd, 0, io.SeekCurrent)
	return n, end, err
}

// retry repeats a host call that a signal interrupted.
func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if err == unix.EINTR {
			continue
		}
		return max(n, 0), err
	}
}

// SetStatusFlags implements vfs.FlagSetter.
func (f *regular) SetStatusFlags(flags uint32) error {
	_, err := unix.FcntlInt(uintptr(f.fd), unix.F_SETFL, int(flags&(unix.O_APPEND|unix.O_NOATIME))|unix.O_NONBLOCK)
	return err
}

// Size implements vfs.Sizer.
func (f *regular) Size(ctx context.Context) (int64, error) {
	st, err := f.Stat(ctx)
	return st.Size, err
}

// Seek implements vfs.Seeker.
func (f *regular) Seek(ctx context.Context, cur, off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekStart:
	case io.SeekCurrent:
		off += cur
	case io.SeekEnd:
		size, err := f.Size(ctx)
		if err != nil {
			return 0, err
		}
		off += size
	case unix.SEEK_DATA, unix.SEEK_HOLE:
		return unix.Seek(f.fd, off, whence)
	default:
		return 0, unix.EINVAL
	}
	if off < 0 {
		return 0, unix.EINVAL
	}
	return off, nil
}

// Truncate implements vfs.Truncater.
func (f *regular) Truncate(_ context.Context, size int64) error { return unix.Ftruncate(f.fd, size) }

// Sync implements vfs.Syncer.
func (f *regular) Sync(context.Context) error { return unix.Fsync(f.fd) }

// Fallocate implements vfs.Fallocater.
func (f *regular) Fallocate(_ context.Context, mode uint32, off, length int64) error {
	return unix.Fallocate(f.fd, mode, off, length)
}

// Advise implements vfs.Adviser.
func (f *regular) Advise(_ context.Context, off, length int64, advice int) error {
	return unix.Fadvise(f.fd, off, length, advice)
}

// ConfigureMMap implements vfs.MMapper.
func (f *regular) ConfigureMMap(_ context.Context, opts *memmap.MMapOpts) error {
	if d, ok := f.fs.devices.Load(f.st.Dev); ok && d.(*device).noexec {
		if opts.Perms.Execute {
			return unix.EPERM
		}
		opts.MaxPerms.Execute = false
	}
	path, _ := f.d.Path()
	if err := f.inode.AddFD(f.fd, f.flags&unix.O_ACCMODE == unix.O_RDWR, path); err != nil {
		return err
	}
	opts.Mappable, opts.MappingIdentity = f.inode.Object, f.inode.Object
	return nil
}

// directory is an open directory.
type directory struct {
	waiter.AlwaysReady
	*node
	d *vfs.Dentry

	mu    sync.Mutex
	next  int64  // offset of the host's descriptor
	inode *inode // of whoever locks it; nil until then
}

// Release implements vfs.Impl. The node goes with the Dentry.
func (f *directory) Release() {
	if f.inode != nil {
		f.inode.DecRef()
	}
}

// Locks implements vfs.Locker. Directories are rarely locked.
func (f *directory) Locks() *vfs.Locks {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.inode == nil {
		f.inode = f.fs.inode(&f.st)
	}
	return &f.inode.locks
}

// Sync implements vfs.Syncer.
func (f *directory) Sync(context.Context) error { return unix.Fsync(f.fd) }

// mountOffset is the directory offset from which on mount points follow that
// the host does not list. File systems use all of 63 bits, ext4 the last one for
// the end; none is likely to use these.
const mountOffset = 1<<63 - 1<<16

// inMounts reports whether off is behind the host's entries.
func inMounts(off int64) bool { return off >= mountOffset && off < mountOffset+1<<15 }

// seekLocked moves the host's descriptor to off.
func (f *directory) seekLocked(off int64) error {
	if off == f.next {
		return nil
	}
	if _, err := unix.Seek(f.fd, off, io.SeekStart); err != nil {
		return err
	}
	f.next = off
	return nil
}

// ReadDirRaw implements vfs.RawDirReader: the format is the host's own.
func (f *directory) ReadDirRaw(_ context.Context, off int64, buf []byte) (int, int64, error) {
	if inMounts(off) {
		return 0, off, nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.seekLocked(off); err != nil {
		return 0, off, err
	}
	n, err := retry(func() (int, error) { return unix.Getdents(f.fd, buf) })
	if err != nil || n == 0 {
		return 0, off, err
	}
	for b := buf[:n]; len(b) > 0; {
		_, next, l := direntSize(b)
		if l == 0 {
			return 0, off, unix.EIO
		}
		f.next = next
		b = b[l:]
	}
	return n, f.next, nil
}

// ReadDir implements vfs.DirReader.
func (f *directory) ReadDir(ctx context.Context, off int64, emit func(vfs.Dirent) bool) error {
	for buf := make([]byte, 32<<10); ; {
		n, next, err := f.ReadDirRaw(ctx, off, buf)
		if err != nil {
			return err
		}
		if n == 0 {
			return f.readMounts(ctx, off, emit)
		}
		for b := buf[:n]; len(b) > 0; {
			e, l := parseDirent(b)
			if l == 0 || !emit(e) {
				return nil
			}
			b = b[l:]
		}
		off = next
	}
}

// readMounts emits the mount points in the directory that the host does not have.
func (f *directory) readMounts(ctx context.Context, off int64, emit func(vfs.Dirent) bool) error {
	names := f.d.MountNames()
	pos := int64(mountOffset)
	for _, name := range names {
		pos++
		if inMounts(off) && pos <= off {
			continue
		}
		if _, err := f.statChild(name); err != unix.ENOENT {
			continue
		}
		if !emit(vfs.Dirent{Name: name, Ino: 1, Type: unix.DT_DIR, NextOff: pos}) {
			return nil
		}
	}
	return nil
}

// Seek implements vfs.Seeker.
func (f *directory) Seek(_ context.Context, cur, off int64, whence int) (int64, error) {
	off, err := vfs.SeekDir(cur, off, whence)
	if err != nil {
		return 0, err
	}
	if off == 0 { // rewinding reads the directory anew
		f.mu.Lock()
		defer f.mu.Unlock()
		_, err := unix.Seek(f.fd, 0, io.SeekStart)
		f.next = 0
		return 0, err
	}
	return off, nil
}
