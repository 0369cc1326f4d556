package mm

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
)

// The part of this process that the comparison plays with: far from where the
// kernel and the Go runtime put things.
const (
	kernelBase  = hostarch.Addr(0x200000000)
	kernelPages = 64
	kernelEnd   = kernelBase + kernelPages*page
)

func errnoOf(err error) unix.Errno {
	var e unix.Errno
	if err != nil && !errors.As(err, &e) {
		return unix.EIO
	}
	return e
}

// mapped returns a letter triple per page of the arena, from the text of
// /proc/PID/maps.
func mapped(maps string) []string {
	out := make([]string, kernelPages)
	for i := range out {
		out[i] = "    "
	}
	for line := range strings.Lines(maps) {
		var start, end hostarch.Addr
		var perms string
		if n, _ := fmt.Sscanf(line, "%x-%x %s", &start, &end, &perms); n != 3 {
			continue
		}
		for a := max(start, kernelBase); a < min(end, kernelEnd); a += page {
			out[(a-kernelBase)/page] = perms
		}
	}
	return out
}

// hasBoundary reports whether a mapping of this process ends within (a, end).
func hasBoundary(t *testing.T, a, end hostarch.Addr) bool {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		var from, to hostarch.Addr
		if n, _ := fmt.Sscanf(line, "%x-%x ", &from, &to); n == 2 && to > a && to < end {
			return true
		}
	}
	return false
}

