// Package machine boots emulated machines and runs static programs in them, as
// root and one after the other: hosts of an architecture, a page size or a kind
// of virtualisation that this machine does not have.
//
// qemu, the kernels and a busybox are Debian packages that are unpacked into the
// user's cache folder; nothing is installed. It depends on the standard library
// and on the commands apt-get and dpkg-deb, and must not know what it runs.
package machine

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

//go:embed init.sh
var initScript []byte

// Machine says what to emulate.
type Machine struct {
	// Arch is "amd64" or "arm64".
	Arch string
	// KVM gives the machine a /dev/kvm: SVM on amd64, EL2 on arm64.
	KVM bool
	// Kernel is the name of a Debian package that depends on the kernel's; ""
	// means linux-image-cloud-Arch. linux-image-arm64-16k has pages of 16 KiB.
	Kernel string
	// CPU is qemu's model; "" means all that qemu emulates well.
	CPU string
	// CPUs is their number; 0 means 2.
	CPUs int
	// Memory is the size of the RAM as qemu takes it; "" means 2G.
	Memory string
	// Log gets the kernel's messages, if it is not nil.
	Log io.Writer
}

// Program is a program to run.
type Program struct {
	// Argv is the command line. Files are found by their guest paths.
	Argv []string
	// Env holds variables, NAME=VALUE, beside PATH and HOME.
	Env []string
	// Dir is the folder in the guest in which it runs; "" means /test.
	Dir string
	// Timeout bounds its run; it then gets SIGQUIT, and SIGKILL after another 20 s. 0
	// means that only Run's context bounds it.
	Timeout time.Duration
}

// ErrDied says that a machine ended before its programs did.
var ErrDied = errors.New("the emulated machine died")

// Run boots the machine with files, which maps paths below /test in the machine to
// files or folders of the host, and runs programs until ctx is done. out gets what
// each prints (stdout and stderr), as it comes; done gets its exit status, as a
// shell has it, before the next one starts.
//
// An error says that not all programs ran to their ends: it wraps ctx's if that was
// why, or ErrDied.
func (m Machine) Run(ctx context.Context, files map[string]string, programs []Program, out io.Writer, done func(i, status int)) error {
	cache, err := m.fetch(ctx)
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "ringfence-qemu-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	mark := "\n" + rand.Text() + " "
	initrd := filepath.Join(tmp, "initrd")
	if err := m.writeInitrd(initrd, cache, files, plan(programs, mark)); err != nil {
		return fmt.Errorf("initramfs: %w", err)
	}
	return m.boot(ctx, cache, initrd, &splitter{mark: []byte(mark), out: out, done: done, n: len(programs)})
}

// plan returns the part of the init script that runs programs.
func plan(programs []Program, mark string) []byte {
	var b bytes.Buffer
	for _, p := range programs {
		dir := p.Dir
		if dir == "" {
			dir = "/test"
		}
		fmt.Fprintf(&b, "(cd %s && exec setsid env", quote(dir))
		for _, e := range p.Env {
			b.WriteString(" " + quote(e))
		}
		if p.Timeout > 0 {
			fmt.Fprintf(&b, " timeout -s QUIT -k 20 %d", max(1, int(p.Timeout.Seconds())))
		}
		for _, a := range p.Argv {
			b.WriteString(" " + quote(a))
		}
		fmt.Fprintf(&b, ")\nprintf %%s%%d\\\\n %s $?\n(kill -9 -1)\n", quote(mark))
	}
	return b.Bytes()
}

// quote makes a word of s for a shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// splitter takes the statuses out of what comes from the machine.
type splitter struct {
	mark []byte
	out  io.Writer
	done func(i, status int)
	n    int // programs
	seen int
	held []byte
}

// Write implements io.Writer.
func (s *splitter) Write(b []byte) (int, error) {
	s.held = append(s.held, b...)
	for {
		i := bytes.Index(s.held, s.mark)
		if i < 0 {
			break
		}
		number, rest, ok := bytes.Cut(s.held[i+len(s.mark):], []byte("\n"))
		if !ok {
			return len(b), nil // The rest of the line is yet to come.
		}
		status, err := strconv.Atoi(string(number))
		if err != nil {
			return 0, fmt.Errorf("status %q", number)
		}
		if _, err := s.out.Write(s.held[:i]); err != nil {
			return 0, err
		}
		s.held = bytes.Clone(rest)
		s.done(s.seen, status)
		s.seen++
	}
	// The end may be the beginning of a mark.
	i := len(s.held)
	for k := min(len(s.held), len(s.mark)-1); k > 0; k-- {
		if bytes.HasPrefix(s.mark, s.held[len(s.held)-k:]) {
			i -= k
			break
		}
	}
	_, err := s.out.Write(s.held[:i])
	s.held = bytes.Clone(s.held[i:])
	return len(b), err
}

