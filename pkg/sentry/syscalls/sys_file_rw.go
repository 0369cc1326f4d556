package syscalls

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
	"github.com/ringfence/ringfence/pkg/usermem"
)

const (
	// maxRW is the most that one call transfers (read(2), NOTES), in bytes.
	maxRW = 0x7ffff000
	// Data goes through buffers of these sizes, in bytes: most calls ask for
	// little, and large ones are worth a large buffer.
	smallBuffer = 64 << 10
	largeBuffer = 1 << 20

	readEvents  = waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr | waiter.EventRdHUp
	writeEvents = waiter.WritableEvents | waiter.EventHUp | waiter.EventErr
)

var smallBuffers = sync.Pool{New: func() any { b := make([]byte, smallBuffer); return &b }}
var largeBuffers = sync.Pool{New: func() any { b := make([]byte, largeBuffer); return &b }}

// getBuffer returns a buffer of n bytes, but at most largeBuffer, and a function
// that gives it back.
func getBuffer(n int) ([]byte, func()) {
	pool := &smallBuffers
	if n > smallBuffer {
		pool = &largeBuffers
	}
	b := pool.Get().(*[]byte)
	return (*b)[:min(n, len(*b))], func() { pool.Put(b) }
}

// notifier is what untilReady waits for: a file, or a waiter.Queue.
type notifier interface {
	EventRegister(*waiter.Entry) error
	EventUnregister(*waiter.Entry)
}

// untilReady calls f until it does not return EAGAIN, waiting for the events of
// w in between; nonblock makes EAGAIN final.
func untilReady(t *kernel.Task, w notifier, events waiter.EventMask, nonblock bool, f func() error) error {
	err := f()
	if err != unix.EAGAIN || nonblock {
		return err
	}
	if file, ok := w.(*vfs.FileDescription); ok {
		w = file.For(t)
	}
	e, c := waiter.NewChannelEntry(events)
	if err := w.EventRegister(e); err != nil {
		return err
	}
	defer w.EventUnregister(e)
	for {
		if err := f(); err != unix.EAGAIN {
			return err
		}
		if err := t.Block(c); err != nil {
			return err
		}
	}
}

// segment is a piece of application memory.
type segment struct {
	addr hostarch.Addr
	len  int
}

// segments are the pieces that a call transfers, in order.
type segments []segment

func (s segments) total() int {
	n := 0
	for _, seg := range s {
		n += seg.len
	}
	return n
}

// single returns the segments of read(2) and the like.
func single(addr hostarch.Addr, n uint) segments { return segments{{addr, int(min(n, maxRW))}} }

// copyInVector copies in an array of n struct iovec.
func copyInVector(t *kernel.Task, addr hostarch.Addr, n uint) (segments, error) {
	if n > linux.UIO_MAXIOV {
		return nil, unix.EINVAL
	}
	const size = 16
	buf := make([]byte, n*size)
	if err := t.CopyIn(addr, buf); n > 0 && err != nil {
		return nil, err
	}
	segs := make(segments, 0, n)
	left := uint64(maxRW)
	for ; len(buf) > 0; buf = buf[size:] {
		base, l := usermem.ByteOrder.Uint64(buf), usermem.ByteOrder.Uint64(buf[8:])
		if l > 1<<63-1 {
			return nil, unix.EINVAL
		}
		l = min(l, left)
		left -= l
		if l > 0 {
			segs = append(segs, segment{hostarch.Addr(base), int(l)})
		}
	}
	return segs, nil
}

// copyOut copies data to the pieces from offset off on. It returns how much it
// has copied, with an error if that is not all.
func (s segments) copyOut(t *kernel.Task, off int, data []byte) (int, error) {
	return s.each(off, len(data), func(addr hostarch.Addr, from, to int) (int, error) {
		return t.MM().CopyOut(t, addr, data[from:to], usermem.IOOpts{})
	})
}

// copyIn fills data from the pieces from offset off on.
func (s segments) copyIn(t *kernel.Task, off int, data []byte) (int, error) {
	return s.each(off, len(data), func(addr hostarch.Addr, from, to int) (int, error) {
		return t.MM().CopyIn(t, addr, data[from:to], usermem.IOOpts{})
	})
}

