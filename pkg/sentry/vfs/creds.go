package vfs

import (
	"context"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Creds are the credentials that file access is checked against.
type Creds struct {
	// UID and GID are the file system IDs (setfsuid(2)); Groups are the
	// supplementary groups.
	UID, GID uint32
	Groups   []uint32

	// Override is CAP_DAC_OVERRIDE with CAP_FOWNER and CAP_CHOWN: permission
	// bits and ownership do not matter.
	Override bool
}

type ctxKey int

// CtxCreds is the key with which a task's context gives its *Creds. A context
// without them acts with those of the Sentry's own process.
const CtxCreds ctxKey = iota

// hostCreds are the credentials of the Sentry's process, that the host checks.
var hostCreds = sync.OnceValue(func() *Creds {
	groups, _ := unix.Getgroups() // the kernel only refuses a bad buffer
	c := &Creds{UID: uint32(unix.Geteuid()), GID: uint32(unix.Getegid())}
	for _, g := range groups {
		c.Groups = append(c.Groups, uint32(g))
	}
	c.Override = c.UID == 0
	return c
})

// CredsFromContext returns the credentials that ctx acts with.
func CredsFromContext(ctx context.Context) *Creds {
	if c, ok := ctx.Value(CtxCreds).(*Creds); ok && c != nil {
		return c
	}
	return hostCreds()
}

// IsHost reports whether c are the credentials of the Sentry's own process: then
// the host has checked, or will check, access to its files.
func (c *Creds) IsHost() bool {
	h := hostCreds()
	return c == h || (c.UID == h.UID && c.GID == h.GID && c.Override == h.Override && slices.Equal(c.Groups, h.Groups))
}

// InGroup reports whether gid is the file system group or a supplementary one.
func (c *Creds) InGroup(gid uint32) bool {
	return c.GID == gid || slices.Contains(c.Groups, gid)
}

// Owns reports whether c may do what only the owner of a file may.
func (c *Creds) Owns(st *unix.Stat_t) bool { return c.Override || c.UID == st.Uid }

// The kinds of access, with the values of access(2).
const (
	MayExec  = 1
	MayWrite = 2
	MayRead  = 4
)

// Allowed reports whether the permission bits of st let c access a file in all
// ways of mask (path_resolution(7)).
func (c *Creds) Allowed(st *unix.Stat_t, mask uint32) bool {
	if c.Override {
		isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
		return mask&MayExec == 0 || isDir || st.Mode&0o111 != 0
	}
	bits := st.Mode
	switch {
	case c.UID == st.Uid:
		bits >>= 6
	case c.InGroup(st.Gid):
		bits >>= 3
	}
	return mask&^(bits&7) == 0
}
