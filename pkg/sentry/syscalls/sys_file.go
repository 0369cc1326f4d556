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

// fileSyscalls are the calls on files, directories and descriptors.
var fileSyscalls = []kernel.Syscall{
	// Descriptors: this file.
	unix.SYS_OPENAT:        {Name: "openat", Fn: sysOpenat},
	unix.SYS_OPENAT2:       {Name: "openat2", Fn: sysOpenat2},
	unix.SYS_CLOSE:         {Name: "close", Fn: sysClose},
	unix.SYS_CLOSE_RANGE:   {Name: "close_range", Fn: sysCloseRange},
	unix.SYS_DUP:           {Name: "dup", Fn: sysDup},
	unix.SYS_DUP3:          {Name: "dup3", Fn: sysDup3},
	unix.SYS_FCNTL:         {Name: "fcntl", Fn: sysFcntl},
	unix.SYS_IOCTL:         {Name: "ioctl", Fn: sysIoctl},
	unix.SYS_FLOCK:         {Name: "flock", Fn: sysFlock},
	unix.SYS_MEMFD_CREATE:  {Name: "memfd_create", Fn: sysMemfdCreate},
	unix.SYS_INOTIFY_INIT1: {Name: "inotify_init1", Fn: sysENOSYS},
	unix.SYS_FANOTIFY_INIT: {Name: "fanotify_init", Fn: sysENOSYS},

	// Contents: sys_file_rw.go.
	unix.SYS_READ:            {Name: "read", Fn: sysRead},
	unix.SYS_WRITE:           {Name: "write", Fn: sysWrite},
	unix.SYS_READV:           {Name: "readv", Fn: sysReadv},
	unix.SYS_WRITEV:          {Name: "writev", Fn: sysWritev},
	unix.SYS_PREAD64:         {Name: "pread64", Fn: sysPread64},
	unix.SYS_PWRITE64:        {Name: "pwrite64", Fn: sysPwrite64},
	unix.SYS_PREADV:          {Name: "preadv", Fn: sysPreadv},
	unix.SYS_PWRITEV:         {Name: "pwritev", Fn: sysPwritev},
	unix.SYS_PREADV2:         {Name: "preadv2", Fn: sysPreadv2},
	unix.SYS_PWRITEV2:        {Name: "pwritev2", Fn: sysPwritev2},
	unix.SYS_LSEEK:           {Name: "lseek", Fn: sysLseek},
	unix.SYS_SENDFILE:        {Name: "sendfile", Fn: sysSendfile},
	unix.SYS_COPY_FILE_RANGE: {Name: "copy_file_range", Fn: sysCopyFileRange},
	unix.SYS_SPLICE:          {Name: "splice", Fn: sysSplice},
	unix.SYS_TEE:             {Name: "tee", Fn: sysSplice},
	unix.SYS_VMSPLICE:        {Name: "vmsplice", Fn: sysSplice},
	unix.SYS_FTRUNCATE:       {Name: "ftruncate", Fn: sysFtruncate},
	unix.SYS_FALLOCATE:       {Name: "fallocate", Fn: sysFallocate},
	unix.SYS_FADVISE64:       {Name: "fadvise64", Fn: sysFadvise64},
	unix.SYS_READAHEAD:       {Name: "readahead", Fn: sysReadahead},
	unix.SYS_FSYNC:           {Name: "fsync", Fn: sysFsync},
	unix.SYS_FDATASYNC:       {Name: "fdatasync", Fn: sysFsync},
	unix.SYS_SYNCFS:          {Name: "syncfs", Fn: sysSyncfs},
	unix.SYS_SYNC_FILE_RANGE: {Name: "sync_file_range", Fn: sysSyncfs},
	unix.SYS_SYNC:            {Name: "sync", Fn: sysSync},
	unix.SYS_GETDENTS64:      {Name: "getdents64", Fn: sysGetdents64},

	// Attributes: sys_file_stat.go.
	sysNewfstatat:         {Name: "newfstatat", Fn: sysFstatat},
	unix.SYS_FSTAT:        {Name: "fstat", Fn: sysFstat},
	unix.SYS_STATX:        {Name: "statx", Fn: sysStatx},
	unix.SYS_STATFS:       {Name: "statfs", Fn: sysStatfs},
	unix.SYS_FSTATFS:      {Name: "fstatfs", Fn: sysFstatfs},
	unix.SYS_FACCESSAT:    {Name: "faccessat", Fn: sysFaccessat},
	unix.SYS_FACCESSAT2:   {Name: "faccessat2", Fn: sysFaccessat2},
	unix.SYS_FCHMOD:       {Name: "fchmod", Fn: sysFchmod},
	unix.SYS_FCHMODAT:     {Name: "fchmodat", Fn: sysFchmodat},
	unix.SYS_FCHMODAT2:    {Name: "fchmodat2", Fn: sysFchmodat2},
	unix.SYS_FCHOWN:       {Name: "fchown", Fn: sysFchown},
	unix.SYS_FCHOWNAT:     {Name: "fchownat", Fn: sysFchownat},
	unix.SYS_UTIMENSAT:    {Name: "utimensat", Fn: sysUtimensat},
	unix.SYS_GETXATTR:     {Name: "getxattr", Fn: sysGetxattr},
	unix.SYS_LGETXATTR:    {Name: "lgetxattr", Fn: sysLgetxattr},
	unix.SYS_FGETXATTR:    {Name: "fgetxattr", Fn: sysFgetxattr},
	unix.SYS_LISTXATTR:    {Name: "listxattr", Fn: sysListxattr},
	unix.SYS_LLISTXATTR:   {Name: "llistxattr", Fn: sysLlistxattr},
	unix.SYS_FLISTXATTR:   {Name: "flistxattr", Fn: sysFlistxattr},
	unix.SYS_SETXATTR:     {Name: "setxattr", Fn: sysSetxattr},
	unix.SYS_LSETXATTR:    {Name: "lsetxattr", Fn: sysLsetxattr},
	unix.SYS_FSETXATTR:    {Name: "fsetxattr", Fn: sysFsetxattr},
	unix.SYS_REMOVEXATTR:  {Name: "removexattr", Fn: sysRemovexattr},
	unix.SYS_LREMOVEXATTR: {Name: "lremovexattr", Fn: sysLremovexattr},
	unix.SYS_FREMOVEXATTR: {Name: "fremovexattr", Fn: sysFremovexattr},

	// Names: sys_file_path.go.
	unix.SYS_MKDIRAT:           {Name: "mkdirat", Fn: sysMkdirat},
	unix.SYS_MKNODAT:           {Name: "mknodat", Fn: sysMknodat},
	unix.SYS_UNLINKAT:          {Name: "unlinkat", Fn: sysUnlinkat},
	unix.SYS_SYMLINKAT:         {Name: "symlinkat", Fn: sysSymlinkat},
	unix.SYS_LINKAT:            {Name: "linkat", Fn: sysLinkat},
	unix.SYS_RENAMEAT:          {Name: "renameat", Fn: sysRenameat},
	unix.SYS_RENAMEAT2:         {Name: "renameat2", Fn: sysRenameat2},
	unix.SYS_READLINKAT:        {Name: "readlinkat", Fn: sysReadlinkat},
	unix.SYS_TRUNCATE:          {Name: "truncate", Fn: sysTruncate},
	unix.SYS_CHDIR:             {Name: "chdir", Fn: sysChdir},
	unix.SYS_FCHDIR:            {Name: "fchdir", Fn: sysFchdir},
	unix.SYS_GETCWD:            {Name: "getcwd", Fn: sysGetcwd},
	unix.SYS_CHROOT:            {Name: "chroot", Fn: sysChroot},
	unix.SYS_UMASK:             {Name: "umask", Fn: sysUmask},
	unix.SYS_NAME_TO_HANDLE_AT: {Name: "name_to_handle_at", Fn: sysNotSupported},
	unix.SYS_OPEN_BY_HANDLE_AT: {Name: "open_by_handle_at", Fn: sysEPERM},
}

