package kernel_test

import (
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
)

func TestWait(t *testing.T) {
	check(t, func(a *app) {
		if _, _, errno := a.wait4(-1, 0); errno != unix.ECHILD {
			t.Errorf("no child: %v", errno)
		}
		if _, _, errno := a.wait4(-1, 0x100); errno != unix.EINVAL {
			t.Errorf("bad option: %v", errno)
		}
		pid := a.fork(func(a *app) { a.sleep(10 * time.Millisecond); a.exit(3) })
		if p, _, errno := a.wait4(-1, linux.WNOHANG); p != 0 || errno != 0 {
			t.Errorf("too early: %d, %v", p, errno)
		}
		if _, _, errno := a.wait4(pid+1, 0); errno != unix.ECHILD {
			t.Errorf("another's: %v", errno)
		}
		if _, _, errno := a.wait4(-99, 0); errno != unix.ECHILD {
			t.Errorf("another group: %v", errno)
		}
		info := func(options uintptr) linux.SignalInfo {
			a.must(unix.SYS_WAITID, linux.P_PID, uintptr(pid), uintptr(scratch), options, 0)
			var i linux.SignalInfo
			i.UnmarshalBytes(append(a.read(scratch, 28), make([]byte, 100)...))
			return i
		}
		if i := info(linux.WEXITED | linux.WNOWAIT); i.Code != linux.CLD_EXITED || i.Status() != 3 || i.PID() != int32(pid) {
			t.Errorf("waitid: %v", &i)
		}
		if p, status, errno := a.wait4(0, 0); p != pid || status != 3<<8 || errno != 0 {
			t.Errorf("wait4: %d, %#x, %v; want %d, 0x300", p, status, errno, pid)
		}
		if _, _, errno := a.wait4(pid, 0); errno != unix.ECHILD {
			t.Errorf("reaped: %v", errno)
		}
		if errno := a.kill(pid, 0); errno != unix.ESRCH {
			t.Errorf("kill after it was reaped: %v", errno)
		}
	})
}

// Children of clone without SIGCHLD are not seen without __WALL or __WCLONE.
func TestWaitClone(t *testing.T) {
	check(t, func(a *app) {
		pid := a.clone(0, func(a *app) {})
		if _, _, errno := a.wait4(-1, 0); errno != unix.ECHILD {
			t.Errorf("without an option: %v", errno)
		}
		if p, _, errno := a.wait4(-1, linux.WALL); p != pid || errno != 0 {
			t.Errorf("with __WALL: %d, %v", p, errno)
		}
	})
}

func TestNoZombies(t *testing.T) {
	for name, act := range map[string]linux.SigAction{
		"SIG_IGN":      {Handler: linux.SIG_IGN},
		"SA_NOCLDWAIT": {Flags: linux.SA_NOCLDWAIT},
	} {
		t.Run(name, func(t *testing.T) {
			check(t, func(a *app) {
				a.setAction(linux.SIGCHLD, act)
				pid := a.fork(func(a *app) { a.exit(1) })
				if _, _, errno := a.wait4(pid, 0); errno != unix.ECHILD {
					t.Errorf("wait4: %v", errno)
				}
			})
		})
	}
}

func TestOrphans(t *testing.T) {
	for _, subreaper := range []bool{false, true} {
		check(t, func(a *app) {
			pid := a.fork(func(a *app) { // 2
				if subreaper {
					a.must(unix.SYS_PRCTL, linux.PR_SET_CHILD_SUBREAPER, 1)
				}
				child := a.fork(func(a *app) { // 3
					a.fork(func(a *app) { // 4
						for a.must(unix.SYS_GETPPID) == 3 {
							a.sleep(time.Millisecond)
						}
						a.exit(int(a.must(unix.SYS_GETPPID)))
					})
				})
				a.wait4(child, 0)
				if subreaper {
					if _, status, errno := a.wait4(-1, 0); status != 2<<8 || errno != 0 {
						a.exit(1)
					}
				}
			})
			a.wait4(pid, 0)
			_, status, errno := a.wait4(-1, 0)
			if subreaper {
				if errno != unix.ECHILD {
					t.Errorf("the subreaper's child: %#x, %v", status, errno)
				}
			} else if status != 1<<8 || errno != 0 {
				t.Errorf("status %#x, %v; want 0x100: the first process is the new parent", status, errno)
			}
		})
	}
}

