// signals SEED STORM: processes and threads that signal each other without end,
// with handlers on alternate stacks, timers that expire all the time, and frames
// that are not what the Sentry has put there.
#include "adversary.h"
#include <sys/syscall.h>
#include <ucontext.h>

enum { processes = 8, threadsEach = 2, handled = 24 };

static pid_t *pids;        // shared by all
static volatile u64 *sent; // likewise: signals that were sent
static u64 storm;
static volatile sig_atomic_t depth;
static struct rng forger;
static int forging;

static void onSignal(int sig, siginfo_t *info, void *context) {
	if (info->si_signo != sig) {
		static const char msg[] = "the signal's number is not that of its siginfo: errno 0\n";
		write(2, msg, sizeof msg - 1);
		_exit(1);
	}
	if (forging && below(&forger, 4) == 0) {
		// Anything may stand in the frame: bytes that were not meant, pointers.
		unsigned char *f = context;
		for (u64 n = below(&forger, 64); n > 0; n--)
			f[below(&forger, sizeof(ucontext_t) + 512)] = next(&forger);
		return;
	}
	if (depth < 8 && sig % 3 == 0) {
		depth++;
		raise(1 + (sig + 6) % handled);
		depth--;
	}
}

static void handleAll(int flags) {
	struct sigaction sa = {.sa_sigaction = onSignal, .sa_flags = SA_SIGINFO | SA_ONSTACK | flags};
	for (int sig = 1; sig < NSIG; sig++) {
		sa.sa_flags = SA_SIGINFO | SA_ONSTACK | flags | (sig % 2 ? SA_RESTART : 0) | (sig % 5 ? 0 : SA_NODEFER);
		sigaction(sig, &sa, 0); // not all can be
	}
}

static void altStack(void) {
	stack_t s = {.ss_sp = malloc(256 << 10), .ss_size = 256 << 10};
	if (s.ss_sp == 0 || sigaltstack(&s, 0) != 0)
		die("sigaltstack");
}

static void *sender(void *arg) {
	struct rng r = {(u64)arg};
	altStack();
	while (__sync_fetch_and_add(sent, 1) < storm) {
		pid_t pid = pids[below(&r, processes)];
		int sig = 1 + below(&r, 64);
		if (sig == SIGKILL || sig == SIGABRT)
			continue;
		if (sig == SIGSTOP || sig == SIGTSTP || sig == SIGTTIN || sig == SIGTTOU)
			sig = below(&r, 32) ? SIGCONT : sig;
		switch (pid > 0 ? below(&r, 6) : 6) {
		case 0: {
			union sigval v = {.sival_int = 1};
			sigqueue(pid, sig, v);
			break;
		}
		case 1: syscall(SYS_tgkill, pid, pid, sig); break;
		case 2: {
			sigset_t set;
			sigemptyset(&set);
			for (int i = 0; i < 10; i++)
				sigaddset(&set, 1 + below(&r, 64));
			struct timespec ts = {0, 50000};
			pthread_sigmask(below(&r, 2) ? SIG_SETMASK : SIG_UNBLOCK, &set, 0);
			sigtimedwait(&set, 0, &ts);
			break;
		}
		case 3: {
			struct timespec ts = {0, 100000};
			nanosleep(&ts, 0);
			break;
		}
		default: kill(pid ?: getpid(), sig);
		}
	}
	return 0;
}

static void stormProcess(u64 seed) {
	altStack();
	handleAll(0);
	pthread_t t[threadsEach];
	for (int i = 1; i < threadsEach; i++)
		pthread_create(&t[i], 0, sender, (void *)(seed + i));
	sender((void *)seed);
	_exit(0);
}

// forgeProcess returns from handlers with frames of its own making.
static void forgeProcess(u64 seed) {
	forger.state = seed;
	altStack();
	forging = 1;
	handleAll(0);
	alarm(1);
	for (int i = 0; i < 200; i++)
		raise(below(&forger, 2) ? SIGUSR1 : SIGRTMIN);
	// Without a handler at all, the stack pointer anywhere.
	char fake[4096];
	for (int i = 0; i < (int)sizeof fake; i += 8)
		*(u64 *)(fake + i) = below(&forger, 3) ? next(&forger) : (u64)fake;
#if defined(__x86_64__)
	u64 sp = below(&forger, 3) ? (u64)fake + 8 * below(&forger, 64) : next(&forger);
	__asm__ volatile("mov %0, %%rsp; mov $15, %%eax; syscall; ud2" ::"r"(sp) : "memory");
#elif defined(__aarch64__)
	u64 sp = (below(&forger, 3) ? (u64)fake + 16 * below(&forger, 32) : next(&forger)) & ~15ULL;
	__asm__ volatile("mov sp, %0; mov x8, #139; svc #0; udf #0" ::"r"(sp) : "memory");
#endif
	_exit(0);
}

// noStack gets signals that no stack can take.
static void noStack(u64 seed) {
	struct rng r = {seed};
	stack_t s = {.ss_sp = (void *)(below(&r, 2) ? next(&r) : page), .ss_size = 1 << 20};
	sigaltstack(&s, 0);
	handleAll(SA_NODEFER);
	raise(SIGUSR1);
	_exit(0);
}

// timers have as many timers as there can be, each due all the time.
static void timers(u64 seed) {
	struct rng r = {seed};
	handleAll(0);
	signal(SIGALRM, SIG_IGN);
	for (int i = 0; i < 200; i++) {
		int id;
		struct sigevent ev = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + below(&r, 20)};
		u64 its[4] = {0, 1, 0, 1}; // a nanosecond
		if (syscall(SYS_timer_create, below(&r, 2) ? CLOCK_MONOTONIC : CLOCK_PROCESS_CPUTIME_ID, &ev, &id) != 0 ||
		    syscall(SYS_timer_settime, id, 0, its, 0) != 0)
			die("timer");
	}
	struct itimerval it = {{0, 1}, {0, 1}};
	setitimer(ITIMER_REAL, &it, 0);
	double start = now();
	while (now() - start < 0.3)
		getppid();
	_exit(0);
}

static pid_t run(void (*f)(u64), u64 seed) {
	pid_t pid = fork();
	if (pid < 0)
		die("fork");
	if (pid == 0) {
		unprivileged();
		f(seed);
	}
	return pid;
}

int main(int argc, char **argv) {
	if (argc != 3)
		return 2;
	u64 seed = strtoull(argv[1], 0, 0);
	storm = strtoull(argv[2], 0, 0);
	pids = mmap(0, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	sent = (u64 *)(pids + processes);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	barrier("start");

	double start = now();
	for (int i = 0; i < processes; i++)
		pids[i] = run(stormProcess, seed + 1000 * i);
	while (*sent < storm && now() - start < 60) {
		usleep(1000);
		// Those that have stopped go on, those that have ended are replaced.
		for (int i = 0; i < processes; i++) {
			kill(pids[i], SIGCONT);
			if (waitpid(pids[i], 0, WNOHANG) > 0)
				pids[i] = run(stormProcess, seed + next(&forger));
		}
	}
	int enough = *sent >= storm;
	buryAll(0);
	if (!enough)
		die("the storm calmed down after %llu signals", (unsigned long long)*sent);
	printf("signals in %.1f s\n", now() - start);
	fflush(stdout);

	for (int i = 0; i < 40; i++) {
		run(forgeProcess, seed + i);
		if (i % 4 == 0)
			run(noStack, seed + i);
		if (i % 8 == 7)
			buryAll(0.3);
	}
	for (int i = 0; i < 4; i++)
		run(timers, seed + i);
	buryAll(5);
	barrier("end");
	return survived;
}