// sysNotSupported answers for file systems without file handles.
func sysNotSupported(*kernel.Task, arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return 0, nil, unix.EOPNOTSUPP
}

// withFile calls f with the file open as fd.
func withFile(t *kernel.Task, fd int32, f func(*vfs.FileDescription) error) error {
	file, err := t.GetFile(fd)
	if err != nil {
		return err
	}
	defer file.DecRef()
	return f(file)
}

// withDir calls f with the file that relative paths start at: nil for AT_FDCWD,
// and for absolute paths, which do not look at dirfd.
func withDir(t *kernel.Task, dirfd int32, path string, f func(at *vfs.FileDescription) error) error {
	if dirfd == unix.AT_FDCWD || (path != "" && path[0] == '/') {
		return f(nil)
	}
	return withFile(t, dirfd, f)
}

// withPath copies in the path at addr and calls f with where it starts and it.
func withPath(t *kernel.Task, dirfd int32, addr hostarch.Addr, f func(at *vfs.FileDescription, path string) error) error {
	path, err := t.CopyInPath(addr)
	if err != nil {
		return err
	}
	return withDir(t, dirfd, path, func(at *vfs.FileDescription) error { return f(at, path) })
}

func sysOpenat(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return open(t, args[0].Int(), args[1].Pointer(), args[2].Uint(), uint32(args[3].ModeT()), 0)
}

