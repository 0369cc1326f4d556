package syscalls

import (
	"crypto/rand"
	"encoding/binary"
	"math/bits"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
)

// miscSyscalls are about the system, limits and scheduling, and those that a
// sandbox refuses.
var miscSyscalls = []kernel.Syscall{
	unix.SYS_UNAME:     {Name: "uname", Fn: sysUname},
	unix.SYS_SYSINFO:   {Name: "sysinfo", Fn: sysSysinfo},
	unix.SYS_GETRUSAGE: {Name: "getrusage", Fn: sysGetrusage},
	unix.SYS_GETRLIMIT: {Name: "getrlimit", Fn: sysGetrlimit},
	unix.SYS_SETRLIMIT: {Name: "setrlimit", Fn: sysSetrlimit},
	unix.SYS_PRLIMIT64: {Name: "prlimit64", Fn: sysPrlimit64},
	unix.SYS_GETRANDOM: {Name: "getrandom", Fn: sysGetrandom},
	unix.SYS_GETCPU:    {Name: "getcpu", Fn: sysGetcpu},

	unix.SYS_SCHED_YIELD:            {Name: "sched_yield", Fn: sysSchedYield},
	unix.SYS_SCHED_GETAFFINITY:      {Name: "sched_getaffinity", Fn: sysSchedGetaffinity},
	unix.SYS_SCHED_SETAFFINITY:      {Name: "sched_setaffinity", Fn: sysSchedSetaffinity},
	unix.SYS_SCHED_GETSCHEDULER:     {Name: "sched_getscheduler", Fn: sysSchedGetscheduler},
	unix.SYS_SCHED_SETSCHEDULER:     {Name: "sched_setscheduler", Fn: sysSchedSetscheduler},
	unix.SYS_SCHED_GETPARAM:         {Name: "sched_getparam", Fn: sysSchedGetparam},
	unix.SYS_SCHED_SETPARAM:         {Name: "sched_setparam", Fn: sysSchedSetparam},
	unix.SYS_SCHED_GET_PRIORITY_MAX: {Name: "sched_get_priority_max", Fn: sysSchedPriorityMax},
	unix.SYS_SCHED_GET_PRIORITY_MIN: {Name: "sched_get_priority_min", Fn: sysSchedPriorityMin},
	unix.SYS_SCHED_RR_GET_INTERVAL:  {Name: "sched_rr_get_interval", Fn: sysSchedRRGetInterval},
	unix.SYS_SCHED_GETATTR:          {Name: "sched_getattr", Fn: sysSchedGetattr},
	unix.SYS_GETPRIORITY:            {Name: "getpriority", Fn: sysGetpriority},
	unix.SYS_SETPRIORITY:            {Name: "setpriority", Fn: sysSetpriority},
	unix.SYS_IOPRIO_GET:             {Name: "ioprio_get", Fn: sysIoprioGet},
	unix.SYS_IOPRIO_SET:             {Name: "ioprio_set", Fn: sysIoprioSet},
	unix.SYS_MEMBARRIER:             {Name: "membarrier", Fn: sysMembarrier},

	// Known and not offered: programs go on without.
	unix.SYS_RSEQ:                    {Name: "rseq", Fn: sysENOSYS},
	unix.SYS_SECCOMP:                 {Name: "seccomp", Fn: sysENOSYS},
	unix.SYS_IO_URING_SETUP:          {Name: "io_uring_setup", Fn: sysENOSYS},
	unix.SYS_IO_SETUP:                {Name: "io_setup", Fn: sysENOSYS},
	unix.SYS_USERFAULTFD:             {Name: "userfaultfd", Fn: sysENOSYS},
	unix.SYS_LANDLOCK_CREATE_RULESET: {Name: "landlock_create_ruleset", Fn: sysENOSYS},
	unix.SYS_GET_MEMPOLICY:           {Name: "get_mempolicy", Fn: sysENOSYS},
	unix.SYS_SET_MEMPOLICY:           {Name: "set_mempolicy", Fn: sysENOSYS},
	unix.SYS_MBIND:                   {Name: "mbind", Fn: sysENOSYS},
	unix.SYS_MIGRATE_PAGES:           {Name: "migrate_pages", Fn: sysENOSYS},
	unix.SYS_MOVE_PAGES:              {Name: "move_pages", Fn: sysENOSYS},
	unix.SYS_PIDFD_GETFD:             {Name: "pidfd_getfd", Fn: sysEPERM},

	// Refused to every task, as a host without the privilege does.
	unix.SYS_PTRACE:            {Name: "ptrace", Fn: sysEPERM},
	unix.SYS_PROCESS_VM_READV:  {Name: "process_vm_readv", Fn: sysEPERM},
	unix.SYS_PROCESS_VM_WRITEV: {Name: "process_vm_writev", Fn: sysEPERM},
	unix.SYS_KCMP:              {Name: "kcmp", Fn: sysEPERM},
	unix.SYS_SYSLOG:            {Name: "syslog", Fn: sysEPERM},
	unix.SYS_MOUNT:             {Name: "mount", Fn: sysEPERM},
	unix.SYS_UMOUNT2:           {Name: "umount2", Fn: sysEPERM},
	unix.SYS_PIVOT_ROOT:        {Name: "pivot_root", Fn: sysEPERM},
	unix.SYS_OPEN_TREE:         {Name: "open_tree", Fn: sysEPERM},
	unix.SYS_MOVE_MOUNT:        {Name: "move_mount", Fn: sysEPERM},
	unix.SYS_FSOPEN:            {Name: "fsopen", Fn: sysEPERM},
	unix.SYS_FSPICK:            {Name: "fspick", Fn: sysEPERM},
	unix.SYS_MOUNT_SETATTR:     {Name: "mount_setattr", Fn: sysEPERM},
	unix.SYS_SETNS:             {Name: "setns", Fn: sysEPERM},
	unix.SYS_SETHOSTNAME:       {Name: "sethostname", Fn: sysEPERM},
	unix.SYS_SETDOMAINNAME:     {Name: "setdomainname", Fn: sysEPERM},
	unix.SYS_REBOOT:            {Name: "reboot", Fn: sysEPERM},
	unix.SYS_KEXEC_LOAD:        {Name: "kexec_load", Fn: sysEPERM},
	unix.SYS_SWAPON:            {Name: "swapon", Fn: sysEPERM},
	unix.SYS_SWAPOFF:           {Name: "swapoff", Fn: sysEPERM},
	unix.SYS_ACCT:              {Name: "acct", Fn: sysEPERM},
	unix.SYS_INIT_MODULE:       {Name: "init_module", Fn: sysEPERM},
	unix.SYS_FINIT_MODULE:      {Name: "finit_module", Fn: sysEPERM},
	unix.SYS_DELETE_MODULE:     {Name: "delete_module", Fn: sysEPERM},
	unix.SYS_BPF:               {Name: "bpf", Fn: sysEPERM},
	unix.SYS_PERF_EVENT_OPEN:   {Name: "perf_event_open", Fn: sysEPERM},
	unix.SYS_QUOTACTL:          {Name: "quotactl", Fn: sysEPERM},
	unix.SYS_KEYCTL:            {Name: "keyctl", Fn: sysEPERM},
	unix.SYS_ADD_KEY:           {Name: "add_key", Fn: sysEPERM},
	unix.SYS_REQUEST_KEY:       {Name: "request_key", Fn: sysEPERM},
	unix.SYS_VHANGUP:           {Name: "vhangup", Fn: sysEPERM},
}