func TestParentDeathSignal(t *testing.T) {
	check(t, func(a *app) {
		a.must(unix.SYS_PRCTL, linux.PR_SET_CHILD_SUBREAPER, 1)
		pid := a.fork(func(a *app) {
			var set atomic.Bool
			a.fork(func(a *app) {
				a.must(unix.SYS_PRCTL, linux.PR_SET_PDEATHSIG, uintptr(linux.SIGUSR2))
				set.Store(true)
				a.spin(func() bool { return false })
			})
			for !set.Load() {
				a.sleep(time.Millisecond)
			}
		})
		a.wait4(pid, 0)
		if _, status, errno := a.wait4(-1, 0); status != uint32(linux.SIGUSR2) || errno != 0 {
			t.Errorf("status %#x, %v", status, errno)
		}
	})
}

// When the first process ends, all others do.
func TestInitEnds(t *testing.T) {
	status := run(t, func(a *app) {
		for range 3 {
			a.fork(func(a *app) {
				a.sigmask(linux.SIG_SETMASK, ^linux.SignalSet(0))
				a.fork(func(a *app) { a.spin(func() bool { return false }) })
				a.syscall(unix.SYS_PPOLL, 0, 0, 0, 0, 0)
			})
		}
		a.sleep(5 * time.Millisecond)
		a.exit(6)
	})
	if status != 6<<8 {
		t.Errorf("status %#x", status)
	}
}

func TestVfork(t *testing.T) {
	var order []string // each side writes when the other cannot
	check(t, func(a *app) {
		a.store32(shared, 1)
		pid := a.clone(linux.CLONE_VM|linux.CLONE_VFORK|uintptr(linux.SIGCHLD), func(a *app) {
			a.sleep(5 * time.Millisecond)
			order = append(order, "child")
			a.store32(shared, 2)
			a.exit(4)
		})
		order = append(order, "parent")
		if v := a.load32(shared); v != 2 {
			t.Errorf("memory is not shared: %d", v)
		}
		if _, status, _ := a.wait4(pid, 0); status != 4<<8 {
			t.Errorf("status %#x", status)
		}
	})
	if len(order) != 2 || order[0] != "child" {
		t.Errorf("order %v", order)
	}
}

func TestForkMemory(t *testing.T) {
	check(t, func(a *app) {
		a.store32(shared, 1)
		pid := a.fork(func(a *app) {
			if a.load32(shared) != 1 {
				a.exit(1)
			}
			a.store32(shared, 2)
		})
		if _, status, _ := a.wait4(pid, 0); status != 0 || a.load32(shared) != 1 {
			t.Errorf("status %#x, the parent sees %d", status, a.load32(shared))
		}
	})
}

func TestCloneErrors(t *testing.T) {
	check(t, func(a *app) {
		for _, test := range []struct {
			flags uintptr
			want  unix.Errno
		}{
			{linux.CLONE_SIGHAND, unix.EINVAL},
			{linux.CLONE_THREAD | linux.CLONE_VM, unix.EINVAL},
			{linux.CLONE_NEWUSER, unix.EPERM},
			{linux.CLONE_NEWNS, unix.EPERM},
			{linux.CLONE_NEWPID, unix.EPERM},
			{65, unix.EINVAL},
			{linux.CLONE_PIDFD | linux.CLONE_PARENT_SETTID, unix.EINVAL},
		} {
			if _, errno := a.syscall(unix.SYS_CLONE, test.flags, 0, 0, 0, 0); errno != test.want {
				t.Errorf("flags %#x: %v, want %v", test.flags, errno, test.want)
			}
		}
		for _, test := range []struct {
			size uintptr
			args []uint64
			want unix.Errno
		}{
			{63, nil, unix.EINVAL},
			{4097, nil, unix.E2BIG},
			{96, []uint64{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}, unix.E2BIG},
			{64, []uint64{1}, unix.EINVAL},                      // the signal's place
			{64, []uint64{0, 0, 0, 0, 17, 0x1000}, unix.EINVAL}, // a stack without size
		} {
			a.store64(scratch, append(test.args, make([]uint64, 12-len(test.args))...)...)
			if _, errno := a.syscall(unix.SYS_CLONE3, uintptr(scratch), test.size); errno != test.want {
				t.Errorf("clone3 of %d bytes %v: %v, want %v", test.size, test.args, errno, test.want)
			}
		}
	})
}

