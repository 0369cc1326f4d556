package seccomp

import (
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/bpf"
)

// InstallError is a refusal of the kernel to install a filter.
type InstallError struct {
	// Op is the system call that failed.
	Op string
	// Errno is what it failed with.
	Errno unix.Errno
	// Fix says what to do about it; it may be empty.
	Fix string
}

// Error implements error.
func (e *InstallError) Error() string {
	s := fmt.Sprintf("install seccomp filter: %s: %s", e.Op, errnoOf(e.Errno))
	if e.Fix != "" {
		s += ": " + e.Fix
	}
	return s
}

// Unwrap returns the errno.
func (e *InstallError) Unwrap() error { return e.Errno }

// ThreadError is the refusal to install a filter on all threads because one of
// them has filters of its own, or is in strict mode.
type ThreadError struct {
	// TID is the thread that cannot take the filter.
	TID int
	// Name is its name (comm), or "" if it has ended since.
	Name string
}

// Error implements error.
func (e *ThreadError) Error() string {
	name := e.Name
	if name == "" {
		name = "ended since"
	}
	return fmt.Sprintf("install seccomp filter on all threads: thread %d (%s) has filters that the calling thread does not have: confine the process before single threads", e.TID, name)
}

// Install confines every thread of the process with p, which is validated
// first, now and for good. Filters that are there stay; the most restrictive
// answer counts. It sets no_new_privs: on every thread on success, on the
// calling one in any case.
//
// Errors are *bpf.InvalidError, *InstallError and *ThreadError. After an error
// no thread has the filter.
func Install(p bpf.Program) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	r, err := install(p, unix.SECCOMP_FILTER_FLAG_TSYNC)
	if err != nil {
		return err
	}
	if r > 0 {
		// seccomp(2), SECCOMP_FILTER_FLAG_TSYNC: the thread that refused.
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/comm", r))
		return &ThreadError{TID: r, Name: strings.TrimSpace(string(comm))}
	}
	return nil
}

// InstallOnThread is like Install for the calling thread only and those that
// it creates. The caller has locked the goroutine to its thread and never
// unlocks it.
func InstallOnThread(p bpf.Program) error {
	_, err := install(p, 0)
	return err
}

// InstallListener is like InstallOnThread and returns the file descriptor on
// which calls with the action UserNotif are received (close-on-exec), see
// seccomp_unotify(2).
func InstallListener(p bpf.Program) (fd int, err error) {
	return install(p, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER)
}

// listenerTSync are the flags of InstallWithListener: TSYNC alone would return
// the thread that refused in place of the listener.
const listenerTSync = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH

// InstallWithListener is like Install and returns the file descriptor that
// InstallListener returns. When a thread refuses the error is an *InstallError
// with ESRCH. It needs FeatureTSyncListener.
func InstallWithListener(p bpf.Program) (fd int, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return install(p, listenerTSync)
}

// install returns what seccomp(2) does for a filter with flags.
func install(p bpf.Program, flags uintptr) (int, error) {
	if err := p.Validate(); err != nil {
		return 0, fmt.Errorf("install seccomp filter: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		errno, _ := err.(unix.Errno)
		return 0, &InstallError{Op: "prctl(PR_SET_NO_NEW_PRIVS)", Errno: errno, Fix: "Linux 3.5 or newer is needed"}
	}
	r, errno := setFilter(p, flags)
	if errno == 0 {
		return r, nil
	}
	e := &InstallError{Op: "seccomp(SECCOMP_SET_MODE_FILTER)", Errno: errno}
	switch errno {
	case unix.ENOSYS:
		e.Fix = "use a kernel that is built with CONFIG_SECCOMP_FILTER, and a container profile that permits seccomp(2)"
	case unix.EINVAL:
		e.Fix = "the kernel does not know what the filter asks for: use Linux 5.0 or newer"
	case unix.EPERM:
		e.Fix = "a filter that is already there forbids seccomp(2): change the container's seccomp profile"
	case unix.ENOMEM:
		e.Fix = "all filters together are too long, or memory is short: install fewer filters"
	case unix.ESRCH:
		e.Fix = "a thread has filters that the calling thread does not have: confine the process before single threads"
	case unix.EBUSY:
		e.Fix = "there is a filter with a listener already, and there can be one only"
	}
	return 0, e
}

// Feature is something that kernels may or may not be able to do.
type Feature int

// The features.
const (
	// FeatureFilter is seccomp(2) with filters at all.
	FeatureFilter Feature = iota
	// FeatureTSync is one filter for all threads at once (Linux 3.17).
	FeatureTSync
	// FeatureKillProcess is the action KillProcess (Linux 4.14).
	FeatureKillProcess
	// FeatureLog is the action Log (Linux 4.14).
	FeatureLog
	// FeatureUserNotif is the action UserNotif, with listeners (Linux 5.0).
	FeatureUserNotif
	// FeatureWaitKillable is SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	// (Linux 5.19).
	FeatureWaitKillable
	// FeatureTSyncListener is a listener together with one filter for all
	// threads at once (Linux 5.7).
	FeatureTSyncListener

	numFeatures = iota
)

// features says how to ask for each Feature: the filter flags and the action
// that it needs.
var features = [numFeatures]struct {
	name   string
	flags  uintptr
	action Action
}{
	FeatureFilter:      {"filter", 0, Allow},
	FeatureTSync:       {"tsync", unix.SECCOMP_FILTER_FLAG_TSYNC, Allow},
	FeatureKillProcess: {"kill-process", 0, KillProcess},
	FeatureLog:         {"log", 0, Log},
	FeatureUserNotif:   {"user-notif", unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, UserNotif},
	FeatureWaitKillable: {"wait-killable",
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, UserNotif},
	FeatureTSyncListener: {"tsync-listener", listenerTSync, UserNotif},
}

// Features returns all features.
func Features() []Feature {
	all := make([]Feature, numFeatures)
	for i := range all {
		all[i] = Feature(i)
	}
	return all
}

// String returns the name of f: "user-notif".
func (f Feature) String() string {
	if f < 0 || f >= numFeatures {
		return fmt.Sprintf("Feature(%d)", int(f))
	}
	return features[f].name
}

// IsSupported reports whether the kernel has f, without changing anything.
func IsSupported(f Feature) bool { return Probe(f) == nil }

// Probe is IsSupported with the reason: nil if the kernel has f, else the
// *InstallError that tells how it was found out.
func Probe(f Feature) error {
	if f < 0 || f >= numFeatures {
		return fmt.Errorf("seccomp has no %v", f)
	}
	// Without a program a filter is refused with EFAULT, but flags that are
	// not known are with EINVAL, and before.
	if _, errno := setFilter(nil, features[f].flags); errno != unix.EFAULT {
		return &InstallError{Op: fmt.Sprintf("probe %v: seccomp(SECCOMP_SET_MODE_FILTER, %#x, NULL)", f, features[f].flags), Errno: errno}
	}
	if errno := actionAvailable(features[f].action); errno != 0 {
		return &InstallError{Op: fmt.Sprintf("probe %v: seccomp(SECCOMP_GET_ACTION_AVAIL, %v)", f, features[f].action), Errno: errno}
	}
	return nil
}
