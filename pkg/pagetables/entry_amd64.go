package pagetables

// Bits of entries (Intel SDM vol. 3, 4.5; AMD APM vol. 2, 5.4).
const (
	entryPresent = 1 << 0
	entryW       = 1 << 1
	entryU       = 1 << 2
	entryA       = 1 << 5
	entryD       = 1 << 6
	entryPS      = 1 << 7
	entryNX      = 1 << 63

	// maxPhys is the end of the addresses that an entry can hold.
	maxPhys  = 1 << 52
	physMask = maxPhys - 1<<12
)

// isLeaf reports whether an entry that is used, of a table at level, maps memory.
func isLeaf(e uint64, level int) bool { return level == 0 || e&entryPS != 0 }

func entryPhys(e uint64) uint64 { return e & physMask }

func tableEntry(phys uint64) uint64 { return phys | entryPresent | entryW | entryU | entryA }

// leafEntry has A and D set already: nobody reads them, and a CPU that has to
// set them takes longer, or faults where page tables are shadowed.
func leafEntry(phys uint64, opts MapOpts) uint64 {
	e := phys | entryPresent | entryA | entryD
	if opts.Access.Write {
		e |= entryW
	}
	if !opts.Access.Execute {
		e |= entryNX
	}
	if opts.User {
		e |= entryU
	}
	return e
}

func blockEntry(phys uint64, opts MapOpts) uint64 { return leafEntry(phys, opts) | entryPS }

// entryOpts returns what a leaf allows: whatever is present can be read.
func entryOpts(e uint64) (opts MapOpts) {
	opts.Access.Read = true
	opts.Access.Write = e&entryW != 0
	opts.Access.Execute = e&entryNX == 0
	opts.User = e&entryU != 0
	return opts
}
