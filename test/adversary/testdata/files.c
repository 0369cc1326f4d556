// files SECONDS SECRET...: tries to read and write outside its root, /, and what is
// bound at /box, where the test renames directories and links all the time, as
// does this program itself. Each SECRET is the host's path of a file that has the
// word "secret".
#include "adversary.h"
#include <sys/stat.h>

static double until;
static volatile u64 opened, moved;
static char **secrets;

static void check(int fd, const char *how, const char *path) {
	if (fd < 0)
		return;
	char buf[64] = {};
	if (read(fd, buf, sizeof buf - 1) > 0 && strstr(buf, "secret"))
		die("%s %s: read a secret", how, path);
	__sync_fetch_and_add(&opened, 1);
	close(fd);
}

static const char *const attempts[] = {
	"x/../secret", "x/../../secret", "x/y/../../secret", "x/y/../../../secret", "l/secret", "d/secret", "d/../secret", "l/../secret",
	"x/up/secret", "x/y/up/secret", "x/inside", "x/y/inside", "d/inside", "l/inside", "r/secret", "x/y/../../../outside/secret",
};

static void *reader(void *arg) {
	struct rng r = {(u64)arg};
	while (now() < until) {
		char path[512];
		const char *a = attempts[below(&r, sizeof attempts / sizeof attempts[0])];
		snprintf(path, sizeof path, "/box/%s", a);
		check(open(path, O_RDONLY), "open", path);
		// From directories that may have gone elsewhere by now.
		static const char *const dirs[] = {"/box", "/box/x", "/box/x/y", "/box/d", "/box/l"};
		int dir = open(dirs[below(&r, 5)], O_RDONLY | O_DIRECTORY | (below(&r, 2) ? O_PATH : 0));
		if (dir < 0)
			continue;
		static const char *const up[] = {"../secret", "../../secret", "../outside/secret", "../../outside/secret", "../../../secret", "up/secret", "inside", "..", "."};
		const char *u = up[below(&r, 9)];
		check(openat(dir, u, O_RDONLY), "openat", u);
		snprintf(path, sizeof path, "/proc/self/fd/%d/%s", dir, u);
		check(open(path, O_RDONLY), "open", path);
		u64 how[3] = {O_RDONLY, 0, below(&r, 32)};
		check(syscall(SYS_openat2, dir, u, how, sizeof how), "openat2", u);
		if (fchdir(dir) == 0) {
			check(open(u, O_RDONLY), "open from the working directory", u);
			snprintf(path, sizeof path, "/proc/self/cwd/%s", u);
			check(open(path, O_RDONLY), "open", path);
		}
		// Nothing may be made outside either: the test looks.
		int fd = openat(dir, "../evil", O_WRONLY | O_CREAT, 0600);
		if (fd >= 0)
			close(fd);
		mkdirat(dir, "../../evil", 0700);
		symlinkat("x", dir, "../evil-link");
		linkat(dir, "inside", dir, "../evil-hard", 0);
		renameat(dir, "inside2", dir, "../evil-moved");
		unlinkat(dir, "../secret", 0);
		unlinkat(dir, "../../secret", 0);
		truncate("/box/d/secret", 0);
		chmod("/box/l/secret", 0777);
		close(dir);
	}
	return 0;
}

static void *mover(void *arg) {
	struct rng r = {(u64)arg};
	static const char *const names[] = {"/box/d", "/box/l", "/box/t", "/box/x/y", "/box/r"};
	while (now() < until) {
		const char *a = names[below(&r, 5)], *b = names[below(&r, 5)];
		if (syscall(SYS_renameat2, AT_FDCWD, a, AT_FDCWD, b, below(&r, 2) ? 2 /* RENAME_EXCHANGE */ : 1) == 0)
			__sync_fetch_and_add(&moved, 1);
		if (below(&r, 8) == 0) {
			unlink("/box/t");
			symlink(secrets[below(&r, 2)], "/box/t");
			mkdir("/box/d", 0700);
			symlink("../outside", "/box/l");
			symlink("/", "/box/r");
			close(open("/box/d/inside", O_CREAT | O_WRONLY, 0600));
		}
	}
	return 0;
}

