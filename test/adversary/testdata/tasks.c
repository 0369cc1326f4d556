// tasks ROUNDS: fork bombs, threads that come and go, threads that execute a
// program all at once, vfork, and families in disorder.
#include "adversary.h"
#include <sys/syscall.h>

static char *self;
static volatile int *shared;

// bomb forks until it cannot, and so do its children.
static void bomb(void) {
	limit(RLIMIT_NPROC, 60);
	unprivileged();
	for (;;) {
		pid_t pid = fork();
		if (pid < 0 && errno != EAGAIN)
			die("fork in a bomb");
		if (pid < 0)
			__sync_fetch_and_add(shared, 1);
		if (*shared > 200)
			_exit(0);
		waitpid(-1, 0, WNOHANG);
	}
}

static void *shortLived(void *arg) {
	(void)arg;
	return 0;
}

static void *blocked(void *arg) {
	(void)arg;
	for (;;)
		pause();
	return 0;
}

static void churn(void) {
	pthread_attr_t attr;
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 64 << 10);
	for (int i = 0; i < 100; i++) {
		pthread_t t[4];
		for (int j = 0; j < 4; j++)
			if ((errno = pthread_create(&t[j], &attr, shortLived, 0)) != 0)
				die("pthread_create");
		for (int j = 0; j < 4; j++)
			pthread_join(t[j], 0);
	}
	pthread_t t;
	for (int j = 0; j < 50; j++)
		pthread_create(&t, &attr, blocked, 0);
	_exit(7); // with all of them alive
}

static void *execute(void *arg) {
	char *argv[] = {self, "exit", arg, 0}, *envp[] = {0};
	execve(self, argv, envp);
	die("execve");
}

// execRace has threads that execute a program at once, or while others end.
static void execRace(int how) {
	pthread_t t;
	for (int i = 0; i < 4; i++)
		pthread_create(&t, 0, how & 1 && i % 2 ? shortLived : execute, "9");
	if (how & 2)
		pthread_create(&t, 0, blocked, 0);
	if (how & 4)
		syscall(SYS_exit, 1); // the leader alone
	if (how & 8)
		_exit(9); // the process, at the same time
	execute("9");
}

static void vforks(void) {
	for (int i = 0; i < 50; i++) {
		volatile int seen = 0;
		pid_t pid = vfork();
		if (pid == 0) {
			seen = 1;
			if (i % 3 == 0) {
				char *argv[] = {self, "exit", "3", 0}, *envp[] = {0};
				execve(self, argv, envp);
			}
			if (i % 3 == 1)
				kill(getpid(), SIGKILL);
			_exit(3);
		}
		if (pid < 0 || !seen)
			die("vfork");
		int status;
		if (waitpid(pid, &status, 0) != pid || (i % 3 == 1 ? status != SIGKILL : status != 3 << 8))
			die("status %#x after vfork", status);
	}
	_exit(7);
}

// vforkKilled is killed while its child has its memory.
static void vforkKilled(void) {
	pid_t parent = getpid();
	if (vfork() == 0) {
		kill(parent, SIGKILL);
		for (volatile int i = 0; i < 100000; i++)
			;
		_exit(0);
	}
	_exit(1); // not before the child, which kills us
}

