package kernel

import (
	"time"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/mm"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
)

// SetKillDelay sets killDelay, and returns what it was.
func SetKillDelay(d time.Duration) time.Duration {
	defer func() { killDelay = d }()
	return killDelay
}

// StartBare makes the first process without a program: its memory is length
// bytes at addr, which are its stack as well.
func (k *Kernel) StartBare(fdt *vfs.FDTable, fs *vfs.FSContext, addr hostarch.Addr, length uint64) error {
	t := k.newInit(fdt, fs)
	m, err := mm.New(k.cfg.Platform, k.cfg.MemoryFile, mm.Options{Limits: t.tg.memoryLimits()})
	if err != nil {
		return err
	}
	if _, err := m.MMap(t, memmap.MMapOpts{
		Addr: addr, Length: length, Fixed: true, Unmap: true, Private: true,
		Perms: hostarch.ReadWrite, MaxPerms: hostarch.AnyAccess,
	}); err != nil {
		return err
	}
	t.mm = m
	t.ac.SetStack(uintptr(addr) + uintptr(length))
	t.ac.SetIP(uintptr(addr))
	t.start()
	return nil
}