func TestProcessLimit(t *testing.T) {
	check(t, func(a *app) {
		a.must(unix.SYS_SETRESUID, 1000, 1000, 1000) // root is not limited
		a.store64(scratch, 2, 2)
		a.must(unix.SYS_SETRLIMIT, linux.RLIMIT_NPROC, uintptr(scratch))
		pid := a.fork(func(*app) {})
		if _, errno := a.syscall(unix.SYS_CLONE, uintptr(linux.SIGCHLD), 0, 0, 0, 0); errno != unix.EAGAIN {
			t.Errorf("a third process: %v", errno)
		}
		a.wait4(pid, 0)
		pid = a.fork(func(*app) {})
		a.wait4(pid, 0)
	})
}

func TestThreadExit(t *testing.T) {
	check(t, func(a *app) {
		a.store32(shared, 77)
		a.p.mu.Lock()
		a.p.programs = append(a.p.programs, func(a *app) { a.syscall(unix.SYS_EXIT, 0) })
		a.p.mu.Unlock()
		flags := uintptr(threadFlags | linux.CLONE_CHILD_CLEARTID | linux.CLONE_PARENT_SETTID)
		addr := uintptr(shared)
		child := []uintptr{flags, a.ac.Stack() - 65536, uintptr(shared) + 8, 0, 0}
		child[cloneChildTID] = addr
		tid := a.must(unix.SYS_CLONE, child...)
		if v := a.load32(shared + 8); uintptr(v) != tid {
			t.Errorf("CLONE_PARENT_SETTID wrote %d, want %d", v, tid)
		}
		// As pthread_join does.
		for a.load32(shared) == 77 {
			a.syscall(unix.SYS_FUTEX, addr, linux.FUTEX_WAIT, 77, 0)
		}
		if _, errno := a.syscall(unix.SYS_TGKILL, 1, tid, 0); errno != 0 && errno != unix.ESRCH {
			t.Error(errno)
		}
		if v := a.load32(shared); v != 0 {
			t.Errorf("CLONE_CHILD_CLEARTID left %d", v)
		}
	})
}

func TestGroups(t *testing.T) {
	check(t, func(a *app) {
		call := func(want unix.Errno, nr uintptr, args ...uintptr) uintptr {
			t.Helper()
			ret, errno := a.syscall(nr, args...)
			if errno != want {
				t.Errorf("system call %d %v: %v, want %v", nr, args, errno, want)
			}
			return ret
		}
		call(unix.EPERM, unix.SYS_SETSID)        // a group leader
		call(unix.EPERM, unix.SYS_SETPGID, 0, 0) // a session leader
		call(unix.EINVAL, unix.SYS_SETPGID, 0, ^uintptr(0))
		call(unix.ESRCH, unix.SYS_SETPGID, 99, 0)
		call(unix.ESRCH, unix.SYS_GETPGID, 99)
		ready := make(chan bool)
		pid := uintptr(a.fork(func(a *app) {
			<-ready
			if a.must(unix.SYS_GETPGID, 0) != 2 {
				a.exit(1)
			}
			if _, errno := a.syscall(unix.SYS_SETSID); errno != unix.EPERM {
				a.exit(2)
			}
			a.must(unix.SYS_SETPGID, 0, 1)
			if a.must(unix.SYS_SETSID) != 2 || a.must(unix.SYS_GETSID, 0) != 2 {
				a.exit(3)
			}
			ready <- true
			<-ready
		}))
		call(unix.EPERM, unix.SYS_SETPGID, pid, 99) // no such group
		call(0, unix.SYS_SETPGID, pid, pid)
		ready <- true
		<-ready
		call(unix.EPERM, unix.SYS_SETPGID, pid, 1) // another session
		if s := call(0, unix.SYS_GETSID, pid); s != 2 {
			t.Errorf("session %d, want 2", s)
		}
		ready <- true
		if _, status, _ := a.wait4(-1, 0); status != 0 {
			t.Errorf("child: %#x", status)
		}
	})
}

