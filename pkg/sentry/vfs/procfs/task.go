package procfs

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/pseudofs"
)

// process returns the directory /proc/PID.
func (b *builder) process(pid int32) (vfs.Node, error) {
	t := b.p.Task(pid)
	if t == nil {
		return nil, unix.ENOENT
	}
	st := t.Status()
	path := strconv.Itoa(int(pid))
	o := owner{st.UID[1], st.GID[1]}
	nodes := b.taskNodes(t, st.TGID)
	nodes = append(nodes, node{name: "task", dir: func(path string) vfs.Node {
		return b.threads(path, t, o)
	}})
	return b.treeOf(path, nodes, o), nil
}

// threads returns the directory /proc/PID/task.
func (b *builder) threads(path string, t vfs.ProcTask, o owner) vfs.Node {
	d := &pseudofs.Dir{Attr: b.attr(path, unix.S_IFDIR|0o555, o)}
	d.Lookup = func(_ context.Context, name string) (vfs.Node, error) {
		tid, ok := number(name)
		if !ok {
			return nil, unix.ENOENT
		}
		for _, other := range t.Threads() {
			if other != tid {
				continue
			}
			if thread := b.p.Task(tid); thread != nil {
				return b.treeOf(path+"/"+name, b.taskNodes(thread, tid), o), nil
			}
		}
		return nil, unix.ENOENT
	}
	d.List = func(context.Context) []string {
		var names []string
		for _, tid := range t.Threads() {
			names = append(names, strconv.Itoa(int(tid)))
		}
		return names
	}
	return d
}

// taskNodes returns the entries that a process and a thread have in common. id
// is the number that stat and status show.
func (b *builder) taskNodes(t vfs.ProcTask, id int32) []node {
	file := func(name string, f func() string) node {
		return node{name: name, text: func(context.Context) string { return f() }}
	}
	private := func(name string, f func() string) node {
		n := file(name, f)
		n.mode = 0o400
		return n
	}
	place := func(get func(*vfs.FSContext) *vfs.Dentry) (content, func(context.Context) (*vfs.Dentry, error)) {
		text := func(context.Context) string {
			fs := t.FSContext()
			if fs == nil {
				return ""
			}
			defer fs.DecRef()
			d := get(fs)
			defer d.Drop()
			return fs.PathOf(d)
		}
		return text, func(context.Context) (*vfs.Dentry, error) {
			fs := t.FSContext()
			if fs == nil {
				return nil, unix.ENOENT
			}
			defer fs.DecRef()
			return get(fs), nil
		}
	}
	cwd, followCwd := place((*vfs.FSContext).Cwd)
	root, followRoot := place((*vfs.FSContext).Root)
	comm := file("comm", func() string { return t.Status().Comm + "\n" })
	comm.mode = 0o644
	comm.write = func(_ context.Context, p []byte) error {
		t.SetComm(strings.TrimSuffix(string(p), "\n"))
		return nil
	}
	return []node{
		private("auxv", func() string { return string(t.Auxv()) }),
		file("cgroup", func() string { return "0::/\n" }),
		file("cmdline", func() string { return string(t.Cmdline()) }),
		comm,
		{name: "cwd", link: cwd, follow: followCwd},
		private("environ", func() string { return string(t.Environ()) }),
		{name: "exe", link: func(context.Context) string { return t.Executable() }},
		{name: "fd", dir: func(path string) vfs.Node { return b.fds(path, t, b.fdLink) }},
		{name: "fdinfo", dir: func(path string) vfs.Node { return b.fds(path, t, b.fdInfo) }},
		file("limits", func() string { return limits(t.Limits()) }),
		file("maps", t.Maps),
		file("mountinfo", b.mountinfo),
		file("mounts", b.mounts),
		file("oom_score", func() string { return "0\n" }),
		{name: "oom_score_adj", text: fixed("0\n"), mode: 0o644,
			write: func(context.Context, []byte) error { return nil }},
		{name: "root", link: root, follow: followRoot},
		file("stat", func() string { return b.taskStat(t, id) }),
		file("statm", func() string {
			st := t.Status()
			size, rss := st.VMSize/hostarch.PageSize, st.RSS/hostarch.PageSize
			return fmt.Sprintf("%d %d 0 0 0 %d 0\n", size, rss, size)
		}),
		file("status", func() string { return status(t, id) }),
	}
}

