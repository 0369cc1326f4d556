package linux

import (
	"bytes"
	"debug/elf"
	"fmt"
	"reflect"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// structs are all the structures, with the sizes that the kernel's headers give
// them where both architectures agree.
var structs = []struct {
	s    Struct
	size int
}{
	{&Timespec{}, 16},
	{&Timeval{}, 16},
	{&Itimerspec{}, 32},
	{&Itimerval{}, 32},
	{&Timezone{}, 8},
	{&Tms{}, 32},
	{&Timex{}, 208},
	{&Sigevent{}, 64},
	{&CloneArgs{}, 88},
	{&SchedParam{}, 4},
	{&SchedAttr{}, 56},
	{&RobustListHead{}, 24},
	{&Rseq{}, 32},
	{&Stat{}, statSize},
	{&StatxTimestamp{}, 16},
	{&Statx{}, 256},
	{&Statfs{}, 120},
	{&Rlimit{}, 16},
	{&Rusage{}, 144},
	{&Sysinfo{}, 112},
	{&Utsname{}, 390},
	{&PollFD{}, 8},
	{&EpollEvent{}, epollEventSize},
	{&InotifyEvent{}, 16},
	{&SignalfdSiginfo{}, 128},
	{&SigsetArg{}, 16},
	{&Flock{}, 32},
	{&FOwnerEx{}, 8},
	{&OpenHow{}, 24},
	{&IOVec{}, 16},
	{&Termios{}, 36},
	{&Winsize{}, 8},
	{&CapUserHeader{}, 8},
	{&CapUserData{}, 12},
	{&SockAddrUnix{}, 110},
	{&Msghdr{}, 56},
	{&Mmsghdr{}, 64},
	{&Cmsghdr{}, 16},
	{&Ucred{}, 12},
	{&Linger{}, 8},
	{&SeccompData{}, 64},
	{&SockFprog{}, 16},
	{&ELFHeader{}, 64},
	{&ELFProgram{}, 56},
	{&SigAction{}, 32},
	{&SignalStack{}, 24},
	{&SignalInfo{}, 128},
}

// Every structure writes exactly its size, and reads back what it wrote. The
// pattern differs in every byte, so a field at the wrong place shows.
func TestMarshal(t *testing.T) {
	for _, test := range structs {
		name := fmt.Sprintf("%T", test.s)
		size := test.s.SizeBytes()
		if size != test.size {
			t.Errorf("%s: size %d, want %d", name, size, test.size)
		}
		in := pattern(size)
		test.s.UnmarshalBytes(in)
		out := bytes.Repeat([]byte{0xee}, size+1)
		test.s.MarshalBytes(out)
		if out[size] != 0xee {
			t.Errorf("%s: wrote beyond its size", name)
		}
		if left := zeroed(in, out[:size], t, name); left == 0 {
			t.Errorf("%s: wrote only padding", name)
		}
		again := reflect.New(reflect.TypeOf(test.s).Elem()).Interface().(Struct)
		again.UnmarshalBytes(out)
		if !reflect.DeepEqual(again, test.s) {
			t.Errorf("%s: read back %+v, want %+v", name, again, test.s)
		}
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic for a slice that is too short", name)
				}
			}()
			test.s.MarshalBytes(out[:size-1])
		}()
	}
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i%251 + 1)
	}
	return b
}

// zeroed checks that out is in, but for padding, which is 0. It returns the
// number of bytes that are not padding.
func zeroed(in, out []byte, t *testing.T, name string) (n int) {
	for i := range in {
		switch out[i] {
		case in[i]:
			n++
		case 0:
		default:
			t.Errorf("%s: byte %d is %#x, want %#x or padding", name, i, out[i], in[i])
		}
	}
	return n
}