func TestFutex(t *testing.T) {
	op := func(a *app, op int, val, val2 uintptr, addr2 hostarch.Addr, val3 uintptr) (uintptr, unix.Errno) {
		return a.syscall(unix.SYS_FUTEX, uintptr(shared), uintptr(op), val, val2, uintptr(addr2), val3)
	}
	waiters := func(a *app, n int, f func(a *app)) *atomic.Int32 {
		var done atomic.Int32
		for range n {
			tid := a.thread(func(a *app) { f(a); done.Add(1) })
			a.asleep(tid)
		}
		return &done
	}
	wait := func(a *app) {
		if _, errno := op(a, linux.FUTEX_WAIT|linux.FUTEX_PRIVATE_FLAG, 5, 0, 0, 0); errno != 0 {
			t.Errorf("wait: %v", errno)
		}
	}
	const wake = linux.FUTEX_WAKE | linux.FUTEX_PRIVATE_FLAG
	until := func(a *app, done *atomic.Int32, n int32) {
		t.Helper()
		for done.Load() < n {
			a.sleep(time.Millisecond)
		}
		if done.Load() != n {
			t.Errorf("%d have been woken, want %d", done.Load(), n)
		}
	}

	t.Run("wake", func(t *testing.T) {
		check(t, func(a *app) {
			a.store32(shared, 5)
			done := waiters(a, 3, wait)
			for _, want := range []uintptr{2, 1, 0} {
				if got, errno := op(a, wake, 2, 0, 0, 0); errno != 0 || got != want {
					t.Errorf("woke %d, %v; want %d", got, errno, want)
				}
			}
			until(a, done, 3)
		})
	})
	t.Run("errors", func(t *testing.T) {
		check(t, func(a *app) {
			a.store32(shared, 5)
			a.store64(scratch3, 0, 1e6)
			for _, test := range []struct {
				op   int
				val  uintptr
				val2 uintptr
				val3 uintptr
				want unix.Errno
			}{
				{linux.FUTEX_WAIT, 4, 0, 0, unix.EAGAIN},
				{linux.FUTEX_WAIT, 5, uintptr(scratch3), 0, unix.ETIMEDOUT},
				{linux.FUTEX_WAIT_BITSET, 5, 0, 0, unix.EINVAL},
				{linux.FUTEX_WAIT_BITSET, 5, uintptr(scratch3), 1, unix.ETIMEDOUT}, // long ago
				{linux.FUTEX_WAKE_BITSET, 5, 0, 0, unix.EINVAL},
				{linux.FUTEX_CMP_REQUEUE, 1, 1, 4, unix.EAGAIN},
				{linux.FUTEX_REQUEUE, 1, ^uintptr(0), 0, unix.EINVAL},
				{linux.FUTEX_UNLOCK_PI, 0, 0, 0, unix.EPERM},
				{linux.FUTEX_FD, 0, 0, 0, unix.ENOSYS},
				{linux.FUTEX_WAKE | linux.FUTEX_CLOCK_REALTIME, 0, 0, 0, unix.ENOSYS},
				{99, 0, 0, 0, unix.ENOSYS},
			} {
				if _, errno := op(a, test.op, test.val, test.val2, shared+4, test.val3); errno != test.want {
					t.Errorf("op %d: %v, want %v", test.op, errno, test.want)
				}
			}
			if _, errno := a.syscall(unix.SYS_FUTEX, uintptr(shared)+1, linux.FUTEX_WAKE, 1); errno != unix.EINVAL {
				t.Errorf("unaligned: %v", errno)
			}
			if _, errno := a.syscall(unix.SYS_FUTEX, 0x100, linux.FUTEX_WAIT, 1, 0); errno != unix.EFAULT {
				t.Errorf("unmapped: %v", errno)
			}
		})
	})
	t.Run("bitset", func(t *testing.T) {
		check(t, func(a *app) {
			a.store32(shared, 5)
			done := waiters(a, 1, func(a *app) { op(a, linux.FUTEX_WAIT_BITSET, 5, 0, 0, 6) })
			if n, _ := op(a, linux.FUTEX_WAKE_BITSET, 9, 0, 0, 1); n != 0 {
				t.Errorf("woke %d with other bits", n)
			}
			if n, _ := op(a, linux.FUTEX_WAKE_BITSET, 9, 0, 0, 2); n != 1 {
				t.Errorf("woke %d with a bit of it", n)
			}
			until(a, done, 1)
		})
	})
	t.Run("requeue", func(t *testing.T) {
		check(t, func(a *app) {
			a.store32(shared, 5)
			done := waiters(a, 4, wait)
			if n, errno := op(a, linux.FUTEX_CMP_REQUEUE|linux.FUTEX_PRIVATE_FLAG, 1, 2, shared+64, 5); n != 3 || errno != 0 {
				t.Errorf("requeue: %d, %v", n, errno)
			}
			until(a, done, 1)
			if n, _ := op(a, wake, 9, 0, 0, 0); n != 1 {
				t.Errorf("%d were left", n)
			}
			until(a, done, 2)
			if n, _ := a.syscall(unix.SYS_FUTEX, uintptr(shared)+64, wake, 9); n != 2 {
				t.Errorf("%d were moved", n)
			}
			until(a, done, 4)
		})
	})
	t.Run("wake-op", func(t *testing.T) {
		check(t, func(a *app) {
			a.store32(shared, 5)
			a.store32(shared+4, 10)
			done := waiters(a, 1, wait)
			// *addr2 += 3; wake at addr2 too if it was > 9
			code := uintptr(linux.FUTEX_OP_ADD<<28 | linux.FUTEX_OP_CMP_GT<<24 | 3<<12 | 9)
			if n, errno := op(a, linux.FUTEX_WAKE_OP|linux.FUTEX_PRIVATE_FLAG, 1, 1, shared+4, code); n != 1 || errno != 0 {
				t.Errorf("wake-op: %d, %v", n, errno)
			}
			if v := a.load32(shared + 4); v != 13 {
				t.Errorf("value %d, want 13", v)
			}
			until(a, done, 1)
			for _, c := range []struct{ kind, arg, want uintptr }{
				{linux.FUTEX_OP_SET, 0xfff, 0xffffffff}, {linux.FUTEX_OP_ANDN, 0xf0, 0xffffff0f},
				{linux.FUTEX_OP_XOR, 0xf, 0xffffff00}, {linux.FUTEX_OP_OR, 0x11, 0xffffff11},
				{linux.FUTEX_OP_SET | linux.FUTEX_OP_OPARG_SHIFT, 4, 16},
			} {
				op(a, linux.FUTEX_WAKE_OP, 1, 1, shared+4, c.kind<<28|c.arg<<12)
				if v := a.load32(shared + 4); uintptr(v) != c.want {
					t.Errorf("operation %d: %#x, want %#x", c.kind, v, c.want)
				}
			}
		})
	})
	t.Run("pi", func(t *testing.T) {
		check(t, func(a *app) {
			a.store32(shared, 0)
			if _, errno := op(a, linux.FUTEX_LOCK_PI, 0, 0, 0, 0); errno != 0 || a.load32(shared) != 1 {
				t.Errorf("lock: %v, word %#x", errno, a.load32(shared))
			}
			if _, errno := op(a, linux.FUTEX_LOCK_PI, 0, 0, 0, 0); errno != unix.EDEADLK {
				t.Errorf("twice: %v", errno)
			}
			done := waiters(a, 2, func(a *app) {
				if _, errno := op(a, linux.FUTEX_TRYLOCK_PI, 0, 0, 0, 0); errno != unix.EAGAIN {
					t.Errorf("try: %v", errno)
				}
				if _, errno := op(a, linux.FUTEX_LOCK_PI, 0, 0, 0, 0); errno != 0 {
					t.Errorf("lock in a thread: %v", errno)
				}
				if v := a.load32(shared) & linux.FUTEX_TID_MASK; v != uint32(a.task.TID()) {
					t.Errorf("the owner is %d", v)
				}
				if _, errno := op(a, linux.FUTEX_UNLOCK_PI, 0, 0, 0, 0); errno != 0 {
					t.Errorf("unlock in a thread: %v", errno)
				}
			})
			if _, errno := op(a, linux.FUTEX_UNLOCK_PI, 0, 0, 0, 0); errno != 0 {
				t.Errorf("unlock: %v", errno)
			}
			until(a, done, 2)
			if v := a.load32(shared); v != 0 {
				t.Errorf("the word is %#x in the end", v)
			}
			a.store32(shared, 12345)
			if _, errno := op(a, linux.FUTEX_LOCK_PI, 0, 0, 0, 0); errno != unix.ESRCH {
				t.Errorf("an owner that does not exist: %v", errno)
			}
		})
	})
}

