package syscalls

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/sentry/kernel"
)

// credsSyscalls read and change credentials.
var credsSyscalls = []kernel.Syscall{
	unix.SYS_GETUID:    {Name: "getuid", Fn: sysGetuid},
	unix.SYS_GETEUID:   {Name: "geteuid", Fn: sysGeteuid},
	unix.SYS_GETGID:    {Name: "getgid", Fn: sysGetgid},
	unix.SYS_GETEGID:   {Name: "getegid", Fn: sysGetegid},
	unix.SYS_GETRESUID: {Name: "getresuid", Fn: sysGetresuid},
	unix.SYS_GETRESGID: {Name: "getresgid", Fn: sysGetresgid},
	unix.SYS_SETUID:    {Name: "setuid", Fn: sysSetuid},
	unix.SYS_SETGID:    {Name: "setgid", Fn: sysSetgid},
	unix.SYS_SETREUID:  {Name: "setreuid", Fn: sysSetreuid},
	unix.SYS_SETREGID:  {Name: "setregid", Fn: sysSetregid},
	unix.SYS_SETRESUID: {Name: "setresuid", Fn: sysSetresuid},
	unix.SYS_SETRESGID: {Name: "setresgid", Fn: sysSetresgid},
	unix.SYS_SETFSUID:  {Name: "setfsuid", Fn: sysSetfsuid},
	unix.SYS_SETFSGID:  {Name: "setfsgid", Fn: sysSetfsgid},
	unix.SYS_GETGROUPS: {Name: "getgroups", Fn: sysGetgroups},
	unix.SYS_SETGROUPS: {Name: "setgroups", Fn: sysSetgroups},
	unix.SYS_CAPGET:    {Name: "capget", Fn: sysCapget},
	unix.SYS_CAPSET:    {Name: "capset", Fn: sysCapset},
}

// unchanged is the ID that stands for "as it is".
const unchanged = ^uint32(0)

func sysGetuid(t *kernel.Task, _ arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return uintptr(t.Creds().RUID), nil, nil
}

func sysGeteuid(t *kernel.Task, _ arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return uintptr(t.Creds().EUID), nil, nil
}

func sysGetgid(t *kernel.Task, _ arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return uintptr(t.Creds().RGID), nil, nil
}

func sysGetegid(t *kernel.Task, _ arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	return uintptr(t.Creds().EGID), nil, nil
}

func copyOutIDs(t *kernel.Task, args arch.SyscallArguments, ids ...uint32) error {
	for i, id := range ids {
		if err := copyOutInt(t, args[i].Pointer(), int32(id)); err != nil {
			return err
		}
	}
	return nil
}

func sysGetresuid(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	c := t.Creds()
	return 0, nil, copyOutIDs(t, args, c.RUID, c.EUID, c.SUID)
}

func sysGetresgid(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	c := t.Creds()
	return 0, nil, copyOutIDs(t, args, c.RGID, c.EGID, c.SGID)
}

func sysSetuid(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	uid := args[0].Uint()
	c := t.Creds().Clone()
	switch {
	case uid == unchanged:
		return 0, nil, unix.EINVAL
	case c.Has(linux.CAP_SETUID):
		c.SetUIDs(uid, uid, uid)
	case uid == c.RUID || uid == c.SUID:
		c.SetUIDs(c.RUID, uid, c.SUID)
	default:
		return 0, nil, unix.EPERM
	}
	t.SetCreds(c)
	return 0, nil, nil
}

func sysSetgid(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	gid := args[0].Uint()
	c := t.Creds().Clone()
	switch {
	case gid == unchanged:
		return 0, nil, unix.EINVAL
	case c.Has(linux.CAP_SETGID):
		c.RGID, c.EGID, c.SGID, c.FSGID = gid, gid, gid, gid
	case gid == c.RGID || gid == c.SGID:
		c.EGID, c.FSGID = gid, gid
	default:
		return 0, nil, unix.EPERM
	}
	t.SetCreds(c)
	return 0, nil, nil
}

// mayUse reports whether a task may take on id, one of old, or any with the
// capability.
func mayUse(privileged bool, id uint32, old ...uint32) bool {
	ok := privileged || id == unchanged
	for _, o := range old {
		ok = ok || id == o
	}
	return ok
}

// orOld returns id, or old if id is to be left as it is.
func orOld(id, old uint32) uint32 {
	if id == unchanged {
		return old
	}
	return id
}

func sysSetreuid(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	r, e := args[0].Uint(), args[1].Uint()
	c := t.Creds().Clone()
	priv := c.Has(linux.CAP_SETUID)
	if !mayUse(priv, r, c.RUID, c.EUID) || !mayUse(priv, e, c.RUID, c.EUID, c.SUID) {
		return 0, nil, unix.EPERM
	}
	newE, s := orOld(e, c.EUID), c.SUID
	if r != unchanged || (e != unchanged && e != c.RUID) {
		s = newE
	}
	c.SetUIDs(orOld(r, c.RUID), newE, s)
	t.SetCreds(c)
	return 0, nil, nil
}