func sysEPERM(*kernel.Task, arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, unix.EPERM
}

func sysENOSYS(*kernel.Task, arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, unix.ENOSYS
}

func sysUname(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	k := t.Kernel()
	var u linux.Utsname
	copy(u.Sysname[:], "Linux")
	copy(u.Nodename[:64], k.Hostname())
	copy(u.Release[:64], k.Release())
	copy(u.Version[:64], k.Version())
	copy(u.Machine[:64], linux.MachineName)
	copy(u.Domainname[:], "(none)")
	return 0, nil, t.CopyOutStruct(args[0].Pointer(), &u)
}

func sysSysinfo(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	k := t.Kernel()
	used, total := k.MemoryUsage()
	return 0, nil, t.CopyOutStruct(args[0].Pointer(), &linux.Sysinfo{
		Uptime:   int64(time.Since(k.BootTime())/time.Second) + 1,
		TotalRAM: total,
		FreeRAM:  total - min(used, total),
		Procs:    uint16(k.TaskCount()),
		Unit:     1,
	})
}

func sysGetrusage(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	u, err := t.Usage(args[0].Int())
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, t.CopyOutStruct(args[1].Pointer(), &u)
}

func sysGetrlimit(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	resource := args[0].Uint()
	if resource >= linux.RLIM_NLIMITS {
		return 0, nil, unix.EINVAL
	}
	l, err := t.SetLimit(t.ThreadGroup(), int(resource), nil)
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, t.CopyOutStruct(args[1].Pointer(), &l)
}

