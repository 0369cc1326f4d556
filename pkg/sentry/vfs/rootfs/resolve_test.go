package rootfs_test

import (
	"math/rand/v2"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestResolveLikeKernel makes random trees full of symbolic links, and compares
// what random paths lead to with what the kernel says with RESOLVE_IN_ROOT.
func TestResolveLikeKernel(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	names := []string{"a", "b", "c", "d"}
	path := func(n int) string {
		var p strings.Builder
		if rng.IntN(3) == 0 {
			p.WriteString("/")
		}
		for i := range 1 + rng.IntN(n) {
			if i > 0 {
				p.WriteString(strings.Repeat("/", 1+rng.IntN(20)/19))
			}
			switch rng.IntN(10) {
			case 0:
				p.WriteString("..")
			case 1:
				p.WriteString(".")
			default:
				p.WriteString(names[rng.IntN(len(names))])
			}
		}
		if rng.IntN(6) == 0 {
			p.WriteString("/")
		}
		return p.String()
	}
	found := 0
	for range 20 {
		s := newSandbox(t, true)
		for range 150 {
			// Whether these succeed does not matter. The host's own calls would follow
			// absolute links out of the tree.
			switch rng.IntN(4) {
			case 0:
				s.fs.MknodAt(ctx, nil, path(4), unix.S_IFREG|0o644)
			case 1:
				s.fs.SymlinkAt(ctx, path(4), nil, path(4))
			default:
				s.fs.MkdirAt(ctx, nil, path(4), 0o755)
			}
		}
		root, err := unix.Open(s.host, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(t, err)
		for range 1000 {
			p := path(6)
			flags, at := uint64(unix.O_PATH|unix.O_CLOEXEC), 0
			if rng.IntN(2) == 0 {
				flags, at = flags|unix.O_NOFOLLOW, unix.AT_SYMLINK_NOFOLLOW
			}
			var want unix.Stat_t
			fd, werr := -1, error(unix.EAGAIN) // which any rename on the host can cause
			for try := 0; werr == unix.EAGAIN && try < 1000; try++ {
				fd, werr = unix.Openat2(root, p, &unix.OpenHow{Flags: flags, Resolve: unix.RESOLVE_IN_ROOT})
			}
			if werr == nil {
				must(t, unix.Fstat(fd, &want))
				unix.Close(fd)
			}
			got, gerr := s.fs.StatAt(ctx, nil, p, at)
			if gerr != werr || got.Ino != want.Ino || got.Mode != want.Mode {
				t.Fatalf("seed %d: %q (flags %#x): inode %d, %v; the kernel says %d, %v", seed, p, at, got.Ino, gerr, want.Ino, werr)
			}
			if werr == nil {
				found++
				// The path that the Sentry has for it leads there too.
				f, err := s.fs.OpenAt(ctx, nil, p, uint32(flags), 0, 0)
				must(t, err)
				again, err := s.fs.StatAt(ctx, nil, f.Path(), unix.AT_SYMLINK_NOFOLLOW)
				if again.Ino != want.Ino {
					t.Fatalf("seed %d: %q has path %q, which is inode %d, %v; want %d", seed, p, f.Path(), again.Ino, err, want.Ino)
				}
				f.DecRef()
			}
		}
		unix.Close(root)
	}
	if found < 1000 {
		t.Errorf("only %d of 20000 paths led anywhere", found)
	}
}
