package platform

import (
	"github.com/ringfence/ringfence/pkg/seccomp"
	precompiledseccomp "github.com/ringfence/ringfence/pkg/seccomp/precompiled"
	"github.com/ringfence/ringfence/pkg/seccomp/sysno"
)

// SeccompInfo describes the host system calls that a platform makes, so that a
// Sentry can confine itself to those and its own.
type SeccompInfo interface {
	// Variables returns the values of the variables that SyscallFilters uses,
	// as this instance has them: numbers known only at run time that do not
	// change the structure of the rules, such as a file descriptor. The names
	// are the same in every configuration.
	Variables() precompiledseccomp.Values

	// ConfigKey names the configuration that the rules follow from: the
	// platform's name, and every option that changes them. Two SeccompInfos with
	// the same key have the same rules but for variables and architecture.
	ConfigKey() string

	// SyscallFilters returns the system calls that only the platform makes. The
	// rules use the values in vars, which are not those of Variables when
	// programs are compiled at build time, but placeholders.
	SyscallFilters(vars precompiledseccomp.Values) seccomp.SyscallRules

	// HottestSyscalls returns the system calls that the platform makes most
	// often, the most frequent first: a dozen at most, or none. Filters test for
	// these first.
	HottestSyscalls() []uintptr
}

// ArchSeccompInfo is a SeccompInfo that can be had for every architecture on any
// host. Programs are compiled at build time from such ones: write rules with
// package sysno, and not with numbers or constants of this architecture.
type ArchSeccompInfo interface {
	SeccompInfo

	// ForArch returns the SeccompInfo of the same configuration on a, or false
	// if the platform does not have it there.
	ForArch(a sysno.Arch) (SeccompInfo, bool)
}

// StaticSeccompInfo is the SeccompInfo of a platform without options and
// variables.
type StaticSeccompInfo struct {
	// PlatformName is the name of the platform.
	PlatformName string

	// Filters are the platform's rules.
	Filters seccomp.SyscallRules

	// HotSyscalls is what HottestSyscalls returns.
	HotSyscalls []uintptr
}

// Variables implements SeccompInfo.Variables.
func (StaticSeccompInfo) Variables() precompiledseccomp.Values { return nil }

// ConfigKey implements SeccompInfo.ConfigKey.
func (s StaticSeccompInfo) ConfigKey() string { return s.PlatformName }

// SyscallFilters implements SeccompInfo.SyscallFilters.
func (s StaticSeccompInfo) SyscallFilters(precompiledseccomp.Values) seccomp.SyscallRules {
	return s.Filters
}

// HottestSyscalls implements SeccompInfo.HottestSyscalls.
func (s StaticSeccompInfo) HottestSyscalls() []uintptr { return s.HotSyscalls }