// proc tries what could show the host.
static void proc(void) {
	static const char *const paths[] = {
		"/proc/self/root%s", "/proc/1/root%s", "/proc/self/root/..%s", "/proc/self/root/../../..%s", "/proc/self/cwd/../..%s",
		"/proc/self/fd/0/..%s", "/proc/self/task/1/root%s", "/proc/thread-self/root%s", "/proc/self/../1/root%s", "/../..%s",
		"/dev/fd/../../..%s", "/proc/self/fd/../../..%s", "/tmp/../..%s", "/box/../..%s", "/box/..%s", "%s",
	};
	for (int i = 0; i < (int)(sizeof paths / sizeof paths[0]); i++)
		for (char **s = secrets; *s; s++) {
			char path[8192];
			snprintf(path, sizeof path, paths[i], *s);
			check(open(path, O_RDONLY), "open", path);
			char *argv[] = {path, 0};
			if (execve(path, argv, argv) == 0)
				die("execve %s", path);
		}
	// Of the kernel, or made up.
	static const char *const none[] = {
		"/proc/kcore", "/proc/kmsg", "/proc/sysrq-trigger", "/proc/kallsyms", "/proc/self/pagemap", "/proc/self/map_files", "/proc/99999999",
		"/proc/99999999999999999999", "/proc/-1", "/proc/0", "/proc/4294967297", "/proc/self/fd/-1", "/proc/self/fd/99999999999999999999",
		"/proc/self/fd/4294967296", "/proc/self/fd/x", "/proc/1x", "/proc/+1", "/proc/01", "/proc/self/ns/../../../../etc/shadow", "/dev/mem", "/dev/kvm",
		"/dev/sda", "/dev/vda", "/sys/kernel",
	};
	for (int i = 0; i < (int)(sizeof none / sizeof none[0]); i++) {
		int fd = open(none[i], O_RDWR);
		if (fd >= 0)
			die("%s can be opened", none[i]);
		struct stat st;
		if (stat(none[i], &st) == 0 && (st.st_mode & S_IFMT) != S_IFDIR && open(none[i], O_RDONLY) >= 0)
			die("%s can be read", none[i]);
	}
	// Every entry of /proc/self survives to be read at any offset, written, and
	// mapped, also while the process is going away.
	static const char *const entries[] = {
		"maps", "smaps", "stat", "status", "statm", "cmdline", "environ", "auxv", "comm", "limits", "mountinfo", "mounts", "mem", "exe", "cwd",
		"root", "fd", "fdinfo", "task", "oom_score_adj", "io", "wchan", "stack", "personality", "cgroup", "uid_map", "loginuid",
	};
	for (int i = 0; i < (int)(sizeof entries / sizeof entries[0]); i++)
		for (int who = 0; who < 2; who++) {
			pid_t pid = fork();
			if (pid == 0)
				_exit(0);
			char path[64], buf[8192];
			snprintf(path, sizeof path, "/proc/%d/%s", who ? getpid() : pid, entries[i]);
			int fd = open(path, below(&(struct rng){i}, 2) ? O_RDONLY : O_RDWR);
			if (!who)
				waitpid(pid, 0, 0);
			if (fd >= 0) {
				for (int j = 0; j < 64; j++)
					pread(fd, buf, sizeof buf, 1ULL << j);
				pread(fd, buf, 1, 0x7fffffffffffffff);
				lseek(fd, 0x7fffffffffffffff, SEEK_SET);
				read(fd, buf, sizeof buf);
				lseek(fd, -1, SEEK_END);
				for (int j = 0; j < 100 && read(fd, buf, 7) > 0; j++)
					;
				write(fd, buf, sizeof buf);
				syscall(SYS_getdents64, fd, buf, sizeof buf);
				mmap(0, page, PROT_READ, MAP_PRIVATE, fd, 0);
				ftruncate(fd, 0);
				close(fd);
			}
			readlink(path, buf, 1);
			if (who)
				waitpid(pid, 0, 0);
		}
}

int main(int argc, char **argv) {
	if (argc < 4)
		return 2;
	secrets = argv + 2;
	signal(SIGPIPE, SIG_IGN);
	barrier("start");
	proc();
	until = now() + atof(argv[1]);
	pthread_t t[3];
	pthread_create(&t[0], 0, reader, (void *)1);
	pthread_create(&t[1], 0, mover, (void *)2);
	pthread_create(&t[2], 0, mover, (void *)3);
	reader((void *)4);
	for (int i = 0; i < 3; i++)
		pthread_join(t[i], 0);
	printf("opened %llu moved %llu\n", (unsigned long long)opened, (unsigned long long)moved);
	if (opened == 0 || moved == 0)
		die("nothing was tried");
	barrier("end");
	return survived;
}
