// What the hostile programs share. Nothing here depends on the architecture.
#ifndef ADVERSARY_H
#define ADVERSARY_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

// survived is the status of a program that has done all it meant to.
enum { survived = 42, page = 4096 };

typedef uint64_t u64;

// die says what a program expected of the Sentry and did not get.
__attribute__((unused, noreturn, format(printf, 1, 2))) static void die(const char *format, ...) {
	int err = errno;
	va_list ap;
	va_start(ap, format);
	vfprintf(stderr, format, ap);
	va_end(ap);
	fprintf(stderr, ": errno %d (%s)\n", err, strerror(err));
	fflush(stderr);
	_exit(1);
}

// rng is splitmix64: any seed is good.
struct rng {
	u64 state;
};

__attribute__((unused)) static u64 next(struct rng *r) {
	u64 z = r->state += 0x9e3779b97f4a7c15;
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

__attribute__((unused)) static u64 below(struct rng *r, u64 n) { return next(r) % n; }

__attribute__((unused)) static double now(void) {
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec + ts.tv_nsec / 1e9;
}

// barrier tells the test that the program has come so far, with nothing else
// running, and waits until the test has looked.
__attribute__((unused)) static void barrier(const char *name) {
	char c;
	printf("at %s\n", name);
	fflush(stdout);
	if (read(0, &c, 1) != 1)
		die("barrier %s: the test has gone", name);
}

// limit sets both values of a resource limit.
__attribute__((unused)) static void limit(int resource, u64 value) {
	struct rlimit l = {value, value};
	if (setrlimit(resource, &l) != 0)
		die("setrlimit %d", resource);
}

// unprivileged makes the process one that cannot harm those of other users, and
// that limits apply to.
__attribute__((unused)) static void unprivileged(void) {
	if (setgid(1234) != 0 || setuid(1234) != 0)
		die("setuid");
}

// buryAll waits for every child, and kills those that take longer than so many
// seconds: signals do nothing to a program that has blocked them. It must run as
// a child subreaper, or the first process.
__attribute__((unused)) static void buryAll(double seconds) {
	double start = now();
	for (;;) {
		pid_t pid = waitpid(-1, 0, WNOHANG | __WALL);
		if (pid > 0)
			continue;
		if (pid < 0 && errno == ECHILD)
			return;
		if (now() - start > seconds)
			kill(-1, SIGKILL);
		usleep(500);
	}
}

#endif
