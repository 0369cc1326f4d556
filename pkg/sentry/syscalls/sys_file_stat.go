package syscalls

import (
	"bytes"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
)

// copyOutStat copies st out as a struct stat.
func copyOutStat(t *kernel.Task, addr hostarch.Addr, st *unix.Stat_t) error {
	s := linux.Stat{
		Dev: st.Dev, Ino: st.Ino, Nlink: st.Nlink, Mode: st.Mode, UID: st.Uid, GID: st.Gid, Rdev: st.Rdev,
		Size: st.Size, Blksize: st.Blksize, Blocks: st.Blocks,
		Atime: linux.Timespec(st.Atim), Mtime: linux.Timespec(st.Mtim), Ctime: linux.Timespec(st.Ctim),
	}
	return t.CopyOutStruct(addr, &s)
}

// copyInEmptyPath copies in a path that may be missing with AT_EMPTY_PATH.
func copyInEmptyPath(t *kernel.Task, addr hostarch.Addr, flags int) (string, error) {
	if addr == 0 && flags&unix.AT_EMPTY_PATH != 0 {
		return "", nil
	}
	return t.CopyInPath(addr)
}

func stat(t *kernel.Task, dirfd int32, pathAddr, addr hostarch.Addr, flags int) error {
	if flags&^(unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT|unix.AT_EMPTY_PATH) != 0 {
		return unix.EINVAL
	}
	path, err := copyInEmptyPath(t, pathAddr, flags)
	if err != nil {
		return err
	}
	return withDir(t, dirfd, path, func(at *vfs.FileDescription) error {
		st, err := t.FS().StatAt(t, at, path, flags)
		if err != nil {
			return err
		}
		return copyOutStat(t, addr, &st)
	})
}

func sysFstatat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, stat(t, args[0].Int(), args[1].Pointer(), args[2].Pointer(), int(args[3].Int()))
}

func sysFstat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, withFile(t, args[0].Int(), func(file *vfs.FileDescription) error {
		st, err := file.Stat(t)
		if err != nil {
			return err
		}
		return copyOutStat(t, args[1].Pointer(), &st)
	})
}

func sysStatx(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	flags, mask := int(args[2].Int()), args[3].Uint()
	const valid = unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT | unix.AT_EMPTY_PATH | linux.AT_STATX_SYNC_TYPE
	if flags&^valid != 0 || flags&linux.AT_STATX_SYNC_TYPE == linux.AT_STATX_SYNC_TYPE || mask&linux.STATX__RESERVED != 0 {
		return 0, nil, unix.EINVAL
	}
	flags &^= linux.AT_STATX_SYNC_TYPE
	path, err := copyInEmptyPath(t, args[1].Pointer(), flags)
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, withDir(t, args[0].Int(), path, func(at *vfs.FileDescription) error {
		st, err := t.FS().StatAt(t, at, path, flags)
		if err != nil {
			return err
		}
		stamp := func(ts unix.Timespec) linux.StatxTimestamp {
			return linux.StatxTimestamp{Sec: ts.Sec, Nsec: uint32(ts.Nsec)}
		}
		x := linux.Statx{
			Mask:    linux.STATX_BASIC_STATS,
			Blksize: uint32(st.Blksize), Nlink: uint32(st.Nlink), UID: st.Uid, GID: st.Gid, Mode: uint16(st.Mode),
			Ino: st.Ino, Size: uint64(st.Size), Blocks: uint64(st.Blocks),
			Atime: stamp(st.Atim), Ctime: stamp(st.Ctim), Mtime: stamp(st.Mtim),
			RdevMajor: unix.Major(st.Rdev), RdevMinor: unix.Minor(st.Rdev),
			DevMajor: unix.Major(st.Dev), DevMinor: unix.Minor(st.Dev),
		}
		if mask&linux.STATX_MNT_ID != 0 {
			if id, root := t.FS().MountOf(t, at, path, flags); id != 0 {
				x.Mask |= linux.STATX_MNT_ID
				x.MntID = uint64(id)
				x.AttributesMask |= linux.STATX_ATTR_MOUNT_ROOT
				if root {
					x.Attributes |= linux.STATX_ATTR_MOUNT_ROOT
				}
			}
		}
		return t.CopyOutStruct(args[4].Pointer(), &x)
	})
}

func copyOutStatfs(t *kernel.Task, addr hostarch.Addr, st *unix.Statfs_t) error {
	s := linux.Statfs{
		Type: st.Type, Bsize: st.Bsize, Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail,
		Files: st.Files, Ffree: st.Ffree, Fsid: st.Fsid.Val, Namelen: st.Namelen, Frsize: st.Frsize,
		Flags: st.Flags | linux.ST_VALID,
	}
	return t.CopyOutStruct(addr, &s)
}