func (s segments) each(off, n int, f func(addr hostarch.Addr, from, to int) (int, error)) (int, error) {
	done := 0
	for _, seg := range s {
		if off >= seg.len {
			off -= seg.len
			continue
		}
		if done == n {
			break
		}
		part := min(seg.len-off, n-done)
		addr, ok := seg.addr.AddLength(uint64(off))
		if !ok {
			return done, unix.EFAULT
		}
		m, err := f(addr, done, done+part)
		done += m
		if err != nil {
			return done, err
		}
		off = 0
	}
	return done, nil
}

// position says at which offset to read or write.
type position int64

// currentOffset is the position of the file itself, which moves.
const currentOffset position = -1

// readFile reads from file into segs. Regular files are read until segs are full
// or the file ends, others once.
func readFile(t *kernel.Task, file *vfs.FileDescription, segs segments, pos position, nonblock bool) (uintptr, error) {
	total := segs.total()
	_, seekable := file.Impl().(vfs.ReaderAt)
	nonblock = nonblock || file.Nonblocking()
	buf, free := getBuffer(total)
	defer free()
	done := 0
	for {
		chunk := buf[:min(len(buf), total-done)]
		n := 0
		err := untilReady(t, file, readEvents, nonblock, func() (err error) {
			if pos == currentOffset {
				n, err = file.Read(t, chunk)
			} else {
				n, err = file.PRead(t, chunk, int64(pos)+int64(done))
			}
			return err
		})
		if n > 0 {
			m, cerr := segs.copyOut(t, done, chunk[:n])
			done += m
			if cerr != nil && err == nil {
				err = cerr
			}
		}
		if err != nil && done == 0 {
			return 0, err
		}
		if err != nil || n < len(chunk) || done == total || !seekable || t.Interrupted() {
			return uintptr(done), nil
		}
	}
}

// writeFile writes segs to file, all of them unless that fails or is
// interrupted, or would wait and must not.
func writeFile(t *kernel.Task, file *vfs.FileDescription, segs segments, pos position, nonblock bool) (uintptr, error) {
	total := segs.total()
	nonblock = nonblock || file.Nonblocking()
	total, err := limitSize(t, file, total, pos)
	if err != nil {
		return 0, err
	}
	buf, free := getBuffer(total)
	defer free()
	done := 0
	for {
		chunk := buf[:min(len(buf), total-done)]
		n, err := segs.copyIn(t, done, chunk)
		if n == 0 && err != nil {
			break
		}
		faulted := err
		err = nil
		for off := 0; ; {
			m := 0
			err = untilReady(t, file, writeEvents, nonblock, func() (err error) {
				if pos == currentOffset {
					m, err = file.Write(t, chunk[off:n])
				} else {
					m, err = file.PWrite(t, chunk[off:n], int64(pos)+int64(done))
				}
				return err
			})
			off += m
			done += m
			if err != nil || off == n || m == 0 {
				break
			}
		}
		if err == unix.EPIPE {
			t.SendSignal(kernel.KernelSignal(linux.SIGPIPE)) // cannot fail for the task itself
		}
		if err == nil {
			err = faulted
		}
		if err != nil && done == 0 {
			return 0, err
		}
		if err != nil || done >= total || n == 0 || t.Interrupted() {
			return uintptr(done), nil
		}
	}
	if done == 0 {
		return 0, unix.EFAULT
	}
	return uintptr(done), nil
}

// limitSize cuts a write of n bytes to what RLIMIT_FSIZE allows; beyond it the
// task gets SIGXFSZ and EFBIG.
func limitSize(t *kernel.Task, file *vfs.FileDescription, n int, pos position) (int, error) {
	limit, _ := t.Limit(unix.RLIMIT_FSIZE)
	if limit >= 1<<62 || n == 0 {
		return n, nil
	}
	if _, ok := file.Impl().(vfs.WriterAt); !ok {
		return n, nil
	}
	off := int64(pos)
	if pos == currentOffset {
		whence := unix.SEEK_CUR
		if file.StatusFlags()&unix.O_APPEND != 0 {
			st, err := file.Stat(t)
			if err != nil {
				return 0, err
			}
			off = st.Size
		} else {
			cur, err := file.Seek(t, 0, whence)
			if err != nil {
				return n, nil
			}
			off = cur
		}
	}
	if uint64(off) >= limit {
		t.SendSignal(kernel.KernelSignal(linux.SIGXFSZ)) // cannot fail for the task itself
		return 0, unix.EFBIG
	}
	return int(min(uint64(n), limit-uint64(off))), nil
}

