package systrap

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/affinity"
	"github.com/ringfence/ringfence/pkg/sysmsg"
)

// thread is a thread of a stub process. At any time one Context has it, or none.
type thread struct {
	as  *addressSpace
	tid int

	// addr is the address of the slot in the stub, slot the same memory here.
	addr uint64
	slot []byte

	// called says that the thread waits in a call that it made without a signal, and not
	// in a handler; saved that it has written all its state there; order what it was told
	// to do last.
	called, saved bool
	order         uint32

	// word is the slot's state, brief the same for a Wait that ends after followTime.
	word, brief sysmsg.Word

	follower *affinity.Follower
	// met says that the last event was seen by looking.
	met bool
}

// prepareThread returns the n-th thread, and the system calls that make it: the result
// of the last one is for added.
//
// Preconditions: as.growMu is held, or nobody else knows as; n threads were made before.
func (as *addressSpace) prepareThread(n int) (*thread, []call, error) {
	if n >= maxSlots {
		return nil, nil, fmt.Errorf("%d threads in one address space: %w", n, unix.EAGAIN)
	}
	chunk, index := n/chunkSlots, n%chunkSlots
	b, err := as.mem.chunk(chunk)
	if err != nil {
		return nil, nil, err
	}
	fd := binary.LittleEndian.Uint64(as.mem.region[requestFD:])
	var calls []call
	if chunk == as.chunks {
		off := uint64(chunk) * chunkSize
		calls = append(calls, call{unix.SYS_MMAP, [6]uint64{uint64(as.at.slots) + off, chunkSize, unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_FIXED, fd, slotsOffset + off}})
	}
	t := &thread{as: as, addr: uint64(as.at.slots) + uint64(n)*slotSize, slot: b[index*slotSize:][:slotSize:slotSize]}
	word := word32(t.slot, stackSize+headerState)
	t.word, t.brief = sysmsg.NewWord(word, pollPeriod), sysmsg.NewWord(word, followTime)
	// As after an event, so that the new thread waits for Resume.
	t.word.Init()

	stack := stacksOffset + n*stackTSize
	as.mem.put64(stack, t.addr)       // ss_sp
	as.mem.put64(stack+8, 0)          // ss_flags
	as.mem.put64(stack+16, stackSize) // ss_size
	// The last two are for the new thread itself.
	calls = append(calls, call{unix.SYS_CLONE, [6]uint64{cloneThread, t.frameAddr(), 0, 0, as.ro(stack), as.ro(constantProgs + 16*progApplication)}})
	return t, calls, nil
}

// added completes t, which was made with the id tid.
func (as *addressSpace) added(t *thread, tid int) {
	t.tid, t.follower = tid, affinity.NewFollower(as.pid, tid)
	as.chunks = len(as.mem.chunks)
}

// patience is how many times in a row pollPeriod may pass after an interrupt was
// sent, or a thread was asked for its state, and nothing come of it, until the thread
// is taken for one that has blocked the signal. On a host with many more threads than
// CPUs one that only waits for a CPU was seen to need more than 10 seconds.
var patience = 300

// resume lets the thread run, and waits until it has an event.
func (t *thread) resume(c *threadContext) error {
	switches.Add(1)
	err := t.await(c)
	switches.Add(-1)
	return err
}

func (t *thread) await(c *threadContext) error {
	t.as.looker.CompareAndSwap(t, nil)
	spins := t.spins(c)
	t.setHeader32(headerSpin, spins)
	// Asking for the state later takes two turns.
	t.putOrder(c.saves > 0 || spins == 0)
	t.word.Resume()
	word := t.word
	if t.follower.Kept() {
		word = t.brief
	}
	for unanswered, left := 0, spins; ; left = 0 {
		if t.as.gone.Load() {
			return t.as.check()
		}
		o, err := word.Wait(left)
		if err != nil {
			return t.as.fail(fmt.Errorf("stub process %d: %w: %w", t.as.pid, err, unix.EPROTO))
		}
		if o != sysmsg.TimedOut {
			if spins > 0 {
				c.spinner.Report(o)
			}
			t.met = o == sysmsg.Spun
			if t.met && spins > 0 {
				t.as.looker.Store(t)
			}
			return nil
		}
		if t.follower.Kept() {
			t.follower.Free()
			c.holder.Free()
			word = t.word
			continue
		}
		if err := t.as.check(); err != nil {
			return err
		}
		// Writing its state takes a thread no time, unless the application has said in
		// its name that it has made a call.
		if !c.sent.Load() && t.order != orderSave || isStopped(t.as.pid) {
			unanswered = 0
		} else if unanswered++; unanswered > patience {
			return t.as.fail(fmt.Errorf("stub process %d: a thread does not react: %w", t.as.pid, unix.ETIMEDOUT))
		}
	}
}

// setHeader writes a word of the header.
func (t *thread) setHeader(off int, v uint64) {
	binary.LittleEndian.PutUint64(t.slot[stackSize+off:], v)
}

// setHeader32 writes half a word of the header.
func (t *thread) setHeader32(off int, v uint32) {
	binary.LittleEndian.PutUint32(t.slot[stackSize+off:], v)
}

// putOrder tells the thread what it is to do when it has the slot, and whether it is to
// write all its state with the next call.
func (t *thread) putOrder(whole bool) {
	order := t.order
	if whole {
		order |= orderWhole
	}
	t.setHeader32(headerOrder, order)
}
