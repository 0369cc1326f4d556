package tmpfs

import (
	"context"
	"io"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/filemap"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
)

// smallSize is up to how many bytes contents lie in the Sentry's heap: most
// files are small, and descriptors few.
const smallSize = 64 << 10

// contents is what a regular file holds: bytes in the heap, or a host memory
// file once there are many of them, or they are mapped.
type contents struct {
	n *inode

	mu    sync.RWMutex
	small []byte
	fd    int // memfd, if object is not nil
	// object keeps fd open for mappings; the inode has one reference on it.
	object *filemap.Object
	// sizeBytes and charged count what the file system's limit is checked with.
	sizeBytes int64
	charged   int64
	seals     uint32
	sealable  bool
}

func roundUp(n int64) int64 { return (n + 4095) &^ 4095 }

// chargeLocked accounts for contents of size bytes: ENOSPC if there is no room.
func (c *contents) chargeLocked(size int64) error {
	want := roundUp(size)
	if delta := want - c.charged; delta > 0 {
		if c.n.fs.used.Add(delta) > c.n.fs.maxSize {
			c.n.fs.used.Add(-delta)
			return unix.ENOSPC
		}
	} else {
		c.n.fs.used.Add(delta)
	}
	c.charged = want
	return nil
}

// promoteLocked moves the contents to a host memory file.
func (c *contents) promoteLocked() error {
	if c.object != nil {
		return nil
	}
	fd, err := unix.MemfdCreate("ringfence-tmpfs", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	for off := 0; off < len(c.small); {
		n, err := unix.Pwrite(fd, c.small[off:], int64(off))
		if err != nil {
			unix.Close(fd)
			return err
		}
		off += n
	}
	if err := unix.Ftruncate(fd, c.sizeBytes); err != nil {
		unix.Close(fd)
		return err
	}
	c.fd, c.small = fd, nil
	// The memory lives on in mappings when the inode is gone.
	c.object = filemap.New(c.n.fs.dev, c.n.ino, nil)
	c.object.Discard()
	return nil
}

// free gives the contents up with the inode.
func (c *contents) free() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n.fs.used.Add(-c.charged)
	c.charged = 0
	if c.object != nil {
		c.object.DecRef()
		unix.Close(c.fd)
		c.object = nil
	}
	c.small = nil
}

// size returns the length in bytes, and the blocks of 512 bytes in use.
func (c *contents) size() (size, blocks int64) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.object == nil {
		return c.sizeBytes, roundUp(int64(len(c.small))) / 512
	}
	var st unix.Stat_t
	if unix.Fstat(c.fd, &st) != nil {
		return c.sizeBytes, 0
	}
	return c.sizeBytes, st.Blocks
}

func (c *contents) truncate(size int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case size < 0:
		return unix.EINVAL
	case size > maxFile:
		return unix.EFBIG
	case size > c.sizeBytes && c.seals&unix.F_SEAL_GROW != 0,
		size < c.sizeBytes && c.seals&unix.F_SEAL_SHRINK != 0:
		return unix.EPERM
	}
	if c.object == nil && size > smallSize {
		if err := c.promoteLocked(); err != nil {
			return err
		}
	}
	if c.object != nil {
		if err := unix.Ftruncate(c.fd, size); err != nil {
			return err
		}
	} else if size < int64(len(c.small)) {
		clear(c.small[size:]) // what is written later must not show it
		c.small = c.small[:size]
	}
	c.sizeBytes = size
	// A hole costs nothing; what was there before has been paid for.
	return c.chargeLocked(min(size, c.charged))
}

// maxFile is the largest length of a file, in bytes.
const maxFile = 1<<63 - 1<<16

