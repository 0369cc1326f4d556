// fuzz SEED CALLS: makes CALLS system calls with random numbers and arguments, in
// several processes with several threads each, and survives them.
#include "adversary.h"
#include <linux/capability.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>

enum {
	workers = 3,       // processes at a time
	threads = 3,       // in each
	perWorker = 1500,  // calls of each thread before a new process takes over
	patience = 1,      // seconds that a worker may take
	maxNumber = 480,   // no system call has a higher number
	arenaSize = 1 << 20,
};

// done counts calls, by worker. It is shared by all processes, and may be
// overwritten by any.
static volatile u64 *done;
static int self;
static int privileged;

static char *arena, *readonly, *noaccess, *hole, *edge;

static const char *const paths[] = {
	"/", ".", "..", "", "/tmp", "/tmp/a", "/tmp/b", "/tmp/d", "/tmp/d/x", "/tmp/l", "/proc", "/proc/self", "/proc/self/exe",
	"/proc/self/maps", "/proc/self/fd", "/proc/self/fd/3", "/proc/self/root", "/proc/self/cwd", "/proc/self/mem",
	"/proc/self/status", "/proc/self/task", "/proc/self/stat", "/proc/1/status", "/proc/1/fd/0", "/proc/self/cmdline", "/proc/self/environ",
	"/proc/meminfo", "/proc/stat", "/proc/mounts", "/proc/self/mountinfo", "/proc/sys", "/proc/self/oom_score_adj", "/proc/self/fdinfo/0",
	"/dev", "/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/tty", "/dev/ptmx", "/dev/shm", "/dev/shm/x", "/dev/fd/0", "/dev/stdin",
	"/etc/passwd", "/etc/passwd/x", "/etc", "/bin/true", "/usr/bin", "/../../..", "//tmp//a/", "/tmp/./d/../a",
	"/no/such", "a/b/c", "/tmp/fifo",
};

static const u64 numbers[] = {
	0, 1, 2, 3, 7, 8, 15, 16, 63, 64, 127, 128, 255, 256, 511, 512, 1023, 1024, page - 1, page, page + 1, 65535, 65536, 1 << 20,
	0x7ffffffe, 0x7fffffff, 0x80000000, 0x80000001, 0xfffffffe, 0xffffffff, 0x100000000, 0x100000001,
	0x7fffffffffff, 0x800000000000, 0x7ffffffff000, 0x7fffffffe000, 0xffff800000000000, 0xffffffff80000000, 0xffffffffff600000,
	0x7ffffffffffffffe, 0x7fffffffffffffff, 0x8000000000000000, 0x8000000000000001,
	-1ULL, -2ULL, -100ULL, -4095ULL, -4096ULL, -4097ULL, -65536ULL,
};

#define pick(r, list) (list)[below(r, sizeof(list) / sizeof((list)[0]))]

static u64 pointer(struct rng *r) {
	switch (below(r, 16)) {
	case 0: return (u64)readonly + below(r, page);
	case 1: return (u64)noaccess + below(r, page);
	case 2: return (u64)hole + below(r, page);
	case 3: return (u64)edge + page - below(r, 64); // unmapped soon after
	case 4: return pick(r, numbers);
	case 5: return (u64)&arena;
	case 6: return (u64)pointer & ~(u64)(page - 1);
	case 7: return (u64)arena + below(r, arenaSize / page) * page;
	case 8: return (u64)pick(r, paths);
	}
	return (u64)arena + (below(r, 4096) * 8);
}

static u64 number(struct rng *r) {
	switch (below(r, 5)) {
	case 0: return next(r);
	case 1: return 1ULL << below(r, 64);
	case 2: return below(r, 64);
	case 3: return below(r, 1 << 16);
	}
	return pick(r, numbers);
}

static u64 argument(struct rng *r) {
	switch (below(r, 8)) {
	case 0: case 1: case 2: return pointer(r);
	case 3: case 4: return below(r, 40); // a descriptor, signal or small length
	}
	return number(r);
}

// prepare puts what may be a struct or path where pointers point to.
static void prepare(struct rng *r) {
	char *p = arena + below(r, 4096) * 8;
	if (below(r, 4) == 0) {
		strcpy(p, pick(r, paths));
		return;
	}
	for (int i = 0; i < 8; i++)
		((u64 *)p)[i] = below(r, 2) ? argument(r) : (argument(r) << 32) | (uint32_t)argument(r);
}

static void onAlarm(int sig) { (void)sig; }

static void call(struct rng *r) {
	prepare(r);
	u64 nr = below(r, maxNumber);
	switch (below(r, 64)) {
	case 0: nr = next(r); break;
	case 1: nr = number(r); break;
	}
	u64 a = argument(r), b = argument(r), c = argument(r), d = argument(r), e = argument(r), f = argument(r);
	switch (nr) {
	case SYS_exit: case SYS_exit_group:
		if (below(r, 16))
			return;
		break;
	case SYS_rt_sigreturn: // ends the thread in most cases
		if (below(r, 8))
			return;
		break;
	case SYS_pause: case SYS_rt_sigsuspend:
		if (below(r, 4))
			return;
		break;
	case SYS_kill: case SYS_tkill: case SYS_tgkill: case SYS_rt_sigqueueinfo: case SYS_rt_tgsigqueueinfo:
	case SYS_pidfd_send_signal: case SYS_prlimit64: case SYS_setpgid:
		if (privileged) // they would hit the parent
			return;
		break;
	case SYS_clone: // the child must not run on this stack
		b = (u64)arena + below(r, arenaSize);
		break;
	}
	syscall(nr, a, b, c, d, e, f);
	__sync_fetch_and_add(&done[self], 1);
}