func sysSetregid(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	r, e := args[0].Uint(), args[1].Uint()
	c := t.Creds().Clone()
	priv := c.Has(linux.CAP_SETGID)
	if !mayUse(priv, r, c.RGID, c.EGID) || !mayUse(priv, e, c.RGID, c.EGID, c.SGID) {
		return 0, nil, unix.EPERM
	}
	newE := orOld(e, c.EGID)
	if r != unchanged || (e != unchanged && e != c.RGID) {
		c.SGID = newE
	}
	c.RGID, c.EGID, c.FSGID = orOld(r, c.RGID), newE, newE
	t.SetCreds(c)
	return 0, nil, nil
}

func sysSetresuid(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	r, e, s := args[0].Uint(), args[1].Uint(), args[2].Uint()
	c := t.Creds().Clone()
	priv := c.Has(linux.CAP_SETUID)
	for _, id := range []uint32{r, e, s} {
		if !mayUse(priv, id, c.RUID, c.EUID, c.SUID) {
			return 0, nil, unix.EPERM
		}
	}
	c.SetUIDs(orOld(r, c.RUID), orOld(e, c.EUID), orOld(s, c.SUID))
	t.SetCreds(c)
	return 0, nil, nil
}

func sysSetresgid(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	r, e, s := args[0].Uint(), args[1].Uint(), args[2].Uint()
	c := t.Creds().Clone()
	priv := c.Has(linux.CAP_SETGID)
	for _, id := range []uint32{r, e, s} {
		if !mayUse(priv, id, c.RGID, c.EGID, c.SGID) {
			return 0, nil, unix.EPERM
		}
	}
	c.RGID, c.EGID, c.SGID = orOld(r, c.RGID), orOld(e, c.EGID), orOld(s, c.SGID)
	c.FSGID = c.EGID
	t.SetCreds(c)
	return 0, nil, nil
}

// sysSetfsuid returns the old ID whether or not it changed it.
func sysSetfsuid(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	uid := args[0].Uint()
	c := t.Creds().Clone()
	old := c.FSUID
	if uid != unchanged && mayUse(c.Has(linux.CAP_SETUID), uid, c.RUID, c.EUID, c.SUID, c.FSUID) {
		const fileCaps = 1<<linux.CAP_CHOWN | 1<<linux.CAP_DAC_OVERRIDE | 1<<linux.CAP_DAC_READ_SEARCH |
			1<<linux.CAP_FOWNER | 1<<linux.CAP_FSETID | 1<<linux.CAP_LINUX_IMMUTABLE | 1<<linux.CAP_MKNOD | 1<<linux.CAP_MAC_OVERRIDE
		c.FSUID = uid
		switch {
		case old == 0 && uid != 0:
			c.Effective &^= fileCaps
		case old != 0 && uid == 0:
			c.Effective |= c.Permitted & fileCaps
		}
		t.SetCreds(c)
	}
	return uintptr(old), nil, nil
}

func sysSetfsgid(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	gid := args[0].Uint()
	c := t.Creds().Clone()
	old := c.FSGID
	if gid != unchanged && mayUse(c.Has(linux.CAP_SETGID), gid, c.RGID, c.EGID, c.SGID, c.FSGID) {
		c.FSGID = gid
		t.SetCreds(c)
	}
	return uintptr(old), nil, nil
}

func sysGetgroups(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	groups, size := t.Creds().Groups, args[0].Int()
	if size < 0 || (size > 0 && int(size) < len(groups)) {
		return 0, nil, unix.EINVAL
	}
	if size > 0 {
		var buf []byte
		for _, g := range groups {
			buf = binary.LittleEndian.AppendUint32(buf, g)
		}
		if err := t.CopyOut(args[1].Pointer(), buf); err != nil {
			return 0, nil, err
		}
	}
	return uintptr(len(groups)), nil, nil
}

func sysSetgroups(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	const maxGroups = 65536
	n := args[0].Uint()
	c := t.Creds().Clone()
	if !c.Has(linux.CAP_SETGID) {
		return 0, nil, unix.EPERM
	}
	if n > maxGroups {
		return 0, nil, unix.EINVAL
	}
	buf := make([]byte, n*4)
	if err := t.CopyIn(args[1].Pointer(), buf); err != nil {
		return 0, nil, err
	}
	c.Groups = nil
	for i := range n {
		c.Groups = append(c.Groups, binary.LittleEndian.Uint32(buf[i*4:]))
	}
	t.SetCreds(c)
	return 0, nil, nil
}

// capHeader copies the header of capget(2) and capset(2) in, and returns how
// many structures follow. An unknown version is answered with ours.
func capHeader(t *kernel.Task, addr hostarch.Addr) (h linux.CapUserHeader, n int, err error) {
	if err = t.CopyInStruct(addr, &h); err != nil {
		return h, 0, err
	}
	switch h.Version {
	case linux.LINUX_CAPABILITY_VERSION_1:
		return h, 1, nil
	case linux.LINUX_CAPABILITY_VERSION_2, linux.LINUX_CAPABILITY_VERSION_3:
		return h, 2, nil
	}
	if err = copyOutInt(t, addr, linux.LINUX_CAPABILITY_VERSION_3); err == nil {
		err = unix.EINVAL
	}
	return h, 0, err
}

