package syscalls

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
	"github.com/ringfence/ringfence/pkg/sentry/mm"
)

// mmSyscalls are the calls on memory.
var mmSyscalls = []kernel.Syscall{
	unix.SYS_MMAP:       {Name: "mmap", Fn: sysMmap},
	unix.SYS_MUNMAP:     {Name: "munmap", Fn: sysMunmap},
	unix.SYS_MPROTECT:   {Name: "mprotect", Fn: sysMprotect},
	unix.SYS_MREMAP:     {Name: "mremap", Fn: sysMremap},
	unix.SYS_BRK:        {Name: "brk", Fn: sysBrk},
	unix.SYS_MADVISE:    {Name: "madvise", Fn: sysMadvise},
	unix.SYS_MSYNC:      {Name: "msync", Fn: sysMsync},
	unix.SYS_MINCORE:    {Name: "mincore", Fn: sysMincore},
	unix.SYS_MLOCK:      {Name: "mlock", Fn: sysMlock},
	unix.SYS_MLOCK2:     {Name: "mlock2", Fn: sysMlock2},
	unix.SYS_MUNLOCK:    {Name: "munlock", Fn: sysMunlock},
	unix.SYS_MLOCKALL:   {Name: "mlockall", Fn: sysMlockall},
	unix.SYS_MUNLOCKALL: {Name: "munlockall", Fn: sysMunlockall},
	// One process cannot advise another: callers fall back on madvise.
	unix.SYS_PROCESS_MADVISE: {Name: "process_madvise", Fn: sysENOSYS},
	unix.SYS_PKEY_MPROTECT:   {Name: "pkey_mprotect", Fn: sysPkeyMprotect},
	unix.SYS_PKEY_ALLOC:      {Name: "pkey_alloc", Fn: sysPkeyAlloc},
	unix.SYS_PKEY_FREE:       {Name: "pkey_free", Fn: sysPkeyFree},
}

// accessOf returns the access that PROT_ bits ask for.
func accessOf(prot uint32) hostarch.AccessType {
	return hostarch.AccessType{
		Read:    prot&linux.PROT_READ != 0,
		Write:   prot&linux.PROT_WRITE != 0,
		Execute: prot&linux.PROT_EXEC != 0,
	}
}

// validFlags are those that MAP_SHARED_VALIDATE accepts (mmap(2)).
const validFlags = linux.MAP_TYPE | linux.MAP_FIXED | linux.MAP_FIXED_NOREPLACE | linux.MAP_ANONYMOUS | linux.MAP_GROWSDOWN |
	linux.MAP_DENYWRITE | linux.MAP_EXECUTABLE | linux.MAP_LOCKED | linux.MAP_NORESERVE | linux.MAP_POPULATE |
	linux.MAP_NONBLOCK | linux.MAP_STACK | linux.MAP_HUGETLB | linux.MAP_HUGE_MASK<<linux.MAP_HUGE_SHIFT |
	linux.MAP_UNINITIALIZED | linux.MAP_32BIT | linux.MAP_ABOVE4G

// alwaysThere is what every host has, in bytes.
const alwaysThere = 16 << 20

// overcommits reports whether length bytes are more than the host could ever have:
// Linux does not promise those (vm.overcommit_memory in proc_sys_vm(5)).
func overcommits(length uint64) bool {
	if length <= alwaysThere {
		return false
	}
	var si unix.Sysinfo_t
	return unix.Sysinfo(&si) == nil && length/uint64(si.Unit) > uint64(si.Totalram)+uint64(si.Totalswap)
}

func sysMmap(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	prot, flags, fd := args[2].Uint(), args[3].Uint(), args[4].Int()
	opts := memmap.MMapOpts{
		Length:    args[1].Uint64(),
		Offset:    args[5].Uint64(),
		Addr:      args[0].Pointer(),
		Fixed:     flags&(linux.MAP_FIXED|linux.MAP_FIXED_NOREPLACE) != 0,
		Unmap:     flags&linux.MAP_FIXED != 0,
		Map32Bit:  flags&linux.MAP_32BIT != 0,
		Perms:     accessOf(prot),
		MaxPerms:  hostarch.AnyAccess,
		GrowsDown: flags&linux.MAP_GROWSDOWN != 0,
		Precommit: flags&linux.MAP_POPULATE != 0 && flags&linux.MAP_NONBLOCK == 0,
	}
	if flags&linux.MAP_FIXED_NOREPLACE != 0 {
		opts.Unmap = false
	}
	if opts.Offset&hostarch.PageMask != 0 {
		return 0, nil, unix.EINVAL
	}
	switch flags & linux.MAP_TYPE {
	case linux.MAP_PRIVATE:
		opts.Private = true
	case linux.MAP_SHARED:
	case linux.MAP_SHARED_VALIDATE:
		if flags&linux.MAP_ANONYMOUS != 0 {
			return 0, nil, unix.EINVAL
		}
		if flags&^validFlags != 0 { // MAP_SYNC is one that no file here has
			return 0, nil, unix.EOPNOTSUPP
		}
	default:
		return 0, nil, unix.EINVAL
	}
	if flags&linux.MAP_HUGETLB != 0 && flags&linux.MAP_ANONYMOUS != 0 {
		return 0, nil, unix.ENOMEM // as of a host that has none reserved
	}
	if flags&linux.MAP_LOCKED != 0 {
		opts.MLockMode = memmap.MLockEager
	}
	anonymous := flags&linux.MAP_ANONYMOUS != 0
	if flags&linux.MAP_NORESERVE == 0 && opts.Perms.Write && (anonymous || opts.Private) && overcommits(opts.Length) {
		return 0, nil, unix.ENOMEM
	}
	if !anonymous {
		file, err := t.GetFile(fd)
		if err != nil {
			return 0, nil, err
		}
		defer file.DecRef()
		if opts.Length == 0 {
			return 0, nil, unix.EINVAL
		}
		if err := file.ConfigureMMap(t, &opts); err != nil {
			return 0, nil, err
		}
	}
	addr, err := t.MM().MMap(t, opts)
	return uintptr(addr), nil, err
}

