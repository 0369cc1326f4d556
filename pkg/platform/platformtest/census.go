package platformtest

import (
	"bufio"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// census is what this process holds of the host's.
type census struct {
	fds        map[string]bool // "number -> what"
	maps       map[string]int  // mappings with a name, by name
	processes  map[int]bool    // descendants, zombies too
	goroutines int

	// threads is compared by group Leak only: the Go runtime makes a thread for
	// each goroutine that blocks in the host, and keeps it.
	threads int
}

func takeCensus() (*census, error) {
	c := &census{fds: make(map[string]bool), maps: make(map[string]int)}
	fds, err := descriptors(os.Getpid())
	if err != nil {
		return nil, err
	}
	for fd, what := range fds {
		c.fds[fmt.Sprintf("%d -> %s", fd, what)] = true
	}
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		// Anonymous memory is the runtime's, and comes and goes.
		if f := strings.Fields(line); len(f) > 5 && !strings.HasPrefix(f[5], "[") {
			c.maps[strings.Join(f[5:], " ")]++
		}
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return nil, err
	}
	c.threads = len(tasks)
	c.goroutines = runtime.NumGoroutine()
	c.processes, err = descendants(os.Getpid())
	return c, err
}

// descriptors returns what the file descriptors of a process are.
func descriptors(pid int) (map[int]string, error) {
	path := fmt.Sprintf("/proc/%d/fd", pid)
	dir, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	fds := make(map[int]string)
	for _, d := range dir {
		fd, err := strconv.Atoi(d.Name())
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		// Our own descriptor of the directory is closed by now.
		if what, err := os.Readlink(filepath.Join(path, d.Name())); err == nil {
			fds[fd] = what
		}
	}
	return fds, nil
}

// stat returns the parent and state of a process.
func stat(pid int) (ppid int, state string, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, "", err
	}
	// The name, in parentheses, may hold anything.
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 2 {
		return 0, "", fmt.Errorf("/proc/%d/stat: cannot parse %q", pid, b)
	}
	ppid, err = strconv.Atoi(f[1])
	return ppid, f[0], err
}

// descendants returns the children of a process, their children, and so on.
func descendants(root int) (map[int]bool, error) {
	dir, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	parent := make(map[int]int)
	for _, d := range dir {
		pid, err := strconv.Atoi(filepath.Base(d))
		if err != nil {
			continue
		}
		// Those that are gone by now do not matter.
		if ppid, _, err := stat(pid); err == nil {
			parent[pid] = ppid
		}
	}
	found := make(map[int]bool)
	for pid := range parent {
		for p, n := parent[pid], 0; p > 1 && n < 1000; p, n = parent[p], n+1 {
			if p == root {
				found[pid] = true
				break
			}
		}
	}
	return found, nil
}

// compare says what is there now and was not in c.
func (c *census) compare() error {
	now, err := takeCensus()
	if err != nil {
		return err
	}
	var left []error
	for _, fd := range slices.Sorted(maps.Keys(now.fds)) {
		if !c.fds[fd] {
			left = append(left, fmt.Errorf("file descriptor %s", fd))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(now.maps)) {
		if n := now.maps[name] - c.maps[name]; n > 0 {
			left = append(left, fmt.Errorf("%d more mappings of %s", n, name))
		}
	}
	for _, pid := range slices.Sorted(maps.Keys(now.processes)) {
		if !c.processes[pid] {
			_, state, _ := stat(pid)
			left = append(left, fmt.Errorf("process %d in state %s", pid, state))
		}
	}
	if n := now.goroutines - c.goroutines; n > 0 {
		left = append(left, fmt.Errorf("%d more goroutines; all are:\n%s", n, goroutines()))
	}
	return errors.Join(left...)
}

// compareSettled is compare that gives what is on its way out some seconds.
func (c *census) compareSettled() error {
	var err error
	for i := range 30 {
		if err = c.compare(); err == nil {
			return nil
		}
		time.Sleep(time.Duration(i+1) * 5 * time.Millisecond)
	}
	return err
}

// hostMapping is a line of /proc/PID/maps.
type hostMapping struct {
	start, end uint64
	perms      string
	name       string
}

// mapsOf returns the mappings of a process.
func mapsOf(pid int) ([]hostMapping, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var ms []hostMapping
	s := bufio.NewScanner(f)
	for s.Scan() {
		var m hostMapping
		fields := strings.Fields(s.Text())
		if len(fields) < 5 {
			return nil, fmt.Errorf("/proc/%d/maps: cannot parse %q", pid, s.Text())
		}
		if _, err := fmt.Sscanf(fields[0], "%x-%x", &m.start, &m.end); err != nil {
			return nil, fmt.Errorf("/proc/%d/maps: %q: %w", pid, s.Text(), err)
		}
		m.perms, m.name = fields[1], strings.Join(fields[5:], " ")
		ms = append(ms, m)
	}
	return ms, s.Err()
}

// alive reports whether a process exists and is no zombie.
func alive(pid int) bool {
	_, state, err := stat(pid)
	return err == nil && state != "Z" && state != "X"
}

// kill kills a process.
func kill(pid int) error { return unix.Kill(pid, unix.SIGKILL) }

// stopProcess and continueProcess send SIGSTOP and SIGCONT.
func stopProcess(pid int) error     { return unix.Kill(pid, unix.SIGSTOP) }
func continueProcess(pid int) error { return unix.Kill(pid, unix.SIGCONT) }