func sysCapget(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	h, n, err := capHeader(t, args[0].Pointer())
	addr := args[1].Pointer()
	if addr == 0 && (err == nil || err == unix.EINVAL) {
		return 0, nil, nil // a question about the version
	}
	if err != nil {
		return 0, nil, err
	}
	other, err := otherTask(t, h.PID)
	if err != nil {
		return 0, nil, err
	}
	c := other.Creds()
	for i := range n {
		shift := 32 * i
		d := linux.CapUserData{
			Effective: uint32(c.Effective >> shift), Permitted: uint32(c.Permitted >> shift), Inheritable: uint32(c.Inheritable >> shift),
		}
		if err := t.CopyOutStruct(addr+hostarch.Addr(i*d.SizeBytes()), &d); err != nil {
			return 0, nil, err
		}
	}
	return 0, nil, nil
}

func sysCapset(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	h, n, err := capHeader(t, args[0].Pointer())
	if err != nil {
		return 0, nil, err
	}
	if h.PID != 0 && h.PID != t.TID() {
		return 0, nil, unix.EPERM
	}
	var e, p, i uint64
	for k := range n {
		var d linux.CapUserData
		if err := t.CopyInStruct(args[1].Pointer()+hostarch.Addr(k*d.SizeBytes()), &d); err != nil {
			return 0, nil, err
		}
		e |= uint64(d.Effective) << (32 * k)
		p |= uint64(d.Permitted) << (32 * k)
		i |= uint64(d.Inheritable) << (32 * k)
	}
	const all = 1<<(linux.CAP_LAST_CAP+1) - 1
	e, p, i = e&all, p&all, i&all
	c := t.Creds().Clone()
	if p&^c.Permitted != 0 || e&^p != 0 || i&^(c.Inheritable|c.Bounding) != 0 ||
		(!c.Has(linux.CAP_SETPCAP) && i&^(c.Inheritable|c.Permitted) != 0) {
		return 0, nil, unix.EPERM
	}
	c.Effective, c.Permitted, c.Inheritable = e, p, i
	c.Ambient &= p & i
	t.SetCreds(c)
	return 0, nil, nil
}

// prctlCreds are the requests of prctl(2) about capabilities.
func prctlCreds(t *kernel.Task, args arch.SyscallArguments) (uintptr, *kernel.SyscallControl, error) {
	const keepCaps, keepCapsLocked, allBits = 1 << 4, 1 << 5, 0xff
	c := t.Creds().Clone()
	arg := args[1].Value
	truth := func(b bool) (uintptr, *kernel.SyscallControl, error) {
		if b {
			return 1, nil, nil
		}
		return 0, nil, nil
	}
	switch args[0].Int() {
	case linux.PR_GET_KEEPCAPS:
		return truth(c.SecureBits&keepCaps != 0)
	case linux.PR_SET_KEEPCAPS:
		if arg > 1 {
			return 0, nil, unix.EINVAL
		}
		if c.SecureBits&keepCapsLocked != 0 {
			return 0, nil, unix.EPERM
		}
		c.SecureBits = c.SecureBits&^keepCaps | uint32(arg)*keepCaps
	case linux.PR_GET_SECUREBITS:
		return uintptr(c.SecureBits), nil, nil
	case linux.PR_SET_SECUREBITS:
		if !c.Has(linux.CAP_SETPCAP) || arg&^allBits != 0 {
			return 0, nil, unix.EPERM
		}
		c.SecureBits = uint32(arg)
	case linux.PR_CAPBSET_READ:
		if arg > linux.CAP_LAST_CAP {
			return 0, nil, unix.EINVAL
		}
		return truth(c.Bounding&(1<<arg) != 0)
	case linux.PR_CAPBSET_DROP:
		if !c.Has(linux.CAP_SETPCAP) {
			return 0, nil, unix.EPERM
		}
		if arg > linux.CAP_LAST_CAP {
			return 0, nil, unix.EINVAL
		}
		c.Bounding &^= 1 << arg
	case linux.PR_CAP_AMBIENT:
		capability := args[2].Value
		if arg != linux.PR_CAP_AMBIENT_CLEAR_ALL && capability > linux.CAP_LAST_CAP {
			return 0, nil, unix.EINVAL
		}
		bit := uint64(1) << (capability & 63)
		switch arg {
		case linux.PR_CAP_AMBIENT_CLEAR_ALL:
			c.Ambient = 0
		case linux.PR_CAP_AMBIENT_IS_SET:
			return truth(c.Ambient&bit != 0)
		case linux.PR_CAP_AMBIENT_RAISE:
			if c.Permitted&c.Inheritable&bit == 0 {
				return 0, nil, unix.EPERM
			}
			c.Ambient |= bit
		case linux.PR_CAP_AMBIENT_LOWER:
			c.Ambient &^= bit
		default:
			return 0, nil, unix.EINVAL
		}
	}
	t.SetCreds(c)
	return 0, nil, nil
}
