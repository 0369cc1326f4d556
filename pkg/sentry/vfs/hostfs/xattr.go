package hostfs

import (
	"context"
	"strings"

	"golang.org/x/sys/unix"
)

// path returns a name for the file itself in the host's own file tree, for calls
// that have no form with a descriptor.
func (n *node) path() string { return "/proc/self/fd/" + procName(n.fd) }

// GetXattr implements vfs.Xattrer.
func (n *node) GetXattr(_ context.Context, name string, buf []byte) (int, error) {
	return unix.Getxattr(n.path(), name, buf)
}

// ListXattr implements vfs.Xattrer.
func (n *node) ListXattr(_ context.Context, buf []byte) (int, error) {
	return unix.Listxattr(n.path(), buf)
}

// settable returns EPERM for attributes that decide what the host does.
func (n *node) settable(name string) error {
	if err := n.check(); err != nil {
		return err
	}
	if !strings.HasPrefix(name, "user.") && !strings.HasPrefix(name, "system.posix_acl_") {
		return unix.EPERM
	}
	return nil
}

// SetXattr implements vfs.Xattrer.
func (n *node) SetXattr(_ context.Context, name string, value []byte, flags uint32) error {
	if err := n.settable(name); err != nil {
		return err
	}
	return unix.Setxattr(n.path(), name, value, int(flags))
}

// RemoveXattr implements vfs.Xattrer.
func (n *node) RemoveXattr(_ context.Context, name string) error {
	if err := n.settable(name); err != nil {
		return err
	}
	return unix.Removexattr(n.path(), name)
}
