package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// suite is the Debian release that everything is taken from: in the kernels of the
// one before, the virtio console is a module.
const suite = "trixie"

const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// cached is what Fetch unpacked.
type cached struct {
	qemu, kernelDir string
	triple, loader  string
}

// kernel returns the path of a file beside the kernel, vmlinuz.
func (c *cached) kernel(name string) string { return filepath.Join(c.kernelDir, name) }

// command returns the beginning of the command line for a program of qemu, which
// runs with the libraries that it came with.
func (c *cached) command(program string) []string {
	usr := filepath.Join(c.qemu, "usr")
	lib := filepath.Join(usr, "lib", c.triple)
	return []string{filepath.Join(lib, c.loader), "--library-path", lib, filepath.Join(usr, "bin", program),
		"-L", filepath.Join(usr, "share/qemu"), "-L", filepath.Join(usr, "share/seabios")}
}

// Fetch downloads what the machine needs into the cache folder, unless it is there.
// It is safe to run at the same time as another.
func (m Machine) Fetch(ctx context.Context) error {
	_, err := m.fetch(ctx)
	return err
}

func (m Machine) fetch(ctx context.Context) (*cached, error) {
	if m.Arch != "amd64" && m.Arch != "arm64" {
		return nil, fmt.Errorf("no machine of architecture %q can be emulated: amd64 and arm64 only", m.Arch)
	}
	base, err := os.UserCacheDir()
	if err != nil {
		return nil, fmt.Errorf("no cache folder: %w", err)
	}
	dir := filepath.Join(base, "ringfence", "qemu-"+suite)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("%w: set XDG_CACHE_HOME to a folder that can be written", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := flock(lock); err != nil {
		return nil, err
	}
	kernel := m.Kernel
	if kernel == "" {
		kernel = "linux-image-cloud-" + m.Arch
	}
	c := &cached{qemu: filepath.Join(dir, "qemu"), kernelDir: filepath.Join(dir, kernel)}
	switch runtime.GOARCH {
	case "amd64":
		c.triple, c.loader = "x86_64-linux-gnu", "ld-linux-x86-64.so.2"
	case "arm64":
		c.triple, c.loader = "aarch64-linux-gnu", "ld-linux-aarch64.so.1"
	default:
		return nil, fmt.Errorf("no qemu for a host of architecture %s: amd64 and arm64 only", runtime.GOARCH)
	}
	if err := provide(c.qemu, func(tmp string) error { return fetchQEMU(ctx, tmp) }); err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	if err := provide(c.kernelDir, func(tmp string) error { return fetchKernel(ctx, tmp, m.Arch, kernel) }); err != nil {
		return nil, fmt.Errorf("kernel %s: %w", kernel, err)
	}
	return c, nil
}

// flock waits for the lock, and says so.
func flock(f *os.File) error {
	err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == syscall.EWOULDBLOCK {
		say("waiting for another download into %s", filepath.Dir(f.Name()))
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
	}
	return err
}

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, "qemu: "+format+"\n", args...) }

// provide makes dir by make, whole or not at all, unless it is there.
func provide(dir string, make func(tmp string) error) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	tmp := dir + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	say("downloading %s, once", filepath.Base(dir))
	if err := make(tmp); err != nil {
		return err
	}
	return os.Rename(tmp, dir)
}

// fetchQEMU unpacks qemu with all that it depends on.
func fetchQEMU(ctx context.Context, tmp string) error {
	a, err := newApt(ctx, filepath.Join(tmp, "apt"), runtime.GOARCH)
	if err != nil {
		return err
	}
	packages, err := a.resolve(ctx, "qemu-system-arm", "qemu-system-x86")
	if err != nil {
		return err
	}
	if err := a.unpack(ctx, tmp, packages...); err != nil {
		return err
	}
	for _, dir := range []string{"apt", "etc", "var", "usr/share/doc", "usr/share/man", "usr/share/locale"} {
		if err := os.RemoveAll(filepath.Join(tmp, dir)); err != nil {
			return err
		}
	}
	return nil
}

// fetchKernel unpacks a kernel, a busybox, a bash and, where they are modules, what
// makes up KVM.
func fetchKernel(ctx context.Context, tmp, arch, name string) error {
	a, err := newApt(ctx, filepath.Join(tmp, "apt"), arch)
	if err != nil {
		return err
	}
	packages, err := a.resolve(ctx, name)
	if err != nil {
		return err
	}
	wanted := []string{"bash-static", "busybox-static"}
	for _, p := range packages {
		if version, ok := strings.CutPrefix(p, "linux-image-"); ok && version[0] >= '0' && version[0] <= '9' {
			wanted = append(wanted, p)
		}
	}
	root := filepath.Join(tmp, "apt", "root")
	if err := a.unpack(ctx, root, wanted...); err != nil {
		return err
	}
	for _, pattern := range []string{"bin/bash-static", "bin/busybox", "boot/vmlinuz-*", "kvm.ko.xz", "kvm-amd.ko.xz", "irqbypass.ko.xz"} {
		path, err := find(root, pattern)
		if err != nil {
			return err
		}
		if path == "" {
			if strings.HasSuffix(pattern, ".xz") {
				continue // built in
			}
			return fmt.Errorf("packages %q hold no %s", wanted, pattern)
		}
		base := filepath.Base(path)
		if strings.HasPrefix(base, "vmlinuz") {
			base = "vmlinuz"
		}
		if err := os.Rename(path, filepath.Join(tmp, base)); err != nil {
			return err
		}
	}
	return os.RemoveAll(filepath.Join(tmp, "apt"))
}

