// Package stubtest watches stub processes from outside, for tests: with ptrace(2)
// it stops their threads at every system call of the host that has got past Syscall
// User Dispatch, before seccomp has its say and after it, and finds those that were
// not refused although the test does not permit them. It is there on amd64 only.
//
// It depends on nothing but the host, so that what it finds does not come from the
// code that it watches, and must not import a backend.
package stubtest
