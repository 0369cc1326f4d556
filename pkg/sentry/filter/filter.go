// Package filter confines the Sentry to the system calls that it and its platform
// need: with a seccomp filter whose program is usually compiled at build time
// (package programs), and a Monitor that names the call which breaks the rules.
//
// It depends on pkg/platform, for the platform's rules, on pkg/seccomp, and on
// pkg/freestanding, for the monitor. It must not import a backend, nor the rest of the
// Sentry.
package filter

import (
	"fmt"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/bpf"
	"github.com/ringfence/ringfence/pkg/platform"
	"github.com/ringfence/ringfence/pkg/seccomp"
	"github.com/ringfence/ringfence/pkg/seccomp/precompiled"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// Access is what the Sentry may change of the host's files.
type Access int

// Each Access includes those before it.
const (
	// ReadOnly is what programs get whose standard files are terminals, pipes
	// and the like: what they may write to there, and nothing else.
	ReadOnly Access = iota
	// Redirected is for standard files that are regular files: they may be opened
	// again, for writing as well.
	Redirected
	// Write is everything beneath the root.
	Write
)

// String returns the name that a has in keys.
func (a Access) String() string { return [...]string{"read-only", "redirected", "write"}[a] }

// Key returns the key of the program for a platform's configuration.
func Key(info platform.SeccompInfo, access Access) string {
	return info.ConfigKey() + "," + access.String()
}

// Source returns the program for a platform's configuration; a is the
// architecture of info.
func Source(info platform.SeccompInfo, access Access, a sysno.Arch) precompiled.Source {
	names := slices.Collect(maps.Keys(info.Variables()))
	return precompiled.Source{
		Key:       Key(info, access),
		Variables: append(slices.Clone(names), varPID, varMonitorPID),
		Rules: func(v precompiled.Values) []seccomp.RuleSet {
			allowed := sentryRules(a, access, v)
			theirs := make(precompiled.Values)
			for _, name := range names {
				theirs[name] = v[name]
			}
			allowed.Merge(info.SyscallFilters(theirs))
			return []seccomp.RuleSet{
				{Rules: allowed, Action: seccomp.Allow},
				{Rules: refusedRules(a), Action: seccomp.Errno(unix.EPERM)},
			}
		},
		Options: seccomp.ProgramOptions{
			Arch:            a,
			DefaultAction:   seccomp.UserNotif,
			BadArchAction:   seccomp.UserNotif,
			HottestSyscalls: hottest(info, a),
		},
	}
}

// hottest returns the platform's hottest calls, and then the Sentry's.
func hottest(info platform.SeccompInfo, a sysno.Arch) []uintptr {
	hot := slices.Clone(info.HottestSyscalls())
	for _, c := range []sysno.Call{sysno.Futex, sysno.EpollPwait, sysno.Openat2, sysno.Newfstatat, sysno.Mmap, sysno.Tgkill, sysno.Madvise} {
		if !slices.Contains(hot, c.On(a)) {
			hot = append(hot, c.On(a))
		}
	}
	return hot
}

// Sources returns the programs for every configuration of the platforms, on a:
// what is compiled at build time.
func Sources(platforms []platform.SeccompInfo, a sysno.Arch) ([]precompiled.Source, error) {
	var sources []precompiled.Source
	for _, p := range platforms {
		forArch, ok := p.(platform.ArchSeccompInfo)
		if !ok {
			return nil, fmt.Errorf("seccomp programs for %s: it can have rules for this architecture only: implement platform.ArchSeccompInfo", p.ConfigKey())
		}
		info, ok := forArch.ForArch(a)
		if !ok {
			continue
		}
		for access := ReadOnly; access <= Write; access++ {
			sources = append(sources, Source(info, access, a))
		}
	}
	return sources, nil
}

// Platforms returns every configuration of every platform that is linked in.
func Platforms() []platform.SeccompInfo {
	var infos []platform.SeccompInfo
	for _, name := range platform.List() {
		if c, err := platform.Lookup(name); err == nil { // always: it is in the list
			infos = append(infos, c.PrecompiledSeccompInfo()...)
		}
	}
	return infos
}

// Config says how to confine this process.
type Config struct {
	// Platform is the Sentry's platform as it is now.
	Platform platform.SeccompInfo
	Access   Access
	// Programs are those that were compiled at build time.
	Programs precompiled.Set
	// Monitor names the call that breaks the rules; it may be nil.
	Monitor *Monitor
	// Logf is told what is not as it should be, and nevertheless works.
	Logf func(format string, args ...any)
}

// Install confines this process, all of its threads, for good. From now on a
// system call that is not in the rules ends it, and is not executed.
//
// Without a Monitor, or where the kernel cannot have one, it ends as if by
// SIGSYS, and nothing says what the call was.
func Install(c Config) error {
	program, err := c.program()
	if err != nil {
		return fmt.Errorf("the Sentry's seccomp filter: %w", err)
	}
	if c.Monitor != nil {
		err := c.Monitor.install(program)
		if err == nil {
			return nil
		}
		if !canDoWithout(err) {
			return fmt.Errorf("the Sentry's seccomp filter: %w", err)
		}
		c.Logf("a forbidden system call will end the Sentry without being named: %v", err)
	}
	if err := seccomp.Install(killing(program)); err != nil {
		return fmt.Errorf("the Sentry's seccomp filter: %w", err)
	}
	return nil
}

// program returns the program for c.
func (c *Config) program() (bpf.Program, error) {
	values := c.values()
	key := Key(c.Platform, c.Access)
	if p, ok := c.Programs.Get(key); ok {
		return p.Render(values)
	}
	c.Logf("there is no precompiled seccomp program for %q: compiling it", key)
	source := Source(c.Platform, c.Access, sysno.Native)
	return source.Build(values)
}

// values returns the values of all variables.
func (c *Config) values() precompiled.Values {
	values := make(precompiled.Values)
	maps.Copy(values, c.Platform.Variables())
	pid := uint32(os.Getpid())
	values[varPID], values[varMonitorPID] = pid, pid
	if c.Monitor != nil {
		values[varMonitorPID] = uint32(c.Monitor.pid)
	}
	return values
}

// killing returns p with what would ask the Monitor ending the process instead.
func killing(p bpf.Program) bpf.Program {
	p = slices.Clone(p)
	for i := range p {
		if p[i].Code == bpf.Ret|bpf.K && seccomp.Action(p[i].K) == seccomp.UserNotif {
			p[i].K = uint32(seccomp.KillProcess)
		}
	}
	return p
}