func sysMunmap(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, t.MM().MUnmap(t, args[0].Pointer(), args[1].Uint64())
}

func sysMprotect(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	prot := args[2].Uint()
	const known = linux.PROT_READ | linux.PROT_WRITE | linux.PROT_EXEC | linux.PROT_SEM | linux.PROT_GROWSDOWN | linux.PROT_GROWSUP
	if prot&^known != 0 || prot&linux.PROT_GROWSUP != 0 { // no stack grows up here
		return 0, nil, unix.EINVAL
	}
	return 0, nil, t.MM().MProtect(t, args[0].Pointer(), args[1].Uint64(), accessOf(prot), prot&linux.PROT_GROWSDOWN != 0)
}

func sysMremap(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	flags := args[3].Uint()
	if flags&^(linux.MREMAP_MAYMOVE|linux.MREMAP_FIXED|linux.MREMAP_DONTUNMAP) != 0 {
		return 0, nil, unix.EINVAL
	}
	opts := mm.MRemapOpts{DontUnmap: flags&linux.MREMAP_DONTUNMAP != 0}
	switch {
	case flags&linux.MREMAP_MAYMOVE == 0:
		if flags&linux.MREMAP_FIXED != 0 {
			return 0, nil, unix.EINVAL
		}
	case flags&linux.MREMAP_FIXED != 0:
		opts.Move, opts.NewAddr = mm.MRemapFixed, args[4].Pointer()
	default:
		opts.Move = mm.MRemapMayMove
		if opts.DontUnmap {
			opts.NewAddr = args[4].Pointer()
		}
	}
	oldSize, newSize := args[1].Uint64(), args[2].Uint64()
	if newSize > oldSize && overcommits(newSize-oldSize) {
		return 0, nil, unix.ENOMEM
	}
	addr, err := t.MM().MRemap(t, args[0].Pointer(), oldSize, newSize, opts)
	return uintptr(addr), nil, err
}

// sysBrk returns where the heap ends now, whether or not it could be changed.
func sysBrk(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	addr := args[0].Pointer()
	if end, _ := t.MM().Brk(t, 0); addr > end && overcommits(uint64(addr-end)) {
		addr = 0
	}
	end, _ := t.MM().Brk(t, addr)
	return uintptr(end), nil, nil
}

func sysMadvise(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, t.MM().Madvise(t, args[0].Pointer(), args[1].Uint64(), args[2].Int())
}

func sysMsync(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, t.MM().MSync(t, args[0].Pointer(), args[1].Uint64(), args[2].Int())
}

// mincoreChunk is how much of mincore(2) is answered at a time, in bytes.
const mincoreChunk = 64 << 20

func sysMincore(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	addr, vec := args[0].Pointer(), args[2].Pointer()
	length, ok := hostarch.PageRoundUp(args[1].Uint64())
	if !addr.IsPageAligned() {
		return 0, nil, unix.EINVAL
	}
	if _, fits := addr.ToRange(length); !ok || !fits {
		return 0, nil, unix.ENOMEM
	}
	for length > 0 && !t.Interrupted() {
		n := min(length, mincoreChunk)
		pages, err := t.MM().Mincore(t, addr, n)
		if err != nil {
			return 0, nil, err
		}
		if err := t.CopyOut(vec, pages); err != nil {
			return 0, nil, err
		}
		addr, vec, length = addr+hostarch.Addr(n), vec+hostarch.Addr(len(pages)), length-n
	}
	if length > 0 {
		return 0, nil, kernel.ERESTARTNOINTR
	}
	return 0, nil, nil
}

func sysMlock(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, t.MM().MLock(t, args[0].Pointer(), args[1].Uint64(), memmap.MLockEager)
}

func sysMlock2(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	mode := memmap.MLockEager
	switch args[2].Uint() {
	case 0:
	case unix.MLOCK_ONFAULT:
		mode = memmap.MLockLazy
	default:
		return 0, nil, unix.EINVAL
	}
	return 0, nil, t.MM().MLock(t, args[0].Pointer(), args[1].Uint64(), mode)
}

func sysMunlock(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, t.MM().MLock(t, args[0].Pointer(), args[1].Uint64(), memmap.MLockNone)
}

// sysMlockall checks its flags; there is nothing else to do, since the Sentry
// pages nothing out.
func sysMlockall(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	flags := args[0].Uint()
	if flags == 0 || flags == linux.MCL_ONFAULT || flags&^(linux.MCL_CURRENT|linux.MCL_FUTURE|linux.MCL_ONFAULT) != 0 {
		return 0, nil, unix.EINVAL
	}
	limit, _ := t.Limit(unix.RLIMIT_MEMLOCK)
	switch {
	case limit == 0:
		return 0, nil, unix.EPERM
	case flags&linux.MCL_CURRENT != 0 && t.MM().VirtualMemorySize() > limit:
		return 0, nil, unix.ENOMEM
	}
	return 0, nil, nil
}

func sysMunlockall(*kernel.Task, arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, nil
}

// sysPkeyMprotect is mprotect(2) for key -1; there are no others (pkeys(7)).
func sysPkeyMprotect(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	if args[3].Int() != -1 {
		return 0, nil, unix.EINVAL
	}
	return sysMprotect(t, args)
}

func sysPkeyAlloc(*kernel.Task, arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, unix.ENOSPC
}

func sysPkeyFree(*kernel.Task, arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, unix.EINVAL
}