// transfer is readFile or writeFile.
type transfer func(t *kernel.Task, file *vfs.FileDescription, segs segments, pos position, nonblock bool) (uintptr, error)

// onFile does a transfer with the file open as fd.
func onFile(t *kernel.Task, f transfer, fd int32, segs segments, pos position, nonblock bool) (n uintptr, c *kernel.SyscallControl, err error) {
	err = withFile(t, fd, func(file *vfs.FileDescription) error {
		n, err = f(t, file, segs, pos, nonblock)
		return err
	})
	return n, nil, err
}

func sysRead(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return onFile(t, readFile, args[0].Int(), single(args[1].Pointer(), args[2].SizeT()), currentOffset, false)
}

func sysWrite(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return onFile(t, writeFile, args[0].Int(), single(args[1].Pointer(), args[2].SizeT()), currentOffset, false)
}

// vector does a transfer with an array of struct iovec.
func vector(t *kernel.Task, f transfer, args arch.SyscallArguments, pos position, nonblock bool) (uintptr, *kernel.SyscallControl, error) {
	segs, err := copyInVector(t, args[1].Pointer(), args[2].SizeT())
	if err != nil {
		return 0, nil, err
	}
	return onFile(t, f, args[0].Int(), segs, pos, nonblock)
}

func sysReadv(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return vector(t, readFile, args, currentOffset, false)
}

func sysWritev(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return vector(t, writeFile, args, currentOffset, false)
}

// offset returns an offset that a call names; EINVAL if it is negative.
func offset(a arch.SyscallArgument) (position, error) {
	if a.Int64() < 0 {
		return 0, unix.EINVAL
	}
	return position(a.Int64()), nil
}

func sysPread64(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	pos, err := offset(args[3])
	if err != nil {
		return 0, nil, err
	}
	return onFile(t, readFile, args[0].Int(), single(args[1].Pointer(), args[2].SizeT()), pos, false)
}

func sysPwrite64(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	pos, err := offset(args[3])
	if err != nil {
		return 0, nil, err
	}
	return onFile(t, writeFile, args[0].Int(), single(args[1].Pointer(), args[2].SizeT()), pos, false)
}

func sysPreadv(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	pos, err := offset(args[3])
	if err != nil {
		return 0, nil, err
	}
	return vector(t, readFile, args, pos, false)
}

func sysPwritev(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	pos, err := offset(args[3])
	if err != nil {
		return 0, nil, err
	}
	return vector(t, writeFile, args, pos, false)
}

// vector2 is preadv2(2) and pwritev2(2): offset -1 is that of the file.
func vector2(t *kernel.Task, f transfer, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	flags := args[5].Uint()
	if flags&^(unix.RWF_HIPRI|unix.RWF_DSYNC|unix.RWF_SYNC|unix.RWF_NOWAIT) != 0 {
		return 0, nil, unix.EOPNOTSUPP
	}
	pos := currentOffset
	if args[3].Int64() != -1 {
		var err error
		if pos, err = offset(args[3]); err != nil {
			return 0, nil, err
		}
	}
	n, c, err := vector(t, f, args, pos, flags&unix.RWF_NOWAIT != 0)
	if err == nil && flags&(unix.RWF_DSYNC|unix.RWF_SYNC) != 0 {
		err = withFile(t, args[0].Int(), func(file *vfs.FileDescription) error { return file.Sync(t) })
	}
	return n, c, err
}

func sysPreadv2(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return vector2(t, readFile, args)
}

func sysPwritev2(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return vector2(t, writeFile, args)
}