func sysSetrlimit(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	resource := args[0].Uint()
	if resource >= linux.RLIM_NLIMITS {
		return 0, nil, unix.EINVAL
	}
	var l linux.Rlimit
	if err := t.CopyInStruct(args[1].Pointer(), &l); err != nil {
		return 0, nil, err
	}
	_, err := t.SetLimit(t.ThreadGroup(), int(resource), &l)
	return 0, nil, err
}

func sysPrlimit64(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	pid, resource := args[0].Int(), args[1].Uint()
	if resource >= linux.RLIM_NLIMITS {
		return 0, nil, unix.EINVAL
	}
	var limit *linux.Rlimit
	if addr := args[2].Pointer(); addr != 0 {
		limit = &linux.Rlimit{}
		if err := t.CopyInStruct(addr, limit); err != nil {
			return 0, nil, err
		}
	}
	tg := t.ThreadGroup()
	if pid != 0 {
		other := t.Kernel().TaskByTID(pid)
		if other == nil {
			return 0, nil, unix.ESRCH
		}
		c, o := t.Creds(), other.Creds()
		same := c.RUID == o.EUID && c.RUID == o.SUID && c.RUID == o.RUID && c.RGID == o.EGID && c.RGID == o.SGID && c.RGID == o.RGID
		if other.ThreadGroup() != tg && !same && !c.Has(linux.CAP_SYS_RESOURCE) {
			return 0, nil, unix.EPERM
		}
		tg = other.ThreadGroup()
	}
	old, err := t.SetLimit(tg, int(resource), limit)
	if err != nil {
		return 0, nil, err
	}
	if addr := args[3].Pointer(); addr != 0 {
		return 0, nil, t.CopyOutStruct(addr, &old)
	}
	return 0, nil, nil
}

// maxRandom bounds what getrandom(2) gives at once, in bytes: programs must be
// ready for less than they asked for.
const maxRandom = 1 << 20

func sysGetrandom(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	const insecure = 4 // GRND_INSECURE
	if args[2].Uint()&^(unix.GRND_NONBLOCK|unix.GRND_RANDOM|insecure) != 0 {
		return 0, nil, unix.EINVAL
	}
	buf := make([]byte, min(args[1].SizeT(), maxRandom))
	rand.Read(buf) // never fails
	return uintptr(len(buf)), nil, t.CopyOut(args[0].Pointer(), buf)
}

func sysGetcpu(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	// Any of the CPUs that the task may run on is as good an answer as another.
	for _, a := range args[:2] {
		if a.Value != 0 {
			if err := copyOutInt(t, a.Pointer(), 0); err != nil {
				return 0, nil, err
			}
		}
	}
	return 0, nil, nil
}

func sysSchedYield(t *kernel.Task, _ arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0) // the host's, which always succeeds
	return 0, nil, nil
}

// otherTask returns the task with a number, 0 for t itself.
func otherTask(t *kernel.Task, tid int32) (*kernel.Task, error) {
	if tid < 0 {
		return nil, unix.EINVAL
	}
	if tid == 0 {
		return t, nil
	}
	if other := t.Kernel().TaskByTID(tid); other != nil {
		return other, nil
	}
	return nil, unix.ESRCH
}