// Calls with random arguments, many of them wrong, have the results and effects
// that the host's kernel gives.
func TestLikeKernel(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, make([]byte, 16*page), 0o600); err != nil {
		t.Fatal(err)
	}
	var fds [2]int // read-only, read-write
	for i, flags := range []int{unix.O_RDONLY, unix.O_RDWR} {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		fds[i] = fd
	}
	clearArena := func() { unix.Syscall(unix.SYS_MUNMAP, uintptr(kernelBase), kernelPages*page, 0) }
	defer clearArena()

	for seed := range uint64(8) {
		clearArena()
		e := newEnv(t)
		mm := e.newMM()
		f := e.newFile(16)
		r := rand.New(rand.NewPCG(seed, 5))
		sometimes := func(n int) bool { return r.IntN(n) == 0 }
		addr := func() hostarch.Addr {
			a := kernelBase + hostarch.Addr(r.IntN(kernelPages))*page
			if sometimes(40) {
				a += hostarch.Addr(1 + r.IntN(page-1))
			}
			return a
		}
		// Lengths stay in the arena, or are absurd.
		length := func(a hostarch.Addr) uint64 {
			room := uint64(kernelEnd - a)
			switch r.IntN(60) {
			case 0:
				return 0
			case 1:
				return ^uint64(0) - uint64(r.IntN(3*page))
			case 2:
				return 1 << 62
			}
			n := 1 + uint64(r.IntN(16*page))
			if !sometimes(4) {
				n, _ = hostarch.PageRoundUp(n)
			}
			return min(n, room)
		}
		protOf := func() int {
			return []int{0, unix.PROT_READ, unix.PROT_READ | unix.PROT_WRITE, unix.PROT_READ | unix.PROT_WRITE, unix.PROT_READ | unix.PROT_EXEC}[r.IntN(5)]
		}
		access := func(prot int) hostarch.AccessType {
			return hostarch.AccessType{Read: prot&1 != 0, Write: prot&2 != 0, Execute: prot&4 != 0}
		}
		var log []string
		for range 3000 {
			a := addr()
			n := length(a)
			var what string
			var got, want unix.Errno
			switch op := r.IntN(100); {
			case op < 25:
				prot := protOf()
				private, anonymous, readOnly, replace := sometimes(2), sometimes(2), sometimes(2), !sometimes(4)
				flags, fd, off := uintptr(unix.MAP_SHARED), uintptr(0), uintptr(0)
				if private {
					flags = unix.MAP_PRIVATE
				}
				opts := memmap.MMapOpts{Length: n, Addr: a, Fixed: true, Unmap: replace, Private: private, Perms: access(prot), MaxPerms: hostarch.AnyAccess}
				if replace {
					flags |= unix.MAP_FIXED
				} else {
					flags |= unix.MAP_FIXED_NOREPLACE
				}
				if anonymous {
					flags |= unix.MAP_ANONYMOUS
				} else {
					fd, off = uintptr(fds[1]), uintptr(r.IntN(4)*page)
					opts.Mappable, opts.MappingIdentity, opts.Offset = f, f, uint64(off)
					if readOnly {
						fd = uintptr(fds[0])
						if !private {
							opts.MaxPerms.Write = false
						}
					}
				}
				what = fmt.Sprintf("mmap(%v, %#x, %#x, %#x, anonymous %v, read-only %v)", a, n, prot, flags, anonymous, readOnly)
				_, _, want = unix.Syscall6(unix.SYS_MMAP, uintptr(a), uintptr(n), uintptr(prot), flags, fd, off)
				_, err := mm.MMap(ctx, opts)
				got = errnoOf(err)
			case op < 35:
				what = fmt.Sprintf("munmap(%v, %#x)", a, n)
				_, _, want = unix.Syscall(unix.SYS_MUNMAP, uintptr(a), uintptr(n), 0)
				got = errnoOf(mm.MUnmap(ctx, a, n))
			case op < 60:
				prot := protOf()
				what = fmt.Sprintf("mprotect(%v, %#x, %#x)", a, n, prot)
				_, _, want = unix.Syscall(unix.SYS_MPROTECT, uintptr(a), uintptr(n), uintptr(prot))
				got = errnoOf(mm.MProtect(ctx, a, n, access(prot), false))
			case op < 75:
				to := addr()
				m := length(to)
				flags := []uintptr{0, unix.MREMAP_MAYMOVE, unix.MREMAP_MAYMOVE | unix.MREMAP_FIXED, unix.MREMAP_MAYMOVE | unix.MREMAP_DONTUNMAP}[r.IntN(4)]
				opts := MRemapOpts{Move: MRemapMove(min(flags, 2)), DontUnmap: flags&unix.MREMAP_DONTUNMAP != 0}
				if flags&unix.MREMAP_FIXED != 0 {
					opts.Move, opts.NewAddr = MRemapFixed, to
				} else if flags != 0 {
					opts.Move, to = MRemapMayMove, 0
				}
				if sometimes(2) {
					m = n
				}
				if m > 1<<40 || n > 1<<40 && flags&unix.MREMAP_FIXED != 0 {
					continue // kernels differ in the error
				}
				if opts.DontUnmap && m != n && max(m, n)-min(m, n) < hostarch.PageSize {
					continue // kernels differ in whether they round before they compare
				}
				if flags == 0 && m > uint64(kernelEnd-a) || opts.Move == MRemapFixed && m > uint64(kernelEnd-to) {
					continue // would leave the arena
				}
				end, _ := (a + hostarch.Addr(n)).RoundUp()
				if v := mm.vmas.lookup(a); v != nil && end > v.End {
					continue // several mappings: kernels differ in what they move
				}
				if flags&unix.MREMAP_FIXED != 0 && (n == 0 || mm.vmas.lookup(a) == nil) {
					continue // kernels differ in what they look at first, and have unmapped by then
				}
				if hasBoundary(t, a, end) {
					continue // the kernel does not merge what was written apart
				}
				if v := mm.vmas.lookup(a); v != nil && v.v.mappable != nil && (opts.DontUnmap || n == 0) {
					continue // older kernels refuse, and a copy of a copy grows
				}
				what = fmt.Sprintf("mremap(%v, %#x, %#x, %#x, %v)", a, n, m, flags, to)
				r1, _, errno := unix.Syscall6(unix.SYS_MREMAP, uintptr(a), uintptr(n), uintptr(m), flags, uintptr(to), 0)
				want = errno
				na, err := mm.MRemap(ctx, a, n, m, opts)
				got = errnoOf(err)
				if got == 0 && want == 0 {
					// What moved to where there was room, or grew out of the arena, is
					// not to be compared.
					if theirs := hostarch.Addr(r1); theirs < kernelBase || theirs >= kernelEnd {
						unix.Syscall(unix.SYS_MUNMAP, r1, uintptr(m), 0)
						if na >= kernelBase && na < kernelEnd {
							t.Errorf("%s stayed at %v, the kernel moves it", what, na)
						}
						mm.MUnmap(ctx, na, m)
					} else if na != theirs {
						t.Errorf("%s = %v, the kernel says %v", what, na, theirs)
					}
					unix.Syscall(unix.SYS_MUNMAP, uintptr(kernelEnd), 16*page, 0)
					mm.MUnmap(ctx, kernelEnd, 16*page)
				}
			case op < 85:
				advice := []int32{linux.MADV_DONTNEED, linux.MADV_FREE, linux.MADV_NORMAL, linux.MADV_REMOVE, linux.MADV_DONTFORK, linux.MADV_DOFORK, linux.MADV_POPULATE_READ, linux.MADV_POPULATE_WRITE, 9999}[r.IntN(9)]
				if n == 1<<62 {
					continue // would reach all of this process
				}
				what = fmt.Sprintf("madvise(%v, %#x, %d)", a, n, advice)
				if end, ok := a.AddLength(n); ok && advice == linux.MADV_REMOVE && !mm.vmas.isFree(hostarch.AddrRange{Start: a, End: end}) {
					continue // depends on the file system
				}
				if advice == linux.MADV_POPULATE_READ || advice == linux.MADV_POPULATE_WRITE {
					end, _ := (a + hostarch.Addr(n)).RoundUp()
					beyond := false
					mm.vmas.overlapping(hostarch.AddrRange{Start: a.RoundDown(), End: end}, func(v *segment[vma]) bool {
						beyond = beyond || v.v.mappable != nil
						return true
					})
					if beyond {
						continue // the end of the file is not what is compared here
					}
				}
				_, _, want = unix.Syscall(unix.SYS_MADVISE, uintptr(a), uintptr(n), uintptr(advice))
				got = errnoOf(mm.Madvise(ctx, a, n, advice))
			case op < 90:
				flags := []int32{0, linux.MS_ASYNC, linux.MS_ASYNC | linux.MS_INVALIDATE, 3, 5, 8}[r.IntN(6)]
				what = fmt.Sprintf("msync(%v, %#x, %d)", a, n, flags)
				_, _, want = unix.Syscall(unix.SYS_MSYNC, uintptr(a), uintptr(n), uintptr(flags))
				got = errnoOf(mm.MSync(ctx, a, n, flags))
			default:
				what = fmt.Sprintf("munlock(%v, %#x)", a, n)
				_, _, want = unix.Syscall(unix.SYS_MUNLOCK, uintptr(a), uintptr(n), 0)
				got = errnoOf(mm.MLock(ctx, a, n, memmap.MLockNone))
			}
			log = append(log, what)
			maps, err := os.ReadFile("/proc/self/maps")
			if err != nil {
				t.Fatal(err)
			}
			theirs, ours := mapped(string(maps)), mapped(mm.ReadMaps())
			if got != want || strings.Join(theirs, "") != strings.Join(ours, "") {
				for _, l := range log[max(0, len(log)-6):] {
					t.Log(l)
				}
				t.Logf("kernel %v", theirs)
				t.Logf("ours   %v", ours)
				t.Fatalf("seed %d: %s = %v, the kernel says %v", seed, what, got, want)
			}
		}
		check(t, mm)
	}
}
