package kernel

import (
	"context"
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/waiter"
)

// pidFD is the file of pidfd_open(2): it is readable when its process has ended.
type pidFD struct{ tg *ThreadGroup }

// Readiness implements waiter.Waitable.
func (p *pidFD) Readiness(mask waiter.EventMask) waiter.EventMask {
	p.tg.k.mu.Lock()
	defer p.tg.k.mu.Unlock()
	if p.tg.zombie {
		return mask & waiter.ReadableEvents
	}
	return 0
}

// EventRegister implements waiter.Waitable.
func (p *pidFD) EventRegister(e *waiter.Entry) error { return p.tg.ended.EventRegister(e) }

// EventUnregister implements waiter.Waitable.
func (p *pidFD) EventUnregister(e *waiter.Entry) { p.tg.ended.EventUnregister(e) }

// Stat implements vfs.Impl.
func (p *pidFD) Stat(context.Context) (unix.Stat_t, error) {
	return unix.Stat_t{Mode: 0o600, Nlink: 1, Ino: uint64(p.tg.id)}, nil
}

// Release implements vfs.Impl.
func (p *pidFD) Release() {}

// NewPidFD returns a file for tg with one reference (pidfd_open(2)). flags may
// have O_NONBLOCK.
func NewPidFD(tg *ThreadGroup, flags uint32) *vfs.FileDescription {
	return vfs.NewFileDescription(&pidFD{tg}, unix.O_RDWR|flags, func() string {
		return fmt.Sprintf("anon_inode:[pidfd:%d]", tg.id)
	})
}

// ProcessOfPidFD returns the process that a file of NewPidFD stands for, or nil
// if file is another.
func ProcessOfPidFD(file *vfs.FileDescription) *ThreadGroup {
	if p, ok := file.Impl().(*pidFD); ok {
		return p.tg
	}
	return nil
}

// addPidFD gives t a descriptor for tg, and copies its number to addr.
func (t *Task) addPidFD(tg *ThreadGroup, addr hostarch.Addr) error {
	file := NewPidFD(tg, 0)
	limit, _ := t.Limit(linux.RLIMIT_NOFILE)
	fd, err := t.fdt.NewFD(0, file, true, limit)
	if err != nil {
		file.DecRef()
		return err
	}
	var buf [4]byte
	binary.LittleEndian.PutUint32(buf[:], uint32(fd))
	if err := t.CopyOut(addr, buf[:]); err != nil {
		if f := t.fdt.Remove(fd); f != nil {
			f.DecRef()
		}
		return err
	}
	return nil
}