func open(t *kernel.Task, dirfd int32, addr hostarch.Addr, flags, mode uint32, resolve uint64) (uintptr, *kernel.SyscallControl, error) {
	fd := int32(-1)
	err := withPath(t, dirfd, addr, func(at *vfs.FileDescription, path string) error {
		file, err := t.FS().OpenAt(t, at, path, flags, mode, resolve)
		if err != nil {
			return err
		}
		if err := file.FIFOWait(t.Block); err != nil {
			file.DecRef()
			return err
		}
		fd, err = addFD(t, file, flags&unix.O_CLOEXEC != 0)
		return err
	})
	return uintptr(fd), nil, err
}

// openHowSize is the size of struct open_how in bytes.
const openHowSize = 24

// validOpenFlags are the flags that openat2(2) knows; open(2) ignores others.
const validOpenFlags = unix.O_ACCMODE | unix.O_CREAT | unix.O_EXCL | unix.O_NOCTTY | unix.O_TRUNC | unix.O_APPEND |
	unix.O_NONBLOCK | unix.O_DSYNC | unix.O_ASYNC | unix.O_DIRECT | linux.O_LARGEFILE | unix.O_DIRECTORY |
	unix.O_NOFOLLOW | unix.O_NOATIME | unix.O_CLOEXEC | unix.O_SYNC | unix.O_PATH | unix.O_TMPFILE

