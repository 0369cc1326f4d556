// Eight threads count under a mutex; a SIGSEGV handler repairs a fault of each.
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { THREADS = 8, ROUNDS = 10000, PAGE = 4096 };

static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static long count;
static int done;
static char *pages;
static volatile sig_atomic_t repaired;

static void on_segv(int sig, siginfo_t *info, void *uc) {
	(void)sig;
	(void)uc;
	char *addr = info->si_addr;
	if (addr < pages || addr >= pages + THREADS * PAGE || info->si_code != SEGV_ACCERR) {
		static const char msg[] = "unexpected fault\n";
		if (write(2, msg, sizeof msg - 1) < 0)
			_exit(4);
		_exit(3);
	}
	mprotect(pages + (addr - pages) / PAGE * PAGE, PAGE, PROT_READ | PROT_WRITE);
	__sync_fetch_and_add(&repaired, 1);
}

static void *work(void *arg) {
	long n = (long)arg;
	for (int i = 0; i < ROUNDS; i++) {
		pthread_mutex_lock(&mu);
		count++;
		pthread_mutex_unlock(&mu);
	}
	pages[n * PAGE + 123] = (char)('a' + n);
	pthread_mutex_lock(&mu);
	done++;
	pthread_cond_signal(&cond);
	pthread_mutex_unlock(&mu);
	return (void *)(n * n);
}

int main(void) {
	struct sigaction sa;
	memset(&sa, 0, sizeof sa);
	sa.sa_sigaction = on_segv;
	sa.sa_flags = SA_SIGINFO;
	sigaction(SIGSEGV, &sa, NULL);
	pages = mmap(NULL, THREADS * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (pages == MAP_FAILED)
		return 2;
	pthread_t t[THREADS];
	for (long i = 0; i < THREADS; i++)
		if (pthread_create(&t[i], NULL, work, (void *)i))
			return 2;
	pthread_mutex_lock(&mu);
	while (done < THREADS)
		pthread_cond_wait(&cond, &mu);
	pthread_mutex_unlock(&mu);
	long sum = 0;
	for (int i = 0; i < THREADS; i++) {
		void *r;
		pthread_join(t[i], &r);
		sum += (long)r;
	}
	printf("count %ld sum %ld repaired %d pages ", count, sum, (int)repaired);
	for (int i = 0; i < THREADS; i++)
		putchar(pages[i * PAGE + 123]);
	putchar('\n');
	return 42;
}
