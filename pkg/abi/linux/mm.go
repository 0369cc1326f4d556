package linux

// Protections of mmap(2) and mprotect(2).
const (
	PROT_NONE      = 0
	PROT_READ      = 1
	PROT_WRITE     = 2
	PROT_EXEC      = 4
	PROT_SEM       = 8
	PROT_GROWSDOWN = 0x1000000
	PROT_GROWSUP   = 0x2000000
)

// Flags of mmap(2).
const (
	MAP_SHARED          = 1
	MAP_PRIVATE         = 2
	MAP_SHARED_VALIDATE = 3
	MAP_DROPPABLE       = 8
	MAP_TYPE            = 0xf
	MAP_FIXED           = 0x10
	MAP_ANONYMOUS       = 0x20
	MAP_GROWSDOWN       = 0x100
	MAP_DENYWRITE       = 0x800
	MAP_EXECUTABLE      = 0x1000
	MAP_LOCKED          = 0x2000
	MAP_NORESERVE       = 0x4000
	MAP_POPULATE        = 0x8000
	MAP_NONBLOCK        = 0x10000
	MAP_STACK           = 0x20000
	MAP_HUGETLB         = 0x40000
	MAP_SYNC            = 0x80000
	MAP_FIXED_NOREPLACE = 0x100000
	MAP_UNINITIALIZED   = 0x4000000
	MAP_HUGE_SHIFT      = 0x1a
	MAP_HUGE_MASK       = 0x3f
)

// Flags of mremap(2).
const (
	MREMAP_MAYMOVE   = 1
	MREMAP_FIXED     = 2
	MREMAP_DONTUNMAP = 4
)

// Advice of madvise(2).
const (
	MADV_NORMAL          = 0
	MADV_RANDOM          = 1
	MADV_SEQUENTIAL      = 2
	MADV_WILLNEED        = 3
	MADV_DONTNEED        = 4
	MADV_FREE            = 8
	MADV_REMOVE          = 9
	MADV_DONTFORK        = 10
	MADV_DOFORK          = 11
	MADV_MERGEABLE       = 12
	MADV_UNMERGEABLE     = 13
	MADV_HUGEPAGE        = 14
	MADV_NOHUGEPAGE      = 15
	MADV_DONTDUMP        = 16
	MADV_DODUMP          = 17
	MADV_WIPEONFORK      = 18
	MADV_KEEPONFORK      = 19
	MADV_COLD            = 20
	MADV_PAGEOUT         = 21
	MADV_POPULATE_READ   = 22
	MADV_POPULATE_WRITE  = 23
	MADV_DONTNEED_LOCKED = 24
	MADV_COLLAPSE        = 25
	MADV_HWPOISON        = 100
	MADV_GUARD_INSTALL   = 102
	MADV_GUARD_REMOVE    = 103
)

// Flags of msync(2), mlockall(2) and mlock2(2).
const (
	MS_ASYNC      = 1
	MS_INVALIDATE = 2
	MS_SYNC       = 4

	MCL_CURRENT = 1
	MCL_FUTURE  = 2
	MCL_ONFAULT = 4

	MLOCK_ONFAULT = 1
)

// Flags of memfd_create(2).
const (
	MFD_CLOEXEC       = 1
	MFD_ALLOW_SEALING = 2
	MFD_HUGETLB       = 4
	MFD_NOEXEC_SEAL   = 8
	MFD_EXEC          = 0x10
)

// Commands and flags of membarrier(2).
const (
	MEMBARRIER_CMD_QUERY                                = 0
	MEMBARRIER_CMD_GLOBAL                               = 1
	MEMBARRIER_CMD_GLOBAL_EXPEDITED                     = 2
	MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED            = 4
	MEMBARRIER_CMD_PRIVATE_EXPEDITED                    = 8
	MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED           = 0x10
	MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE          = 0x20
	MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE = 0x40
	MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ               = 0x80
	MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_RSEQ      = 0x100
	MEMBARRIER_CMD_GET_REGISTRATIONS                    = 0x200
	MEMBARRIER_CMD_FLAG_CPU                             = 1
)
