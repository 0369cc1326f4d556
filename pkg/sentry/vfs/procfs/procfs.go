// Package procfs is the /proc of a sandbox: its own processes, and as much of
// the rest as programs read.
//
// It depends on vfs and pseudofs; what it shows of tasks comes from a
// vfs.ProcProvider. Of the host it shows /proc/cpuinfo alone, which tells no
// more than CPUID does.
package procfs

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/sentry/vfs/pseudofs"
)

// builder makes the nodes of one /proc.
type builder struct {
	fs *pseudofs.FS
	p  vfs.ProcProvider
	ns func() *vfs.Namespace
}

// New returns the root of a file system with the number dev. ns returns the
// Namespace that it is going to be part of, for mountinfo.
func New(dev uint64, p vfs.ProcProvider, ns func() *vfs.Namespace) vfs.Directory {
	b := &builder{
		fs: &pseudofs.FS{Dev: dev, Magic: unix.PROC_SUPER_MAGIC, Start: time.Now()},
		p:  p,
		ns: ns,
	}
	static := b.tree("", b.root())
	root := &pseudofs.Dir{Attr: b.attr("", unix.S_IFDIR|0o555, owner{})}
	root.Lookup = func(ctx context.Context, name string) (vfs.Node, error) {
		if pid, ok := number(name); ok {
			return b.process(pid)
		}
		return static.Lookup(ctx, name)
	}
	root.List = func(ctx context.Context) []string {
		names := static.List(ctx)
		for _, pid := range p.Processes() {
			names = append(names, strconv.Itoa(int(pid)))
		}
		return names
	}
	return root
}

// number returns the ID that a name in /proc stands for.
func number(name string) (int32, bool) {
	n, err := strconv.ParseInt(name, 10, 32)
	return int32(n), err == nil && n > 0 && strconv.FormatInt(n, 10) == name
}

// owner is whom a file belongs to.
type owner struct{ uid, gid uint32 }

func (b *builder) attr(path string, mode uint32, o owner) pseudofs.Attr {
	return pseudofs.Attr{FS: b.fs, Ino: pseudofs.Ino("/proc/" + path), FileMode: mode, UID: o.uid, GID: o.gid}
}

// content makes what a file says.
type content func(ctx context.Context) string

// node is an entry of a directory that does not change: one of these is set.
type node struct {
	name   string
	text   content
	link   content
	nodes  []node
	follow func(ctx context.Context) (*vfs.Dentry, error) // with link
	dir    func(path string) vfs.Node
	mode   uint32 // of a file, if not 0444
	write  func(ctx context.Context, p []byte) error
}

func fixed(text string) content { return func(context.Context) string { return text } }

// tree returns the directory at path with the given entries.
func (b *builder) tree(path string, nodes []node) *pseudofs.Dir {
	return b.treeOf(path, nodes, owner{})
}

func (b *builder) treeOf(path string, nodes []node, o owner) *pseudofs.Dir {
	d := &pseudofs.Dir{Attr: b.attr(path, unix.S_IFDIR|0o555, o)}
	d.Lookup = func(_ context.Context, name string) (vfs.Node, error) {
		for i := range nodes {
			if nodes[i].name == name {
				return b.make(path+"/"+name, &nodes[i], o), nil
			}
		}
		return nil, unix.ENOENT
	}
	d.List = func(context.Context) []string {
		names := make([]string, len(nodes))
		for i := range nodes {
			names[i] = nodes[i].name
		}
		return names
	}
	return d
}

func (b *builder) make(path string, n *node, o owner) vfs.Node {
	switch {
	case n.dir != nil:
		return n.dir(path)
	case n.nodes != nil:
		return b.treeOf(path, n.nodes, o)
	case n.link != nil:
		return &pseudofs.Link{
			Attr: b.attr(path, unix.S_IFLNK|0o777, o),
			Target: func(ctx context.Context) (string, error) {
				target := n.link(ctx)
				if target == "" {
					return "", unix.ENOENT
				}
				return target, nil
			},
			Follow: n.follow,
		}
	}
	mode := uint32(0o444)
	if n.mode != 0 {
		mode = n.mode
	}
	return &pseudofs.File{
		Attr:    b.attr(path, unix.S_IFREG|mode, o),
		Content: func(ctx context.Context) ([]byte, error) { return []byte(n.text(ctx)), nil },
		Write:   n.write,
	}
}

