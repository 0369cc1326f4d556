package kernel

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/sentry/vfs"
)

// allCaps is the set of every capability.
const allCaps = 1<<(linux.CAP_LAST_CAP+1) - 1

// Creds are the credentials of a task (credentials(7)). They never change once
// a task has them: calls that change them install a copy.
//
// They rule what happens inside the sandbox alone; the host sees those of the
// Sentry's process.
type Creds struct {
	RUID, EUID, SUID, FSUID uint32
	RGID, EGID, SGID, FSGID uint32
	Groups                  []uint32

	// Effective, Permitted, Inheritable, Bounding and Ambient are the
	// capability sets.
	Effective, Permitted, Inheritable, Bounding, Ambient uint64

	// SecureBits and NoNewPrivs are those of prctl(2). KeepCaps is in SecureBits.
	SecureBits uint32
	NoNewPrivs bool

	file vfs.Creds
}

// HostCreds returns the credentials of the Sentry's own process. The user root
// has all capabilities.
func HostCreds() *Creds {
	c := &Creds{
		RUID: uint32(unix.Getuid()), EUID: uint32(unix.Geteuid()),
		RGID: uint32(unix.Getgid()), EGID: uint32(unix.Getegid()),
		Bounding: allCaps,
	}
	c.SUID, c.FSUID, c.SGID, c.FSGID = c.EUID, c.EUID, c.EGID, c.EGID
	groups, _ := unix.Getgroups() // the kernel only refuses a bad buffer
	for _, g := range groups {
		c.Groups = append(c.Groups, uint32(g))
	}
	if c.EUID == 0 {
		c.Effective, c.Permitted = allCaps, allCaps
	}
	return c.finish()
}

// Clone returns a copy of c to be changed and given to Task.SetCreds.
func (c *Creds) Clone() *Creds {
	n := *c
	n.Groups = slices.Clone(c.Groups)
	return &n
}

// finish computes what files are checked against.
func (c *Creds) finish() *Creds {
	c.file = vfs.Creds{
		UID: c.FSUID, GID: c.FSGID, Groups: c.Groups,
		Override: c.Has(linux.CAP_DAC_OVERRIDE) && c.Has(linux.CAP_FOWNER),
	}
	return c
}

// Has reports whether the capability is effective.
func (c *Creds) Has(capability uint) bool { return c.Effective&(1<<capability) != 0 }

// SetUIDs installs new user IDs, and changes the capabilities as Linux does
// when a task gives up or gains the user 0 (capabilities(7), "Effect of user ID
// changes").
func (c *Creds) SetUIDs(r, e, s uint32) {
	hadRoot := c.RUID == 0 || c.EUID == 0 || c.SUID == 0
	wasRoot := c.EUID == 0
	c.RUID, c.EUID, c.SUID, c.FSUID = r, e, s, e
	const keepCaps = 1 << 4
	if hadRoot && r != 0 && e != 0 && s != 0 {
		if c.SecureBits&keepCaps == 0 {
			c.Permitted, c.Effective = 0, 0
		}
		c.Ambient = 0
	}
	switch {
	case wasRoot && e != 0:
		c.Effective = 0
	case !wasRoot && e == 0:
		c.Effective = c.Permitted
	}
}

// exec changes c as execve(2) of a file without set-user-ID bits and file
// capabilities does.
func (c *Creds) exec() *Creds {
	n := c.Clone()
	n.SUID, n.FSUID, n.SGID, n.FSGID = n.EUID, n.EUID, n.EGID, n.EGID
	n.SecureBits &^= 1 << 4
	switch {
	case n.EUID == 0:
		n.Permitted = n.Inheritable | n.Bounding
		n.Effective = n.Permitted
	case n.RUID == 0:
		n.Permitted = n.Inheritable | n.Bounding
		n.Effective = n.Ambient
	default:
		n.Permitted, n.Effective = n.Ambient, n.Ambient
	}
	return n.finish()
}
