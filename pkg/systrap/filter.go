package systrap

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/bpf"
)

// rule allows a system call. If first is not nil, its first argument must be
// *first; if ops is not nil, the low half of the second one must be among them.
type rule struct {
	nr    uint32
	first *uint64
	ops   []uint32
}

// Futex operations (linux/futex.h), on shared memory.
const (
	futexWait = 0
	futexWake = 1
)

// applicationRules are for threads that run application code.
func applicationRules() []rule {
	return []rule{
		{nr: unix.SYS_RT_SIGRETURN},
		{nr: unix.SYS_FUTEX, ops: []uint32{futexWait, futexWake}},
	}
}

// syscallThreadRules are for the system call thread; the others inherit them.
func syscallThreadRules() []rule {
	flags, dispatch := uint64(cloneThread), uint64(unix.PR_SET_SYSCALL_USER_DISPATCH)
	return append(applicationRules(),
		rule{nr: unix.SYS_MMAP}, rule{nr: unix.SYS_MPROTECT}, rule{nr: unix.SYS_MUNMAP}, rule{nr: unix.SYS_LSEEK},
		rule{nr: unix.SYS_CLONE, first: &flags}, rule{nr: unix.SYS_SIGALTSTACK}, rule{nr: unix.SYS_SECCOMP},
		rule{nr: unix.SYS_PRCTL, first: &dispatch},
		rule{nr: unix.SYS_EXIT_GROUP})
}

// Program numbers in the region.
const (
	progSyscallThread = iota
	progApplication
	numProgs
)

// filters are the programs of the stubs that were made last: those of a zygote have
// the same.
var filters filterCache

type filterCache struct {
	mu            sync.Mutex
	text, textEnd uint64
	progs         [numProgs]bpf.Program
}

// of returns the programs for stubs with our text between the two addresses.
func (c *filterCache) of(text, textEnd uint64) ([numProgs]bpf.Program, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.text == text && c.textEnd == textEnd {
		return c.progs, nil
	}
	for i, rules := range [numProgs][]rule{progSyscallThread: syscallThreadRules(), progApplication: applicationRules()} {
		prog, err := buildFilter(rules, auditArch, text, textEnd)
		if err != nil {
			c.text, c.textEnd = 0, 0
			return c.progs, err
		}
		c.progs[i] = prog
	}
	c.text, c.textEnd = text, textEnd
	return c.progs, nil
}

// buildFilter returns the program that allows the rules when the call comes from
// text up to textEnd, and else gives SIGSYS. Both are in the same 4 GiB.
func buildFilter(rules []rule, auditArch uint32, text, textEnd uint64) (bpf.Program, error) {
	var b bpf.Builder
	trap, allow := b.NewLabel("trap"), b.NewLabel("allow")
	load := func(off uint32) { b.Stmt(bpf.Ld|bpf.W|bpf.Abs, off) }
	equal := func(v uint32, jt, jf bpf.Label) { b.JumpIf(bpf.Jmp|bpf.Jeq|bpf.K, v, jt, jf) }

	load(bpf.OffHigh(bpf.OffIP))
	equal(uint32(text>>32), bpf.Next, trap)
	load(bpf.OffLow(bpf.OffIP))
	b.JumpIf(bpf.Jmp|bpf.Jge|bpf.K, uint32(text), bpf.Next, trap)
	b.JumpIf(bpf.Jmp|bpf.Jge|bpf.K, uint32(textEnd), trap, bpf.Next)
	load(bpf.OffArch)
	equal(auditArch, bpf.Next, trap)
	load(bpf.OffNr)
	for _, r := range rules {
		if r.first == nil && r.ops == nil {
			equal(r.nr, allow, bpf.Next)
			continue
		}
		other := b.NewLabel("other")
		equal(r.nr, bpf.Next, other)
		if r.first != nil {
			load(bpf.OffLow(bpf.OffArg(0)))
			equal(uint32(*r.first), bpf.Next, trap)
			load(bpf.OffHigh(bpf.OffArg(0)))
			equal(uint32(*r.first>>32), allow, trap)
		} else {
			load(bpf.OffLow(bpf.OffArg(1)))
			for _, op := range r.ops {
				equal(op, allow, bpf.Next)
			}
			b.Jump(trap)
		}
		b.Place(other)
	}
	b.Place(trap)
	b.Stmt(bpf.Ret|bpf.K, unix.SECCOMP_RET_TRAP)
	b.Place(allow)
	b.Stmt(bpf.Ret|bpf.K, unix.SECCOMP_RET_ALLOW)
	return b.Build()
}