func sysOpenat2(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	addr, size := args[2].Pointer(), args[3].SizeT()
	switch {
	case size < openHowSize:
		return 0, nil, unix.EINVAL
	case size > hostarch.PageSize:
		return 0, nil, unix.E2BIG
	}
	buf := make([]byte, size)
	if err := t.CopyIn(addr, buf); err != nil {
		return 0, nil, err
	}
	for _, b := range buf[openHowSize:] {
		if b != 0 {
			return 0, nil, unix.E2BIG
		}
	}
	var how linux.OpenHow
	how.UnmarshalBytes(buf)
	const validResolve = unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_SYMLINKS |
		unix.RESOLVE_BENEATH | unix.RESOLVE_IN_ROOT | linux.RESOLVE_CACHED
	creates := how.Flags&unix.O_CREAT != 0 || how.Flags&unix.O_TMPFILE == unix.O_TMPFILE
	const beneathInRoot = unix.RESOLVE_BENEATH | unix.RESOLVE_IN_ROOT
	switch {
	case how.Flags&^validOpenFlags != 0, how.Resolve&^validResolve != 0,
		how.Mode&^0o7777 != 0, how.Mode != 0 && !creates,
		how.Resolve&beneathInRoot == beneathInRoot,
		how.Flags&unix.O_PATH != 0 && how.Flags&^(unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC) != 0:
		return 0, nil, unix.EINVAL
	case how.Resolve&linux.RESOLVE_CACHED != 0: // nothing here is known to be cached
		return 0, nil, unix.EAGAIN
	}
	dirfd := args[0].Int()
	if how.Resolve&unix.RESOLVE_IN_ROOT == 0 {
		return open(t, dirfd, args[1].Pointer(), uint32(how.Flags), uint32(how.Mode), how.Resolve)
	}
	// Even an absolute path starts at dirfd.
	path, err := t.CopyInPath(args[1].Pointer())
	if err != nil {
		return 0, nil, err
	}
	fd := int32(-1)
	err = withDir(t, dirfd, "", func(at *vfs.FileDescription) error {
		file, err := t.FS().OpenAt(t, at, path, uint32(how.Flags), uint32(how.Mode), how.Resolve)
		if err != nil {
			return err
		}
		if err := file.FIFOWait(t.Block); err != nil {
			file.DecRef()
			return err
		}
		fd, err = addFD(t, file, how.Flags&unix.O_CLOEXEC != 0)
		return err
	})
	return uintptr(fd), nil, err
}

func sysClose(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	file := t.FDTable().Remove(args[0].Int())
	if file == nil {
		return 0, nil, unix.EBADF
	}
	file.DecRef()
	return 0, nil, nil
}

func sysCloseRange(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	first, last, flags := args[0].Uint(), args[1].Uint(), args[2].Uint()
	if flags&^(unix.CLOSE_RANGE_UNSHARE|unix.CLOSE_RANGE_CLOEXEC) != 0 || first > last {
		return 0, nil, unix.EINVAL
	}
	if flags&unix.CLOSE_RANGE_UNSHARE != 0 {
		t.UnshareFiles()
	}
	const most = 1<<31 - 1
	lo, hi := int32(min(first, most)), int32(min(last, most))
	if flags&unix.CLOSE_RANGE_CLOEXEC == 0 {
		t.FDTable().RemoveRange(lo, hi)
		return 0, nil, nil
	}
	for _, fd := range t.FDTable().FDs() {
		if lo <= fd && fd <= hi {
			t.FDTable().SetCloexec(fd, true) // EBADF: another thread closed it
		}
	}
	return 0, nil, nil
}

func sysDup(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	file, err := t.GetFile(args[0].Int())
	if err != nil {
		return 0, nil, err
	}
	fd, err := addFD(t, file, false)
	return uintptr(fd), nil, err
}

func sysDup3(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	flags := args[2].Uint()
	if flags&^unix.O_CLOEXEC != 0 || args[0].Int() == args[1].Int() {
		return 0, nil, unix.EINVAL
	}
	return dup2(t, args[0].Int(), args[1].Int(), flags&unix.O_CLOEXEC != 0)
}

func dup2(t *kernel.Task, from, to int32, cloexec bool) (uintptr, *kernel.SyscallControl, error) {
	file, err := t.GetFile(from)
	if err != nil {
		return 0, nil, err
	}
	limit, _ := t.Limit(unix.RLIMIT_NOFILE)
	old, err := t.FDTable().NewFDAt(to, file, cloexec, limit)
	if err != nil {
		file.DecRef()
		return 0, nil, err
	}
	if old != nil {
		old.DecRef()
	}
	return uintptr(to), nil, nil
}

