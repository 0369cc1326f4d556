// victims works|refused: processes that do one thing each, until the test kills the
// stub that they run in. The argument says what fork(2) does then, when there is no
// zygote any more.
#include "adversary.h"

enum { kinds = 7 };

static int forever[2];

static void *spin(void *arg) {
	for (;;)
		;
	return arg;
}

static void *once(void *done) {
	++*(int *)done;
	return 0;
}

static void victim(int kind) {
	pthread_t t;
	switch (kind) {
	case 0: spin(0);
	case 1:
		for (;;)
			getppid();
	case 2: // faults, and mappings made on its behalf
		for (;;) {
			char *p = mmap(0, 64 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			for (int i = 0; i < 64; i++)
				p[i * page] = 1;
			munmap(p, 64 * page);
		}
	case 3: // the test cannot reach it while it waits
		read(forever[0], &(char){0}, 1);
		for (;;)
			getppid();
	case 4:
		for (;;) {
			pid_t pid = fork();
			if (pid == 0)
				_exit(0);
			waitpid(pid, 0, 0);
		}
	case 5:
		for (int i = 0; i < 4; i++)
			pthread_create(&t, 0, spin, 0);
		for (;;)
			usleep(1000);
	case 6:
		signal(SIGALRM, SIG_IGN);
		for (;;) {
			struct itimerval it = {{0, 1000}, {0, 1000}};
			setitimer(ITIMER_REAL, &it, 0);
			raise(SIGCONT);
			pthread_create(&t, 0, spin, 0);
			pthread_cancel(t);
			pthread_join(t, 0);
		}
	}
}

// goesOn does what needs no new process.
static void goesOn(void) {
	static volatile int done;
	for (int i = 0; i < 4; i++) {
		pthread_t t;
		if ((errno = pthread_create(&t, 0, once, (void *)&done)) != 0)
			die("pthread_create without a zygote");
		pthread_join(t, 0);
		char *p = mmap(0, 64 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (p == MAP_FAILED)
			die("mmap without a zygote");
		memset(p, i, 64 * page);
		if (mprotect(p, page, PROT_READ) != 0 || munmap(p, 64 * page) != 0)
			die("memory without a zygote");
		raise(SIGCONT);
	}
	if (done != 4)
		die("%d threads without a zygote", done);
}

int main(int argc, char **argv) {
	if (argc != 2)
		return 2;
	int works = strcmp(argv[1], "works") == 0;
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	pid_t pids[kinds];
	if (pipe(forever) != 0)
		die("pipe");
	for (int i = 0; i < kinds; i++) {
		if ((pids[i] = fork()) == 0) {
			close(forever[1]);
			victim(i);
		}
		if (pids[i] < 0)
			die("fork");
	}
	barrier("start");
	close(forever[1]);
	for (int left = kinds; left > 0;) {
		int status;
		pid_t pid = waitpid(-1, &status, __WALL);
		if (pid < 0)
			die("waitpid");
		for (int i = 0; i < kinds; i++)
			if (pids[i] == pid) {
				if (status != SIGKILL)
					die("victim %d: status %#x", i, status);
				left--;
			}
	}
	buryAll(0);

	barrier("zygote"); // after which it is gone
	for (int i = 0; i < 3; i++) {
		pid_t pid = fork();
		if (pid == 0)
			_exit(9);
		int status;
		if (works != (pid > 0) || (pid < 0 && errno != EAGAIN))
			die("fork returns %d without a zygote", pid);
		if (pid > 0 && (waitpid(pid, &status, 0) != pid || status != 9 << 8))
			die("a child without a zygote: status %#x", status);
	}
	goesOn();
	barrier("end");
	return survived;
}
