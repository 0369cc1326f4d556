package bpf

import (
	"bytes"
	"encoding/gob"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The kernel is asked in a child process, because filters cannot be removed.
// The child runs each job on an OS thread of its own, with that thread's
// filters only.

// kernelJob is programs to install, in order, on one thread, and arguments for
// getppid, which ignores them, to call after that.
type kernelJob struct {
	Programs []Program
	Calls    [][6]uint64
}

// kernelAnswer is what the kernel made of a job.
type kernelAnswer struct {
	// Installed has the errno of each installation.
	Installed []unix.Errno
	// Returned has the raw result of each call.
	Returned []int64
}

const childEnv = "BPF_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		if err := serveKernelJobs(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// askKernel runs jobs in a child.
func askKernel(t *testing.T, jobs []kernelJob) []kernelAnswer {
	t.Helper()
	var in, out bytes.Buffer
	if err := gob.NewEncoder(&in).Encode(jobs); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &in, &out, os.Stderr
	timer := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	defer timer.Stop()
	if err := cmd.Run(); err != nil {
		t.Fatalf("child: %v", err)
	}
	var answers []kernelAnswer
	if err := gob.NewDecoder(&out).Decode(&answers); err != nil {
		t.Fatal(err)
	}
	if len(answers) != len(jobs) {
		t.Fatalf("%d answers to %d jobs", len(answers), len(jobs))
	}
	return answers
}

func serveKernelJobs() error {
	var jobs []kernelJob
	if err := gob.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		return err
	}
	answers := make([]kernelAnswer, len(jobs))
	for i, job := range jobs {
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // and never unlock: the thread ends
			done <- job.run(&answers[i])
		}()
		if err := <-done; err != nil {
			return err
		}
	}
	return gob.NewEncoder(os.Stdout).Encode(answers)
}

func (job *kernelJob) run(answer *kernelAnswer) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("prctl(PR_SET_NO_NEW_PRIVS): %w", err)
	}
	for _, p := range job.Programs {
		fprog := unix.SockFprog{Len: uint16(len(p))}
		if len(p) > 0 {
			fprog.Filter = (*unix.SockFilter)(unsafe.Pointer(&p[0]))
		}
		_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&fprog)))
		answer.Installed = append(answer.Installed, errno)
	}
	for _, a := range job.Calls {
		r, _, errno := unix.RawSyscall6(unix.SYS_GETPPID, uintptr(a[0]), uintptr(a[1]), uintptr(a[2]), uintptr(a[3]), uintptr(a[4]), uintptr(a[5]))
		if errno != 0 {
			r = -uintptr(errno)
		}
		answer.Returned = append(answer.Returned, int64(r))
	}
	return nil
}

// TestKernelValidates compares Validate with what the kernel accepts, on valid
// programs with random damage.
func TestKernelValidates(t *testing.T) {
	s := &source{rnd: rand.New(rand.NewPCG(3, 4))}
	const jobs, perJob = 20, 150
	var all []kernelJob
	for range jobs {
		var job kernelJob
		for range perJob {
			// Checked like the rest, but never executed.
			p := append(Program{Stmt(Ret|K, unix.SECCOMP_RET_ALLOW)}, s.program(1+s.n(30))...)
			for range 1 + s.n(2) {
				switch in := &p[s.n(len(p)-1)+1]; s.n(6) {
				case 0:
					in.Code = uint16(s.byte())
				case 1:
					in.Code ^= 1 << s.n(9)
				case 2:
					in.K = s.constant()
				case 3:
					in.JT, in.JF = uint8(s.n(40)), uint8(s.n(40))
				case 4:
					*in = Stmt([]uint16{Ld | Mem, Ldx | Mem, St, Stx}[s.n(4)], uint32(s.n(17)))
				case 5:
					p = p[:len(p)-1]
				}
			}
			p[0] = Stmt(Ret|K, unix.SECCOMP_RET_ALLOW)
			job.Programs = append(job.Programs, p)
		}
		all = append(all, job)
	}
	valid := 0
	for i, answer := range askKernel(t, all) {
		for j, errno := range answer.Installed {
			p := all[i].Programs[j]
			err := p.Validate()
			if err == nil {
				valid++
			}
			if (err == nil) != (errno == 0) || errno != 0 && errno != unix.EINVAL {
				t.Errorf("the kernel says %v, Validate says %v of\n%v", errno, err, p)
			}
		}
	}
	if total := jobs * perJob; valid < total/10 || valid > total*9/10 {
		t.Errorf("%d of %d programs are valid: too one-sided to test anything", valid, total)
	}
}

// TestKernelRuns compares Run with what the kernel's implementation makes of
// random programs that return errors.
func TestKernelRuns(t *testing.T) {
	s := &source{rnd: rand.New(rand.NewPCG(5, 6))}
	const firstErrno = 1024 // added by or
	// What random programs seldom do: shifts by 32 and more.
	fixed := []Program{
		{Stmt(Ld|Imm, 3), Stmt(Ldx|Imm, 33), Stmt(Alu|Lsh|X, 0)},
		{Stmt(Ld|Imm, 3), Stmt(Ldx|Imm, 32), Stmt(Alu|Lsh|X, 0)},
		{Stmt(Ld|Imm, 0x300), Stmt(Ldx|Imm, 1<<31|4), Stmt(Alu|Rsh|X, 0)},
	}
	var jobs []kernelJob
	for i := range 200 {
		body := s.program(5 + s.n(30))
		if i < len(fixed) {
			body = append(fixed[i], Stmt(Ret|A, 0))
		}
		for i, in := range body {
			switch in.Code {
			case Ret | K:
				if body[i].K = unix.SECCOMP_RET_ERRNO | (firstErrno + in.K); i == len(body)-1 || s.n(3) > 0 {
					body[i] = Stmt(Alu|Xor|K, uint32(i))
				}
			case Ret | A:
				// A may ask for the thread to be killed. It is made into an
				// errno at the end.
				body[i] = Stmt(Alu|Xor|K, uint32(i))
			case Alu | Div | X:
				body[i].Code = Alu | Mul | X // X may be 0, which kills
			}
		}
		body = append(body, Stmt(Alu|And|K, 1023), Stmt(Alu|Or|K, unix.SECCOMP_RET_ERRNO|firstErrno), Stmt(Ret|A, 0))
		p := append(Program{
			Stmt(Ld|W|Abs, OffNr),
			JumpStmt(Jmp|Jeq|K, unix.SYS_GETPPID, 1, 0),
			Stmt(Ret|K, unix.SECCOMP_RET_ALLOW),
		}, body...)
		job := kernelJob{Programs: []Program{p}}
		for range 20 {
			d := s.data()
			job.Calls = append(job.Calls, d.Args)
		}
		jobs = append(jobs, job)
	}
	seen := make(map[int64]bool)
	for i, answer := range askKernel(t, jobs) {
		p := jobs[i].Programs[0]
		if answer.Installed[0] != 0 {
			t.Fatalf("installing: %v\n%v", answer.Installed[0], p)
		}
		for j, got := range answer.Returned {
			d := Data{Nr: unix.SYS_GETPPID, Arch: nativeAuditArch, Args: jobs[i].Calls[j]}
			r, err := p.Run(&d)
			if err != nil {
				t.Fatal(err)
			}
			if want := -int64(r.Action & unix.SECCOMP_RET_DATA); got != want {
				t.Errorf("for %x the kernel gives %d, Run %d\n%v", d.Args, got, want, p)
			}
			seen[got] = true
		}
	}
	if len(seen) < 100 {
		t.Errorf("only %d different results: too few to test anything", len(seen))
	}
}
