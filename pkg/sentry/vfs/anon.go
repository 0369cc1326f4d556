package vfs

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// anonDevice is the st_dev of files that no mount holds: pipes, sockets,
// eventfds. Its major number 0 is that of the kernel's own unnamed devices.
const anonDevice = 0xd

var lastAnonIno atomic.Uint64

// anonFile is embedded by files that have no name: it gives them an inode of
// their own.
type anonFile struct {
	ino  uint64
	mode uint32
}

// newAnonFile returns an anonFile of the given type and permissions (inode(7)).
func newAnonFile(mode uint32) anonFile {
	return anonFile{ino: lastAnonIno.Add(1), mode: mode}
}

func (a *anonFile) stat() unix.Stat_t {
	st := unix.Stat_t{Dev: anonDevice, Ino: a.ino, Mode: a.mode, Blksize: 4096}
	st.Nlink = 1
	return st
}
