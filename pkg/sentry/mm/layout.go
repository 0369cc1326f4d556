package mm

import (
	"crypto/rand"
	"encoding/binary"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/platform"
)

// taskSize is the end of what Linux gives to a program with 4-level page tables
// on amd64; arm64 programs do not mind less than 48 bits.
const taskSize = hostarch.Addr(1<<47 - hostarch.PageSize)

// Distances of Linux's layout (arch/x86/mm/mmap.c, mm/util.c), in bytes.
const (
	stackGuardGap  = 256 * hostarch.PageSize
	minMMapGap     = 128 << 20
	maxMMapRandom  = 1 << 40
	maxStackRandom = 16 << 30
	maxHeapRandom  = 32 << 20
)

// layout says where things lie.
type layout struct {
	min, max   hostarch.Addr // what can be mapped
	mmapBase   hostarch.Addr // mappings lie below
	stackTop   hostarch.Addr
	pieBase    hostarch.Addr
	heapRandom uint64
}

func newLayout(p platform.Platform, opts Options) layout {
	l := layout{min: max(p.MinUserAddress(), hostarch.PageSize), max: min(p.MaxUserAddress(), taskSize)}
	l.min = l.min.MustRoundUp()
	l.max = l.max.RoundDown()
	size := uint64(l.max - l.min)
	random := func(limit uint64) hostarch.Addr {
		if opts.NoRandomize {
			return 0
		}
		return randomBelow(limit)
	}
	stackRandom := min(maxStackRandom, size/64)
	gap := min(max(opts.Limits.Stack, minMMapGap), size/8) + stackRandom + stackGuardGap
	l.stackTop = l.max - random(stackRandom)
	l.mmapBase = l.max - hostarch.Addr(hostarch.PageRoundDown(gap)) - random(min(maxMMapRandom, size/64))
	l.pieBase = (l.min + hostarch.Addr(size/3*2)).RoundDown() + random(min(maxMMapRandom, size/64))
	if !opts.NoRandomize {
		l.heapRandom = min(maxHeapRandom, size/64)
	}
	return l
}

// randomBelow returns a random multiple of the page size below limit.
func randomBelow(limit uint64) hostarch.Addr {
	var b [8]byte
	rand.Read(b[:]) // never fails
	pages := max(limit/hostarch.PageSize, 1)
	return hostarch.Addr(binary.LittleEndian.Uint64(b[:]) % pages * hostarch.PageSize)
}

// StackTop returns the page boundary above the main stack.
func (mm *MemoryManager) StackTop() hostarch.Addr { return mm.layout.stackTop }

// PIEBase returns the page boundary where a program without fixed addresses is
// to lie.
func (mm *MemoryManager) PIEBase() hostarch.Addr { return mm.layout.pieBase }