func sysStatfs(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, withPath(t, unix.AT_FDCWD, args[0].Pointer(), func(_ *vfs.FileDescription, path string) error {
		st, err := t.FS().Statfs(t, path)
		if err != nil {
			return err
		}
		return copyOutStatfs(t, args[1].Pointer(), &st)
	})
}

func sysFstatfs(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, withFile(t, args[0].Int(), func(file *vfs.FileDescription) error {
		st, err := file.Statfs(t)
		if err != nil {
			return err
		}
		return copyOutStatfs(t, args[1].Pointer(), &st)
	})
}

func access(t *kernel.Task, dirfd int32, addr hostarch.Addr, mode uint32, flags int) error {
	creds := vfs.CredsFromContext(t)
	if flags&unix.AT_EACCESS == 0 {
		c := t.Creds()
		creds = &vfs.Creds{UID: c.RUID, GID: c.RGID, Groups: c.Groups}
		if c.RUID == 0 {
			creds.Override = c.Permitted&(1<<linux.CAP_DAC_OVERRIDE) != 0
		}
	}
	path, err := copyInEmptyPath(t, addr, flags)
	if err != nil {
		return err
	}
	return withDir(t, dirfd, path, func(at *vfs.FileDescription) error {
		return t.FS().AccessAt(t, creds, at, path, mode, flags)
	})
}

func sysFaccessat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, access(t, args[0].Int(), args[1].Pointer(), args[2].Uint(), 0)
}

func sysFaccessat2(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, access(t, args[0].Int(), args[1].Pointer(), args[2].Uint(), int(args[3].Int()))
}

func chmod(t *kernel.Task, dirfd int32, addr hostarch.Addr, mode uint32, flags int) error {
	if flags&^(unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH) != 0 {
		return unix.EINVAL
	}
	return withPath(t, dirfd, addr, func(at *vfs.FileDescription, path string) error {
		return t.FS().ChmodAt(t, at, path, mode, flags)
	})
}

func sysFchmod(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, withFile(t, args[0].Int(), func(file *vfs.FileDescription) error {
		return file.Chmod(t, uint32(args[1].ModeT()))
	})
}

func sysFchmodat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, chmod(t, args[0].Int(), args[1].Pointer(), uint32(args[2].ModeT()), 0)
}

func sysFchmodat2(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, chmod(t, args[0].Int(), args[1].Pointer(), uint32(args[2].ModeT()), int(args[3].Int()))
}

func chown(t *kernel.Task, dirfd int32, addr hostarch.Addr, uid, gid uint32, flags int) error {
	if flags&^(unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH) != 0 {
		return unix.EINVAL
	}
	return withPath(t, dirfd, addr, func(at *vfs.FileDescription, path string) error {
		return t.FS().ChownAt(t, at, path, uid, gid, flags)
	})
}

func sysFchown(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, withFile(t, args[0].Int(), func(file *vfs.FileDescription) error {
		return file.Chown(t, args[1].Uint(), args[2].Uint())
	})
}

func sysFchownat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, chown(t, args[0].Int(), args[1].Pointer(), args[2].Uint(), args[3].Uint(), int(args[4].Int()))
}

// utimens sets times; without a path those of dirfd itself.
func utimens(t *kernel.Task, dirfd int32, addr hostarch.Addr, times [2]unix.Timespec, flags int) error {
	if addr == 0 && dirfd != unix.AT_FDCWD {
		if flags != 0 {
			return unix.EINVAL
		}
		return withFile(t, dirfd, func(file *vfs.FileDescription) error { return file.Utimens(t, times) })
	}
	return withPath(t, dirfd, addr, func(at *vfs.FileDescription, path string) error {
		return t.FS().UtimensAt(t, at, path, times, flags)
	})
}

// nowTimes makes utimens set both times to now.
var nowTimes = [2]unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_NOW}}

func sysUtimensat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	flags := int(args[3].Int())
	times := nowTimes
	if addr := args[2].Pointer(); addr != 0 {
		for i := range times {
			var ts linux.Timespec
			if err := t.CopyInStruct(addr+hostarch.Addr(i*timespecSize), &ts); err != nil {
				return 0, nil, err
			}
			if (ts.Nsec < 0 || ts.Nsec >= 1e9) && ts.Nsec != unix.UTIME_NOW && ts.Nsec != unix.UTIME_OMIT {
				return 0, nil, unix.EINVAL
			}
			times[i] = unix.Timespec(ts)
		}
		if times[0].Nsec == unix.UTIME_OMIT && times[1].Nsec == unix.UTIME_OMIT {
			return 0, nil, nil
		}
	}
	if flags&^(unix.AT_SYMLINK_NOFOLLOW|unix.AT_EMPTY_PATH) != 0 {
		return 0, nil, unix.EINVAL
	}
	return 0, nil, utimens(t, args[0].Int(), args[1].Pointer(), times, flags)
}