// root returns the entries of /proc beside the processes.
func (b *builder) root() []node {
	bootID := sync.OnceValue(newUUID)
	cpuinfo := sync.OnceValue(func() string {
		data, err := os.ReadFile("/proc/cpuinfo")
		if err != nil {
			return "" // better an empty file than none: programs count lines
		}
		return string(data)
	})
	readOnly := func(name, value string) node { return node{name: name, text: fixed(value + "\n")} }
	return []node{
		{name: "cmdline", text: fixed("ringfence\n")},
		{name: "cpuinfo", text: func(context.Context) string { return cpuinfo() }},
		{name: "filesystems", text: fixed("nodev\tproc\nnodev\ttmpfs\nnodev\tdevtmpfs\nnodev\thostfs\n")},
		{name: "loadavg", text: func(context.Context) string {
			pids := b.p.Processes()
			running, last := 0, int32(0)
			for _, pid := range pids {
				last = max(last, pid)
				if t := b.p.Task(pid); t != nil && t.Status().State == 'R' {
					running++
				}
			}
			return fmt.Sprintf("0.00 0.00 0.00 %d/%d %d\n", running, len(pids), last)
		}},
		{name: "meminfo", text: b.meminfo},
		{name: "mounts", link: fixed("self/mounts")},
		{name: "self", link: func(ctx context.Context) string {
			if tgid, _ := b.p.Self(ctx); tgid != 0 {
				return strconv.Itoa(int(tgid))
			}
			return ""
		}},
		{name: "stat", text: b.stat},
		{name: "sys", nodes: []node{
			{name: "fs", nodes: []node{
				readOnly("file-max", "1048576"),
				readOnly("nr_open", "1048576"),
				readOnly("pipe-max-size", "1048576"),
			}},
			{name: "kernel", nodes: []node{
				readOnly("cap_last_cap", "40"),
				{name: "hostname", text: func(context.Context) string { return b.p.Hostname() + "\n" }},
				readOnly("ngroups_max", "65536"),
				{name: "osrelease", text: func(context.Context) string { return b.p.Release() + "\n" }},
				readOnly("ostype", "Linux"),
				readOnly("overflowgid", "65534"),
				readOnly("overflowuid", "65534"),
				readOnly("pid_max", "4194304"),
				{name: "random", nodes: []node{
					{name: "boot_id", text: func(context.Context) string { return bootID() + "\n" }},
					readOnly("entropy_avail", "256"),
					readOnly("poolsize", "256"),
					{name: "uuid", text: func(context.Context) string { return newUUID() + "\n" }},
				}},
				readOnly("randomize_va_space", "2"),
				readOnly("sem", "32000\t1024000000\t500\t32000"),
				readOnly("shmall", "18446744073692774399"),
				readOnly("shmmax", "18446744073692774399"),
				readOnly("shmmni", "4096"),
				readOnly("threads-max", "63456"),
				{name: "version", text: func(context.Context) string { return b.p.Version() + "\n" }},
			}},
			{name: "net", nodes: []node{
				{name: "core", nodes: []node{readOnly("somaxconn", "4096")}},
			}},
			{name: "vm", nodes: []node{
				readOnly("max_map_count", "65530"),
				readOnly("mmap_min_addr", "65536"),
				readOnly("overcommit_memory", "0"),
				readOnly("swappiness", "60"),
			}},
		}},
		{name: "thread-self", link: func(ctx context.Context) string {
			if tgid, tid := b.p.Self(ctx); tgid != 0 {
				return fmt.Sprintf("%d/task/%d", tgid, tid)
			}
			return ""
		}},
		{name: "uptime", text: func(context.Context) string {
			up := time.Since(b.p.BootTime()).Seconds()
			return fmt.Sprintf("%.2f %.2f\n", up, 0.0)
		}},
		{name: "version", text: func(context.Context) string {
			return fmt.Sprintf("Linux version %s (ringfence) %s\n", b.p.Release(), b.p.Version())
		}},
	}
}

// newUUID returns a random UUID.
func newUUID() string {
	var u [16]byte
	rand.Read(u[:]) // never fails
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

func (b *builder) meminfo(context.Context) string {
	used, total := b.p.MemoryUsage()
	free := total - min(used, total)
	var s strings.Builder
	for _, l := range []struct {
		name  string
		bytes uint64
	}{
		{"MemTotal", total}, {"MemFree", free}, {"MemAvailable", free},
		{"Buffers", 0}, {"Cached", 0}, {"SwapCached", 0}, {"Active", used}, {"Inactive", 0},
		{"SwapTotal", 0}, {"SwapFree", 0}, {"Dirty", 0}, {"Writeback", 0},
		{"AnonPages", used}, {"Mapped", 0}, {"Shmem", 0},
	} {
		fmt.Fprintf(&s, "%-15s %8d kB\n", l.name+":", l.bytes>>10)
	}
	return s.String()
}

func (b *builder) stat(context.Context) string {
	var user, system time.Duration
	pids := b.p.Processes()
	running := 0
	for _, pid := range pids {
		if t := b.p.Task(pid); t != nil {
			st := t.Status()
			user += st.UserTime + st.ChildUser
			system += st.SystemTime + st.ChildSystem
			if st.State == 'R' {
				running++
			}
		}
	}
	var s strings.Builder
	fmt.Fprintf(&s, "cpu  %d 0 %d 0 0 0 0 0 0 0\n", ticks(user), ticks(system))
	n := runtime.NumCPU()
	for i := range n {
		fmt.Fprintf(&s, "cpu%d %d 0 %d 0 0 0 0 0 0 0\n", i, ticks(user)/int64(n), ticks(system)/int64(n))
	}
	fmt.Fprintf(&s, "intr 0\nctxt 0\nbtime %d\nprocesses %d\nprocs_running %d\nprocs_blocked 0\n",
		b.p.BootTime().Unix(), len(pids), running)
	return s.String()
}

// ticks returns d in units of 1/100 s (sysconf(_SC_CLK_TCK)).
func ticks(d time.Duration) int64 { return int64(d / (10 * time.Millisecond)) }
