package pagetables

// Bits of stage 1 descriptors with a 4 KiB granule (Arm ARM, D8.3).
const (
	entryPresent = 1 << 0
	entryTable   = 1 << 1 // table, or page at the lowest level
	entryUser    = 1 << 6 // AP[1]
	entryRO      = 1 << 7 // AP[2]
	entryInner   = 3 << 8 // SH: inner shareable
	entryAF      = 1 << 10
	entryNG      = 1 << 11
	entryPXN     = 1 << 53
	entryUXN     = 1 << 54

	// maxPhys is the end of the addresses that an entry can hold.
	maxPhys  = 1 << 48
	physMask = maxPhys - 1<<12
)

// isLeaf reports whether an entry that is used, of a table at level, maps memory.
func isLeaf(e uint64, level int) bool { return level == 0 || e&entryTable == 0 }

func entryPhys(e uint64) uint64 { return e & physMask }

func tableEntry(phys uint64) uint64 { return phys | entryPresent | entryTable }

// blockEntry uses MAIR index 0. Code runs at the privilege that the page is for,
// and at no other.
func blockEntry(phys uint64, opts MapOpts) uint64 {
	e := phys | entryPresent | entryAF | entryInner | entryNG | entryPXN | entryUXN
	if !opts.Access.Write {
		e |= entryRO
	}
	if opts.User {
		e |= entryUser
	}
	if opts.Access.Execute {
		if opts.User {
			e &^= entryUXN
		} else {
			e &^= entryPXN
		}
	}
	return e
}

func leafEntry(phys uint64, opts MapOpts) uint64 { return blockEntry(phys, opts) | entryTable }

// entryOpts returns what a leaf allows: whatever is present can be read.
func entryOpts(e uint64) (opts MapOpts) {
	opts.Access.Read = true
	opts.Access.Write = e&entryRO == 0
	opts.User = e&entryUser != 0
	opts.Access.Execute = e&entryUXN == 0 || e&entryPXN == 0
	return opts
}