func sysFcntl(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	fd, cmd, arg := args[0].Int(), args[1].Int(), args[2]
	file, cloexec := t.FDTable().GetFlags(fd)
	if file == nil {
		return 0, nil, unix.EBADF
	}
	defer file.DecRef()
	if file.StatusFlags()&unix.O_PATH != 0 {
		switch cmd {
		case unix.F_DUPFD, unix.F_DUPFD_CLOEXEC, unix.F_GETFD, unix.F_SETFD, unix.F_GETFL, linux.F_DUPFD_QUERY:
		default:
			return 0, nil, unix.EBADF
		}
	}
	switch cmd {
	case unix.F_DUPFD, unix.F_DUPFD_CLOEXEC:
		limit, _ := t.Limit(unix.RLIMIT_NOFILE)
		file.IncRef()
		n, err := t.FDTable().NewFD(arg.Int(), file, cmd == unix.F_DUPFD_CLOEXEC, limit)
		if err != nil {
			file.DecRef()
		}
		return uintptr(n), nil, err
	case unix.F_GETFD:
		if cloexec {
			return unix.FD_CLOEXEC, nil, nil
		}
		return 0, nil, nil
	case unix.F_SETFD:
		return 0, nil, t.FDTable().SetCloexec(fd, arg.Uint()&unix.FD_CLOEXEC != 0)
	case unix.F_GETFL:
		flags := file.StatusFlags()
		if file.Dentry() != nil && flags&unix.O_PATH == 0 {
			flags |= linux.O_LARGEFILE // open(2) adds it in 64-bit programs
		}
		return uintptr(flags), nil, nil
	case unix.F_SETFL:
		return 0, nil, file.SetStatusFlags(arg.Uint())
	case unix.F_GETLK, unix.F_OFD_GETLK:
		return 0, nil, getLock(t, file, arg.Pointer(), cmd == unix.F_OFD_GETLK)
	case unix.F_SETLK, unix.F_SETLKW:
		return 0, nil, setLock(t, file, arg.Pointer(), false, cmd == unix.F_SETLKW)
	case unix.F_OFD_SETLK, unix.F_OFD_SETLKW:
		return 0, nil, setLock(t, file, arg.Pointer(), true, cmd == unix.F_OFD_SETLKW)
	case unix.F_GETPIPE_SZ:
		n, err := vfs.PipeSize(file)
		return uintptr(n), nil, err
	case unix.F_SETPIPE_SZ:
		n, err := vfs.SetPipeSize(file, int(arg.Int()))
		return uintptr(n), nil, err
	case unix.F_GET_SEALS, unix.F_ADD_SEALS:
		s, ok := file.Impl().(vfs.Sealer)
		if !ok {
			return 0, nil, unix.EINVAL
		}
		if cmd == unix.F_ADD_SEALS {
			return 0, nil, s.AddSeals(arg.Uint())
		}
		seals, err := s.Seals()
		return uintptr(seals), nil, err
	case unix.F_GETOWN, linux.F_GETSIG: // SIGIO is never sent
		return 0, nil, nil
	case unix.F_SETOWN, linux.F_SETSIG, unix.F_SETOWN_EX:
		return 0, nil, nil
	case unix.F_GETLEASE:
		return unix.F_UNLCK, nil, nil
	case linux.F_DUPFD_QUERY:
		other, err := t.GetFile(arg.Int())
		if err != nil {
			return 0, nil, err
		}
		defer other.DecRef()
		if other == file {
			return 1, nil, nil
		}
		return 0, nil, nil
	}
	return 0, nil, unix.EINVAL
}