func (c *contents) readAt(p []byte, off int64) (int, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if off >= c.sizeBytes {
		return 0, nil
	}
	p = p[:min(int64(len(p)), c.sizeBytes-off)]
	if c.object == nil {
		n := 0
		if off < int64(len(c.small)) {
			n = copy(p, c.small[off:])
		}
		clear(p[n:])
		return len(p), nil
	}
	for {
		n, err := unix.Pread(c.fd, p, off)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// writeAt writes p at off, or with off < 0 at the end; it returns the offset
// behind it.
func (c *contents) writeAt(p []byte, off int64) (int, int64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if off < 0 {
		off = c.sizeBytes
	}
	if len(p) == 0 {
		return 0, off, nil
	}
	if c.seals&unix.F_SEAL_WRITE != 0 {
		return 0, off, unix.EPERM
	}
	if off >= maxFile {
		return 0, off, unix.EFBIG
	}
	end := off + int64(len(p))
	if end > c.sizeBytes && c.seals&unix.F_SEAL_GROW != 0 {
		if off >= c.sizeBytes {
			return 0, off, unix.EPERM
		}
		p, end = p[:c.sizeBytes-off], c.sizeBytes
	}
	// Charge for what is written, as if there were no holes to fill.
	charge := min(c.charged+roundUp(int64(len(p))), roundUp(max(end, c.sizeBytes)))
	if err := c.chargeLocked(max(charge, c.charged)); err != nil {
		return 0, off, err
	}
	if c.object == nil && end > smallSize {
		if err := c.promoteLocked(); err != nil {
			return 0, off, err
		}
	}
	n := len(p)
	if c.object == nil {
		if end > int64(len(c.small)) {
			c.small = grow(c.small, int(end))
		}
		copy(c.small[off:], p)
	} else {
		var err error
		for {
			n, err = unix.Pwrite(c.fd, p, off)
			if err != unix.EINTR {
				break
			}
		}
		if err != nil {
			return 0, off, err
		}
	}
	c.sizeBytes = max(c.sizeBytes, off+int64(n))
	return n, off + int64(n), nil
}

// grow returns b with length n; new bytes are zero.
func grow(b []byte, n int) []byte {
	if n <= cap(b) {
		return b[:n] // truncate has cleared what is behind
	}
	c := make([]byte, n, max(n, min(2*n, smallSize)))
	copy(c, b)
	return c
}

// regular is an open regular file.
type regular struct {
	waiter.AlwaysReady
	*inode
	d     *vfs.Dentry
	write bool
}

// open returns a description of the regular file n, opened at d.
func (n *inode) open(d *vfs.Dentry, flags uint32) *vfs.FileDescription {
	write := flags&unix.O_ACCMODE != unix.O_RDONLY
	return vfs.NewFileAt(&regular{inode: n, d: d, write: write}, flags, d)
}

// Release implements vfs.Impl.
func (*regular) Release() {}

// Locks implements vfs.Locker.
func (f *regular) Locks() *vfs.Locks { return &f.locks }

// ReadAt implements vfs.ReaderAt.
func (f *regular) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	return f.data.readAt(p, off)
}

// WriteAt implements vfs.WriterAt.
func (f *regular) WriteAt(_ context.Context, p []byte, off int64) (int, error) {
	n, _, err := f.data.writeAt(p, off)
	if n > 0 {
		f.touch()
	}
	return n, err
}

// Append implements vfs.WriterAt.
func (f *regular) Append(_ context.Context, p []byte) (int, int64, error) {
	n, end, err := f.data.writeAt(p, -1)
	if n > 0 {
		f.touch()
	}
	return n, end, err
}

// Size implements vfs.Sizer.
func (f *regular) Size(context.Context) (int64, error) {
	size, _ := f.data.size()
	return size, nil
}

// Seek implements vfs.Seeker.
func (f *regular) Seek(_ context.Context, cur, off int64, whence int) (int64, error) {
	size, _ := f.data.size()
	switch whence {
	case io.SeekStart:
	case io.SeekCurrent:
		off += cur
	case io.SeekEnd:
		off += size
	case unix.SEEK_DATA, unix.SEEK_HOLE:
		if off < 0 || off >= size {
			return 0, unix.ENXIO
		}
		f.data.mu.RLock()
		defer f.data.mu.RUnlock()
		if f.data.object != nil {
			return unix.Seek(f.data.fd, off, whence)
		}
		if whence == unix.SEEK_HOLE {
			off = size
		}
	default:
		return 0, unix.EINVAL
	}
	if off < 0 {
		return 0, unix.EINVAL
	}
	return off, nil
}

// Truncate implements vfs.Truncater.
func (f *regular) Truncate(_ context.Context, size int64) error {
	if err := f.data.truncate(size); err != nil {
		return err
	}
	f.touch()
	return nil
}

// Sync implements vfs.Syncer.
func (*regular) Sync(context.Context) error { return nil }

// Fallocate implements vfs.Fallocater.
func (f *regular) Fallocate(_ context.Context, mode uint32, off, length int64) error {
	const keep, punch = unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE
	c := f.data
	c.mu.Lock()
	defer c.mu.Unlock()
	end := off + length
	switch {
	case mode&^(keep|punch) != 0, mode == punch:
		return unix.EOPNOTSUPP
	case end < off || end > maxFile:
		return unix.EFBIG
	case mode&punch != 0 && c.seals&unix.F_SEAL_WRITE != 0,
		mode&keep == 0 && end > c.sizeBytes && c.seals&unix.F_SEAL_GROW != 0:
		return unix.EPERM
	}
	if mode&punch == 0 {
		if err := c.chargeLocked(max(c.charged, roundUp(end))); err != nil {
			return err
		}
	}
	if err := c.promoteLocked(); err != nil {
		return err
	}
	if err := unix.Fallocate(c.fd, mode, off, length); err != nil {
		return err
	}
	if mode&keep == 0 {
		c.sizeBytes = max(c.sizeBytes, end)
	}
	f.touch()
	return nil
}

// ConfigureMMap implements vfs.MMapper.
func (f *regular) ConfigureMMap(_ context.Context, opts *memmap.MMapOpts) error {
	c := f.data
	c.mu.Lock()
	defer c.mu.Unlock()
	if !opts.Private && f.write && c.seals&(unix.F_SEAL_WRITE|unix.F_SEAL_FUTURE_WRITE) != 0 {
		if opts.Perms.Write {
			return unix.EPERM
		}
		opts.MaxPerms.Write = false
	}
	if err := c.promoteLocked(); err != nil {
		return err
	}
	if err := c.object.AddFD(c.fd, true, f.d.String()); err != nil {
		return err
	}
	opts.Mappable, opts.MappingIdentity = c.object, c.object
	return nil
}

// Seals implements vfs.Sealer.
func (f *regular) Seals() (uint32, error) {
	f.data.mu.RLock()
	defer f.data.mu.RUnlock()
	if !f.data.sealable {
		return unix.F_SEAL_SEAL, nil
	}
	return f.data.seals, nil
}

// AddSeals implements vfs.Sealer.
func (f *regular) AddSeals(seals uint32) error {
	const all = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE | unix.F_SEAL_FUTURE_WRITE
	if seals&^all != 0 {
		return unix.EINVAL
	}
	if !f.write {
		return unix.EPERM
	}
	f.data.mu.Lock()
	defer f.data.mu.Unlock()
	if !f.data.sealable || f.data.seals&unix.F_SEAL_SEAL != 0 {
		return unix.EPERM
	}
	f.data.seals |= seals
	return nil
}

// NewMemfd returns a new file without a name in fs, open for reading and writing
// (memfd_create(2)). sealable is MFD_ALLOW_SEALING.
func NewMemfd(ctx context.Context, fs *FS, name string, sealable bool) *vfs.FileDescription {
	n := fs.newInode(ctx, unix.S_IFREG|0o777)
	n.data.sealable = sealable
	d := vfs.NewDentry(nil, nil, n, "/memfd:"+name)
	return n.open(d, unix.O_RDWR)
}
