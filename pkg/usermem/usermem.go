// Package usermem defines how the Sentry reads and writes application memory,
// and the helpers that every user of that memory needs.
//
// It depends on hostarch and golang.org/x/sys. Everything that comes out of an IO was written
// by the application and is hostile: copy once, then validate the copy.
package usermem

import (
	"bytes"
	"context"
	"encoding/binary"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
)

// IOOpts are the options of one access.
type IOOpts struct {
	// IgnorePermissions lets the access go through whatever the mapping's
	// protection (as ptrace(2) does), but not through memory that is unmapped.
	IgnorePermissions bool
}

// IO gives access to the contents of an application's virtual memory.
//
// Copies stop at the first byte that cannot be accessed: they return the number
// of bytes done and, when that is less than asked, an error: unix.EFAULT, or a
// *memmap.BusError for a mapping without a page behind it.
type IO interface {
	// CopyOut copies src to the memory at addr.
	CopyOut(ctx context.Context, addr hostarch.Addr, src []byte, opts IOOpts) (int, error)

	// CopyIn copies the memory at addr to dst.
	CopyIn(ctx context.Context, addr hostarch.Addr, dst []byte, opts IOOpts) (int, error)

	// ZeroOut sets toZero bytes at addr to 0. toZero must not be negative.
	ZeroOut(ctx context.Context, addr hostarch.Addr, toZero int64, opts IOOpts) (int64, error)

	// SwapUint32 atomically stores new at addr and returns what was there. addr
	// must be a multiple of 4, else the error is EINVAL.
	SwapUint32(ctx context.Context, addr hostarch.Addr, new uint32, opts IOOpts) (uint32, error)

	// CompareAndSwapUint32 atomically replaces old at addr by new, and returns
	// what was there before in either case. addr must be a multiple of 4.
	CompareAndSwapUint32(ctx context.Context, addr hostarch.Addr, old, new uint32, opts IOOpts) (uint32, error)

	// LoadUint32 atomically loads the value at addr, a multiple of 4.
	LoadUint32(ctx context.Context, addr hostarch.Addr, opts IOOpts) (uint32, error)
}

// ByteOrder is the byte order of every architecture that Ringfence supports.
var ByteOrder = binary.LittleEndian

// stringChunk is how much of a string is copied at a time, in bytes.
const stringChunk = 256

// stringChunks are for strings that are shorter, as most are.
var stringChunks = sync.Pool{New: func() any { return new([stringChunk]byte) }}

// CopyStringIn copies the NUL-terminated string at addr, without the NUL. It
// fails with ENAMETOOLONG when there is no NUL in the first maxlen bytes.
func CopyStringIn(ctx context.Context, uio IO, addr hostarch.Addr, maxlen int, opts IOOpts) (string, error) {
	var out []byte
	array := stringChunks.Get().(*[stringChunk]byte)
	defer stringChunks.Put(array)
	for len(out) < maxlen {
		// Stop at page ends: the string may end just before an unmapped page.
		chunk := min(int(hostarch.PageSize-addr.PageOffset()), stringChunk, maxlen-len(out))
		buf := array[:chunk]
		n, err := uio.CopyIn(ctx, addr, buf, opts)
		if i := bytes.IndexByte(buf[:n], 0); i >= 0 {
			return string(append(out, buf[:i]...)), nil
		}
		if err != nil {
			return "", err
		}
		out = append(out, buf...)
		end, ok := addr.AddLength(uint64(chunk))
		if !ok {
			return "", unix.EFAULT
		}
		addr = end
	}
	return "", unix.ENAMETOOLONG
}

// CopyUint64In copies the 64-bit value at addr.
func CopyUint64In(ctx context.Context, uio IO, addr hostarch.Addr, opts IOOpts) (uint64, error) {
	var buf [8]byte
	if _, err := uio.CopyIn(ctx, addr, buf[:], opts); err != nil {
		return 0, err
	}
	return ByteOrder.Uint64(buf[:]), nil
}

// CopyUint64Out copies v to addr.
func CopyUint64Out(ctx context.Context, uio IO, addr hostarch.Addr, v uint64, opts IOOpts) error {
	var buf [8]byte
	ByteOrder.PutUint64(buf[:], v)
	_, err := uio.CopyOut(ctx, addr, buf[:], opts)
	return err
}

// CopyUint32In copies the 32-bit value at addr. Unlike LoadUint32 it may tear.
func CopyUint32In(ctx context.Context, uio IO, addr hostarch.Addr, opts IOOpts) (uint32, error) {
	var buf [4]byte
	if _, err := uio.CopyIn(ctx, addr, buf[:], opts); err != nil {
		return 0, err
	}
	return ByteOrder.Uint32(buf[:]), nil
}

// CopyUint32Out copies v to addr.
func CopyUint32Out(ctx context.Context, uio IO, addr hostarch.Addr, v uint32, opts IOOpts) error {
	var buf [4]byte
	ByteOrder.PutUint32(buf[:], v)
	_, err := uio.CopyOut(ctx, addr, buf[:], opts)
	return err
}