static void *fuzz(void *arg) {
	struct rng r = {(u64)arg};
	pid_t me = getpid();
	for (int i = 0; i < perWorker; i++) {
		call(&r);
		if (getpid() != me && below(&r, 4) == 0) // a child that lived
			_exit(0);
	}
	return 0;
}

static void *map(int prot) {
	void *p = mmap(0, page, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		die("mmap");
	return p;
}

// dropResource gives up what limits do not apply to, and the power to harm the parent.
static void dropResource(void) {
	struct __user_cap_header_struct h = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct d[2];
	if (syscall(SYS_capget, &h, d) != 0)
		die("capget");
	u64 gone = 1ULL << CAP_SYS_RESOURCE | 1ULL << CAP_SYS_ADMIN;
	d[0].effective &= ~gone, d[0].permitted &= ~gone;
	if (syscall(SYS_capset, &h, d) != 0)
		die("capset");
}

// worker makes calls until it dies of one.
static void worker(u64 seed) {
	// What it may use up, and what its parent is safe from.
	limit(RLIMIT_NPROC, 150);
	limit(RLIMIT_AS, 512 << 20);
	limit(RLIMIT_FSIZE, 1 << 20);
	limit(RLIMIT_CORE, 0);
	if (privileged)
		dropResource();
	else
		unprivileged();
	arena = mmap(0, arenaSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	readonly = map(PROT_READ);
	noaccess = map(PROT_NONE);
	hole = map(PROT_NONE);
	munmap(hole, page);
	edge = mmap(0, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	munmap(edge + page, page);

	// The descriptors that random ones hit.
	int null = open("/dev/null", O_RDWR);
	for (int fd = 0; fd < 3; fd++)
		dup2(null, fd);
	int p[2];
	mkdir("/tmp/d", 0777);
	if (pipe(p) || socketpair(AF_UNIX, SOCK_STREAM, 0, p) || socketpair(AF_UNIX, SOCK_DGRAM, 0, p) || pipe2(p, O_NONBLOCK))
		_exit(0);
	open("/tmp/a", O_RDWR | O_CREAT, 0666);
	open("/tmp", O_RDONLY | O_DIRECTORY);
	open("/proc/self", O_PATH);
	open("/proc/self/maps", O_RDONLY);
	open("/etc/passwd", O_RDONLY);
	eventfd(0, EFD_NONBLOCK);
	int ep = epoll_create1(0);
	struct epoll_event ev = {EPOLLIN, {.u64 = 1}};
	epoll_ctl(ep, EPOLL_CTL_ADD, p[0], &ev);
	timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
	sigset_t all;
	sigfillset(&all);
	signalfd(-1, &all, SFD_NONBLOCK);
	syscall(SYS_memfd_create, "m", 2);
	syscall(SYS_pidfd_open, getpid(), 0);

	// Calls that wait are interrupted.
	struct sigaction sa = {.sa_handler = onAlarm};
	sigaction(SIGALRM, &sa, 0);
	struct itimerval it = {{0, 3000}, {0, 3000}};
	setitimer(ITIMER_REAL, &it, 0);

	pthread_t t;
	for (int i = 1; i < threads; i++)
		pthread_create(&t, 0, fuzz, (void *)(seed + i));
	fuzz((void *)seed);
	_exit(0);
}

int main(int argc, char **argv) {
	if (argc != 3)
		return 2;
	u64 seed = strtoull(argv[1], 0, 0), calls = strtoull(argv[2], 0, 0), total = 0;
	done = mmap(0, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	barrier("start");
	struct {
		pid_t pid;
		double since;
	} w[workers] = {};
	u64 started = 0;
	while (total < calls) {
		for (int i = 0; i < workers; i++) {
			if (w[i].pid == 0) {
				done[i] = 0;
				self = i, privileged = started % 2;
				if ((w[i].pid = fork()) == 0)
					worker(seed + started * threads);
				if (w[i].pid < 0)
					die("fork");
				w[i].since = now();
				started++;
			} else if (now() - w[i].since > patience) {
				kill(w[i].pid, SIGKILL);
			}
		}
		usleep(1000);
		for (pid_t pid; (pid = waitpid(-1, 0, WNOHANG | __WALL)) > 0;)
			for (int i = 0; i < workers; i++)
				if (w[i].pid == pid) {
					w[i].pid = 0;
					total += done[i] < threads * perWorker ? done[i] : 0;
				}
	}
	// What they have made lives on, in sessions and groups of its own.
	buryAll(0);
	printf("workers %llu\n", (unsigned long long)started);
	barrier("end");
	return survived;
}