func TestRobustList(t *testing.T) {
	const head, entry = shared + 128, shared + 256
	check(t, func(a *app) {
		var held atomic.Bool
		a.thread(func(a *app) {
			tid := uint32(a.task.TID())
			// head -> entry -> head; the word follows the entry by 16 bytes. The
			// pending entry is not held.
			a.store64(head, uint64(entry), 16, uint64(entry)+64)
			a.store64(entry, uint64(head))
			a.store32(entry+16, tid|linux.FUTEX_WAITERS)
			a.store32(entry+80, 99)
			a.must(unix.SYS_SET_ROBUST_LIST, uintptr(head), 24)
			held.Store(true)
			a.sleep(5 * time.Millisecond)
		})
		for !held.Load() {
			a.sleep(time.Millisecond)
		}
		for {
			v := a.load32(entry + 16)
			if v&linux.FUTEX_OWNER_DIED != 0 {
				break
			}
			a.syscall(unix.SYS_FUTEX, uintptr(entry)+16, linux.FUTEX_WAIT, uintptr(v), 0)
		}
		if v := a.load32(entry + 16); v != linux.FUTEX_WAITERS|linux.FUTEX_OWNER_DIED {
			t.Errorf("word %#x", v)
		}
		if v := a.load32(entry + 80); v != 99 {
			t.Errorf("another's word became %d", v)
		}
		// A list that never ends, and one that leads nowhere.
		for _, next := range []uint64{uint64(entry), 0xdead0000} {
			a.thread(func(a *app) {
				a.store64(head, uint64(entry), 16, 0)
				a.store64(entry, next)
				a.must(unix.SYS_SET_ROBUST_LIST, uintptr(head), 24)
			})
			for a.task.ThreadGroup().Threads() > 1 {
				a.sleep(time.Millisecond)
			}
		}
	})
}

