// Package syscalls answers the application's system calls: it copies and checks
// arguments, and asks the kernel, memory manager and files for the rest.
//
// It depends on kernel, mm and vfs. Every argument is hostile. It holds no state:
// that is the task's or the file's.
package syscalls

import "github.com/ringfence/ringfence/pkg/sentry/kernel"

// tables are the system calls by subject.
var tables = []map[uintptr]kernel.Syscall{
	taskSyscalls, taskSyscallsArch,
	signalSyscalls,
	timeSyscalls,
	futexSyscalls,
	credsSyscalls,
	miscSyscalls,
	fileSyscalls, fileSyscallsArch,
	pollSyscalls, pollSyscallsArch,
	pipeSyscalls,
	socketSyscalls,
	mmSyscalls,
}

// Table returns the system calls by number.
func Table() map[uintptr]kernel.Syscall {
	all := make(map[uintptr]kernel.Syscall)
	for _, table := range tables {
		for nr, s := range table {
			all[nr] = s
		}
	}
	return all
}
