package main

// program writes "hello\n" and exits with the errno of getpid().
var program = []byte("" +
	"\xb8\x01\x00\x00\x00" + // mov $SYS_write, %eax
	"\xbf\x01\x00\x00\x00" + // mov $1, %edi
	"\x48\x8d\x35\x19\x00\x00\x00" + // lea hello(%rip), %rsi
	"\xba\x06\x00\x00\x00" + // mov $6, %edx
	"\x0f\x05" + // syscall
	"\xb8\x27\x00\x00\x00" + // mov $SYS_getpid, %eax
	"\x0f\x05" + // syscall
	"\xf7\xd8" + // neg %eax
	"\x89\xc7" + // mov %eax, %edi
	"\xb8\xe7\x00\x00\x00" + // mov $SYS_exit_group, %eax
	"\x0f\x05" + // syscall
	"hello\n")