// find returns the first path below root whose end matches a pattern, or "".
func find(root, pattern string) (string, error) {
	found := ""
	depth := strings.Count(pattern, "/") + 1
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		parts := strings.Split(path, "/")
		if ok, _ := filepath.Match(pattern, strings.Join(parts[max(0, len(parts)-depth):], "/")); ok && d.Type().IsRegular() {
			found = path
			return fs.SkipAll
		}
		return nil
	})
	return found, err
}

// apt is a package manager with a state of its own, in which nothing is installed,
// on the Debian archive that the machine's own configuration names.
type apt struct{ dir string }

func newApt(ctx context.Context, dir, arch string) (*apt, error) {
	for _, tool := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("%w: this needs a Debian-like machine, or a cache folder that one has filled", err)
		}
	}
	if _, err := os.Stat(keyring); err != nil {
		return nil, fmt.Errorf("%w: apt-get install debian-archive-keyring", err)
	}
	mirror := os.Getenv("QEMU_MIRROR")
	if mirror == "" {
		targets, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages").Output()
		if err != nil {
			return nil, fmt.Errorf("apt-get indextargets: %w", err)
		}
		for uri := range strings.Lines(string(targets)) {
			if uri = strings.TrimRight(uri, "/\n"); strings.HasSuffix(uri, "/debian") {
				mirror = uri
				break
			}
		}
	}
	if mirror == "" {
		return nil, errors.New("the machine's apt configuration names no Debian archive: set QEMU_MIRROR to the address of one")
	}
	a := &apt{dir: dir}
	for _, d := range []string{"lists/partial", "cache/archives/partial", "empty", "debs"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	for name, content := range map[string]string{
		"status":       "",
		"sources.list": fmt.Sprintf("deb [signed-by=%s] %s %s main\n", keyring, mirror, suite),
		"apt.conf": fmt.Sprintf(`
Dir::Etc::sourcelist "%[1]s/sources.list";
Dir::Etc::sourceparts "%[1]s/empty";
Dir::Etc::preferences "%[1]s/none";
Dir::Etc::preferencesparts "%[1]s/empty";
Dir::State "%[1]s";
Dir::State::Lists "%[1]s/lists";
Dir::State::status "%[1]s/status";
Dir::Cache "%[1]s/cache";
APT::Architecture "%[2]s";
APT::Architectures { "%[2]s"; };
APT::Sandbox::User "root";
APT::Install-Recommends "false";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "3";
`, dir, arch),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return nil, err
		}
	}
	if _, err := a.run(ctx, dir, "apt-get", "-qq", "update"); err != nil {
		return nil, fmt.Errorf("the package lists of %s %s: %w", mirror, suite, err)
	}
	return a, nil
}

// run runs a command with a's configuration and returns what it prints.
func (a *apt) run(ctx context.Context, dir string, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "APT_CONFIG="+filepath.Join(a.dir, "apt.conf"), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(argv[:min(3, len(argv))], " "), err, bytes.TrimSpace(errs.Bytes()))
	}
	return string(out), nil
}

// resolve returns the names of packages and all that they depend on.
func (a *apt) resolve(ctx context.Context, packages ...string) ([]string, error) {
	out, err := a.run(ctx, a.dir, append([]string{"apt-get", "-qq", "-y", "--print-uris", "install"}, packages...)...)
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(out) {
		// 'URI' NAME_VERSION_ARCH.deb SIZE HASH
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[0], "'") {
			name, _, _ := strings.Cut(f[1], "_")
			names = append(names, name)
		}
	}
	return names, nil
}

// unpack downloads packages and unpacks them into root.
func (a *apt) unpack(ctx context.Context, root string, packages ...string) error {
	debs := filepath.Join(a.dir, "debs")
	if _, err := a.run(ctx, debs, append([]string{"apt-get", "-qq", "download"}, packages...)...); err != nil {
		return err
	}
	paths, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return err
	}
	for _, path := range paths {
		if _, err := a.run(ctx, a.dir, "dpkg-deb", "-x", path, root); err != nil {
			return err
		}
	}
	return nil
}
