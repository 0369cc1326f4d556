// text SEED ROUNDS [NAME]: programs whose code a sandbox might like to change: system calls
// in places where bytes mean two things, jumps to where nobody jumps, code that is
// written while it runs, that is shared, copied, moved, forked; and other ways into
// the kernel than system calls. The results are those of the hardware. 0 rounds are one
// with fewer calls, for when each of them is slow.
#include "adversary.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <setjmp.h>
#include <sys/ucontext.h>

#ifdef __x86_64__

enum { hot = 100 }; // calls after which code may have been changed

static int many = 10; // times hot, where much may happen

typedef long function(long, long, long);

static function *asFunction(void *p) { return (function *)p; }

// start returns the page that p is in.
static unsigned char *start(unsigned char *p) { return (unsigned char *)((u64)p & -(u64)page); }

// place returns executable memory with code in it, not quite at the start of a page:
// what lies before may count. how is one of several kinds of mapping.
enum { anonymous, file, writable, sharedFile, kinds };
enum { lead = 32 };

static unsigned char *place(int how, const void *code, size_t size) {
	unsigned char *p, nops[lead];
	memset(nops, 0x90, lead);
	if (how == file || how == sharedFile) {
		char name[] = "/tmp/text-XXXXXX";
		int fd = mkstemp(name);
		if (fd < 0 || ftruncate(fd, page) != 0 || pwrite(fd, nops, lead, 0) != lead || pwrite(fd, code, size, lead) != (ssize_t)size)
			die("a file for code");
		unlink(name);
		p = mmap(0, page, PROT_READ | PROT_EXEC, how == file ? MAP_PRIVATE : MAP_SHARED, fd, 0);
		close(fd);
	} else {
		p = mmap(0, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (p == MAP_FAILED)
			die("mmap for code");
		memcpy(p, nops, lead);
		memcpy(p + lead, code, size);
		if (mprotect(p, page, PROT_READ | PROT_EXEC | (how == writable ? PROT_WRITE : 0)) != 0)
			die("mprotect of code");
	}
	if (p == MAP_FAILED)
		die("mmap for code");
	return p + lead;
}

// What the calls that are used here must return.
static const int numbers[] = {SYS_getpid, SYS_getppid, SYS_getuid, SYS_getgid, SYS_gettid, SYS_geteuid};

static long expected(int nr) {
	switch (nr) {
	case SYS_getpid: return getpid();
	case SYS_getppid: return getppid();
	case SYS_getuid: return getuid();
	case SYS_getgid: return getgid();
	case SYS_gettid: return syscall(SYS_gettid);
	case SYS_geteuid: return geteuid();
	}
	die("number %d", nr);
}

static void want(const char *what, long got, long want) {
	if (got != want)
		die("%s: %#lx, want %#lx", what, got, want);
}

// stub is: mov $nr, %eax; syscall; ret.
static size_t stub(unsigned char *p, int nr) {
	memcpy(p, (unsigned char[]){0xb8, nr, nr >> 8, 0, 0, 0x0f, 0x05, 0xc3}, 8);
	return 8;
}

// A byte pattern that some C library has in ioctl: the end of one instruction looks
// like mov $16, %eax, and 16 is the number that is in EAX already.
static void looksLikeMov(struct rng *r) {
	(void)r;
	static const unsigned char code[] = {
	    0xb8, 16, 0, 0, 0,                                // mov $16, %eax
	    0xc7, 0x44, 0x24, 0xd0, 0xff, 0xff, 0xff, 0xff,   // movl $-1, -0x30(%rsp)
	    0xc7, 0x44, 0x24, 0xb8, 0x10, 0x00, 0x00, 0x00,   // movl $16, -0x48(%rsp)
	    0x0f, 0x05,                                       // syscall
	    0x8b, 0x54, 0x24, 0xb8, 0x83, 0xfa, 0x10,         // cmpl $16, -0x48(%rsp)
	    0x75, 0x08,                                       // jne
	    0x83, 0x7c, 0x24, 0xd0, 0xff,                     // cmpl $-1, -0x30(%rsp)
	    0x75, 0x01,                                       // jne
	    0xc3,                                             // ret
	    0xb8, 0x4d, 0x4d, 0, 0, 0xc3,                     // mov $0x4d4d, %eax; ret
	};
	int null = open("/dev/null", O_RDWR);
	for (int how = 0; how < kinds; how++) {
		function *f = asFunction(place(how, code, sizeof code));
		for (int i = 0; i < 2 * many * hot; i++)
			want("ioctl in the pattern of a C library", f(null, 0x5413, 0), -ENOTTY);
	}
	// movabs $0x..., %rdx whose immediate ends with b8 imm32.
	static const unsigned char movabs[] = {
	    0xb8, 39, 0, 0, 0,                                          // mov $39, %eax
	    0x48, 0xba, 0x11, 0x22, 0x33, 0xb8, 39, 0, 0, 0,            // movabs $0x000027b8332211, %rdx
	    0x0f, 0x05,                                                 // syscall
	    0x48, 0xb9, 0x11, 0x22, 0x33, 0xb8, 39, 0, 0, 0,            // movabs, %rcx
	    0x48, 0x39, 0xca, 0x74, 0x05, 0xb8, 0x4d, 0x4d, 0, 0, 0xc3, // cmp; je; mov; ret
	};
	for (int how = 0; how < kinds; how++) {
		function *f = asFunction(place(how, movabs, sizeof movabs));
		long pid = getpid();
		for (int i = 0; i < 2 * many * hot; i++)
			want("getpid behind movabs", f(0, 0, 0), pid);
	}
}

// Whoever jumps to the system call instruction of a pair gives another number, and
// whoever jumps behind it makes none.
static void middle(struct rng *r) {
	unsigned char code[64];
	for (int how = 0; how < kinds; how++) {
		// mov $39, %eax; syscall; ret; and an entry with the number in RDI.
		size_t n = stub(code, SYS_getpid);
		memcpy(code + n, (unsigned char[]){0x89, 0xf8, 0xeb, 0x100 - 7}, 4); // mov %edi, %eax; jmp to the syscall
		unsigned char *p = place(how, code, sizeof code);
		long pid = getpid();
		for (int i = 0; i < many * hot; i++) {
			want("getpid", asFunction(p)(0, 0, 0), pid);
			if (i % 16 == 0) {
				int nr = numbers[below(r, 6)];
				want("a jump to the system call instruction", asFunction(p + n)(nr, 0, 0), expected(nr));
			}
		}
		// syscall; cmp $-4095, %rax; setae %dl; movzx %dl, %eax; ret, with the number or
		// the value to compare in RAX.
		static const unsigned char compare[] = {
		    0x48, 0x89, 0xf8, 0xeb, 0x05,                                                                       // mov %rdi, %rax; jmp
		    0x48, 0x89, 0xf8, 0xeb, 0x02,                                                                       // mov %rdi, %rax; jmp
		    0x0f, 0x05, 0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff, 0x0f, 0x93, 0xc2, 0x0f, 0xb6, 0xd2, 0x85, 0xf6, // ...; test %esi, %esi
		    0x74, 0x02, 0x89, 0xd0, 0xc3,                                                                       // jz; mov %edx, %eax; ret
		};
		p = place(how, compare, sizeof compare);
		for (int i = 0; i < many * hot; i++) {
			want("getpid before cmp", asFunction(p)(SYS_getpid, 0, 0), pid);
			want("carry after getpid", asFunction(p)(SYS_getpid, 1, 0), 0);
			want("carry after an error", asFunction(p)(SYS_close, 1, 0), 1);
			want("a jump to the cmp", asFunction(p + 5)(-1, 1, 0), 1);
			want("a jump to the cmp", asFunction(p + 5)(-4096, 1, 0), 0);
		}
	}
}

// Registers and flags are as after a system call: RCX is the address behind it, and
// nothing but R11 has changed.
static void registers(struct rng *r) {
	static const unsigned char code[] = {
	    0xb8, 39, 0, 0, 0,       // mov $39, %eax
	    0x0f, 0x05,              // syscall
	    0x48, 0x89, 0x0f,        // mov %rcx, (%rdi)
	    0x4c, 0x89, 0x5f, 0x08,  // mov %r11, 8(%rdi)
	    0x9c, 0x8f, 0x47, 0x10,  // pushf; pop 16(%rdi)
	    0x48, 0x89, 0x77, 0x18,  // mov %rsi, 24(%rdi)
	    0x48, 0x89, 0x57, 0x20,  // mov %rdx, 32(%rdi)
	    0x4c, 0x89, 0x47, 0x28,  // mov %r8, 40(%rdi)
	    0x4c, 0x89, 0x4f, 0x30,  // mov %r9, 48(%rdi)
	    0x4c, 0x89, 0x57, 0x38,  // mov %r10, 56(%rdi)
	    0xc3,
	};
	u64 out[8];
	for (int how = 0; how < kinds; how++) {
		unsigned char *p = place(how, code, sizeof code);
		for (int i = 0; i < many * hot; i++) {
			u64 a = next(r), b = next(r), c = next(r), d = next(r), e = next(r), flags = below(r, 2) ? 0x8d5 : 0;
			register u64 r8 __asm__("r8") = c, r9 __asm__("r9") = d, r10 __asm__("r10") = e;
			long result;
			__asm__ volatile("movq %%rsp, %%rbx\n leaq -512(%%rsp), %%rsp\n"
			                 "pushq %4\n popfq\n callq *%5\n movq %%rbx, %%rsp\n cld"
			                 : "=&a"(result), "+r"(r8), "+r"(r9), "+r"(r10)
			                 : "r"(flags | 0x202), "r"(p), "D"(out), "S"(a), "d"(b)
			                 : "rbx", "rcx", "r11", "memory", "cc");
			want("the result", result, getpid());
			want("RCX", out[0], (long)p + 7);
			want("flags", out[2], (flags | 0x202));
			want("RSI", out[3], a);
			want("RDX", out[4], b);
			want("R8", out[5], c);
			want("R9", out[6], d);
			want("R10", out[7], e);
		}
	}
}

// heat calls code until it may have been changed.
static void heat(unsigned char *p, int nr) {
	long result = expected(nr);
	for (int i = 0; i < 2 * hot; i++)
		want("hot code", asFunction(p)(0, 0, 0), result);
}

// Code that is hot, and written.
static void selfModifying(struct rng *r) {
	unsigned char code[16];
	for (int round = 0; round < 40; round++) {
		// Elsewhere each time: what was written is not changed again soon.
		stub(code, SYS_getpid);
		unsigned char *p = place(anonymous, code, 8);
		heat(p, SYS_getpid);
		int nr = numbers[below(r, 6)];
		long result = expected(nr);
		switch (round % 4) {
		case 0: // in place
			if (mprotect(start(p), page, PROT_READ | PROT_WRITE | PROT_EXEC) != 0)
				die("mprotect");
			p[1] = nr;
			break;
		case 1: // writable for a moment
			if (mprotect(start(p), page, PROT_READ | PROT_WRITE) != 0)
				die("mprotect");
			stub(p, nr);
			if (mprotect(start(p), page, PROT_READ | PROT_EXEC) != 0)
				die("mprotect");
			break;
		case 2: // a new mapping at the address
			if (mmap(start(p), page, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != start(p))
				die("mmap");
			stub(p, nr);
			break;
		case 3: // at another place of the page, then written over by the kernel
			if (mprotect(start(p), page, PROT_READ | PROT_WRITE | PROT_EXEC) != 0)
				die("mprotect");
			int fd[2];
			stub(code, nr);
			if (pipe(fd) != 0 || write(fd[1], code, 8) != 8 || read(fd[0], p, 8) != 8)
				die("read to code");
			close(fd[0]);
			close(fd[1]);
			if (below(r, 2) && mprotect(start(p), page, PROT_READ | PROT_EXEC) != 0)
				die("mprotect");
			break;
		}
		for (int i = 0; i < 2 * hot; i++)
			want("code that was written anew", asFunction(p)(0, 0, 0), result);
		// What was written is what is read, where it can be written.
		if (round % 4 == 0 || round % 4 == 2) {
			stub(code, nr);
			if (memcmp(p, code, 8) != 0)
				die("writable code has changed");
		}
	}
	// Two mappings of the same memory: one to write, one to run.
	int fd = memfd_create("jit", 0);
	if (fd < 0 || ftruncate(fd, page) != 0)
		die("memfd_create");
	unsigned char *w = mmap(0, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	unsigned char *x = mmap(0, page, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
	if (w == MAP_FAILED || x == MAP_FAILED)
		die("mmap of a memfd");
	for (int round = 0; round < 10; round++) {
		int nr = numbers[below(r, 6)];
		long result = expected(nr);
		stub(w, nr);
		for (int i = 0; i < 2 * hot; i++)
			want("code in shared memory", asFunction(x)(0, 0, 0), result);
	}
	// A private mapping of a file, thrown away or written when it is hot: what was not
	// written is as in the file.
	stub(code, SYS_getppid);
	for (int written = 0; written < 2; written++) {
		unsigned char *q = place(file, code, 8), want[page] = {0};
		memset(want, 0x90, lead);
		memcpy(want + lead, code, 8);
		heat(q, SYS_getppid);
		if (written) {
			if (mprotect(start(q), page, PROT_READ | PROT_WRITE) != 0)
				die("mprotect of code");
			q[100] = want[lead + 100] = 0xcc;
		} else if (madvise(start(q), page, MADV_DONTNEED) != 0)
			die("madvise of code");
		if (memcmp(start(q), want, page) != 0)
			die("code of a file has changed");
	}
}

// Code that has become hot is thrown away, moved, split, forked.
static void moved(struct rng *r) {
	unsigned char code[16];
	for (int how = 0; how < kinds; how++) {
		int nr = numbers[below(r, 6)];
		stub(code, nr);
		unsigned char *p = place(how, code, 8);
		heat(p, nr);
		if (how == file) {
			if (madvise(start(p), page, MADV_DONTNEED) != 0)
				die("madvise of code");
			heat(p, nr);
		}
		unsigned char *q = mremap(start(p), page, page, MREMAP_MAYMOVE | MREMAP_FIXED, start(p) + 512 * page);
		if (q == MAP_FAILED)
			die("mremap of code");
		q += lead;
		heat(q, nr);
		enum { forks, vforks, execs, ways };
		for (int way = 0; way < ways; way++) {
			int vforked = way == vforks;
			pid_t pid = vforked ? vfork() : fork();
			if (pid == 0 && way == execs) {
				heat(q, nr);
				execl("/proc/self/exe", "text", "0", "0", "quit", (char *)0);
				die("execve with hot code");
			}
			if (pid == 0) {
				if (nr == SYS_getpid || nr == SYS_getppid || nr == SYS_gettid)
					(void)asFunction(q)(0, 0, 0);
				else
					heat(q, nr);
				if (!vforked && how != sharedFile) { // a copy of its own
					if (mprotect(start(q), page, PROT_READ | PROT_WRITE | PROT_EXEC) != 0)
						die("mprotect of code");
					stub(q, SYS_getuid);
					heat(q, SYS_getuid);
				}
				_exit(0);
			}
			int status;
			if (pid < 0 || waitpid(pid, &status, 0) != pid || status != 0)
				die("status %#x of a child with hot code", status);
			heat(q, nr);
		}
		if (munmap(start(q), page) != 0)
			die("munmap of code");
	}
}

// A jump that a sandbox has put in place of code leads somewhere. An application may
// map something there, which was free, as far as it knows, or take it away. Each is done
// in a process of its own, since nothing may be changed any more in one that has.
static void trampolines(struct rng *r) {
	(void)r;
	enum { over, away, forbidden, emptied, elsewhere, ways };
	for (int way = 0; way < ways; way++) {
		pid_t pid = fork();
		if (pid == 0) {
			unsigned char code[16];
			stub(code, SYS_getppid);
			unsigned char *p = place(anonymous, code, 8);
			heat(p, SYS_getppid);
			if (p[0] != 0xe9)
				_exit(0); // nobody has
			int distance;
			memcpy(&distance, p + 1, 4);
			unsigned char *to = start(p + 5 + distance);
			switch (way) {
			case over:
				if (mmap(to, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != to)
					die("mmap where a trampoline is");
				memset(to, 0xcc, page);
				heat(p, SYS_getppid);
				want("memory where a trampoline was", to[100], 0xcc);
				break;
			case away:
				if (munmap(to, page) != 0)
					die("munmap where a trampoline is");
				break;
			case forbidden:
				if (mprotect(to, page, PROT_NONE) != 0)
					die("mprotect where a trampoline is");
				break;
			case emptied:
				if (madvise(to, page, MADV_DONTNEED) != 0)
					die("madvise where a trampoline is");
				break;
			case elsewhere:
				if (mremap(to, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, mmap(0, page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) == MAP_FAILED)
					die("mremap where a trampoline is");
				break;
			}
			heat(p, SYS_getppid);
			_exit(0);
		}
		int status;
		if (pid < 0 || waitpid(pid, &status, 0) != pid || status != 0)
			die("status %#x of a child without trampolines", status);
	}
}

// Code makes a system call that puts other code in its place, where it returns to; or in
// the place of what a sandbox has put there to return to.
static void overItself(struct rng *r) {
	(void)r;
	unsigned char call[] = {
		0x49, 0x89, 0xca, // mov %rcx, %r10
		0x6a, SYS_mremap, 0x58, // push; pop %rax
		0x0f, 0x05, 0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff, // syscall; cmp $-4095, %rax
		0xc3, // ret
	};
	unsigned char other[sizeof call];
	memset(other, 0xcc, sizeof other); // int3
	other[8] = 0xc3; // where the cmp is
	unsigned char *p = place(anonymous, call, sizeof call), *q = place(anonymous, other, sizeof other);
	typedef long caller(u64, u64, u64, u64, u64, u64);
	caller *f = (caller *)(void *)p;
	for (int i = 0; i < hot; i++)
		want("mremap of an odd address", f(1, page, page, 0, 0, 0), -EINVAL);
	want("mremap over the code that calls it", f((u64)start(q), page, page, MREMAP_MAYMOVE | MREMAP_FIXED, (u64)start(p), 0), (long)start(p));

	call[4] = SYS_mmap;
	p = place(anonymous, call, sizeof call);
	f = (caller *)(void *)p;
	for (int i = 0; i < hot; i++)
		want("mmap of nothing", f(0, 0, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), -EINVAL);
	if (p[6] != 0xe9)
		return; // nothing is there
	int distance;
	memcpy(&distance, p + 7, 4);
	u64 to = (u64)start(p + 11 + distance);
	want("mmap over what leads back", f(to, page, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), (long)to);
}

// Threads meet in fresh code: one changes it while others are in it.
struct race {
	unsigned char *p;
	int nr;
	pthread_barrier_t start;
	volatile int stop;
};

static void *racer(void *arg) {
	struct race *c = arg;
	long result = expected(c->nr);
	pthread_barrier_wait(&c->start);
	for (int i = 0; i < hot; i++)
		want("code that threads race in", asFunction(c->p)(0, 0, 0), c->nr == SYS_gettid ? syscall(SYS_gettid) : result);
	return 0;
}

static volatile u64 seenIn, seenOut;
static unsigned char *volatile from, *volatile until;

// onTick looks at where a signal has come.
static void onTick(int sig, siginfo_t *info, void *context) {
	(void)sig, (void)info;
	u64 ip = ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
	if (ip >= (u64)from && ip < (u64)until)
		seenIn++;
	else
		seenOut++;
}

static void racing(struct rng *r) {
	struct sigaction sa = {.sa_sigaction = onTick, .sa_flags = SA_SIGINFO | SA_RESTART};
	sigaction(SIGALRM, &sa, 0);
	struct itimerval it = {{0, 1000}, {0, 1000}};
	setitimer(ITIMER_REAL, &it, 0);
	unsigned char code[page - lead];
	for (int round = 0; round < 20; round++) {
		struct race c = {.nr = numbers[below(r, 6)]};
		memset(code, 0xcc, sizeof code);
		int at = below(r, sizeof code - 8); // also across what a CPU reads at once
		stub(code + at, c.nr);
		c.p = place(round % kinds, code, sizeof code) + at;
		from = c.p;
		until = c.p + 8;
		pthread_barrier_init(&c.start, 0, 4);
		pthread_t t[4];
		for (int i = 0; i < 4; i++)
			pthread_create(&t[i], 0, racer, &c);
		for (int i = 0; i < 4; i++)
			pthread_join(t[i], 0);
		munmap(start(c.p), page);
	}
	setitimer(ITIMER_REAL, &(struct itimerval){0}, 0);
}

// A program that uses GS for itself.
static void usesGS(struct rng *r) {
	(void)r;
	unsigned char code[16];
	stub(code, SYS_getppid);
	static u64 mine[64];
	for (int i = 0; i < 64; i++)
		mine[i] = 0x1111111111111111 * (i % 16);
	for (int how = 0; how < 2; how++) {
		unsigned char *p = place(anonymous, code, 8);
		heat(p, SYS_getppid);
		if (how == 0) {
			if (syscall(SYS_arch_prctl, 0x1001 /* ARCH_SET_GS */, mine) != 0)
				die("ARCH_SET_GS");
		} else
			__asm__ volatile("wrgsbase %0" : : "r"(mine + 8));
		long result = getppid();
		for (int i = 0; i < 2 * hot; i++) {
			u64 v;
			want("hot code of a program that uses GS", asFunction(p)(0, 0, 0), result);
			__asm__ volatile("movq %%gs:8, %0" : "=r"(v));
			want("memory behind GS", v, 0x1111111111111111 * (how == 0 ? 1 : 9));
		}
		for (int i = 0; i < 64; i++)
			if (mine[i] != 0x1111111111111111 * (i % 16))
				die("word %d of memory that GS leads to has changed to %#lx", i, mine[i]);
	}
}

// A program that sets GS by itself, although it is not told that it can: where a
// patched call relies on GS that call may do anything to this program, but to no
// other, and a signal gets it out of it. Afterwards all is as it should be.
static sigjmp_buf out;

static void onTrouble(int sig) {
	(void)sig;
	siglongjmp(out, 1);
}

static void setsGS(struct rng *r) {
	unsigned char code[16];
	stub(code, SYS_getppid);
	static u64 mine[2 * page / 8];
	u64 to[] = {(u64)mine + page, (u64)mine + page - 64, 0x10000, 1ul << 46, 1ul << 47, -1ul << 47, -8ul, next(r)};
	for (int i = 0; i < (int)(sizeof to / sizeof to[0]); i++)
		for (int handled = 0; handled < 2; handled++) {
			pid_t pid = fork();
			if (pid == 0) {
				int signals[] = {SIGALRM, SIGSEGV, SIGBUS, SIGILL};
				for (int j = 0; j < 4; j++)
					signal(signals[j], handled ? onTrouble : SIG_DFL);
				unsigned char *volatile p = place(anonymous, code, 8);
				heat(p, SYS_getppid);
				int patched = p[0] == 0xe9;
				setitimer(ITIMER_REAL, &(struct itimerval){.it_value = {0, 100000}}, 0);
				if (sigsetjmp(out, 1) == 0) {
					__asm__ volatile("wrgsbase %0" : : "r"(to[i]));
					for (int j = 0; j < 2 * hot; j++)
						if (asFunction(p)(0, 0, 0) != getppid() && !patched)
							die("a call of a program that has set GS");
				}
				setitimer(ITIMER_REAL, &(struct itimerval){0}, 0);
				heat(p, SYS_getppid);
				for (int j = 0; j < (int)(sizeof mine / 8) && !patched; j++)
					if (mine[j] != 0)
						die("memory that GS leads to has changed");
				_exit(0);
			}
			int status;
			if (pid < 0 || waitpid(pid, &status, 0) != pid)
				die("waitpid");
			// ptrace(2) gives no thread a GS that is not its own memory: it may not go on.
			if (status != 0 && (!WIFSIGNALED(status) || (handled && to[i] >> 47 == 0)))
				die("status %#x of a program that has set GS to %#lx", status, to[i]);
		}
}

// A program that runs itself step by step sees each of its instructions.
static volatile int steps;
static u64 stepIPs[16];

static void onStep(int sig, siginfo_t *info, void *context) {
	(void)sig, (void)info;
	ucontext_t *u = context;
	if (steps < 16)
		stepIPs[steps] = u->uc_mcontext.gregs[REG_RIP];
	steps++;
}

static void singleSteps(struct rng *r) {
	(void)r;
	struct sigaction sa = {.sa_sigaction = onStep, .sa_flags = SA_SIGINFO};
	sigaction(SIGTRAP, &sa, 0);
	unsigned char code[16];
	stub(code, SYS_getppid);
	unsigned char *p = place(anonymous, code, 8);
	heat(p, SYS_getppid);
	long result, wanted = getppid();
	__asm__ volatile("pushfq\n orq $0x100, (%%rsp)\n popfq\n callq *%1\n pushfq\n andq $~0x100, (%%rsp)\n popfq"
	                 : "=a"(result)
	                 : "r"(p)
	                 : "rcx", "r11", "memory", "cc");
	want("a stepped system call", result, wanted);
	want("the first step", stepIPs[0], (long)p); // the call itself
	want("the step over mov", stepIPs[1], (long)p + 5);
	if (stepIPs[2] >= (u64)p && stepIPs[2] < (u64)p + 7)
		die("the step over syscall and ret is at %#lx", stepIPs[2]);
	heat(p, SYS_getppid);
}

// 32-bit code, and 32-bit system calls from 64-bit code, kill the program. They must
// not do what they say.
static void kinds32(struct rng *r) {
	(void)r;
	static const unsigned char exit32[] = {0xb8, 1, 0, 0, 0, 0xbb, 77, 0, 0, 0, 0xcd, 0x80, 0xc3};
	static const unsigned char sysenter[] = {0xb8, 1, 0, 0, 0, 0xbb, 77, 0, 0, 0, 0x0f, 0x34, 0xc3};
	static const unsigned char far[] = {0x6a, 0x23, 0x68, 0x10, 0x00, 0x00, 0x40, 0x48, 0xcb}; // push $0x23; push $0x40000010; lretq
	static const unsigned char *const codes[] = {exit32, sysenter};
	for (int i = 0; i < 5; i++) {
		pid_t pid = fork();
		if (pid == 0) {
			unsigned char *p = mmap((void *)0x40000000, page, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
			if (i < 2)
				memcpy(p, codes[i], 13);
			else {
				memcpy(p, far, sizeof far);
				memcpy(p + 16, exit32, 13);
				if (i > 2)
					memcpy(p + 26, i == 3 ? "\x0f\x05" : "\x0f\x34", 2);
			}
			asFunction(p)(0, 0, 0);
			_exit(5);
		}
		int status;
		if (pid < 0 || waitpid(pid, &status, 0) != pid)
			die("waitpid");
		if (status == 77 << 8)
			die("32-bit code %d has made a system call", i);
		if (!WIFSIGNALED(status) && status != 5 << 8)
			die("status %#x of 32-bit code %d", status, i);
	}
}

// Filters and signal stacks that a program makes for itself.
static void filters(struct rng *r) {
	// A filter that is taken must be obeyed.
	struct sock_filter deny[] = {
	    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
	    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
	    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 123),
	    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog prog = {4, deny};
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &prog) == 0) {
		errno = 0;
		if (syscall(SYS_getppid) != -1 || errno != 123)
			die("a filter was taken and is not obeyed");
	} else if (errno != EINVAL && errno != ENOSYS)
		die("seccomp");
	if (syscall(SYS_rseq, below(r, 1000) | 1, 32, 0, 0x53053053) == 0)
		die("rseq of nothing");
	// A critical section that goes on in the middle of nothing. Whoever takes it must
	// know how: the C library may have taken the thread's place for it already.
	static struct {
		_Alignas(32) uint32_t cpu, start, flags, cpuID;
		u64 section;
		uint32_t more, node, mm, pad;
	} area;
	static struct {
		_Alignas(32) uint32_t version, flags;
		u64 start, size, abort;
	} section = {.start = 1, .size = -1ul >> 1, .abort = 0x123456};
	errno = 0;
	if (syscall(SYS_rseq, &area, 32, 0, 0x53053053) != 0 && errno != ENOSYS && errno != EINVAL && errno != EBUSY)
		die("rseq");
	else if (errno == ENOSYS) {
		area.section = (u64)&section;
		for (int i = 0; i < 2 * hot; i++) {
			getppid();
			sched_yield();
		}
		if (area.section != (u64)&section)
			die("rseq that does not exist has changed memory");
	}
}

static void hostileStack(struct rng *r, stack_t *s) {
	u64 at[] = {0, 8, page, 1ul << 47, -1ul << 47, -page, (1ul << 47) - 3 * page, 0x10000, next(r)};
	s->ss_sp = (void *)at[below(r, sizeof at / sizeof at[0])];
	u64 size[] = {2048, 8192, 65536, -1ul, -1ul >> 1, 1ul << 47};
	s->ss_size = size[below(r, 6)];
	s->ss_flags = below(r, 8) == 0 ? (int)(1u << 31) : 0; // SS_AUTODISARM
}

static void stacks(struct rng *r) {
	for (int i = 0; i < 60; i++) {
		pid_t pid = fork();
		if (pid == 0) {
			stack_t s;
			hostileStack(r, &s);
			struct sigaction sa = {.sa_handler = SIG_DFL, .sa_flags = SA_ONSTACK};
			sa.sa_sigaction = onTick;
			sa.sa_flags |= SA_SIGINFO;
			sigaction(SIGSEGV, &sa, 0);
			sigaction(SIGUSR1, &sa, 0);
			if (sigaltstack(&s, 0) == 0)
				raise(SIGUSR1);
			_exit(5);
		}
		below(r, 100);
		int status;
		if (pid < 0 || waitpid(pid, &status, 0) != pid)
			die("waitpid");
		if (status != 5 << 8 && status != SIGSEGV)
			die("status %#x with a bad signal stack", status);
	}
}

static void (*const all[])(struct rng *) = {looksLikeMov, middle, registers, selfModifying, moved, trampolines, overItself, racing, usesGS, setsGS, singleSteps, kinds32, filters, stacks};
static const char *const names[] = {"looksLikeMov", "middle", "registers", "selfModifying", "moved", "trampolines", "overItself", "racing", "usesGS", "setsGS", "singleSteps", "kinds32", "filters", "stacks"};

int main(int argc, char **argv) {
	if (argc < 3)
		return 2;
	if (argc > 3 && strcmp(argv[3], "quit") == 0)
		return syscall(SYS_getppid) == getppid() ? 0 : 1;
	struct rng r = {strtoull(argv[1], 0, 0)};
	int rounds = atoi(argv[2]), failed = 0;
	if (rounds == 0) {
		rounds = 1;
		many = 2;
	}
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	barrier("start");
	for (int i = 0; i < rounds; i++)
		for (int j = 0; j < (int)(sizeof all / sizeof all[0]); j++) {
			if (argc > 3 && strcmp(argv[3], names[j]) != 0)
				continue;
			u64 seed = next(&r);
			pid_t pid = fork();
			if (pid == 0) {
				struct rng own = {seed};
				all[j](&own);
				_exit(0);
			}
			int status;
			if (pid < 0 || waitpid(pid, &status, 0) != pid)
				die("waitpid");
			if (status != 0) {
				printf("%s: status %#x\n", names[j], status);
				fflush(stdout);
				failed = 1;
			}
		}
	unsigned char code[16];
	stub(code, SYS_getppid);
	unsigned char *p = place(anonymous, code, 8);
	heat(p, SYS_getppid);
	barrier("end");
	printf("hot code is %s\n", p[0] == 0xe9 ? "a jump" : "as it was");
	return failed ? 1 : survived;
}

#else

int main(void) {
	barrier("start");
	barrier("end");
	return survived;
}

#endif