// fds returns a directory with an entry for every open descriptor of t.
func (b *builder) fds(path string, t vfs.ProcTask,
	entry func(path string, o owner, t vfs.ProcTask, fd int32, f *vfs.FileDescription) vfs.Node) vfs.Node {
	st := t.Status()
	o := owner{st.UID[1], st.GID[1]}
	d := &pseudofs.Dir{Attr: b.attr(path, unix.S_IFDIR|0o500, o)}
	d.Lookup = func(_ context.Context, name string) (vfs.Node, error) {
		fd, err := strconv.ParseInt(name, 10, 32)
		if err != nil || fd < 0 || strconv.FormatInt(fd, 10) != name {
			return nil, unix.ENOENT
		}
		f := openFile(t, int32(fd))
		if f == nil {
			return nil, unix.ENOENT
		}
		defer f.DecRef()
		return entry(path+"/"+name, o, t, int32(fd), f), nil
	}
	d.List = func(context.Context) []string {
		table := t.FDTable()
		if table == nil {
			return nil
		}
		defer table.DecRef()
		var names []string
		for _, fd := range table.FDs() {
			names = append(names, strconv.Itoa(int(fd)))
		}
		return names
	}
	return d
}

// openFile returns the file at a descriptor of t with a reference, or nil.
func openFile(t vfs.ProcTask, fd int32) *vfs.FileDescription {
	table := t.FDTable()
	if table == nil {
		return nil
	}
	defer table.DecRef()
	return table.Get(fd)
}

func (b *builder) fdLink(path string, o owner, t vfs.ProcTask, fd int32, f *vfs.FileDescription) vfs.Node {
	mode := uint32(unix.S_IFLNK)
	if f.Readable() {
		mode |= 0o500
	}
	if f.Writable() {
		mode |= 0o300
	}
	return &pseudofs.Link{
		Attr: b.attr(path, mode, o),
		Target: func(context.Context) (string, error) {
			f := openFile(t, fd)
			if f == nil {
				return "", unix.ENOENT
			}
			defer f.DecRef()
			fs := t.FSContext()
			if fs == nil || f.Dentry() == nil {
				return f.Path(), nil
			}
			defer fs.DecRef()
			return fs.PathOf(f.Dentry()), nil
		},
		Follow: func(ctx context.Context) (*vfs.Dentry, error) {
			f := openFile(t, fd)
			if f == nil {
				return nil, unix.ENOENT
			}
			defer f.DecRef()
			return vfs.FileDentry(ctx, f)
		},
	}
}

func (b *builder) fdInfo(path string, o owner, t vfs.ProcTask, fd int32, _ *vfs.FileDescription) vfs.Node {
	return &pseudofs.File{
		Attr: b.attr(path, unix.S_IFREG|0o400, o),
		Content: func(ctx context.Context) ([]byte, error) {
			table := t.FDTable()
			if table == nil {
				return nil, unix.ENOENT
			}
			defer table.DecRef()
			f, cloexec := table.GetFlags(fd)
			if f == nil {
				return nil, unix.ENOENT
			}
			defer f.DecRef()
			flags := f.StatusFlags()
			if cloexec {
				flags |= unix.O_CLOEXEC
			}
			pos, err := f.Seek(ctx, 0, 1)
			if err != nil {
				pos = 0
			}
			return fmt.Appendf(nil, "pos:\t%d\nflags:\t0%o\nmnt_id:\t1\n", pos, flags), nil
		},
	}
}

