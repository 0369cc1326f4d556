package ptrace

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
)

// A Context that is bound to its OS thread leaves its registers in the stub's
// thread after a system call, but for those that say what is called: most calls
// change nothing but the result.

// lazyState says what of a Context's state is only in a stub's thread.
type lazyState struct {
	// regs and fp are the thread that has the general registers and the floating
	// point state, or nil.
	regs, fp *thread

	// known are the general registers as Switch returned them: a register that
	// differs from that was changed by the Sentry.
	known arch.Registers
}

// pullRegs reads the general registers that are only in the stub's thread.
func (c *threadContext) pullRegs() error {
	t := c.lazy.regs
	if t == nil {
		return nil
	}
	c.lazy.regs = nil
	if err := t.as.Enter(); err != nil {
		return err
	}
	defer t.as.Leave()
	if err := t.leaveSyscall(); err != nil {
		return err
	}
	var regs arch.Registers
	if err := getRegs(t.tid, &regs); err != nil {
		return t.fail("reading the general registers", err)
	}
	mergeRegs(&c.ac.Regs, &c.lazy.known, &regs)
	return nil
}

// mergeWords sets every word of regs that equals that of known to that of fresh.
func mergeWords(regs, known, fresh []byte) {
	const word = 8
	for i := 0; i < len(regs); i += word {
		if [word]byte(regs[i:]) == [word]byte(known[i:]) {
			copy(regs[i:i+word], fresh[i:])
		}
	}
}

// pullFP reads the floating point state if that is only in the stub's thread.
func (c *threadContext) pullFP() error {
	t := c.lazy.fp
	if t == nil {
		return nil
	}
	c.lazy.fp = nil
	if err := t.as.Enter(); err != nil {
		return err
	}
	defer t.as.Leave()
	if err := getFP(t.tid, c.ac.FloatingPointData()); err != nil {
		return t.fail("reading the floating point state", err)
	}
	return nil
}

// pull completes the state.
func (c *threadContext) pull() error {
	if err := c.pullRegs(); err != nil {
		return err
	}
	return c.pullFP()
}

// load gives the thread the state ac of c. A refusedError says that the CPU would
// not take it; another one that the AddressSpace was given up.
func (t *thread) load(c *threadContext, ac *arch.Context64) error {
	changed := c.changed || c.ac != ac
	if !changed && c.lazy.regs == t {
		done, err := setResult(t.tid, &ac.Regs, &c.lazy.known)
		if err != nil {
			return t.fail("writing the result of a system call", err)
		}
		if done {
			t.lazy, c.lazy.regs, c.lazy.fp = nil, nil, nil
			return nil
		}
	}
	// Nothing that is only in this thread, or only in another one, gets lost.
	if t.lazy != nil && t.lazy != c {
		if err := t.lazy.save(t); err != nil {
			return err
		}
	}
	t.lazy = nil
	if changed {
		c.lazy = lazyState{}
	} else if c.lazy.regs != nil || c.lazy.fp != nil && c.lazy.fp != t {
		if err := c.pullRegs(); err != nil {
			return err
		}
		if c.lazy.fp != t {
			if err := c.pullFP(); err != nil {
				return err
			}
		}
	}
	if err := t.leaveSyscall(); err != nil {
		return err
	}
	if err := setRegs(t.tid, &ac.Regs); err != nil {
		return t.refused("writing the general registers", err)
	}
	if t.owner != c || changed {
		t.owner = nil
		if err := setFP(t.tid, ac.FloatingPointData()); err != nil {
			return t.refused("writing the floating point state", err)
		}
		t.owner, c.ac, c.changed = c, ac, false
	}
	c.lazy.fp = nil
	return nil
}

// save completes c's state before t, if that has some of it, is used for
// something else.
func (c *threadContext) save(t *thread) error {
	if c.lazy.regs == t {
		if err := c.pullRegs(); err != nil {
			return err
		}
	}
	if c.lazy.fp == t {
		return c.pullFP()
	}
	return nil
}

// refusedError says that a thread cannot have a state.
type refusedError struct{ error }

// refused returns the error for a register set that could not be written.
func (t *thread) refused(what string, err error) error {
	if err == unix.EIO || err == unix.EINVAL || err == unix.EFAULT {
		return refusedError{fmt.Errorf("%s: %w", what, err)}
	}
	return t.fail(what, err)
}
