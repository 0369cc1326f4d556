// memory SEED: mappings by the thousand, storms of mremap(2), long chains of
// copies on write, memory that is shared, stacks without end, and more memory
// than there is.
#include "adversary.h"
#include <setjmp.h>
#include <sys/uio.h>

static void *map(u64 size, int prot, int flags) { return mmap(0, size, prot, flags | MAP_ANONYMOUS, -1, 0); }

static void *must(void *p, const char *what) {
	if (p == MAP_FAILED)
		die("%s", what);
	return p;
}

// mappings are many, with and without neighbours to merge with.
static void mappings(struct rng *r) {
	enum { n = 10000 };
	static char *m[n];
	for (int i = 0; i < n; i++) {
		m[i] = must(map(page, i % 2 ? PROT_READ : PROT_READ | PROT_WRITE, MAP_PRIVATE), "mmap of one of many");
		if (i % 2 == 0 && i % 8 == 0)
			*(int *)m[i] = i;
	}
	for (int i = 0; i < n; i += 8)
		if (*(int *)m[i] != i)
			die("mapping %d has lost its contents", i);
	for (int i = 0; i < n / 4; i++)
		mprotect(m[below(r, n)], page, 1 << below(r, 3));
	for (int i = n - 1; i > 0; i--) { // in any order
		int j = below(r, i + 1);
		char *t = m[i];
		m[i] = m[j], m[j] = t;
	}
	for (int i = 0; i < n; i++)
		if (munmap(m[i], page) != 0)
			die("munmap");
}

// remaps moves, grows and shrinks memory, and checks that its contents go along.
static void remaps(struct rng *r) {
	enum { n = 16, most = 32 };
	struct {
		u64 *at;
		u64 pages, tag;
	} m[n] = {};
	for (int i = 0; i < 3000; i++) {
		int k = below(r, n);
		u64 pages = 1 + below(r, most);
		if (m[k].at == 0) {
			m[k].at = must(map(pages * page, PROT_READ | PROT_WRITE, below(r, 2) ? MAP_PRIVATE : MAP_SHARED), "mmap");
			m[k].pages = pages, m[k].tag = next(r);
			for (u64 p = 0; p < pages; p++)
				m[k].at[p * page / 8] = m[k].tag + p;
			continue;
		}
		u64 *at;
		if (below(r, 2)) {
			u64 *to = must(map(pages * page, PROT_NONE, MAP_PRIVATE), "mmap of a place to go");
			at = mremap(m[k].at, m[k].pages * page, pages * page, MREMAP_MAYMOVE | MREMAP_FIXED, to);
		} else {
			at = mremap(m[k].at, m[k].pages * page, pages * page, MREMAP_MAYMOVE);
		}
		// A shared mapping cannot grow beyond the object behind it: SIGBUS there.
		must(at, "mremap");
		for (u64 p = 0; p < pages && p < m[k].pages; p++)
			if (at[p * page / 8] != m[k].tag + p)
				die("mremap %d has lost page %llu", i, (unsigned long long)p);
		m[k].at = at;
		if (pages < m[k].pages || below(r, 8) == 0) {
			m[k].pages = pages;
			if (munmap(at, pages * page) != 0)
				die("munmap");
			m[k].at = 0;
		} else if (pages > m[k].pages) {
			if (munmap(at + m[k].pages * page / 8, (pages - m[k].pages) * page) != 0)
				die("munmap of the rest");
		}
	}
}

// chain forks as deep as depth; each generation changes a page and sees those of
// all before it, and none of those after it.
static void chain(volatile int *mem, int generation, int depth) {
	for (int i = 0; i < depth; i++)
		if (mem[i * page / 4] != (i < generation ? 1000 + i : -1))
			die("generation %d sees %d in page %d", generation, mem[i * page / 4], i);
	if (generation == depth)
		return;
	mem[generation * page / 4] = 1000 + generation;
	pid_t pid = fork();
	if (pid < 0)
		die("fork of generation %d", generation);
	if (pid == 0) {
		chain(mem, generation + 1, depth);
		_exit(0);
	}
	mem[(depth - 1) * page / 4] = 5; // the child must not see it
	int status;
	if (waitpid(pid, &status, 0) != pid || status != 0)
		die("generation %d: status %#x", generation, status);
}