// copyInLock copies a struct flock in and returns the bytes that it means.
func copyInLock(t *kernel.Task, file *vfs.FileDescription, addr hostarch.Addr, ofd bool) (linux.Flock, vfs.RecordLock, error) {
	var fl linux.Flock
	if err := t.CopyInStruct(addr, &fl); err != nil {
		return fl, vfs.RecordLock{}, err
	}
	var base int64
	switch fl.Whence {
	case unix.SEEK_SET:
	case unix.SEEK_CUR:
		pos, err := file.Seek(t, 0, unix.SEEK_CUR)
		if err != nil {
			return fl, vfs.RecordLock{}, err
		}
		base = pos
	case unix.SEEK_END:
		st, err := file.Stat(t)
		if err != nil {
			return fl, vfs.RecordLock{}, err
		}
		base = st.Size
	default:
		return fl, vfs.RecordLock{}, unix.EINVAL
	}
	start := base + fl.Start
	if start < 0 && base > 0 && fl.Start > 0 {
		return fl, vfs.RecordLock{}, unix.EOVERFLOW
	}
	r := vfs.RecordLock{Start: uint64(start), End: vfs.EndOfFile, Exclusive: fl.Type == unix.F_WRLCK, Owner: t.FDTable(), PID: t.TGID()}
	switch {
	case fl.Len > 0:
		if start > 1<<63-1-fl.Len {
			return fl, r, unix.EOVERFLOW
		}
		r.End = uint64(start + fl.Len)
	case fl.Len < 0:
		r.Start, r.End = uint64(start+fl.Len), uint64(start)
		start += fl.Len
	}
	if start < 0 || (ofd && fl.PID != 0) {
		return fl, r, unix.EINVAL
	}
	if ofd {
		r.Owner, r.PID = file, -1
	}
	return fl, r, nil
}

func getLock(t *kernel.Task, file *vfs.FileDescription, addr hostarch.Addr, ofd bool) error {
	fl, r, err := copyInLock(t, file, addr, ofd)
	if err != nil {
		return err
	}
	if fl.Type != unix.F_RDLCK && fl.Type != unix.F_WRLCK {
		return unix.EINVAL
	}
	locks := vfs.LocksOf(file)
	var other vfs.RecordLock
	busy := false
	if locks != nil {
		other, busy = locks.Test(r)
	}
	if !busy {
		fl.Type = unix.F_UNLCK
		return t.CopyOutStruct(addr, &fl)
	}
	fl = linux.Flock{Type: unix.F_RDLCK, Whence: unix.SEEK_SET, Start: int64(other.Start), PID: other.PID}
	if other.Exclusive {
		fl.Type = unix.F_WRLCK
	}
	if other.End != vfs.EndOfFile {
		fl.Len = int64(other.End - other.Start)
	}
	return t.CopyOutStruct(addr, &fl)
}

func setLock(t *kernel.Task, file *vfs.FileDescription, addr hostarch.Addr, ofd, wait bool) error {
	fl, r, err := copyInLock(t, file, addr, ofd)
	if err != nil {
		return err
	}
	locks := vfs.LocksOf(file)
	switch {
	case fl.Type == unix.F_UNLCK:
		if locks != nil {
			locks.Unset(r.Owner, r.Start, r.End)
		}
		return nil
	case fl.Type == unix.F_RDLCK && !file.Readable(), fl.Type == unix.F_WRLCK && !file.Writable():
		return unix.EBADF
	case fl.Type != unix.F_RDLCK && fl.Type != unix.F_WRLCK:
		return unix.EINVAL
	case locks == nil:
		return unix.ENOLCK
	}
	return waitLock(t, locks, wait, func() error { return locks.Set(r) })
}

// waitLock calls take until it does not return EAGAIN, or once without wait.
func waitLock(t *kernel.Task, locks *vfs.Locks, wait bool, take func() error) error {
	return untilReady(t, &locks.Queue, readEvents, !wait, take)
}

func sysFlock(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	op := args[1].Uint()
	return 0, nil, withFile(t, args[0].Int(), func(file *vfs.FileDescription) error {
		if file.StatusFlags()&unix.O_PATH != 0 {
			return unix.EBADF
		}
		locks := vfs.LocksOf(file)
		if locks == nil {
			return unix.ENOLCK
		}
		switch op &^ unix.LOCK_NB {
		case unix.LOCK_UN:
			locks.Funlock(file)
			return nil
		case unix.LOCK_SH, unix.LOCK_EX:
			return waitLock(t, locks, op&unix.LOCK_NB == 0, func() error {
				return locks.Flock(file, op&unix.LOCK_EX != 0)
			})
		}
		return unix.EINVAL
	})
}