// sameLayout fails unless the fields of ours lie where x/sys has them, of the
// same size and value. names maps our names to those of x/sys; what is not
// there is called the same.
func sameLayout[T any](t *testing.T, ours Struct, names map[string]string) {
	t.Helper()
	var theirs T
	size := int(unsafe.Sizeof(theirs))
	if size != ours.SizeBytes() {
		t.Errorf("%T is %d bytes, %T is %d", ours, ours.SizeBytes(), theirs, size)
		return
	}
	b := pattern(size)
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&theirs)), size), b)
	ours.UnmarshalBytes(b)
	compareFields(t, fmt.Sprintf("%T", ours), reflect.ValueOf(ours).Elem(), reflect.ValueOf(theirs), names)
}

func compareFields(t *testing.T, name string, ours, theirs reflect.Value, names map[string]string) {
	for i := range ours.NumField() {
		f := ours.Type().Field(i)
		if f.Name == "_" {
			continue
		}
		other := f.Name
		if n, ok := names[f.Name]; ok {
			other = n
		}
		v := theirs.FieldByName(other)
		if !v.IsValid() {
			t.Errorf("%s.%s: x/sys has no field %s", name, f.Name, other)
			continue
		}
		compareValues(t, name+"."+f.Name, ours.Field(i), v, names)
	}
}

func compareValues(t *testing.T, name string, a, b reflect.Value, names map[string]string) {
	switch {
	case a.Kind() == reflect.Struct && b.Kind() == reflect.Struct:
		compareFields(t, name, a, b, names)
	case a.Kind() == reflect.Array && b.Kind() == reflect.Array:
		for i := range min(a.Len(), b.Len()) {
			compareValues(t, name, a.Index(i), b.Index(i), names)
		}
		if a.Len() != b.Len() {
			t.Errorf("%s has %d elements, want %d", name, a.Len(), b.Len())
		}
	default:
		if bits(a) != bits(b) {
			t.Errorf("%s = %#x, want %#x", name, bits(a), bits(b))
		}
	}
}

func bits(v reflect.Value) uint64 {
	switch {
	case v.CanInt():
		return uint64(v.Int()) & (1<<(8*v.Type().Size()) - 1)
	case v.CanUint():
		return v.Uint()
	case v.Kind() == reflect.Pointer:
		return uint64(v.Pointer())
	}
	panic("no number: " + v.Kind().String())
}

