// code SEED PROCESSES: executes what nobody meant to be executed: random bytes,
// and every byte at the top of the address space, where stubs have their text; it
// also tries to change what is there.
#include "adversary.h"

enum {
	length = 256, // of a piece of random code
	top = 64,     // pages at the top of the address space
};

static char *codePage, *dataPage;

// execute runs what is at p. It does not return, unless that does.
__attribute__((noinline)) static void execute(void *p, struct rng *r) {
	void (*f)(u64, u64, u64, u64, u64, u64) = p;
	u64 a[6];
	for (int i = 0; i < 6; i++)
		a[i] = below(r, 2) ? next(r) : below(r, 2) ? (u64)dataPage + below(r, page) : below(r, 512);
	f(a[0], a[1], a[2], a[3], a[4], a[5]);
}

static void *thread(void *arg) {
	struct rng r = {(u64)arg};
	for (int i = 0; i < 4; i++)
		execute(codePage + below(&r, page - length), &r);
	return 0;
}

static void onSignal(int sig, siginfo_t *info, void *ucontext) {
	(void)sig, (void)info, (void)ucontext;
	_exit(0);
}

// randomCode is a process that executes random bytes in two threads.
static void randomCode(struct rng *r, u64 kind) {
	codePage = mmap(0, page, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	dataPage = mmap(0, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (int i = 0; i < page; i += 8)
		*(u64 *)(codePage + i) = next(r);
	if (kind % 2) // more instructions that do not fault at once
		for (int i = 0; i < page; i += 1 + below(r, 4))
			codePage[i] = "\x90\x58\x50\xc3\x0f\x05\xcc\x48\x31\xc0\xcd\x80\xf4\xeb\x9d\x9c"[below(r, 16)];
	if (kind % 4 >= 2) { // and go on after a fault
		static char stack[65536];
		stack_t alt = {.ss_sp = stack, .ss_size = sizeof stack};
		sigaltstack(&alt, 0);
		struct sigaction sa = {.sa_sigaction = onSignal, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
		for (int sig = 1; sig < 32; sig++)
			sigaction(sig, &sa, 0);
	}
	alarm(1);
	pthread_t t;
	pthread_create(&t, 0, thread, (void *)next(r));
	thread((void *)next(r));
	pthread_join(t, 0);
	_exit(0);
}

// taskEnd returns the end of the address space that applications see.
static u64 taskEnd(void) {
	u64 end = 1ULL << 47;
	while (end > 1 << 20) {
		void *p = mmap((void *)(end - page), page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
		if (p == (void *)(end - page)) {
			munmap(p, page);
			return end;
		}
		if (p == MAP_FAILED && errno == EEXIST)
			return end;
		end -= page;
	}
	die("no address can be mapped");
}

// stubText is a process that jumps to addr.
static void stubText(struct rng *r, u64 addr) {
	dataPage = mmap(0, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	alarm(1);
	execute((void *)addr, r);
	_exit(0);
}

static void run(u64 seed, void (*f)(struct rng *, u64), u64 arg) {
	pid_t pid = fork();
	if (pid < 0)
		die("fork");
	if (pid == 0) {
		struct rng r = {seed};
		limit(RLIMIT_NPROC, 50);
		unprivileged();
		int null = open("/dev/null", O_RDWR);
		for (int fd = 0; fd < 3; fd++)
			dup2(null, fd);
		f(&r, arg);
	}
}

int main(int argc, char **argv) {
	if (argc != 3)
		return 2;
	struct rng r = {strtoull(argv[1], 0, 0)};
	int processes = atoi(argv[2]);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	barrier("start");
	for (int i = 0; i < processes; i += 2) {
		run(next(&r), randomCode, i);
		run(next(&r), randomCode, i + 1);
		buryAll(0.1);
	}

	// What is above the last page that can be mapped is not ours to map, change,
	// free or read; jumping there must not do anything that we could not do.
	u64 end = taskEnd();
	printf("applications end at %#llx\n", (unsigned long long)end);
	fflush(stdout);
	for (u64 a = end; a < 1ULL << 47; a += a < end + top * page ? page : page + below(&r, 1 << 20) / page * page) {
		void *p = (void *)a;
		if (mmap(p, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED)
			die("mmap at %p", p);
		if (mprotect(p, page, PROT_READ | PROT_WRITE | PROT_EXEC) == 0)
			die("mprotect at %p", p);
		if (mremap(dataPage ?: (void *)&r, page, page, MREMAP_MAYMOVE | MREMAP_FIXED, p) != MAP_FAILED)
			die("mremap to %p", p);
		if (madvise(p, page, MADV_DONTNEED) == 0)
			die("madvise at %p", p);
		if (write(1, p, 1) != -1 || errno != EFAULT)
			die("write from %p", p);
		munmap(p, page); // nothing is there, which is no error
	}
	munmap((void *)end, (1ULL << 47) - end);
	for (int i = 0; i < 2 * processes; i++) {
		u64 a = (1ULL << 47) - below(&r, top * page);
		if (i % 8) // the first page begins with text
			a = end + below(&r, i % 8 < 4 ? 12 * page : 1024);
		run(next(&r), stubText, a);
		if (i % 8 == 7)
			buryAll(0.03);
	}
	buryAll(0);
	barrier("end");
	return survived;
}
