package kernel

import (
	"context"
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
)

// signalFD is the file of signalfd(2). It is ready when a signal of set is
// pending for the thread that asks, or its process; a read takes the signals of
// the thread that reads.
type signalFD struct {
	pendingFor // the thread that made it, for those who ask without a task
	// set is protected by Kernel.mu.
	set linux.SignalSet
}

// For implements vfs.ContextWaitable.
func (s *signalFD) For(ctx context.Context) waiter.Waitable {
	if t := TaskFromContext(ctx); t != nil {
		return pendingFor{s, t}
	}
	return s
}

// pendingFor says when a signal of a signalFD is pending for t.
type pendingFor struct {
	s *signalFD
	t *Task
}

// Readiness implements waiter.Waitable.
func (p pendingFor) Readiness(mask waiter.EventMask) waiter.EventMask {
	p.t.k.mu.Lock()
	defer p.t.k.mu.Unlock()
	if (p.t.pending.set|p.t.tg.pending.set)&p.s.set != 0 {
		return mask & waiter.ReadableEvents
	}
	return 0
}

// EventRegister implements waiter.Waitable.
func (p pendingFor) EventRegister(e *waiter.Entry) error { return p.t.tg.signalled.EventRegister(e) }

// EventUnregister implements waiter.Waitable.
func (p pendingFor) EventUnregister(e *waiter.Entry) { p.t.tg.signalled.EventUnregister(e) }

// Stat implements vfs.Impl.
func (s *signalFD) Stat(context.Context) (unix.Stat_t, error) {
	return unix.Stat_t{Mode: 0o600, Nlink: 1}, nil
}

// Release implements vfs.Impl.
func (s *signalFD) Release() {}

// signalFDInfoSize is the size of struct signalfd_siginfo in bytes.
const signalFDInfoSize = 128

// Read implements vfs.StreamReader.
func (s *signalFD) Read(ctx context.Context, p []byte) (int, error) {
	t := TaskFromContext(ctx)
	if t == nil || len(p) < signalFDInfoSize {
		return 0, unix.EINVAL
	}
	k := t.k
	k.mu.Lock()
	defer k.mu.Unlock()
	n := 0
	for ; len(p)-n >= signalFDInfoSize; n += signalFDInfoSize {
		info := t.takeLocked(s.set)
		if info == nil {
			break
		}
		putSignalFDInfo(p[n:n+signalFDInfoSize], info)
	}
	if n == 0 {
		return 0, unix.EAGAIN
	}
	return n, nil
}

// putSignalFDInfo writes info as struct signalfd_siginfo.
func putSignalFDInfo(b []byte, info *linux.SignalInfo) {
	clear(b)
	u32 := func(off int, v int32) { binary.LittleEndian.PutUint32(b[off:], uint32(v)) }
	u64 := func(off int, v uint64) { binary.LittleEndian.PutUint64(b[off:], v) }
	u32(0, info.Signo)
	u32(4, info.Errno)
	u32(8, info.Code)
	switch sig := linux.Signal(info.Signo); {
	case info.Code == linux.SI_TIMER:
		u32(24, info.TimerID())
		u32(32, info.Overrun())
		u32(44, int32(info.Sigval()))
		u64(48, info.Sigval())
	case info.Code > 0 && sig == linux.SIGCHLD:
		u32(12, info.PID())
		u32(16, info.UID())
		u32(40, info.Status())
		copy(b[56:72], info.Fields[16:32]) // si_utime, si_stime
	case info.Code > 0 && synchronousSignals.Has(sig):
		u64(72, info.Addr())
	default:
		u32(12, info.PID())
		u32(16, info.UID())
		u32(44, int32(info.Sigval()))
		u64(48, info.Sigval())
	}
}

// NewSignalFD returns a file with one reference for the signals of set
// (signalfd(2)). flags may have O_NONBLOCK.
func (t *Task) NewSignalFD(set linux.SignalSet, flags uint32) *vfs.FileDescription {
	s := &signalFD{set: set &^ linux.UnblockableSignals}
	s.pendingFor = pendingFor{s, t}
	return vfs.NewFileDescription(s, unix.O_RDONLY|flags, func() string {
		return "anon_inode:[signalfd]"
	})
}

// SetSignalFD replaces the signals of a file of NewSignalFD; EINVAL if file is
// another.
func SetSignalFD(file *vfs.FileDescription, set linux.SignalSet) error {
	s, ok := file.Impl().(*signalFD)
	if !ok {
		return unix.EINVAL
	}
	s.t.k.mu.Lock()
	s.set = set &^ linux.UnblockableSignals
	s.t.k.mu.Unlock()
	s.t.tg.signalled.Notify(waiter.ReadableEvents)
	return nil
}