func TestLayouts(t *testing.T) {
	sameLayout[unix.Timespec](t, &Timespec{}, nil)
	sameLayout[unix.Timeval](t, &Timeval{}, nil)
	sameLayout[unix.ItimerSpec](t, &Itimerspec{}, nil)
	sameLayout[unix.Itimerval](t, &Itimerval{}, nil)
	sameLayout[unix.Timex](t, &Timex{}, nil)
	sameLayout[unix.Tms](t, &Tms{}, nil)
	sameLayout[unix.SchedAttr](t, &SchedAttr{}, map[string]string{"UtilMin": "Util_min", "UtilMax": "Util_max"})
	sameLayout[unix.Stat_t](t, &Stat{}, map[string]string{"UID": "Uid", "GID": "Gid", "Atime": "Atim", "Mtime": "Mtim", "Ctime": "Ctim"})
	sameLayout[unix.Statx_t](t, &Statx{}, map[string]string{"UID": "Uid", "GID": "Gid", "RdevMajor": "Rdev_major", "RdevMinor": "Rdev_minor", "DevMajor": "Dev_major", "DevMinor": "Dev_minor", "AttributesMask": "Attributes_mask", "MntID": "Mnt_id", "DioMemAlign": "Dio_mem_align", "DioOffsetAlign": "Dio_offset_align"})
	sameLayout[unix.Rlimit](t, &Rlimit{}, nil)
	sameLayout[unix.Rusage](t, &Rusage{}, nil)
	sameLayout[unix.Sysinfo_t](t, &Sysinfo{}, map[string]string{"TotalRAM": "Totalram", "FreeRAM": "Freeram", "SharedRAM": "Sharedram", "BufferRAM": "Bufferram", "TotalSwap": "Totalswap", "FreeSwap": "Freeswap", "TotalHigh": "Totalhigh", "FreeHigh": "Freehigh"})
	sameLayout[unix.Utsname](t, &Utsname{}, nil)
	sameLayout[unix.PollFd](t, &PollFD{}, map[string]string{"FD": "Fd", "REvents": "Revents"})
	sameLayout[unix.InotifyEvent](t, &InotifyEvent{}, map[string]string{"WD": "Wd"})
	sameLayout[unix.SignalfdSiginfo](t, &SignalfdSiginfo{}, map[string]string{"PID": "Pid", "UID": "Uid", "FD": "Fd", "TID": "Tid", "TrapNo": "Trapno", "AddrLSB": "Addr_lsb", "CallAddr": "Call_addr"})
	sameLayout[unix.Flock_t](t, &Flock{}, map[string]string{"PID": "Pid"})
	sameLayout[unix.OpenHow](t, &OpenHow{}, nil)
	sameLayout[unix.Iovec](t, &IOVec{}, nil)
	sameLayout[unix.Winsize](t, &Winsize{}, nil)
	sameLayout[unix.CapUserHeader](t, &CapUserHeader{}, map[string]string{"PID": "Pid"})
	sameLayout[unix.CapUserData](t, &CapUserData{}, nil)
	sameLayout[unix.RawSockaddrUnix](t, &SockAddrUnix{}, nil)
	sameLayout[unix.Cmsghdr](t, &Cmsghdr{}, nil)
	sameLayout[unix.Ucred](t, &Ucred{}, map[string]string{"PID": "Pid", "UID": "Uid", "GID": "Gid"})
	sameLayout[unix.Linger](t, &Linger{}, map[string]string{"OnOff": "Onoff"})
	sameLayout[elf.Header64](t, &ELFHeader{}, nil)
	sameLayout[elf.Prog64](t, &ELFProgram{}, nil)
	sameLayout[unix.SockFprog](t, &SockFprog{}, nil)
}

// The host fills these in: our reading of its answer must agree with x/sys's.
func TestHostStructs(t *testing.T) {
	var fs unix.Statfs_t
	if err := unix.Statfs("/proc", &fs); err != nil {
		t.Fatal(err)
	}
	var ours Statfs
	ours.UnmarshalBytes(unsafe.Slice((*byte)(unsafe.Pointer(&fs)), unsafe.Sizeof(fs)))
	if ours.Type != PROC_SUPER_MAGIC || ours.Namelen != NAME_MAX || ours.Bsize != fs.Bsize || ours.Flags != fs.Flags {
		t.Errorf("statfs(/proc) = %+v, want %+v", ours, fs)
	}

	// epoll_event: what epoll_wait(2) returns is what epoll_ctl(2) was given.
	ep, err := unix.EpollCreate1(0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ep)
	efd, err := unix.Eventfd(1, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(efd)
	want := EpollEvent{Events: EPOLLIN, Data: 0x1122334455667788}
	b := make([]byte, want.SizeBytes()*2)
	want.MarshalBytes(b)
	if _, _, errno := unix.Syscall6(unix.SYS_EPOLL_CTL, uintptr(ep), EPOLL_CTL_ADD, uintptr(efd), uintptr(unsafe.Pointer(&b[0])), 0, 0); errno != 0 {
		t.Fatal(errno)
	}
	clear(b)
	n, _, errno := unix.Syscall6(unix.SYS_EPOLL_PWAIT, uintptr(ep), uintptr(unsafe.Pointer(&b[0])), 1, 0, 0, 0)
	if n != 1 || errno != 0 {
		t.Fatalf("epoll_pwait = %d, %v", n, errno)
	}
	var got EpollEvent
	got.UnmarshalBytes(b)
	if got != want || !bytes.Equal(b[want.SizeBytes():], make([]byte, want.SizeBytes())) {
		t.Errorf("epoll_pwait gave %+v in % x, want %+v", got, b, want)
	}
}
