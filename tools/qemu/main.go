// Command qemu runs static programs in an emulated machine, and exits with the
// first status that is not 0.
//
//	go run ./tools/qemu -arch arm64 PROGRAM ARG...
//	go run ./tools/qemu -arch amd64 -kvm -cpus 1 -manifest FILE
//
// Each line of a manifest is one of
//
//	file PATH [HOST-PATH]    PATH in the machine is below /test
//	run SECONDS WORD...      a command with a time-out; words are those of a shell
//
// and relative paths of the host start at the manifest. What programs print, stdout
// and stderr, comes out on stdout, as it comes.
//
// Statuses of its own are 124 when the time is up, 125 when the machine died or could
// not be started, and 2 for a wrong use.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ringfence/ringfence/tools/qemu/machine"
)

const (
	statusTimeout = 124
	statusFailure = 125
)

func main() {
	var m machine.Machine
	flag.StringVar(&m.Arch, "arch", "amd64", "architecture: amd64 or arm64")
	flag.BoolVar(&m.KVM, "kvm", false, "a machine with /dev/kvm: SVM on amd64, EL2 on arm64")
	flag.IntVar(&m.CPUs, "cpus", 2, "number of CPUs")
	flag.StringVar(&m.CPU, "cpu", "", "qemu's model of CPU (default all that it emulates well)")
	flag.StringVar(&m.Memory, "memory", "", "size of the RAM (default 2G)")
	flag.StringVar(&m.Kernel, "kernel", "", "Debian package of the kernel (default linux-image-cloud-ARCH); linux-image-arm64-16k has pages of 16 KiB")
	timeout := flag.Duration("timeout", 10*time.Minute, "for everything")
	manifest := flag.String("manifest", "", "file with what to run")
	log := flag.Bool("log", false, "print the kernel's messages to stderr")
	fetch := flag.Bool("fetch", false, "only download what is needed")
	flag.Parse()
	if *log {
		m.Log = os.Stderr
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	if *fetch {
		if err := m.Fetch(ctx); err != nil {
			fail(err)
		}
		return
	}
	var files map[string]string
	var programs []machine.Program
	switch {
	case *manifest != "" && flag.NArg() == 0:
		b, err := os.ReadFile(*manifest)
		if err != nil {
			fail(err)
		}
		if files, programs, err = parse(string(b), filepath.Dir(*manifest)); err != nil {
			fail(fmt.Errorf("%s: %w", *manifest, err))
		}
	case *manifest == "" && flag.NArg() > 0:
		name := filepath.Base(flag.Arg(0))
		files = map[string]string{name: flag.Arg(0)}
		programs = []machine.Program{{Argv: append([]string{"/test/" + name}, flag.Args()[1:]...)}}
	default:
		fmt.Fprintln(flag.CommandLine.Output(), "qemu: give a program or a manifest")
		flag.Usage()
		os.Exit(2)
	}
	first := 0
	err := m.Run(ctx, files, programs, os.Stdout, func(i, status int) {
		if len(programs) > 1 || status != 0 {
			fmt.Fprintf(os.Stderr, "qemu: status %d: %s\n", status, strings.Join(programs[i].Argv, " "))
		}
		if first == 0 {
			first = status
		}
	})
	if err != nil {
		fail(err)
	}
	os.Exit(first)
}

// fail ends the command because of err.
func fail(err error) {
	fmt.Fprintln(os.Stderr, "qemu:", err)
	if errors.Is(err, context.DeadlineExceeded) {
		os.Exit(statusTimeout)
	}
	os.Exit(statusFailure)
}

// parse reads a manifest; its relative paths start at dir.
func parse(manifest, dir string) (files map[string]string, programs []machine.Program, err error) {
	files = map[string]string{}
	n := 0
	for line := range strings.Lines(manifest) {
		n++
		line = strings.TrimSpace(line)
		f := strings.Fields(line)
		switch {
		case line == "" || line[0] == '#':
		case f[0] == "file" && (len(f) == 2 || len(f) == 3):
			from := f[len(f)-1]
			if !filepath.IsAbs(from) {
				from = filepath.Join(dir, from)
			}
			files[f[1]] = from
		case f[0] == "run" && len(f) >= 3:
			seconds, err := strconv.Atoi(f[1])
			if err != nil || seconds <= 0 {
				return nil, nil, fmt.Errorf("line %d: %q are no seconds", n, f[1])
			}
			_, command, _ := strings.Cut(line[len("run"):], f[1])
			programs = append(programs, machine.Program{
				Argv:    []string{"/bin/sh", "-c", strings.TrimSpace(command)},
				Timeout: time.Duration(seconds) * time.Second,
			})
		default:
			return nil, nil, fmt.Errorf("line %d: %q is neither a file nor a command to run", n, line)
		}
	}
	return files, programs, nil
}