func sysSchedGetaffinity(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	other, err := otherTask(t, args[0].Int())
	if err != nil {
		return 0, nil, err
	}
	set := other.Affinity()
	var buf []byte
	for _, w := range set {
		buf = binary.LittleEndian.AppendUint64(buf, uint64(w))
	}
	cpus := t.Kernel().CPUs()
	size := int(args[1].Uint())
	if size%8 != 0 || size*8 < highestCPU(&cpus) {
		return 0, nil, unix.EINVAL
	}
	buf = buf[:min(len(buf), size, (highestCPU(&cpus)+63)/64*8)]
	return uintptr(len(buf)), nil, t.CopyOut(args[2].Pointer(), buf)
}

// highestCPU returns the number behind the last CPU of set.
func highestCPU(set *unix.CPUSet) int {
	for i := len(set) - 1; i >= 0; i-- {
		if set[i] != 0 {
			return i*64 + bits.Len64(uint64(set[i]))
		}
	}
	return 0
}

func sysSchedSetaffinity(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	other, err := otherTask(t, args[0].Int())
	if err != nil {
		return 0, nil, err
	}
	cpus := t.Kernel().CPUs()
	buf := make([]byte, len(cpus)*8)
	if err := t.CopyIn(args[2].Pointer(), buf[:min(int(args[1].Uint()), len(buf))]); err != nil {
		return 0, nil, err
	}
	for cpu := range len(buf) * 8 {
		if buf[cpu/8]&(1<<(cpu%8)) == 0 {
			cpus.Clear(cpu)
		}
	}
	if cpus.Count() == 0 {
		return 0, nil, unix.EINVAL
	}
	other.SetAffinity(cpus)
	return 0, nil, nil
}

func sysSchedGetscheduler(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	other, err := otherTask(t, args[0].Int())
	if err != nil {
		return 0, nil, err
	}
	return uintptr(other.Scheduler()), nil, nil
}

// sysSchedSetscheduler allows the policies that need no privilege.
func sysSchedSetscheduler(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	other, err := otherTask(t, args[0].Int())
	if err != nil {
		return 0, nil, err
	}
	var p linux.SchedParam
	if args[2].Value == 0 {
		return 0, nil, unix.EINVAL
	}
	if err := t.CopyInStruct(args[2].Pointer(), &p); err != nil {
		return 0, nil, err
	}
	switch policy := args[1].Int() &^ linux.SCHED_RESET_ON_FORK; policy {
	case linux.SCHED_NORMAL, linux.SCHED_BATCH, linux.SCHED_IDLE:
		if p.Priority != 0 {
			return 0, nil, unix.EINVAL
		}
		other.SetScheduler(policy)
		return 0, nil, nil
	case linux.SCHED_FIFO, linux.SCHED_RR:
		if p.Priority < 1 || p.Priority > 99 {
			return 0, nil, unix.EINVAL
		}
		return 0, nil, unix.EPERM
	}
	return 0, nil, unix.EINVAL
}

func sysSchedGetparam(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	if _, err := otherTask(t, args[0].Int()); err != nil {
		return 0, nil, err
	}
	return 0, nil, t.CopyOutStruct(args[1].Pointer(), &linux.SchedParam{})
}

func sysSchedSetparam(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	if _, err := otherTask(t, args[0].Int()); err != nil {
		return 0, nil, err
	}
	var p linux.SchedParam
	if err := t.CopyInStruct(args[1].Pointer(), &p); err != nil {
		return 0, nil, err
	}
	if p.Priority != 0 {
		return 0, nil, unix.EINVAL
	}
	return 0, nil, nil
}

func sysSchedGetattr(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	const sizeV0 = 48 // SCHED_ATTR_SIZE_VER0
	size := args[2].Uint()
	if args[3].Uint() != 0 || size < sizeV0 || size > 4096 {
		return 0, nil, unix.EINVAL
	}
	other, err := otherTask(t, args[0].Int())
	if err != nil {
		return 0, nil, err
	}
	a := linux.SchedAttr{Policy: uint32(other.Scheduler()), Nice: other.Nice()}
	a.Size = min(size, uint32(a.SizeBytes()))
	buf := make([]byte, a.SizeBytes())
	a.MarshalBytes(buf)
	return 0, nil, t.CopyOut(args[1].Pointer(), buf[:a.Size])
}