func sysIoctl(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	fd, request, arg := args[0].Int(), args[1].Uint(), args[2]
	file, err := t.GetFile(fd)
	if err != nil {
		return 0, nil, err
	}
	defer file.DecRef()
	if file.StatusFlags()&unix.O_PATH != 0 {
		return 0, nil, unix.EBADF
	}
	setFlag := func(flag uint32) error {
		on, err := usermem.CopyUint32In(t, t.MM(), arg.Pointer(), usermem.IOOpts{})
		if err != nil {
			return err
		}
		if on != 0 {
			return file.SetStatusFlags(file.StatusFlags() | flag)
		}
		return file.SetStatusFlags(file.StatusFlags() &^ flag)
	}
	switch request {
	case linux.FIOCLEX, linux.FIONCLEX:
		return 0, nil, t.FDTable().SetCloexec(fd, request == linux.FIOCLEX)
	case linux.FIONBIO:
		return 0, nil, setFlag(unix.O_NONBLOCK)
	case linux.FIOASYNC:
		return 0, nil, setFlag(unix.O_ASYNC)
	}
	if tty, ok := file.Impl().(vfs.Terminal); ok && tty.IsTerminal() {
		if done, err := jobControl(t, request, arg.Pointer()); done {
			return 0, nil, err
		}
	}
	n, err := file.Ioctl(t, t.MM(), request, arg.Value)
	if err != unix.ENOTTY || (request != linux.FIONREAD && request != linux.FIOQSIZE) {
		return n, nil, err
	}
	st, serr := file.Stat(t)
	if serr != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, nil, err
	}
	if request == linux.FIOQSIZE {
		return 0, nil, usermem.CopyUint64Out(t, t.MM(), arg.Pointer(), uint64(st.Size), usermem.IOOpts{})
	}
	pos, err := file.Seek(t, 0, unix.SEEK_CUR)
	if err != nil {
		return 0, nil, err
	}
	return 0, nil, usermem.CopyUint32Out(t, t.MM(), arg.Pointer(), uint32(st.Size-pos), usermem.IOOpts{})
}

// jobControl answers the requests on a terminal that concern sessions and
// process groups (ioctl_tty(2)).
func jobControl(t *kernel.Task, request uint32, addr hostarch.Addr) (done bool, err error) {
	var id int32
	switch request {
	case linux.TIOCGPGRP:
		id, err = t.Foreground()
	case linux.TIOCGSID:
		if _, err = t.Foreground(); err == nil {
			_, id, err = t.GetPGID(0)
		}
	case linux.TIOCSPGRP:
		pgid, err := usermem.CopyUint32In(t, t.MM(), addr, usermem.IOOpts{})
		if err != nil {
			return true, err
		}
		return true, t.SetForeground(int32(pgid))
	default:
		return false, nil
	}
	if err != nil {
		return true, err
	}
	return true, usermem.CopyUint32Out(t, t.MM(), addr, uint32(id), usermem.IOOpts{})
}

func sysMemfdCreate(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	const (
		maxName    = 249
		noExecSeal = 8  // MFD_NOEXEC_SEAL
		exec       = 16 // MFD_EXEC
	)
	flags := args[1].Uint()
	if flags&^(unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|noExecSeal|exec) != 0 || flags&(noExecSeal|exec) == noExecSeal|exec {
		return 0, nil, unix.EINVAL
	}
	name, err := t.CopyInString(args[0].Pointer(), maxName+1)
	if err == unix.ENAMETOOLONG {
		err = unix.EINVAL
	}
	if err != nil {
		return 0, nil, err
	}
	memfd := t.FS().Namespace().Memfd
	if memfd == nil {
		return 0, nil, unix.ENOSYS
	}
	fd, err := addFD(t, memfd(t, name, flags&(unix.MFD_ALLOW_SEALING|noExecSeal) != 0), flags&unix.MFD_CLOEXEC != 0)
	return uintptr(fd), nil, err
}