// tail keeps the end of what is written.
type tail []byte

// Write implements io.Writer.
func (t *tail) Write(b []byte) (int, error) {
	const size = 4 << 10
	*t = append(*t, b...)
	if len(*t) > size {
		*t = bytes.Clone((*t)[len(*t)-size:])
	}
	return len(b), nil
}

// boot runs qemu.
func (m Machine) boot(ctx context.Context, c *cached, initrd string, s *splitter) error {
	var log, errs tail
	kernelLog := io.Writer(&log)
	if m.Log != nil {
		kernelLog = io.MultiWriter(&log, m.Log)
	}
	argv := m.command(c, initrd)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	cmd.Stderr = &errs
	copied := make(chan error, 2)
	for _, w := range []io.Writer{s, kernelLog} {
		r, pw, err := os.Pipe()
		if err != nil {
			return err
		}
		defer r.Close()
		defer pw.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, pw)
		go func() {
			_, err := io.Copy(w, r)
			copied <- err
		}()
	}
	started, ended := make(chan error, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread() // Pdeathsig acts when the thread ends.
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			ended <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("qemu: %w", err)
	}
	for _, pw := range cmd.ExtraFiles {
		pw.Close()
	}
	qemuErr := <-ended
	for range cmd.ExtraFiles {
		if err := <-copied; err != nil {
			return err
		}
	}
	if s.seen == s.n {
		return nil
	}
	s.out.Write(s.held)
	what := fmt.Sprintf("in program %d of %d", s.seen+1, s.n)
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("stopped %s: %w; the kernel's last messages:\n%s", what, err, log)
	}
	return fmt.Errorf("%w %s (qemu: %v) %s; the kernel's last messages:\n%s", ErrDied, what, qemuErr, errs, log)
}

// command returns qemu's command line. Descriptor 3 is for what programs print, 4
// for the kernel's messages.
func (m Machine) command(c *cached, initrd string) []string {
	threads := "multi"
	boot := "quiet panic=-1 oops=panic"
	var program string
	var args []string
	if m.Arch == "arm64" {
		program = "qemu-system-aarch64"
		el2 := "off"
		if m.KVM {
			el2 = "on"
		}
		// Page table isolation makes a system call five times slower on this CPU, under
		// emulation.
		args = []string{"-machine", "virt,gic-version=3,virtualization=" + el2,
			"-cpu", cmp.Or(m.CPU, "neoverse-v1"), "-append", boot + " console=ttyAMA0 kpti=off"}
	} else {
		program = "qemu-system-x86_64"
		cpu := cmp.Or(m.CPU, "max,la57=off")
		if m.KVM {
			// With a thread for each CPU qemu's SVM loses an interrupt now and then.
			threads = "single"
		} else {
			cpu += ",svm=off"
		}
		// Under load qemu loses writes to the memory-mapped APIC. The IOMMU is there for
		// the sake of an x2APIC.
		args = []string{"-machine", "q35", "-device", "intel-iommu,intremap=on,eim=on",
			"-cpu", cpu, "-append", boot + " no_timer_check console=ttyS0"}
	}
	argv := append(c.command(program), args...)
	return append(argv,
		"-accel", "tcg,thread="+threads, "-smp", strconv.Itoa(cmp.Or(m.CPUs, 2)), "-m", cmp.Or(m.Memory, "2G"),
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none",
		"-serial", "file:/dev/fd/4", "-kernel", c.kernel("vmlinuz"), "-initrd", initrd,
		"-device", "virtio-serial-pci", "-chardev", "file,id=out,path=/dev/fd/3",
		"-device", "virtserialport,chardev=out,nr=1")
}

// writeInitrd writes the machine's files.
func (m Machine) writeInitrd(path string, c *cached, files map[string]string, plan []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	a := newArchive(f)
	a.dir("bin")
	a.file("bin/busybox", c.kernel("busybox"))
	a.file("bin/bash", c.kernel("bash-static"))
	a.bytes("init", 0o755, initScript)
	a.bytes("plan", 0o644, plan)
	if m.KVM {
		a.dir("kvm")
		modules, err := filepath.Glob(c.kernel("*.ko.xz"))
		if err != nil {
			return err
		}
		for _, module := range modules {
			a.file("kvm/"+filepath.Base(module), module)
		}
	}
	a.dir("test")
	for to, from := range files {
		if !fs.ValidPath(to) {
			return fmt.Errorf("%q is no path below /test", to)
		}
		if err := a.tree("test/"+to, from, m.Arch); err != nil {
			return err
		}
	}
	return a.close()
}