// shared memory is the same for all, private memory is not.
static void sharing(struct rng *r) {
	enum { procs = 4, each = 2000, pages = 16 };
	volatile u64 *sum = must(map(pages * page, PROT_READ | PROT_WRITE, MAP_SHARED), "mmap");
	volatile u64 *own = must(map(pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE), "mmap");
	for (int i = 0; i < pages; i++)
		own[i * page / 8] = 7;
	int fd = open("/tmp/shared", O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (fd < 0 || ftruncate(fd, page) != 0)
		die("/tmp/shared");
	volatile u64 *file = must(mmap(0, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), "mmap of a file");
	for (int k = 0; k < procs; k++) {
		if (fork())
			continue;
		for (int i = 0; i < each; i++) {
			int p = (i * 7 + k) % pages;
			__sync_fetch_and_add(&sum[p * page / 8], 1);
			__sync_fetch_and_add(file, 1);
			if (own[p * page / 8] != 7 + i / pages)
				die("private memory of process %d changed", k);
			if (i % pages == pages - 1)
				for (int q = 0; q < pages; q++)
					own[q * page / 8]++;
		}
		_exit(0);
	}
	for (int k = 0; k < procs; k++) {
		int status;
		if (wait(&status) < 0 || status != 0)
			die("a process that shares: status %#x", status);
	}
	u64 total = 0, v;
	for (int i = 0; i < pages; i++) {
		total += sum[i * page / 8];
		if (own[i * page / 8] != 7)
			die("private memory was shared");
	}
	if (total != procs * each)
		die("shared memory adds up to %llu", (unsigned long long)total);
	if (pread(fd, &v, 8, 0) != 8 || v != procs * each)
		die("the file has %llu", (unsigned long long)v);
	close(fd);
	unlink("/tmp/shared");
}

static sigjmp_buf out;
static void onSegv(int sig) { siglongjmp(out, sig); }

static int __attribute__((noinline)) recurse(int n) {
	volatile char frame[3000];
	frame[0] = n;
	return n < 0 ? 0 : recurse(n + 1) + frame[0];
}

static void overflow(void) {
	static char alt[65536];
	stack_t s = {.ss_sp = alt, .ss_size = sizeof alt};
	sigaltstack(&s, 0);
	struct sigaction sa = {.sa_handler = onSegv, .sa_flags = SA_ONSTACK};
	sigaction(SIGSEGV, &sa, 0);
	for (int i = 0; i < 3; i++)
		if (sigsetjmp(out, 1) == 0) {
			recurse(0);
			die("a stack without end");
		}
	signal(SIGSEGV, SIG_DFL);
	pid_t pid = fork();
	if (pid == 0) {
		limit(RLIMIT_CORE, 0);
		recurse(0);
		_exit(0);
	}
	int status;
	if (waitpid(pid, &status, 0) != pid || (status & 0x7f) != SIGSEGV)
		die("stack overflow: status %#x", status);
}

static void refused(void *p, const char *what) {
	if (p != MAP_FAILED)
		die("%s is possible", what);
	if (errno != ENOMEM)
		die("%s", what);
}

// huge asks for more than there is.
static void huge(void) {
	const int rw = PROT_READ | PROT_WRITE;
	refused(map(1ULL << 46, rw, MAP_PRIVATE), "mmap of 64 TiB");
	refused(map(1ULL << 46, rw, MAP_SHARED), "mmap of 64 TiB, shared");
	refused(map(1ULL << 45, rw, MAP_PRIVATE | MAP_POPULATE), "mmap of 32 TiB, populated");
	refused(map(1ULL << 62, rw, MAP_PRIVATE), "mmap of 2^62 bytes");
	refused(map(-1ULL, rw, MAP_PRIVATE), "mmap of 2^64-1 bytes");
	refused(map(-1ULL & ~(u64)(page - 1), rw, MAP_PRIVATE | MAP_NORESERVE), "mmap of 2^64-4096 bytes");
	char *p = must(map(page, rw, MAP_PRIVATE), "mmap");
	if (mremap(p, page, 1ULL << 47, MREMAP_MAYMOVE) != MAP_FAILED)
		die("mremap to 128 TiB");
	if (brk((void *)(1ULL << 46)) == 0)
		die("brk to 64 TiB");
	// Reserved only: this is how runtimes begin.
	char *big = must(map(1ULL << 36, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE), "mmap of 64 GiB of nothing");
	for (u64 i = 0; i < 64; i++) { // sparse
		mprotect(big + (i << 30), page, rw);
		big[i << 30] = 1;
	}
	if (fork() == 0)
		_exit(0);
	wait(0);
	if (munmap(big, 1ULL << 36) != 0)
		die("munmap");
	// Lengths that wrap around.
	if (munmap(p, -page) == 0 || mprotect(p, -1ULL, rw) == 0 || madvise(p, -1ULL, MADV_DONTNEED) == 0)
		die("a length that wraps around");
	struct iovec iov[2] = {{p, 1ULL << 63}, {p, 1ULL << 63}};
	if (writev(1, iov, 2) >= 0 || errno != EINVAL)
		die("writev of 2^64 bytes");
	// Populating is a hint.
	big = map(1ULL << 45, rw, MAP_PRIVATE | MAP_NORESERVE);
	if (big != MAP_FAILED)
		munmap(big, 1ULL << 45);
	// A file with a hole of 4 TiB, and its last byte.
	int fd = open("/tmp/hole", O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (fd < 0)
		die("/tmp/hole");
	if (ftruncate(fd, 1ULL << 42) == 0) {
		char c = 'x';
		if (pwrite(fd, &c, 1, (1ULL << 42) - 1) != 1 || pread(fd, &c, 1, (1ULL << 42) - 1) != 1 || c != 'x')
			die("the last byte of a file of 4 TiB");
		char *f = must(mmap(0, 1ULL << 42, rw, MAP_SHARED, fd, 0), "mmap of a file of 4 TiB");
		if (f[(1ULL << 42) - 1] != 'x' || f[1ULL << 41] != 0)
			die("a file of 4 TiB, mapped");
		munmap(f, 1ULL << 42);
	}
	ftruncate(fd, -1);
	ftruncate(fd, 0x7fffffffffffffff);
	pwrite(fd, p, 1, 0x7fffffffffffffff);
	pwrite(fd, p, 1, 0x7ffffffffffffffe);
	fallocate(fd, 0, 0, 0x7fffffffffffffff);
	fallocate(fd, 0, 0x7ffffffffffffffe, 0x7ffffffffffffffe);
	close(fd);
	unlink("/tmp/hole");
}

int main(int argc, char **argv) {
	if (argc != 2)
		return 2;
	u64 seed = strtoull(argv[1], 0, 0);
	barrier("start");
	for (int test = 0; test < 6; test++) {
		double start = now();
		pid_t pid = fork();
		if (pid == 0) {
			struct rng r = {seed + test};
			switch (test) {
			case 0: mappings(&r); break;
			case 1: remaps(&r); break;
			case 2: {
				int *mem = must(map(50 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE), "mmap");
				for (int i = 0; i < 50 * page / 4; i++)
					mem[i] = -1;
				chain(mem, 0, 50);
				break;
			}
			case 3: sharing(&r); break;
			case 4: overflow(); break;
			case 5: huge(); break;
			}
			_exit(0);
		}
		int status;
		if (waitpid(pid, &status, 0) != pid || status != 0)
			die("test %d: status %#x", test, status);
		printf("test %d: %.2f s\n", test, now() - start);
		fflush(stdout);
	}
	barrier("end");
	return survived;
}