func sysLseek(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	var pos int64
	err := withFile(t, args[0].Int(), func(file *vfs.FileDescription) (err error) {
		if file.StatusFlags()&unix.O_PATH != 0 {
			return unix.EBADF
		}
		pos, err = file.Seek(t, args[1].Int64(), int(args[2].Int()))
		return err
	})
	return uintptr(pos), nil, err
}

// optionalOffset is an off_t in application memory, or if there is none the
// offset of a file.
type optionalOffset struct {
	file *vfs.FileDescription
	addr hostarch.Addr
	off  int64
}

func newOffset(t *kernel.Task, file *vfs.FileDescription, addr hostarch.Addr) (o optionalOffset, err error) {
	o = optionalOffset{file: file, addr: addr}
	if addr == 0 {
		o.off, err = file.Seek(t, 0, unix.SEEK_CUR)
		return o, err
	}
	off, err := usermem.CopyUint64In(t, t.MM(), addr, usermem.IOOpts{})
	if o.off = int64(off); err == nil && o.off < 0 {
		err = unix.EINVAL
	}
	return o, err
}

// store puts the offset back where it came from.
func (o *optionalOffset) store(t *kernel.Task) error {
	if o.addr != 0 {
		return usermem.CopyUint64Out(t, t.MM(), o.addr, uint64(o.off), usermem.IOOpts{})
	}
	_, err := o.file.Seek(t, o.off, unix.SEEK_SET)
	return err
}

func sysSendfile(t *kernel.Task, args arch.SyscallArguments) (n uintptr, c *kernel.SyscallControl, err error) {
	out, err := t.GetFile(args[0].Int())
	if err != nil {
		return 0, nil, err
	}
	defer out.DecRef()
	in, err := t.GetFile(args[1].Int())
	if err != nil {
		return 0, nil, err
	}
	defer in.DecRef()
	if !in.Readable() || !out.Writable() {
		return 0, nil, unix.EBADF
	}
	if _, ok := in.Impl().(vfs.ReaderAt); !ok || out.StatusFlags()&unix.O_APPEND != 0 {
		return 0, nil, unix.EINVAL
	}
	from, err := newOffset(t, in, args[2].Pointer())
	if err != nil {
		return 0, nil, err
	}
	n, err = copyFile(t, &from, int(min(args[3].SizeT(), maxRW)), func(p []byte) (m int, err error) {
		err = untilReady(t, out, writeEvents, out.Nonblocking(), func() (err error) {
			m, err = out.Write(t, p)
			return err
		})
		if err == unix.EPIPE {
			t.SendSignal(kernel.KernelSignal(linux.SIGPIPE)) // cannot fail for the task itself
		}
		return m, err
	})
	return n, nil, err
}

// copyFile moves up to n bytes at from to write, and stores the offset behind
// what was taken.
func copyFile(t *kernel.Task, from *optionalOffset, n int, write func([]byte) (int, error)) (uintptr, error) {
	buf, free := getBuffer(n)
	defer free()
	done := 0
	var err error
	for done < n && err == nil && !(done > 0 && t.Interrupted()) {
		var r int
		r, err = from.file.PRead(t, buf[:min(len(buf), n-done)], from.off)
		if r == 0 {
			break
		}
		for off := 0; off < r && err == nil; {
			var w int
			w, err = write(buf[off:r])
			off += w
			done += w
			from.off += int64(w)
			if w == 0 {
				break
			}
		}
	}
	if done == 0 {
		return 0, err
	}
	return uintptr(done), from.store(t)
}

