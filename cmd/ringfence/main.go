// Command ringfence runs programs in a sandbox of package sentry.
//
// Sub-commands are listed in commands; each has a file of its own. It depends on the
// Sentry and its filter, and links in every backend. What a sandbox does must never be
// in it: that is package sentry's.
package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// A command is a sub-command. run gets the arguments behind its name and returns
// the exit status.
type command struct {
	name  string
	short string
	run   func(args []string) int
}

// commands are the sub-commands in the order in which help lists them.
var commands = []command{
	{"run", "run a program in a sandbox", runMain},
	{"bench", "measure what a sandbox costs here", benchMain},
	{"doctor", "say what works on this machine, and what would help", doctorMain},
	{"seccomp", "show the filters that confine ringfence itself", seccompMain},
	{"version", "print the version", versionMain},
}

// exitError is the exit status for errors of the command itself, as of env(1)
// and chroot(1).
const exitError = 125

func main() { os.Exit(dispatch(os.Args[1:])) }

func dispatch(args []string) int {
	if len(args) == 0 {
		usage(os.Stderr)
		return exitError
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		usage(os.Stdout)
		return 0
	}
	i := slices.IndexFunc(commands, func(c command) bool { return c.name == args[0] })
	if i < 0 {
		var names []string
		for _, c := range commands {
			names = append(names, c.name)
		}
		return fail(exitError, fmt.Errorf("unknown command %q: use one of %s, or --help", args[0], strings.Join(names, ", ")))
	}
	return commands[i].run(args[1:])
}

func usage(w io.Writer) {
	fmt.Fprint(w, "Ringfence runs unmodified Linux programs in a sandbox.\n\nUsage: ringfence COMMAND [OPTIONS] [ARGS...]\n\nCommands:\n")
	for _, c := range commands {
		fmt.Fprintf(w, "  %-10s %s\n", c.name, c.short)
	}
	fmt.Fprint(w, "\nUse ringfence COMMAND --help for the options of a command.\n")
}

// fail prints an error as one line, and returns status.
func fail(status int, err error) int {
	fmt.Fprintf(os.Stderr, "ringfence: %s\n", strings.ReplaceAll(err.Error(), "\n", " "))
	return status
}
