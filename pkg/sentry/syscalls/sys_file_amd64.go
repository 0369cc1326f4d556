package syscalls

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// sysNewfstatat is the number of newfstatat(2).
const sysNewfstatat = unix.SYS_NEWFSTATAT

// cwd is where the paths of the older calls start.
const cwd = int32(unix.AT_FDCWD)

// fileSyscallsArch are the older calls that amd64 still has.
var fileSyscallsArch = []kernel.Syscall{
	unix.SYS_OPEN:         {Name: "open", Fn: sysOpen},
	unix.SYS_CREAT:        {Name: "creat", Fn: sysCreat},
	unix.SYS_DUP2:         {Name: "dup2", Fn: sysDup2},
	unix.SYS_STAT:         {Name: "stat", Fn: sysStat},
	unix.SYS_LSTAT:        {Name: "lstat", Fn: sysLstat},
	unix.SYS_ACCESS:       {Name: "access", Fn: sysAccess},
	unix.SYS_CHMOD:        {Name: "chmod", Fn: sysChmod},
	unix.SYS_CHOWN:        {Name: "chown", Fn: sysChown},
	unix.SYS_LCHOWN:       {Name: "lchown", Fn: sysLchown},
	unix.SYS_MKDIR:        {Name: "mkdir", Fn: sysMkdir},
	unix.SYS_RMDIR:        {Name: "rmdir", Fn: sysRmdir},
	unix.SYS_MKNOD:        {Name: "mknod", Fn: sysMknod},
	unix.SYS_UNLINK:       {Name: "unlink", Fn: sysUnlink},
	unix.SYS_SYMLINK:      {Name: "symlink", Fn: sysSymlink},
	unix.SYS_LINK:         {Name: "link", Fn: sysLink},
	unix.SYS_RENAME:       {Name: "rename", Fn: sysRename},
	unix.SYS_READLINK:     {Name: "readlink", Fn: sysReadlink},
	unix.SYS_GETDENTS:     {Name: "getdents", Fn: sysGetdents},
	unix.SYS_UTIME:        {Name: "utime", Fn: sysUtime},
	unix.SYS_UTIMES:       {Name: "utimes", Fn: sysUtimes},
	unix.SYS_FUTIMESAT:    {Name: "futimesat", Fn: sysFutimesat},
	unix.SYS_INOTIFY_INIT: {Name: "inotify_init", Fn: sysENOSYS},
}

func sysOpen(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return open(t, cwd, args[0].Pointer(), args[1].Uint(), uint32(args[2].ModeT()), 0)
}

func sysCreat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return open(t, cwd, args[0].Pointer(), unix.O_CREAT|unix.O_WRONLY|unix.O_TRUNC, uint32(args[1].ModeT()), 0)
}

func sysDup2(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	from, to := args[0].Int(), args[1].Int()
	if from != to {
		return dup2(t, from, to, false)
	}
	return uintptr(to), nil, withFile(t, from, func(*vfs.FileDescription) error { return nil })
}

func sysStat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, stat(t, cwd, args[0].Pointer(), args[1].Pointer(), 0)
}

func sysLstat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, stat(t, cwd, args[0].Pointer(), args[1].Pointer(), unix.AT_SYMLINK_NOFOLLOW)
}

func sysAccess(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, access(t, cwd, args[0].Pointer(), args[1].Uint(), 0)
}

func sysChmod(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, chmod(t, cwd, args[0].Pointer(), uint32(args[1].ModeT()), 0)
}

func sysChown(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, chown(t, cwd, args[0].Pointer(), args[1].Uint(), args[2].Uint(), 0)
}

func sysLchown(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, chown(t, cwd, args[0].Pointer(), args[1].Uint(), args[2].Uint(), unix.AT_SYMLINK_NOFOLLOW)
}

func sysMkdir(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, mkdir(t, cwd, args[0].Pointer(), args[1].ModeT())
}

func sysRmdir(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, unlink(t, cwd, args[0].Pointer(), unix.AT_REMOVEDIR)
}

func sysMknod(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, mknod(t, cwd, args[0].Pointer(), args[1].ModeT())
}

func sysUnlink(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, unlink(t, cwd, args[0].Pointer(), 0)
}

func sysSymlink(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, symlink(t, args[0].Pointer(), cwd, args[1].Pointer())
}

func sysLink(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, link(t, cwd, args[0].Pointer(), cwd, args[1].Pointer(), 0)
}

func sysRename(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, rename(t, cwd, args[0].Pointer(), cwd, args[1].Pointer(), 0)
}

func sysReadlink(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return readlink(t, cwd, args[0].Pointer(), args[1].Pointer(), args[2].Int())
}

// sysGetdents is getdents(2), with the type behind the name.
func sysGetdents(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	size := int(min(args[2].Uint(), maxDirents))
	var out []byte
	full := false
	err := withFile(t, args[0].Int(), func(file *vfs.FileDescription) error {
		if file.StatusFlags()&unix.O_PATH != 0 {
			return unix.EBADF
		}
		err := file.ReadDir(t, func(e vfs.Dirent) bool {
			const header = 18
			n := (header + len(e.Name) + 2 + 7) &^ 7
			if len(out)+n > size {
				full = true
				return false
			}
			b := make([]byte, n)
			usermem.ByteOrder.PutUint64(b, e.Ino)
			usermem.ByteOrder.PutUint64(b[8:], uint64(e.NextOff))
			usermem.ByteOrder.PutUint16(b[16:], uint16(n))
			copy(b[header:], e.Name)
			b[n-1] = e.Type
			out = append(out, b...)
			return true
		})
		if err == nil && full && len(out) == 0 {
			err = unix.EINVAL
		}
		if err != nil || len(out) == 0 {
			return err
		}
		return t.CopyOut(args[1].Pointer(), out)
	})
	return uintptr(len(out)), nil, err
}

func sysUtime(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	times := nowTimes
	if addr := args[1].Pointer(); addr != 0 { // {time_t actime, modtime}
		var ts linux.Timespec
		if err := t.CopyInStruct(addr, &ts); err != nil {
			return 0, nil, err
		}
		times = [2]unix.Timespec{{Sec: ts.Sec}, {Sec: ts.Nsec}}
	}
	return 0, nil, utimens(t, cwd, args[0].Pointer(), times, 0)
}

// copyInTimevals copies in the two struct timeval of utimes(2).
func copyInTimevals(t *kernel.Task, addr hostarch.Addr) ([2]unix.Timespec, error) {
	times := nowTimes
	if addr == 0 {
		return times, nil
	}
	for i := range times {
		var tv linux.Timeval
		if err := t.CopyInStruct(addr+hostarch.Addr(i*tv.SizeBytes()), &tv); err != nil {
			return times, err
		}
		if tv.Usec < 0 || tv.Usec >= 1e6 {
			return times, unix.EINVAL
		}
		times[i] = unix.Timespec{Sec: tv.Sec, Nsec: tv.Usec * 1000}
	}
	return times, nil
}

func sysUtimes(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	times, err := copyInTimevals(t, args[1].Pointer())
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, utimens(t, cwd, args[0].Pointer(), times, 0)
}

func sysFutimesat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	times, err := copyInTimevals(t, args[2].Pointer())
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, utimens(t, args[0].Int(), args[1].Pointer(), times, 0)
}