func TestTimers(t *testing.T) {
	n := 0
	var last linux.SignalInfo
	check(t, func(a *app) {
		count := func(_ *app, _ int, i linux.SignalInfo) { n++; last = i }
		a.sigaction(linux.SIGALRM, 0, 0, count)
		a.store64(scratch, 0, 2000, 0, 2000) // 2 ms
		a.must(unix.SYS_SETITIMER, linux.ITIMER_REAL, uintptr(scratch), 0)
		for n < 3 {
			a.syscall(unix.SYS_PPOLL, 0, 0, 0, 0, 0)
		}
		a.store64(scratch, 0, 0, 0, 0)
		a.must(unix.SYS_SETITIMER, linux.ITIMER_REAL, uintptr(scratch), uintptr(scratch2))
		if iv := a.load64(scratch2 + 8); iv != 2000 {
			t.Errorf("interval %d us", iv)
		}

		// A process timer, whose signal is blocked for a while.
		a.sigaction(40, 0, 0, count)
		a.sigmask(linux.SIG_BLOCK, linux.SignalSetOf(40))
		ev := linux.Sigevent{Value: 99, Signo: 40, Notify: linux.SIGEV_SIGNAL}
		b := make([]byte, ev.SizeBytes())
		ev.MarshalBytes(b)
		a.write(scratch, b)
		a.must(unix.SYS_TIMER_CREATE, linux.CLOCK_MONOTONIC, uintptr(scratch), uintptr(scratch2))
		id := uintptr(a.load32(scratch2))
		a.store64(scratch, 0, 1e6, 0, 1e6)
		a.must(unix.SYS_TIMER_SETTIME, id, 0, uintptr(scratch), 0)
		a.sleep(20 * time.Millisecond)
		n = 0
		a.sigmask(linux.SIG_UNBLOCK, linux.SignalSetOf(40))
		if n == 0 || last.Sigval() != 99 || last.TimerID() != int32(id) {
			t.Errorf("%d signals, last %v", n, &last)
		}
		a.must(unix.SYS_TIMER_DELETE, id)
		if _, errno := a.syscall(unix.SYS_TIMER_DELETE, id); errno != unix.EINVAL {
			t.Errorf("deleted twice: %v", errno)
		}

		// CPU time is spent while application code runs.
		n = 0
		a.sigaction(linux.SIGVTALRM, 0, 0, count)
		a.store64(scratch, 0, 0, 0, 10000)
		a.must(unix.SYS_SETITIMER, linux.ITIMER_VIRTUAL, uintptr(scratch), 0)
		a.spin(func() bool { return n > 0 })
	})
}

