// Package linux holds the constants and structures of the Linux system call ABI
// that the Sentry and the platforms exchange with applications and with the
// host: signals, mmap, clone and futex flags, stat, termios, ...
//
// It depends on the standard library alone, makes no host calls, and keeps
// layouts exactly as the kernel's uapi headers define them; tests compare them
// with golang.org/x/sys. Errno values are unix.Errno's. What is the same on
// amd64 and arm64 stands in files without a suffix.
package linux
