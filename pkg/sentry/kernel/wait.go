package kernel

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
)

// WaitOptions say which children to wait for, and for what.
type WaitOptions struct {
	// PID is the child, PGID its process group; 0 means any.
	PID, PGID int32
	// Options are those of waitid(2).
	Options uint32
}

// WaitResult is a change of a child.
type WaitResult struct {
	PID int32
	UID uint32
	// Status is as wait4(2) gives it.
	Status uint32
	// Code and Value are si_code and si_status of waitid(2).
	Code, Value int32
	// Usage is what the child and its children used.
	Usage linux.Rusage
}

// Wait waits for a child (wait4(2), waitid(2)). The result is nil if WNOHANG is
// set and there is nothing to report; the error is ECHILD if there is no child.
func (t *Task) Wait(opts WaitOptions) (*WaitResult, error) {
	k := t.k
	for {
		k.mu.Lock()
		r, any := t.waitOnceLocked(opts)
		changed := t.tg.childChanged
		k.mu.Unlock()
		switch {
		case r != nil:
			return r, nil
		case !any:
			return nil, unix.ECHILD
		case opts.Options&linux.WNOHANG != 0:
			return nil, nil
		}
		if err := t.Block(changed); err != nil {
			return nil, err
		}
	}
}

// waitOnceLocked looks for a change. any says that there are children to wait
// for.
func (t *Task) waitOnceLocked(opts WaitOptions) (r *WaitResult, any bool) {
	for _, c := range t.tg.children {
		if opts.PID != 0 && c.id != opts.PID || opts.PGID != 0 && (c.pgrp == nil || c.pgrp.id != opts.PGID) {
			continue
		}
		if opts.Options&linux.WNOTHREAD != 0 && c.parentTask != t {
			continue
		}
		// Children that send another signal than SIGCHLD are those of __WCLONE.
		if opts.Options&linux.WALL == 0 && (c.exitSignal != linux.SIGCHLD) != (opts.Options&linux.WCLONE != 0) {
			continue
		}
		any = true
		r := &WaitResult{PID: c.id, UID: c.leader.Creds().RUID}
		switch {
		case c.zombie && opts.Options&linux.WEXITED != 0:
			r.Status = c.exitStatus
			r.Code, r.Value = exitCode(c.exitStatus)
			r.Usage = c.usageLocked(linux.RUSAGE_SELF)
			children := c.usageLocked(linux.RUSAGE_CHILDREN)
			addUsage(&r.Usage, &children)
			if opts.Options&linux.WNOWAIT == 0 {
				t.k.reapLocked(c)
			}
			return r, true
		case c.report == reportStopped && opts.Options&linux.WSTOPPED != 0 && c.stopSignal != 0:
			r.Status = linux.WaitStatusStopped(c.stopSignal)
			r.Code, r.Value = linux.CLD_STOPPED, int32(c.stopSignal)
		case c.report == reportContinued && opts.Options&linux.WCONTINUED != 0:
			r.Status = linux.WaitStatusContinued
			r.Code, r.Value = linux.CLD_CONTINUED, int32(linux.SIGCONT)
		default:
			continue
		}
		r.Usage = c.usageLocked(linux.RUSAGE_SELF)
		if opts.Options&linux.WNOWAIT == 0 {
			c.report = noReport
		}
		return r, true
	}
	return nil, any
}

// PGID returns the number of t's process group.
func (t *Task) PGID() int32 {
	t.k.mu.Lock()
	defer t.k.mu.Unlock()
	return t.tg.pgrp.id
}
