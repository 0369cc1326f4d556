// Package rootfs puts together the Namespace that a sandbox starts with: a host
// directory as the root, binds, and private /tmp, /dev and /proc.
//
// It depends on vfs and on every file system. It holds no file system of its own.
package rootfs

import (
	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/sentry/vfs"
)

// Bind is a host directory or file that the Namespace shows at another place.
type Bind struct {
	Source, Target string
}

// Config says what a Namespace is made of.
type Config struct {
	// Root is the host directory at "/".
	Root string
	// Write lets tasks change files under Root and the Binds.
	Write bool
	Binds []Bind
	// Proc is what /proc shows.
	Proc vfs.ProcProvider
}

// New returns a Namespace. Errors name the directory and the fix.
func New(Config) (*vfs.Namespace, error) { return nil, unix.ENOSYS }