// priorityRange returns the priorities of a policy.
func priorityRange(policy int32) (lo, hi uintptr, err error) {
	switch policy {
	case linux.SCHED_FIFO, linux.SCHED_RR:
		return 1, 99, nil
	case linux.SCHED_NORMAL, linux.SCHED_BATCH, linux.SCHED_IDLE, linux.SCHED_DEADLINE:
		return 0, 0, nil
	}
	return 0, 0, unix.EINVAL
}

func sysSchedPriorityMax(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	_, hi, err := priorityRange(args[0].Int())
	return hi, nil, err
}

func sysSchedPriorityMin(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	lo, _, err := priorityRange(args[0].Int())
	return lo, nil, err
}

func sysSchedRRGetInterval(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	if _, err := otherTask(t, args[0].Int()); err != nil {
		return 0, nil, err
	}
	return 0, nil, copyOutDuration(t, args[1].Pointer(), 4*time.Millisecond)
}

// priorityTasks returns the tasks that getpriority(2) means.
func priorityTasks(t *kernel.Task, which, who int32) ([]*kernel.Task, error) {
	var tasks []*kernel.Task
	switch which {
	case linux.PRIO_PROCESS:
		if other, err := otherTask(t, who); err == nil {
			tasks = append(tasks, other)
		}
	case linux.PRIO_PGRP:
		tasks = t.Kernel().TasksOfGroup(t, who)
	case linux.PRIO_USER:
		uid := uint32(who)
		if who == 0 {
			uid = t.Creds().RUID
		}
		tasks = t.Kernel().TasksOfUser(uid)
	default:
		return nil, unix.EINVAL
	}
	if len(tasks) == 0 {
		return nil, unix.ESRCH
	}
	return tasks, nil
}

func sysGetpriority(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	tasks, err := priorityTasks(t, args[0].Int(), args[1].Int())
	if err != nil {
		return 0, nil, err
	}
	nice := int32(19)
	for _, other := range tasks {
		nice = min(nice, other.Nice())
	}
	return uintptr(20 - nice), nil, nil // 1 to 40, so as not to look like an error
}

func sysSetpriority(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	tasks, err := priorityTasks(t, args[0].Int(), args[1].Int())
	if err != nil {
		return 0, nil, err
	}
	nice := min(max(args[2].Int(), -20), 19)
	c := t.Creds()
	for _, other := range tasks {
		if o := other.Creds(); o.RUID != c.EUID && o.EUID != c.EUID && !c.Has(linux.CAP_SYS_NICE) {
			return 0, nil, unix.EPERM
		}
		if nice < other.Nice() && !c.Has(linux.CAP_SYS_NICE) {
			if limit, _ := other.Limit(linux.RLIMIT_NICE); uint64(20-nice) > limit {
				return 0, nil, unix.EACCES
			}
		}
		other.SetNice(nice)
	}
	return 0, nil, nil
}

func sysIoprioGet(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, nil // IOPRIO_CLASS_NONE
}

func sysIoprioSet(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	const classShift, realtime, last = 13, 1, 3
	switch class := args[2].Uint() >> classShift; {
	case class > last:
		return 0, nil, unix.EINVAL
	case class == realtime && !t.Creds().Has(linux.CAP_SYS_ADMIN):
		return 0, nil, unix.EPERM
	}
	return 0, nil, nil
}

// sysMembarrier offers what the platform can do.
func sysMembarrier(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	const (
		query              = 0
		global             = 1 << 0
		globalExpedited    = 1 << 1
		registerGlobal     = 1 << 2
		privateExpedited   = 1 << 3
		registerPrivate    = 1 << 4
		supported          = global | globalExpedited | registerGlobal | privateExpedited | registerPrivate
		supportedOnlyQuery = 0
	)
	if args[1].Uint() != 0 {
		return 0, nil, unix.EINVAL
	}
	p := t.Kernel().Platform()
	if !p.HaveGlobalMemoryBarrier() {
		if args[0].Int() == query {
			return supportedOnlyQuery, nil, nil
		}
		return 0, nil, unix.EINVAL
	}
	switch args[0].Int() {
	case query:
		return supported, nil, nil
	case registerGlobal, registerPrivate:
		return 0, nil, nil
	case global, globalExpedited, privateExpedited:
		return 0, nil, p.GlobalMemoryBarrier()
	}
	return 0, nil, unix.EINVAL
}