// family makes children in all the ways that clone(2) has, and abandons them.
static void family(struct rng *r) {
	static const u64 ways[] = {CLONE_PARENT, CLONE_VM, CLONE_FILES, CLONE_FS, CLONE_VM | CLONE_SIGHAND, CLONE_UNTRACED, CLONE_IO,
	                           CLONE_NEWUSER, CLONE_NEWPID, CLONE_THREAD, CLONE_SYSVSEM, CLONE_VFORK, CLONE_PARENT_SETTID, CLONE_CHILD_CLEARTID};
	limit(RLIMIT_NPROC, 60);
	unprivileged();
	alarm(2);
	for (int i = 0; i < 30; i++) {
		u64 flags = below(r, 65);
		for (int j = 0; j < 2; j++)
			flags |= ways[below(r, sizeof ways / sizeof ways[0])];
		u64 stack = 0;
		if (flags & CLONE_VM) { // a stack whose return address nobody has set
			stack = (u64)malloc(16384) + 8192;
			flags &= ~(u64)CLONE_VFORK;
		}
		pid_t pid = syscall(SYS_clone, flags, stack, shared + 8, shared + 8, 0);
		if (pid == 0) {
			if (below(r, 2))
				setsid();
			if (below(r, 2))
				setpgid(0, 0);
			if (below(r, 4) == 0)
				kill(getppid(), SIGSTOP);
			if (below(r, 4) == 0)
				kill(0, SIGCONT);
			if (below(r, 3) == 0)
				prctl(PR_SET_PDEATHSIG, SIGTERM);
			if (below(r, 3) == 0)
				prctl(PR_SET_CHILD_SUBREAPER, 1);
			if (below(r, 2))
				_exit(0);
		} else if (below(r, 4) == 0) {
			kill(pid, below(r, 2) ? SIGKILL : SIGSTOP);
			waitpid(-1, 0, WNOHANG | WUNTRACED | __WALL);
		}
	}
	_exit(0);
}

// twoParents makes a child in a thread that ends, and ends itself only when the child
// has asked to die with its parent: that is another thread now.
static pid_t orphan;
static int toChild[2], fromChild[2];

static void *parentThread(void *arg) {
	char c = 0;
	pid_t parent = getpid();
	(void)arg;
	if ((orphan = fork()) == 0) {
		if (read(toChild[0], &c, 1) != 1 || prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != parent)
			die("the child of a thread that has ended");
		if (write(fromChild[1], &c, 1) != 1)
			die("write");
		for (;;)
			pause();
	}
	return 0;
}

static void twoParents(void) {
	pthread_t t;
	char c = 0;
	if (pipe(toChild) != 0 || pipe(fromChild) != 0)
		die("pipe");
	pthread_create(&t, 0, parentThread, 0);
	pthread_join(t, 0);
	if (write(toChild[1], &c, 1) != 1 || read(fromChild[0], &c, 1) != 1)
		die("the child does not answer");
	*shared = orphan;
	_exit(7);
}

static pid_t start(void) {
	fflush(0);
	pid_t pid = fork();
	if (pid < 0)
		die("fork");
	return pid;
}

static void want(pid_t pid, int status, const char *what) {
	int got;
	if (waitpid(pid, &got, 0) != pid)
		die("waitpid for %s", what);
	if (got != status)
		die("%s: status %#x, want %#x", what, got, status);
}

int main(int argc, char **argv) {
	self = argv[0];
	if (argc == 3 && strcmp(argv[1], "exit") == 0)
		return atoi(argv[2]);
	if (argc != 3)
		return 2;
	struct rng r = {strtoull(argv[1], 0, 0)};
	int rounds = atoi(argv[2]);
	shared = mmap(0, page, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	barrier("start");
	pid_t pid;
	for (int i = 0; i < rounds; i++) {
		*shared = 0;
		if (start() == 0)
			bomb();
		buryAll(60); // they end by themselves, late on a busy host
		if (*shared <= 200)
			die("a fork bomb was never refused a process");

		if ((pid = start()) == 0)
			churn();
		want(pid, 7 << 8, "threads");
		for (int how = 0; how < 16; how++) {
			if ((pid = start()) == 0)
				execRace(how);
			want(pid, 9 << 8, "threads that execute a program");
		}
		if ((pid = start()) == 0)
			vforks();
		want(pid, 7 << 8, "vfork");
		for (int j = 0; j < 5; j++) {
			if ((pid = start()) == 0)
				vforkKilled();
			want(pid, SIGKILL, "the parent of vfork, killed");
		}
		buryAll(5);
		if ((pid = start()) == 0)
			twoParents();
		want(pid, 7 << 8, "a parent of two threads");
		want(*shared, SIGKILL, "a child that dies with its parent");
		for (int j = 0; j < 4; j++)
			if (start() == 0)
				family(&(struct rng){next(&r)});
		buryAll(1);
	}
	barrier("end");
	return survived;
}
