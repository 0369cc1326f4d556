// soak SEED SECONDS: 8 processes with 8 threads each that do what programs do, all
// at once: signals, forks, vforks, execs, mappings, faults, pipes, futexes, timers,
// files. Some are killed or stopped at any moment, and replaced. Each thing checks
// its own result, and each thread has a pulse, so that one that hangs is found and
// named.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { workers = 8, threads = 8, page = 4096, survived = 42, hung = 43 };

// patience is for how many seconds a thread may be without a pulse: hosts are busy.
enum { patience = 240 };

typedef uint64_t u64;

// shared is what all processes see. Every word of it is written by one thread, but
// for stop, which the first process writes.
static struct {
	volatile int stop;
	struct {
		volatile u64 pulse;
		volatile const char *doing;
		volatile pid_t tid;
	} t[workers][threads];
} *shared;

static char *self;

__attribute__((noreturn)) static void die(const char *what) {
	dprintf(2, "soak: process %d: %s: errno %d (%s)\n", getpid(), what, errno, strerror(errno));
	_exit(1);
}

// rng is splitmix64.
struct rng {
	u64 state;
};

static u64 next(struct rng *r) {
	u64 z = r->state += 0x9e3779b97f4a7c15;
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

static u64 below(struct rng *r, u64 n) { return next(r) % n; }

static double now(void) {
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

static void pause_us(u64 us) {
	struct timespec ts = {us / 1000000, us % 1000000 * 1000};
	while (nanosleep(&ts, &ts) != 0 && errno == EINTR)
		;
}

// child forks. The child dies with the thread that made it.
static pid_t child(void) {
	pid_t parent = getpid(), pid = fork();
	if (pid < 0)
		die("fork");
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			_exit(0);
	}
	return pid;
}

static int bury(pid_t pid) {
	int status;
	while (waitpid(pid, &status, 0) != pid)
		if (errno != EINTR)
			die("waitpid");
	return status;
}

// Two threads hand a word to and fro. None of the waits has a time-out: a wake-up
// that is lost is a thread that hangs.
struct pair {
	_Atomic int word;
	int rounds;
};

static void handOver(struct pair *p, int me) {
	for (int i = 0; i < p->rounds; i++) {
		int seen;
		while ((seen = p->word) != me)
			syscall(SYS_futex, &p->word, FUTEX_WAIT_PRIVATE, seen, 0, 0, 0);
		p->word = 1 - me;
		syscall(SYS_futex, &p->word, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
	}
}

static void *partner(void *p) {
	handOver(p, 1);
	return p;
}

static pthread_attr_t small;

static void doFutex(struct rng *r) {
	struct pair p = {0, 1 + below(r, 50)};
	pthread_t t;
	void *result;
	if ((errno = pthread_create(&t, &small, partner, &p)) != 0)
		die("pthread_create");
	handOver(&p, 0);
	pthread_join(t, &result);
	if (result != &p || p.word != 0)
		die("a futex word is wrong");
}

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static volatile int inside;

static void doMutex(struct rng *r) {
	for (int i = 0; i < 20; i++) {
		pthread_mutex_lock(&mutex);
		if (inside++ != 0)
			die("two threads have one mutex");
		if (below(r, 8) == 0)
			sched_yield();
		inside--;
		pthread_mutex_unlock(&mutex);
	}
}

static void doPipe(struct rng *r) {
	int to[2], from[2], rounds = 1 + below(r, 20);
	char c, buf[64];
	if (pipe2(to, O_CLOEXEC) != 0 || pipe2(from, O_CLOEXEC) != 0)
		die("pipe2");
	pid_t pid = child();
	if (pid == 0) {
		close(to[1]);
		close(from[0]);
		while (read(to[0], &c, 1) == 1 && c >= 0) {
			c++;
			if (write(from[1], &c, 1) != 1)
				_exit(1);
		}
		memset(buf, 'x', sizeof buf);
		for (int i = 0; i < 100; i++)
			if (write(from[1], buf, sizeof buf) != sizeof buf)
				_exit(1);
		_exit(17);
	}
	close(to[0]);
	close(from[1]);
	for (int i = 0; i < rounds; i++) {
		c = i;
		if (write(to[1], &c, 1) != 1 || read(from[0], &c, 1) != 1 || c != i + 1)
			die("a byte through two pipes");
	}
	// Other children may have these descriptors, too, for as long as they live: the end
	// of the file is not what they wait for.
	c = -1;
	if (write(to[1], &c, 1) != 1)
		die("the last byte into a pipe");
	close(to[1]);
	int total = 0, n;
	while ((n = read(from[0], buf, 1 + below(r, sizeof buf))) > 0)
		total += n;
	if (n != 0 || total != 6400)
		die("bytes until the end of a pipe");
	close(from[0]);
	if (bury(pid) != 17 << 8)
		die("status of the other end of a pipe");
}

static void onSignal(int sig) {
	(void)sig;
}

static void doSignals(struct rng *r, int w) {
	for (int i = 0; i < 10; i++) {
		pid_t tid = shared->t[w][below(r, threads)].tid;
		if (tid != 0 && syscall(SYS_tgkill, getpid(), tid, SIGUSR1) != 0 && errno != ESRCH)
			die("tgkill");
	}
	// One of our own, blocked and taken.
	sigset_t set, old;
	siginfo_t info;
	int sig = SIGRTMIN + 1;
	sigemptyset(&set);
	sigaddset(&set, sig);
	pthread_sigmask(SIG_BLOCK, &set, &old);
	union sigval v = {.sival_int = below(r, 1000)};
	if ((errno = pthread_sigqueue(pthread_self(), sig, v)) != 0)
		die("sigqueue");
	int n;
	while ((n = sigwaitinfo(&set, &info)) < 0 && errno == EINTR)
		;
	if (n != sig || info.si_value.sival_int != v.sival_int)
		die("sigwaitinfo");
	pthread_sigmask(SIG_SETMASK, &old, 0);
}

// guarded is memory of this thread that onFault makes accessible.
static __thread char *volatile guarded;
static __thread volatile int faults;

static void onFault(int sig, siginfo_t *info, void *context) {
	(void)sig, (void)context;
	char *p = info->si_addr;
	if (guarded == 0 || p < guarded || p >= guarded + 8 * page)
		die("a fault that nobody meant");
	faults++;
	if (mprotect((char *)((u64)p & -(u64)page), page, PROT_READ | PROT_WRITE) != 0)
		die("mprotect in a handler");
}

static void doFaults(struct rng *r) {
	char *p = mmap(0, 8 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		die("mmap");
	guarded = p;
	faults = 0;
	for (int i = 0; i < 8; i++)
		*(volatile u64 *)(p + i * page + below(r, page / 8) * 8) = i;
	if (faults != 8)
		die("the number of faults");
	guarded = 0;
	munmap(p, 8 * page);
}

static void doMemory(struct rng *r) {
	u64 n = 1 + below(r, 64);
	char *range = mmap(0, 256 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (range == MAP_FAILED)
		die("mmap");
	u64 *p = mmap(range, n * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	if ((char *)p != range)
		die("mmap of a fixed address");
	u64 mark = next(r);
	for (u64 i = 0; i < n; i++)
		p[i * page / 8 + i % 512] = mark + i;
	u64 mapped = 0; // from where on the range is ours: others may map what mremap leaves
	if (below(r, 2)) {
		mapped = n * page;
		p = mremap(p, n * page, n * page, MREMAP_MAYMOVE | MREMAP_FIXED, range + 128 * page);
		if ((char *)p != range + 128 * page)
			die("mremap");
	} else if (mprotect(p, n * page, PROT_READ) != 0)
		die("mprotect");
	for (u64 i = 0; i < n; i++)
		if (p[i * page / 8 + i % 512] != mark + i)
			die("a page has lost what was written");
	if (madvise(p, n * page, MADV_DONTNEED) != 0)
		die("madvise");
	for (u64 i = 0; i < n; i++)
		if (p[i * page / 8 + i % 512] != 0)
			die("a page that was given back is not zero");
	munmap(range + mapped, 256 * page - mapped);
}

static void doFork(struct rng *r) {
	int *p = mmap(0, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int *both = mmap(0, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED || both == MAP_FAILED)
		die("mmap");
	*p = 1;
	u64 how = below(r, 4);
	pid_t pid = child();
	if (pid == 0) {
		*p = 2;
		*both = 2;
		if (how == 0) {
			pid_t grandchild = child();
			if (grandchild == 0)
				_exit(*p + *both);
			_exit(bury(grandchild) == 4 << 8 ? 3 : 1);
		}
		if (how == 1)
			kill(getpid(), SIGKILL);
		if (how == 2) // until it is killed
			for (;;) {
				char *q = mmap(0, 8 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
				if (q != MAP_FAILED) {
					q[5 * page] = 1;
					munmap(q, 8 * page);
				}
			}
		_exit(3);
	}
	if (how == 2) {
		pause_us(below(r, 3000));
		kill(pid, SIGKILL);
	}
	int status = bury(pid);
	if (how == 1 || how == 2 ? status != SIGKILL : status != 3 << 8)
		die("the status of a child");
	if (*p != 1 || (how != 2 && *both != 2))
		die("memory after fork");
	munmap(p, page);
	munmap(both, page);
}

static void *idle(void *p) {
	for (;;)
		pause();
	return p;
}

static void doExec(struct rng *r) {
	static char *const env[] = {0};
	char number[8];
	int want = below(r, 100);
	snprintf(number, sizeof number, "%d", want);
	char *const argv[] = {self, "exit", number, 0};
	pid_t pid;
	if (below(r, 2)) {
		if ((errno = posix_spawn(&pid, self, 0, 0, argv, env)) != 0)
			die("posix_spawn");
	} else if ((pid = child()) == 0) {
		pthread_t t;
		for (int i = 0; i < 2; i++)
			pthread_create(&t, &small, idle, 0);
		execve(self, argv, env);
		_exit(1);
	}
	int status = bury(pid);
	if (status != want << 8)
		{
		dprintf(2, "soak: status %#x, want %#x\n", status, want << 8);
		die("the status of a program");
	}
}

static void doTime(struct rng *r) {
	struct timespec ts = {0, below(r, 2000000)};
	double start = now();
	pause_us(ts.tv_nsec / 1000);
	if (now() - start < ts.tv_nsec / 1000 / 1e6)
		die("a sleep was too short");
	ppoll(0, 0, &ts, 0);
}

static void nameOf(int w, int t, char name[64]) { snprintf(name, 64, "/tmp/soak-%d-%d", w, t); }

static void doFile(struct rng *r, int w, int t) {
	char name[64], b[256];
	nameOf(w, t, name);
	int fd = open(name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0)
		die("open");
	u64 mark = next(r);
	if (pwrite(fd, &mark, sizeof mark, 3 * page - 4) != sizeof mark)
		die("pwrite");
	char *p = mmap(0, 4 * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		die("mmap of a file");
	if (memcmp(p + 3 * page - 4, &mark, sizeof mark) != 0)
		die("a mapped file has not what was written");
	memset(p, 7, sizeof b); // the first page
	if (pread(fd, b, sizeof b, 0) != sizeof b || b[255] != 7)
		die("a file has not what was written to its mapping");
	munmap(p, 4 * page);
	close(fd);
	unlink(name);
}

static void doSocket(struct rng *r) {
	int s[2], e = epoll_create1(EPOLL_CLOEXEC), v = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (e < 0 || v < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s) != 0)
		die("socketpair");
	struct epoll_event ev = {.events = EPOLLIN, .data.fd = v}, got;
	if (epoll_ctl(e, EPOLL_CTL_ADD, v, &ev) != 0)
		die("epoll_ctl");
	u64 x = 1 + below(r, 1000), y = 0;
	if (epoll_wait(e, &got, 1, 0) > 0)
		die("epoll_wait before there is anything");
	if (write(v, &x, 8) != 8)
		die("write to an eventfd");
	int n;
	while ((n = epoll_wait(e, &got, 1, -1)) < 0 && errno == EINTR)
		;
	if (n != 1 || got.data.fd != v || read(v, &y, 8) != 8 || x != y)
		die("what an eventfd says");
	if (send(s[0], &x, 8, 0) != 8 || recv(s[1], &y, 8, MSG_WAITALL) != 8)
		die("a socket pair");
	close(s[0]);
	close(s[1]);
	close(e);
	close(v);
}

// Registers stay as they are across system calls, faults and signals.
static void doRegisters(struct rng *r) {
#ifdef __x86_64__
	u64 a = next(r), b = next(r), bad = 0, spins = 1 + below(r, 200);
	__asm__ volatile("movq %1, %%r12\n movq %2, %%r13\n movq %1, %%xmm3\n movq %2, %%xmm15\n fninit\n fldpi\n"
	                 "1: movl $39, %%eax\n syscall\n" // getpid
	                 "movq %%xmm3, %%rcx\n xorq %%r12, %%rcx\n orq %%rcx, %0\n"
	                 "movq %%xmm15, %%rcx\n xorq %%r13, %%rcx\n orq %%rcx, %0\n"
	                 "decq %3\n jnz 1b\n"
	                 "xorq %1, %%r12\n orq %%r12, %0\n xorq %2, %%r13\n orq %%r13, %0\n"
	                 "fldpi\n fcompp\n fnstsw %%ax\n andl $0x4500, %%eax\n xorl $0x4000, %%eax\n orq %%rax, %0\n"
	                 : "+r"(bad), "+r"(a), "+r"(b), "+r"(spins)
	                 :
	                 : "rax", "rcx", "r11", "r12", "r13", "xmm3", "xmm15", "st", "st(1)", "st(2)", "st(3)", "st(4)", "st(5)", "st(6)",
	                   "st(7)", "memory", "cc");
	if (bad)
		die("a register has changed");
#else
	(void)r;
#endif
}

struct me {
	int w, t;
	u64 seed;
};

static void *thread(void *arg) {
	struct me *me = arg;
	struct rng r = {me->seed};
	int w = me->w, t = me->t;
	shared->t[w][t].tid = syscall(SYS_gettid);
	while (!shared->stop) {
#define TRY(name, call) \
	shared->t[w][t].doing = name; \
	call; \
	break
		switch (below(&r, 12)) {
		case 0: TRY("futex", doFutex(&r));
		case 1: TRY("mutex", doMutex(&r));
		case 2: TRY("pipe", doPipe(&r));
		case 3: TRY("signals", doSignals(&r, w));
		case 4: TRY("faults", doFaults(&r));
		case 5: TRY("memory", doMemory(&r));
		case 6: TRY("fork", doFork(&r));
		case 7: TRY("exec", doExec(&r));
		case 8: TRY("time", doTime(&r));
		case 9: TRY("file", doFile(&r, w, t));
		case 10: TRY("socket", doSocket(&r));
		case 11: TRY("registers", doRegisters(&r));
		}
		shared->t[w][t].pulse++;
	}
	shared->t[w][t].doing = "end";
	return 0;
}

static void worker(int w, u64 seed) {
	struct rng r = {seed};
	struct me me[threads];
	pthread_t id[threads];
	for (int t = 0; t < threads; t++)
		me[t] = (struct me){w, t, next(&r)};
	// Interval timers interrupt whatever it is, but leave a busy host some time.
	struct itimerval it = {{0, 50000}, {0, 50000}}, prof = {{0, 5000}, {0, 5000}};
	setitimer(ITIMER_REAL, &it, 0);
	setitimer(ITIMER_PROF, &prof, 0);
	for (int t = 1; t < threads; t++)
		if ((errno = pthread_create(&id[t], &small, thread, &me[t])) != 0)
			die("pthread_create");
	thread(&me[0]);
	for (int t = 1; t < threads; t++)
		pthread_join(id[t], 0);
	_exit(0);
}

static pid_t startWorker(int w, u64 seed) {
	for (int t = 0; t < threads; t++)
		shared->t[w][t].tid = 0;
	pid_t pid = fork();
	if (pid < 0)
		die("fork of a worker");
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		worker(w, seed);
	}
	return pid;
}

// barrier tells the test that nothing but this process is left, and waits until the
// test has looked.
static void barrier(const char *name) {
	char c;
	printf("at %s\n", name);
	fflush(stdout);
	if (read(0, &c, 1) != 1)
		die("the test has gone");
}

// report says that the first thread without a pulse hangs, and waits for the end.
static void report(pid_t *pids, u64 last[workers][threads], int stopped) {
	for (int w = 0; w < workers; w++)
		for (int t = 0; t < threads; t++)
			if (pids[w] != 0 && (stopped ? strcmp((char *)shared->t[w][t].doing, "end") != 0 : shared->t[w][t].pulse == last[w][t]))
				printf("hung: process %d, thread %d, in %s\n", pids[w], shared->t[w][t].tid, shared->t[w][t].doing);
	barrier("hung");
	_exit(hung);
}

// run has all workers going for so many seconds.
static void run(struct rng *r, double seconds) {
	pid_t pids[workers];
	int killed[workers] = {0};
	u64 last[workers][threads] = {0};
	double pulse[workers], end = now() + seconds, stopAt = 0, line = 0;
	shared->stop = 0;
	for (int w = 0; w < workers; w++) {
		pids[w] = startWorker(w, next(r));
		pulse[w] = now();
	}
	for (int left = workers; left > 0;) {
		pause_us(50000);
		double t = now();
		if (!shared->stop && t > end) {
			shared->stop = 1;
			stopAt = t;
		}
		int status;
		pid_t pid;
		while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
			for (int w = 0; w < workers; w++) {
				if (pid != pids[w])
					continue;
				if (status != 0 && !(killed[w] && status == SIGKILL)) {
					dprintf(2, "soak: status %#x of process %d\n", status, pid);
					die("a worker failed");
				}
				if (!killed[w] && !shared->stop)
					die("a worker has ended of its own");
				killed[w] = 0;
				pids[w] = 0;
				if (shared->stop)
					left--;
				else
					pids[w] = startWorker(w, next(r));
				pulse[w] = t;
			}
		}
		if (shared->stop && t - stopAt > patience)
			report(pids, last, 1);
		if (!shared->stop) {
			int w = below(r, workers);
			switch (below(r, 40)) {
			case 0:
				if (pids[w] && kill(pids[w], SIGKILL) == 0)
					killed[w] = 1;
				break;
			case 1:
				kill(pids[w], SIGSTOP);
				pause_us(below(r, 20000));
				kill(pids[w], SIGCONT);
				break;
			case 2:
				kill(pids[w], SIGUSR2);
				break;
			}
		}
		if (t - line < 1)
			continue;
		line = t;
		u64 total = 0;
		for (int w = 0; w < workers; w++) {
			int all = 1;
			for (int i = 0; i < threads; i++) {
				total += shared->t[w][i].pulse;
				all &= shared->t[w][i].pulse != last[w][i];
			}
			if (all || shared->stop) {
				pulse[w] = t;
				for (int i = 0; i < threads; i++)
					last[w][i] = shared->t[w][i].pulse;
			} else if (t - pulse[w] > patience)
				report(pids, last, 0);
		}
		printf("did %llu\n", (unsigned long long)total);
		fflush(stdout);
	}
	// Children of those that were killed are ours now.
	double start = now();
	pid_t pid;
	while ((pid = waitpid(-1, 0, WNOHANG)) >= 0) {
		if (pid == 0)
			pause_us(1000);
		if (now() - start > patience) {
			printf("hung: children of processes that were killed do not end\n");
			barrier("hung");
			_exit(hung);
		}
	}
}

int main(int argc, char **argv) {
	self = argv[0];
	if (argc == 3 && strcmp(argv[1], "exit") == 0)
		return atoi(argv[2]);
	if (argc != 3)
		return 2;
	struct rng r = {strtoull(argv[1], 0, 0)};
	double seconds = atof(argv[2]);
	shared = mmap(0, (sizeof *shared + page - 1) & -page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		die("mmap");
	for (int w = 0; w < workers; w++)
		for (int t = 0; t < threads; t++)
			shared->t[w][t].doing = "nothing";
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 256 << 10);
	struct sigaction sa = {.sa_handler = onSignal, .sa_flags = SA_RESTART};
	sigaction(SIGUSR1, &sa, 0);
	sigaction(SIGUSR2, &sa, 0);
	sigaction(SIGALRM, &sa, 0);
	sigaction(SIGPROF, &sa, 0);
	sa.sa_flags = SA_SIGINFO | SA_NODEFER;
	sa.sa_sigaction = onFault;
	sigaction(SIGSEGV, &sa, 0);
	prctl(PR_SET_CHILD_SUBREAPER, 1);

	// What grows must have grown in the first part.
	double first = seconds / 4 < 60 ? seconds / 4 : 60;
	run(&r, first);
	barrier("start");
	run(&r, seconds - first);
	// Who was killed in between has left its file.
	for (int w = 0; w < workers; w++)
		for (int t = 0; t < threads; t++) {
			char name[64];
			nameOf(w, t, name);
			unlink(name);
		}
	barrier("end");
	return survived;
}
