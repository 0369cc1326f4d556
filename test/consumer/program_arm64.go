package main

// program writes "hello\n" and exits with the errno of getpid().
var program = []byte("" +
	"\x08\x08\x80\xd2" + // mov x8, #SYS_write
	"\x20\x00\x80\xd2" + // mov x0, #1
	"\x01\x01\x00\x10" + // adr x1, hello
	"\xc2\x00\x80\xd2" + // mov x2, #6
	"\x01\x00\x00\xd4" + // svc #0
	"\x88\x15\x80\xd2" + // mov x8, #SYS_getpid
	"\x01\x00\x00\xd4" + // svc #0
	"\xe0\x03\x00\x4b" + // neg w0, w0
	"\xc8\x0b\x80\xd2" + // mov x8, #SYS_exit_group
	"\x01\x00\x00\xd4" + // svc #0
	"hello\n")
