package main

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry"
)

const doctorUsage = `Usage: ringfence doctor

Says what this machine has that matters here, and tries every platform: whether
it works, and if not, why and what would help. The exit status is 1 if none works.
`

func doctorMain(args []string) int {
	switch {
	case len(args) == 0:
	case len(args) == 1 && (args[0] == "--help" || args[0] == "-help" || args[0] == "-h"):
		fmt.Print(doctorUsage)
		return 0
	default:
		return fail(exitError, fmt.Errorf("doctor takes no arguments: see ringfence doctor --help"))
	}
	machine(os.Stdout)
	fmt.Println()
	return diagnose(os.Stdout, sentry.Diagnose())
}

// machine writes what the host is like.
func machine(w io.Writer) {
	kernel := "unknown"
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		kernel = unix.ByteSliceToString(u.Sysname[:]) + " " + unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Machine[:])
	}
	fmt.Fprintf(w, "%-10s %s\n", "ringfence", versionName()+" "+runtime.GOARCH)
	fmt.Fprintf(w, "%-10s %s\n", "kernel", kernel)
	fmt.Fprintf(w, "%-10s %d, of which Go uses %d\n", "CPUs", runtime.NumCPU(), runtime.GOMAXPROCS(0))
	fmt.Fprintf(w, "%-10s %s\n", "seccomp", setting("/proc/sys/kernel/seccomp/actions_avail", "not there: use a kernel with CONFIG_SECCOMP_FILTER"))
	fmt.Fprintf(w, "%-10s %s\n", "ptrace", "yama.ptrace_scope "+setting("/proc/sys/kernel/yama/ptrace_scope", "not there, nothing is restricted"))
}

// setting returns what the kernel says in a file, or absent.
func setting(path, absent string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return absent
	}
	return strings.TrimSpace(string(b))
}

// diagnose writes what platforms are like, in the order in which they are tried, and
// returns the exit status.
func diagnose(w io.Writer, all []sentry.Diagnosis) int {
	auto, slow := "", ""
	for _, d := range all {
		state := "works"
		switch {
		case d.Err != nil:
			state = strings.ReplaceAll("does not work: "+d.Err.Error(), "\n", " ")
		case d.Slow:
			state = "works, slow to leave the guest"
			if slow == "" {
				slow = d.Name
			}
		case auto == "":
			auto = d.Name
		}
		if d.About != "" {
			state += ": " + d.About
		}
		fmt.Fprintf(w, "%-10s %s\n", d.Name, state)
	}
	if auto == "" {
		auto = slow
	}
	if auto == "" {
		fmt.Fprintln(w, "\nno platform works here")
		return 1
	}
	fmt.Fprintf(w, "\n--platform=auto takes %s\n", auto)
	return 0
}