func TestOverrun(t *testing.T) {
	check(t, func(a *app) {
		a.sigmask(linux.SIG_BLOCK, linux.SignalSetOf(linux.SIGALRM))
		a.must(unix.SYS_TIMER_CREATE, linux.CLOCK_MONOTONIC, 0, uintptr(scratch2))
		id := uintptr(a.load32(scratch2))
		a.store64(scratch, 0, 1e6, 0, 1e6)
		a.must(unix.SYS_TIMER_SETTIME, id, 0, uintptr(scratch), 0)
		a.sleep(20 * time.Millisecond)
		a.store64(scratch, uint64(linux.SignalSetOf(linux.SIGALRM)))
		a.must(unix.SYS_RT_SIGTIMEDWAIT, uintptr(scratch), uintptr(scratch3), 0, 8)
		var info linux.SignalInfo
		info.UnmarshalBytes(a.read(scratch3, linux.SignalInfoSize))
		// 20 periods at least have passed; the first one is no overrun.
		if n := a.must(unix.SYS_TIMER_GETOVERRUN, id); n < 10 || info.Overrun() != int32(n) {
			t.Errorf("%d overruns, %d in the signal", n, info.Overrun())
		}
		// Timers that are armed end with the process.
	})
}

func TestPidFD(t *testing.T) {
	check(t, func(a *app) {
		var end atomic.Bool
		pid := uintptr(a.fork(func(a *app) {
			for !end.Load() {
				a.sleep(time.Millisecond)
			}
			a.exit(2)
		}))
		fd := a.must(unix.SYS_PIDFD_OPEN, pid, 0)
		poll := func(ms uint64) uintptr {
			a.store64(scratch, uint64(fd)|uint64(unix.POLLIN)<<32)
			a.store64(scratch2, ms/1000, ms%1000*1e6)
			return a.must(unix.SYS_PPOLL, uintptr(scratch), 1, uintptr(scratch2), 0, 8)
		}
		if poll(1) != 0 {
			t.Error("ready while the process runs")
		}
		a.must(unix.SYS_PIDFD_SEND_SIGNAL, fd, 0, 0, 0)
		end.Store(true)
		if poll(20000) != 1 {
			t.Error("not ready when the process has ended")
		}
		a.must(unix.SYS_WAITID, linux.P_PIDFD, fd, uintptr(scratch), linux.WEXITED, 0)
		if _, errno := a.syscall(unix.SYS_PIDFD_SEND_SIGNAL, fd, 0, 0, 0); errno != unix.ESRCH {
			t.Errorf("signal after it was reaped: %v", errno)
		}
	})
}

func TestSignalFD(t *testing.T) {
	check(t, func(a *app) {
		set := linux.MakeSignalSet(linux.SIGUSR1, 40)
		a.sigmask(linux.SIG_BLOCK, set)
		a.store64(scratch, uint64(set))
		fd := a.must(unix.SYS_SIGNALFD4, ^uintptr(0), uintptr(scratch), 8, unix.SFD_NONBLOCK)
		read := func(a *app) (uint32, unix.Errno) {
			n, errno := a.syscall(unix.SYS_READ, fd, uintptr(scratch), 256)
			if errno == 0 && n != 128 {
				t.Errorf("read %d bytes", n)
			}
			return a.load32(scratch), errno
		}
		if _, errno := read(a); errno != unix.EAGAIN {
			t.Errorf("nothing pending: %v", errno)
		}
		a.kill(1, linux.SIGUSR1)
		if sig, errno := read(a); sig != uint32(linux.SIGUSR1) || errno != 0 {
			t.Errorf("signal %d, %v", sig, errno)
		}
		pid := a.fork(func(a *app) { a.asleep(1); a.kill(1, 40) })
		a.store64(scratch, uint64(fd)|uint64(unix.POLLIN)<<32)
		if n := a.must(unix.SYS_PPOLL, uintptr(scratch), 1, 0, 0, 8); n != 1 {
			t.Errorf("poll: %d", n)
		}
		if sig, errno := read(a); sig != 40 || errno != 0 {
			t.Errorf("signal %d, %v", sig, errno)
		}
		a.wait4(pid, 0)

		// A child waits for its own signals with the file of its parent.
		pid = a.fork(func(a *app) {
			me := int(a.must(unix.SYS_GETPID))
			ep := a.must(unix.SYS_EPOLL_CREATE1, 0)
			a.store64(scratch2, uint64(unix.EPOLLIN), 0)
			a.must(unix.SYS_EPOLL_CTL, ep, unix.EPOLL_CTL_ADD, fd, uintptr(scratch2))
			for range 2 {
				a.fork(func(a *app) { a.asleep(me); a.kill(me, linux.SIGUSR1) })
				a.store64(scratch, uint64(fd)|uint64(unix.POLLIN)<<32)
				if n := a.must(unix.SYS_PPOLL, uintptr(scratch), 1, 0, 0, 8); n != 1 {
					t.Errorf("poll in the child: %d", n)
				}
				if n := a.must(unix.SYS_EPOLL_PWAIT, ep, uintptr(scratch2), 1, 0, 0, 8); n != 1 {
					t.Errorf("epoll in the child: %d", n)
				}
				if sig, errno := read(a); sig != uint32(linux.SIGUSR1) || errno != 0 {
					t.Errorf("signal %d, %v in the child", sig, errno)
				}
			}
			a.exit(0)
		})
		a.wait4(pid, 0)
	})
}