// escape writes a path for mounts (fstab(5)).
var escape = strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`)

func options(m *vfs.Mount) string {
	o := "rw"
	if m.ReadOnly {
		o = "ro"
	}
	if m.Options != "" {
		o += "," + m.Options
	}
	return o
}

func (b *builder) mounts() string {
	var s strings.Builder
	for _, m := range b.ns().Mounts() {
		fmt.Fprintf(&s, "%s %s %s %s 0 0\n", escape.Replace(m.Source), escape.Replace(m.Point), m.Type, options(m))
	}
	return s.String()
}

func (b *builder) mountinfo() string {
	var s strings.Builder
	for _, m := range b.ns().Mounts() {
		parent := 0
		if m.Point != "/" {
			parent = 1
		}
		fmt.Fprintf(&s, "%d %d %d:%d / %s %s - %s %s %s\n", m.ID(), parent, unix.Major(m.Dev), unix.Minor(m.Dev),
			escape.Replace(m.Point), options(m), m.Type, escape.Replace(m.Source), options(m))
	}
	return s.String()
}

// taskStat returns /proc/PID/stat (proc_pid_stat(5)).
func (b *builder) taskStat(t vfs.ProcTask, id int32) string {
	st := t.Status()
	return fmt.Sprintf("%d (%s) %c %d %d %d 0 -1 0 0 0 0 0 %d %d %d %d 20 0 %d 0 %d %d %d "+
		"18446744073709551615 0 0 0 0 0 %d %d %d %d 0 0 0 %d 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n",
		id, st.Comm, st.State, st.PPID, st.PGID, st.SID,
		ticks(st.UserTime), ticks(st.SystemTime), ticks(st.ChildUser), ticks(st.ChildSystem),
		st.Threads, max(ticks(st.Start.Sub(b.p.BootTime())), 0), st.VMSize, st.RSS/hostarch.PageSize,
		st.Pending&(1<<31-1), st.Blocked&(1<<31-1), st.Ignored&(1<<31-1), st.Caught&(1<<31-1),
		st.ExitSignal)
}

// stateNames are the words that status shows behind the letter.
var stateNames = map[byte]string{
	'R': "running", 'S': "sleeping", 'D': "disk sleep", 'T': "stopped", 't': "tracing stop", 'Z': "zombie", 'X': "dead",
}

// status returns /proc/PID/status (proc_pid_status(5)).
func status(t vfs.ProcTask, id int32) string {
	st := t.Status()
	var s strings.Builder
	line := func(name, format string, args ...any) { fmt.Fprintf(&s, name+":\t"+format+"\n", args...) }
	line("Name", "%s", st.Comm)
	line("Umask", "%04o", st.Umask)
	line("State", "%c (%s)", st.State, stateNames[st.State])
	line("Tgid", "%d", st.TGID)
	line("Ngid", "0")
	line("Pid", "%d", id)
	line("PPid", "%d", st.PPID)
	line("TracerPid", "0")
	line("Uid", "%d\t%d\t%d\t%d", st.UID[0], st.UID[1], st.UID[2], st.UID[3])
	line("Gid", "%d\t%d\t%d\t%d", st.GID[0], st.GID[1], st.GID[2], st.GID[3])
	line("FDSize", "64")
	groups := ""
	for _, g := range st.Groups {
		groups += fmt.Sprintf("%d ", g)
	}
	line("Groups", "%s", groups)
	line("VmPeak", "%8d kB", st.VMSize>>10)
	line("VmSize", "%8d kB", st.VMSize>>10)
	line("VmHWM", "%8d kB", st.PeakRSS>>10)
	line("VmRSS", "%8d kB", st.RSS>>10)
	line("Threads", "%d", st.Threads)
	line("SigPnd", "%016x", st.Pending)
	line("ShdPnd", "%016x", st.SharedPending)
	line("SigBlk", "%016x", st.Blocked)
	line("SigIgn", "%016x", st.Ignored)
	line("SigCgt", "%016x", st.Caught)
	line("NoNewPrivs", "0")
	line("Seccomp", "0")
	return s.String()
}

// limitNames are the words of /proc/PID/limits, by RLIMIT_*.
var limitNames = [16][2]string{
	{"Max cpu time", "seconds"}, {"Max file size", "bytes"}, {"Max data size", "bytes"},
	{"Max stack size", "bytes"}, {"Max core file size", "bytes"}, {"Max resident set", "bytes"},
	{"Max processes", "processes"}, {"Max open files", "files"}, {"Max locked memory", "bytes"},
	{"Max address space", "bytes"}, {"Max file locks", "locks"}, {"Max pending signals", "signals"},
	{"Max msgqueue size", "bytes"}, {"Max nice priority", ""}, {"Max realtime priority", ""},
	{"Max realtime timeout", "us"},
}

func limits(l [16][2]uint64) string {
	value := func(v uint64) string {
		if v == unix.RLIM_INFINITY {
			return "unlimited"
		}
		return strconv.FormatUint(v, 10)
	}
	var s strings.Builder
	fmt.Fprintf(&s, "%-25s %-20s %-20s %-10s\n", "Limit", "Soft Limit", "Hard Limit", "Units")
	for i, n := range limitNames {
		fmt.Fprintf(&s, "%-25s %-20s %-20s %-10s\n", n[0], value(l[i][0]), value(l[i][1]), n[1])
	}
	return s.String()
}
