// Package syscalls answers the application's system calls: it copies and checks
// arguments, and asks the kernel, memory manager and files for the rest.
//
// It depends on kernel, mm and vfs. Every argument is hostile. It holds no state:
// that is the task's or the file's.
package syscalls

import "github.com/ringfence/ringfence/pkg/sentry/kernel"

// tables are the system calls by subject, then number.
var tables = [][]kernel.Syscall{
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
func Table() []kernel.Syscall {
	size := 0
	for _, table := range tables {
		size = max(size, len(table))
	}
	all := make([]kernel.Syscall, size)
	for _, table := range tables {
		for nr, s := range table {
			if s.Fn != nil {
				all[nr] = s
			}
		}
	}
	return all
}
