package hostfs

import (
	"bytes"
	"encoding/binary"

	"github.com/ringfence/ringfence/pkg/sentry/vfs"
)

// direntHeader is the size of struct linux_dirent64 before the name.
const direntHeader = 19

// direntSize returns the inode, the offset behind it and the length of the first
// entry in b, in the format of getdents64(2). The length is 0 if there is none.
func direntSize(b []byte) (ino uint64, next int64, n int) {
	if len(b) <= direntHeader {
		return 0, 0, 0
	}
	n = int(binary.LittleEndian.Uint16(b[16:]))
	if n <= direntHeader || n > len(b) {
		return 0, 0, 0
	}
	return binary.LittleEndian.Uint64(b), int64(binary.LittleEndian.Uint64(b[8:])), n
}

// parseDirent decodes the first entry in b and returns its length, 0 if there is
// none.
func parseDirent(b []byte) (vfs.Dirent, int) {
	ino, next, n := direntSize(b)
	if n == 0 {
		return vfs.Dirent{}, 0
	}
	name := b[direntHeader:n]
	if i := bytes.IndexByte(name, 0); i >= 0 {
		name = name[:i]
	}
	return vfs.Dirent{Ino: ino, NextOff: next, Type: b[18], Name: string(name)}, n
}
