package syscalls

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
)

func mkdir(t *kernel.Task, dirfd int32, addr hostarch.Addr, mode uint) error {
	return withPath(t, dirfd, addr, func(at *vfs.FileDescription, path string) error {
		return t.FS().MkdirAt(t, at, path, uint32(mode))
	})
}

func sysMkdirat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, mkdir(t, args[0].Int(), args[1].Pointer(), args[2].ModeT())
}

func mknod(t *kernel.Task, dirfd int32, addr hostarch.Addr, mode uint) error {
	return withPath(t, dirfd, addr, func(at *vfs.FileDescription, path string) error {
		return t.FS().MknodAt(t, at, path, uint32(mode))
	})
}

func sysMknodat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, mknod(t, args[0].Int(), args[1].Pointer(), args[2].ModeT())
}

func unlink(t *kernel.Task, dirfd int32, addr hostarch.Addr, flags int) error {
	return withPath(t, dirfd, addr, func(at *vfs.FileDescription, path string) error {
		return t.FS().UnlinkAt(t, at, path, flags)
	})
}

func sysUnlinkat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, unlink(t, args[0].Int(), args[1].Pointer(), int(args[2].Int()))
}

func symlink(t *kernel.Task, target hostarch.Addr, dirfd int32, addr hostarch.Addr) error {
	text, err := t.CopyInPath(target)
	if err != nil {
		return err
	}
	return withPath(t, dirfd, addr, func(at *vfs.FileDescription, path string) error {
		return t.FS().SymlinkAt(t, text, at, path)
	})
}

func sysSymlinkat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, symlink(t, args[0].Pointer(), args[1].Int(), args[2].Pointer())
}

// withPaths is withPath for two paths.
func withPaths(t *kernel.Task, dirfd1 int32, addr1 hostarch.Addr, dirfd2 int32, addr2 hostarch.Addr,
	f func(at1 *vfs.FileDescription, path1 string, at2 *vfs.FileDescription, path2 string) error) error {
	return withPath(t, dirfd1, addr1, func(at1 *vfs.FileDescription, path1 string) error {
		return withPath(t, dirfd2, addr2, func(at2 *vfs.FileDescription, path2 string) error {
			return f(at1, path1, at2, path2)
		})
	})
}

func link(t *kernel.Task, oldDir int32, oldAddr hostarch.Addr, newDir int32, newAddr hostarch.Addr, flags int) error {
	return withPaths(t, oldDir, oldAddr, newDir, newAddr, func(at1 *vfs.FileDescription, path1 string, at2 *vfs.FileDescription, path2 string) error {
		return t.FS().LinkAt(t, at1, path1, at2, path2, flags)
	})
}

func sysLinkat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, link(t, args[0].Int(), args[1].Pointer(), args[2].Int(), args[3].Pointer(), int(args[4].Int()))
}

func rename(t *kernel.Task, oldDir int32, oldAddr hostarch.Addr, newDir int32, newAddr hostarch.Addr, flags uint32) error {
	return withPaths(t, oldDir, oldAddr, newDir, newAddr, func(at1 *vfs.FileDescription, path1 string, at2 *vfs.FileDescription, path2 string) error {
		return t.FS().RenameAt(t, at1, path1, at2, path2, flags)
	})
}

func sysRenameat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, rename(t, args[0].Int(), args[1].Pointer(), args[2].Int(), args[3].Pointer(), 0)
}

func sysRenameat2(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, rename(t, args[0].Int(), args[1].Pointer(), args[2].Int(), args[3].Pointer(), args[4].Uint())
}

func readlink(t *kernel.Task, dirfd int32, pathAddr, addr hostarch.Addr, size int32) (uintptr, *kernel.SyscallControl, error) {
	if size <= 0 {
		return 0, nil, unix.EINVAL
	}
	n := 0
	err := withPath(t, dirfd, pathAddr, func(at *vfs.FileDescription, path string) error {
		target, err := t.FS().ReadlinkAt(t, at, path)
		if err != nil {
			return err
		}
		n = min(len(target), int(size))
		return t.CopyOut(addr, []byte(target[:n]))
	})
	return uintptr(n), nil, err
}

func sysReadlinkat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return readlink(t, args[0].Int(), args[1].Pointer(), args[2].Pointer(), args[3].Int())
}

func sysTruncate(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	path, err := t.CopyInPath(args[0].Pointer())
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, t.FS().Truncate(t, path, args[1].Int64())
}

func sysChdir(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	path, err := t.CopyInPath(args[0].Pointer())
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, t.FS().Chdir(t, path)
}

func sysFchdir(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, withFile(t, args[0].Int(), func(file *vfs.FileDescription) error {
		return t.FS().Fchdir(t, file)
	})
}

func sysChroot(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	path, err := t.CopyInPath(args[0].Pointer())
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, t.FS().Chroot(t, path)
}

func sysGetcwd(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	path, err := t.FS().Getcwd(t)
	if err != nil {
		return 0, nil, err
	}
	if args[1].SizeT() < uint(len(path)+1) {
		return 0, nil, unix.ERANGE
	}
	return uintptr(len(path) + 1), nil, t.CopyOut(args[0].Pointer(), append([]byte(path), 0))
}

func sysUmask(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return uintptr(t.FS().SetUmask(args[0].Uint())), nil, nil
}
