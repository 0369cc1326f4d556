package loader

import (
	"context"
	"crypto/rand"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/cpuid"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/mm"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// Limits of arguments and environment (execve(2)), in bytes.
const (
	maxArgString = 128 << 10 // one string with its NUL
	minArgSpace  = 128 << 10
	maxArgSpace  = 6 << 20

	// stackRoom is what the stack has below the arguments from the start; the
	// rest comes by growing.
	stackRoom = 128 << 10

	clockTicks = 100 // USER_HZ
)

// stackContents is what differs from program to program.
type stackContents struct {
	argv      []string
	execfn    string
	path      string
	execStack bool
	auxv      [][2]uint64
}

// writeStack makes the main stack, and returns the stack pointer: it points to
// argc, followed by argv, the environment and the auxiliary vector, as the ABI
// has it; the strings lie above.
func writeStack(ctx context.Context, args *Args, c stackContents) (hostarch.Addr, error) {
	// Strings, from the lowest up.
	var strs []byte
	add := func(s string) uint64 {
		off := len(strs)
		strs = append(append(strs, s...), 0)
		return uint64(off)
	}
	space := uint64(0)
	for _, list := range [][]string{c.argv, args.Envv} {
		for _, s := range list {
			if len(s) >= maxArgString {
				return 0, fmt.Errorf("an argument or environment string of %d bytes: %w", len(s), unix.E2BIG)
			}
			space += uint64(len(s)) + 1 + 8
		}
	}
	if limit := min(max(args.StackLimit/4, minArgSpace), maxArgSpace); space > limit {
		return 0, fmt.Errorf("arguments and environment of %d bytes, %d are allowed: %w", space, limit, unix.E2BIG)
	}
	var argOffs, envOffs []uint64
	for _, s := range c.argv {
		argOffs = append(argOffs, add(s))
	}
	argEnd := uint64(len(strs))
	for _, s := range args.Envv {
		envOffs = append(envOffs, add(s))
	}
	envEnd := uint64(len(strs))
	execfn := add(c.execfn)
	platform := add(elfPlatform)
	var random [16]byte
	rand.Read(random[:]) // never fails
	randomOff := uint64(len(strs))
	strs = append(strs, random[:]...)

	top := args.MM.StackTop()
	base := (uint64(top) - 8 - uint64(len(strs))) &^ 15 // of the strings

	hwcap := cpuid.FromContext(ctx).AuxHWCap()
	secure := uint64(0)
	if args.Secure {
		secure = 1
	}
	auxv := append([][2]uint64{
		{linux.AT_HWCAP, hwcap.HWCap},
		{linux.AT_PAGESZ, hostarch.PageSize},
		{linux.AT_CLKTCK, clockTicks},
	}, c.auxv...)
	auxv = append(auxv, [][2]uint64{
		{linux.AT_UID, uint64(args.UID)},
		{linux.AT_EUID, uint64(args.EUID)},
		{linux.AT_GID, uint64(args.GID)},
		{linux.AT_EGID, uint64(args.EGID)},
		{linux.AT_SECURE, secure},
		{linux.AT_RANDOM, base + randomOff},
		{linux.AT_HWCAP2, hwcap.HWCap2},
		{linux.AT_EXECFN, base + execfn},
		{linux.AT_PLATFORM, base + platform},
		{linux.AT_NULL, 0},
	}...)

	// The words below the strings.
	var words []byte
	word := func(v uint64) { words = usermem.ByteOrder.AppendUint64(words, v) }
	word(uint64(len(argOffs)))
	for _, off := range argOffs {
		word(base + off)
	}
	word(0)
	for _, off := range envOffs {
		word(base + off)
	}
	word(0)
	auxStart := len(words)
	for _, a := range auxv {
		word(a[0])
		word(a[1])
	}
	sp := (base - uint64(len(words))) &^ 15

	perms := hostarch.ReadWrite
	perms.Execute = c.execStack
	size := (uint64(top) - sp + stackRoom + hostarch.PageMask) &^ hostarch.PageMask
	if _, err := args.MM.MMap(ctx, memmap.MMapOpts{
		Length: size, Addr: top - hostarch.Addr(size), Fixed: true,
		Private: true, Perms: perms, MaxPerms: hostarch.AnyAccess,
		GrowsDown: true, Stack: true,
	}); err != nil {
		return 0, fmt.Errorf("map the stack of %s: %w", c.path, err)
	}
	for addr, b := range map[uint64][]byte{sp: words, base: strs} {
		if _, err := args.MM.CopyOut(ctx, hostarch.Addr(addr), b, usermem.IOOpts{}); err != nil {
			return 0, fmt.Errorf("write the stack of %s: %w", c.path, err)
		}
	}
	args.MM.SetMetadata(mm.Metadata{
		Args:       hostarch.AddrRange{Start: hostarch.Addr(base), End: hostarch.Addr(base + argEnd)},
		Env:        hostarch.AddrRange{Start: hostarch.Addr(base + argEnd), End: hostarch.Addr(base + envEnd)},
		Auxv:       words[auxStart:],
		Executable: c.path,
	})
	return hostarch.Addr(sp), nil
}