func TestLimits(t *testing.T) {
	check(t, func(a *app) {
		a.must(unix.SYS_SETRESUID, 1000, 1000, 1000)
		set := func(cur, max uint64) unix.Errno {
			a.store64(scratch, cur, max)
			_, errno := a.syscall(unix.SYS_PRLIMIT64, 0, linux.RLIMIT_NOFILE, uintptr(scratch), 0)
			return errno
		}
		for _, test := range []struct {
			cur, max uint64
			want     unix.Errno
		}{{20, 10, unix.EINVAL}, {5, 10, 0}, {10, 10, 0}, {5, 11, unix.EPERM}, {3, 3, 0}} {
			if errno := set(test.cur, test.max); errno != test.want {
				t.Errorf("%d, %d: %v, want %v", test.cur, test.max, errno, test.want)
			}
		}
		a.must(unix.SYS_PIPE2, uintptr(scratch), 0)
		if _, errno := a.syscall(unix.SYS_PIPE2, uintptr(scratch), 0); errno != unix.EMFILE {
			t.Errorf("a fourth descriptor: %v", errno)
		}
		if _, errno := a.syscall(unix.SYS_PRLIMIT64, 0, 16, 0, uintptr(scratch)); errno != unix.EINVAL {
			t.Errorf("no such limit: %v", errno)
		}
	})
}

func TestCreds(t *testing.T) {
	if unix.Geteuid() != 0 {
		// The first process has the credentials of this one.
		check(t, func(a *app) {
			if _, errno := a.syscall(unix.SYS_SETUID, 0); errno != unix.EPERM {
				t.Errorf("setuid(0): %v", errno)
			}
		})
		return
	}
	check(t, func(a *app) {
		caps := func() uint64 {
			a.store64(scratch, linux.LINUX_CAPABILITY_VERSION_3)
			a.must(unix.SYS_CAPGET, uintptr(scratch), uintptr(scratch2))
			return uint64(a.load32(scratch2)) | uint64(a.load32(scratch2+12))<<32
		}
		if caps() != 1<<(linux.CAP_LAST_CAP+1)-1 {
			t.Errorf("root has %#x", caps())
		}
		a.must(unix.SYS_SETRESUID, ^uintptr(0), 1000, ^uintptr(0))
		if caps() != 0 || a.must(unix.SYS_GETEUID) != 1000 || a.must(unix.SYS_GETUID) != 0 {
			t.Errorf("after seteuid: capabilities %#x, euid %d", caps(), a.must(unix.SYS_GETEUID))
		}
		a.must(unix.SYS_SETRESUID, ^uintptr(0), 0, ^uintptr(0))
		if caps() == 0 {
			t.Error("root lost its capabilities on the way back")
		}
		a.must(unix.SYS_SETGID, 5)
		a.must(unix.SYS_SETUID, 1000)
		for _, nr := range []uintptr{unix.SYS_SETUID, unix.SYS_SETGID} {
			if _, errno := a.syscall(nr, 0); errno != unix.EPERM {
				t.Errorf("system call %d of user 1000: %v", nr, errno)
			}
		}
		if caps() != 0 {
			t.Errorf("user 1000 has %#x", caps())
		}
	})
}

// Unknown calls are ENOSYS and counted; strict kernels end.
func TestUnknownSyscall(t *testing.T) {
	check(t, func(a *app) {
		for range 3 {
			if _, errno := a.syscall(5000); errno != unix.ENOSYS {
				t.Errorf("unknown call: %v", errno)
			}
		}
		if n := a.task.Kernel().UnknownSyscalls()[5000]; n != 3 {
			t.Errorf("counted %d times", n)
		}
		if _, errno := a.syscall(^uintptr(0)); errno != unix.ENOSYS {
			t.Errorf("call -1: %v", errno)
		}
	})
}