func sysCopyFileRange(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	in, err := t.GetFile(args[0].Int())
	if err != nil {
		return 0, nil, err
	}
	defer in.DecRef()
	out, err := t.GetFile(args[2].Int())
	if err != nil {
		return 0, nil, err
	}
	defer out.DecRef()
	if args[5].Uint() != 0 {
		return 0, nil, unix.EINVAL
	}
	ist, err := in.Stat(t)
	if err != nil {
		return 0, nil, err
	}
	ost, err := out.Stat(t)
	if err != nil {
		return 0, nil, err
	}
	typ := func(st *unix.Stat_t) uint32 { return st.Mode & unix.S_IFMT }
	switch {
	case typ(&ist) == unix.S_IFDIR || typ(&ost) == unix.S_IFDIR:
		return 0, nil, unix.EISDIR
	case typ(&ist) != unix.S_IFREG || typ(&ost) != unix.S_IFREG:
		return 0, nil, unix.EINVAL
	case !in.Readable() || !out.Writable() || out.StatusFlags()&unix.O_APPEND != 0:
		return 0, nil, unix.EBADF
	}
	n := int64(min(args[4].SizeT(), maxRW))
	from, err := newOffset(t, in, args[1].Pointer())
	if err != nil {
		return 0, nil, err
	}
	to, err := newOffset(t, out, args[3].Pointer())
	if err != nil {
		return 0, nil, err
	}
	if ist.Dev == ost.Dev && ist.Ino == ost.Ino && from.off < to.off+n && to.off < from.off+n {
		return 0, nil, unix.EINVAL
	}
	done, err := copyFile(t, &from, int(n), func(p []byte) (int, error) {
		m, err := out.PWrite(t, p, to.off)
		to.off += int64(m)
		return m, err
	})
	if done > 0 && err == nil {
		err = to.store(t)
	}
	return done, nil, err
}

// sysSplice refuses, as a file system without support for splice(2) does;
// programs copy then.
func sysSplice(*kernel.Task, arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, unix.EINVAL
}

func sysFtruncate(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, withFile(t, args[0].Int(), func(file *vfs.FileDescription) error {
		return file.Truncate(t, args[1].Int64())
	})
}

func sysFallocate(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, withFile(t, args[0].Int(), func(file *vfs.FileDescription) error {
		off, length := args[2].Int64(), args[3].Int64()
		if off < 0 || length <= 0 {
			return unix.EINVAL
		}
		if !file.Writable() {
			return unix.EBADF
		}
		f, ok := file.Impl().(vfs.Fallocater)
		if ok {
			return f.Fallocate(t, args[1].Uint(), off, length)
		}
		if st, err := file.Stat(t); err == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO {
			return unix.ESPIPE
		}
		return unix.ENODEV
	})
}

func sysFadvise64(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, withFile(t, args[0].Int(), func(file *vfs.FileDescription) error {
		length, advice := args[2].Int64(), args[3].Int()
		if length < 0 || advice < 0 || advice > unix.FADV_NOREUSE {
			return unix.EINVAL
		}
		if file.StatusFlags()&unix.O_PATH != 0 {
			return unix.EBADF
		}
		if a, ok := file.Impl().(vfs.Adviser); ok {
			return a.Advise(t, args[1].Int64(), length, int(advice))
		}
		if st, err := file.Stat(t); err == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO {
			return unix.ESPIPE
		}
		return nil
	})
}

func sysReadahead(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, withFile(t, args[0].Int(), func(file *vfs.FileDescription) error {
		if !file.Readable() {
			return unix.EBADF
		}
		st, err := file.Stat(t)
		if err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
			err = unix.EINVAL
		}
		return err // the host reads ahead on its own
	})
}

func sysFsync(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, withFile(t, args[0].Int(), func(file *vfs.FileDescription) error {
		if file.StatusFlags()&unix.O_PATH != 0 {
			return unix.EBADF
		}
		return file.Sync(t)
	})
}

// sysSyncfs writes the file alone: what the host keeps of others is not the
// sandbox's to flush.
func sysSyncfs(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	_, _, err := sysFsync(t, args)
	if err == unix.EINVAL {
		err = nil
	}
	return 0, nil, err
}

func sysSync(*kernel.Task, arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, nil
}

// maxDirents is the most that one call of getdents64(2) returns, in bytes.
const maxDirents = 256 << 10

func sysGetdents64(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	n := 0
	err := withFile(t, args[0].Int(), func(file *vfs.FileDescription) (err error) {
		if file.StatusFlags()&unix.O_PATH != 0 {
			return unix.EBADF
		}
		buf, free := getBuffer(int(min(args[2].Uint(), maxDirents)))
		defer free()
		if n, err = file.ReadDirRaw(t, buf); err != nil {
			return err
		}
		return t.CopyOut(args[1].Pointer(), buf[:n])
	})
	return uintptr(n), nil, err
}