// withXattrs calls f with the extended attributes of what the first argument
// names: a path, or with how == byFD a descriptor.
func withXattrs(t *kernel.Task, arg arch.SyscallArgument, how xattrTarget, write bool, f func(vfs.Xattrer) error) error {
	if how == byFD {
		return withFile(t, arg.Int(), func(file *vfs.FileDescription) error {
			x, err := file.Xattrs(write)
			if err != nil {
				return err
			}
			return f(x)
		})
	}
	path, err := t.CopyInPath(arg.Pointer())
	if err != nil {
		return err
	}
	return t.FS().WithXattrs(t, path, how == followPath, write, f)
}

type xattrTarget int

const (
	followPath xattrTarget = iota
	linkPath
	byFD
)

func copyInXattrName(t *kernel.Task, addr hostarch.Addr) (string, error) {
	name, err := t.CopyInString(addr, linux.XATTR_NAME_MAX+1)
	if err == unix.ENAMETOOLONG || (err == nil && name == "") {
		err = unix.ERANGE
	}
	return name, err
}

// copyOutXattr asks get for a value and copies it out; with size 0 it returns
// the length alone.
func copyOutXattr(t *kernel.Task, addr hostarch.Addr, size uint, get func(buf []byte) (int, error)) (uintptr, error) {
	buf := make([]byte, min(size, linux.XATTR_SIZE_MAX))
	n, err := get(buf)
	if err != nil || size == 0 {
		return uintptr(n), err
	}
	return uintptr(n), t.CopyOut(addr, buf[:n])
}

func getxattr(t *kernel.Task, args arch.SyscallArguments, how xattrTarget) (n uintptr, c *kernel.SyscallControl, err error) {
	name, err := copyInXattrName(t, args[1].Pointer())
	if err != nil {
		return 0, nil, err
	}
	err = withXattrs(t, args[0], how, false, func(x vfs.Xattrer) error {
		n, err = copyOutXattr(t, args[2].Pointer(), args[3].SizeT(), func(buf []byte) (int, error) {
			return x.GetXattr(t, name, buf)
		})
		return err
	})
	return n, nil, err
}

func listxattr(t *kernel.Task, args arch.SyscallArguments, how xattrTarget) (n uintptr, c *kernel.SyscallControl, err error) {
	err = withXattrs(t, args[0], how, false, func(x vfs.Xattrer) error {
		n, err = copyOutXattr(t, args[1].Pointer(), args[2].SizeT(), func(buf []byte) (int, error) {
			return x.ListXattr(t, buf)
		})
		return err
	})
	if err == unix.EOPNOTSUPP { // no attributes to list
		return 0, nil, nil
	}
	return n, nil, err
}

func setxattr(t *kernel.Task, args arch.SyscallArguments, how xattrTarget) (uintptr, *kernel.SyscallControl, error) {
	size, flags := args[3].SizeT(), args[4].Uint()
	if flags&^(unix.XATTR_CREATE|unix.XATTR_REPLACE) != 0 {
		return 0, nil, unix.EINVAL
	}
	name, err := copyInXattrName(t, args[1].Pointer())
	if err != nil {
		return 0, nil, err
	}
	if size > linux.XATTR_SIZE_MAX {
		return 0, nil, unix.E2BIG
	}
	value := make([]byte, size)
	if err := t.CopyIn(args[2].Pointer(), value); size > 0 && err != nil {
		return 0, nil, err
	}
	return 0, nil, withXattrs(t, args[0], how, true, func(x vfs.Xattrer) error {
		return x.SetXattr(t, name, bytes.Clone(value), flags)
	})
}

func removexattr(t *kernel.Task, args arch.SyscallArguments, how xattrTarget) (uintptr, *kernel.SyscallControl, error) {
	name, err := copyInXattrName(t, args[1].Pointer())
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, withXattrs(t, args[0], how, true, func(x vfs.Xattrer) error {
		return x.RemoveXattr(t, name)
	})
}

func sysGetxattr(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return getxattr(t, args, followPath)
}

func sysLgetxattr(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return getxattr(t, args, linkPath)
}

func sysFgetxattr(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return getxattr(t, args, byFD)
}

func sysListxattr(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return listxattr(t, args, followPath)
}

func sysLlistxattr(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return listxattr(t, args, linkPath)
}

func sysFlistxattr(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return listxattr(t, args, byFD)
}

func sysSetxattr(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return setxattr(t, args, followPath)
}

func sysLsetxattr(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return setxattr(t, args, linkPath)
}

func sysFsetxattr(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return setxattr(t, args, byFD)
}

func sysRemovexattr(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return removexattr(t, args, followPath)
}

func sysLremovexattr(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return removexattr(t, args, linkPath)
}

func sysFremovexattr(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return removexattr(t, args, byFD)
}
