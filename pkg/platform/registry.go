package platform

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/ringfence/ringfence/pkg/fd"
)

// Constructor makes instances of one kind of Platform.
type Constructor interface {
	// New returns a new platform. deviceFile is what OpenDevice returned, and
	// becomes the platform's; it is nil for platforms that have no device.
	//
	// A platform that cannot work here gives an error that says why and what
	// would help, and wraps ErrNotSupported or the host's errno.
	New(deviceFile *fd.FD) (Platform, error)

	// OpenDevice opens the device that the platform needs, or the default one
	// ("/dev/kvm" for kvm) if devicePath is empty. Platforms that have none
	// return nil for an empty path, and an error for any other.
	OpenDevice(devicePath string) (*fd.FD, error)

	// Requirements says what the process needs before it calls New.
	Requirements() Requirements

	// PrecompiledSeccompInfo lists the SeccompInfo of every configuration that
	// New can end up with, for programs that are compiled at build time.
	PrecompiledSeccompInfo() []SeccompInfo
}

// Requirements says what a platform needs of the process that it runs in.
type Requirements struct {
	// RequiresCapSysPtrace says that the process must hold CAP_SYS_PTRACE.
	RequiresCapSysPtrace bool
}

var registry struct {
	sync.RWMutex
	constructors map[string]Constructor
}

// Register makes a platform available under name. Backends call it from init.
// It panics when the name is taken, which is a mistake of the program.
func Register(name string, platform Constructor) {
	registry.Lock()
	defer registry.Unlock()
	if _, ok := registry.constructors[name]; ok {
		panic(fmt.Sprintf("platform.Register: %q is registered already", name))
	}
	if registry.constructors == nil {
		registry.constructors = make(map[string]Constructor)
	}
	registry.constructors[name] = platform
}

// List returns the names of the registered platforms, sorted.
func List() (available []string) {
	registry.RLock()
	defer registry.RUnlock()
	return slices.Sorted(maps.Keys(registry.constructors))
}

// Lookup returns the Constructor registered under name. The error for an
// unknown name lists those that exist.
func Lookup(name string) (Constructor, error) {
	registry.RLock()
	c, ok := registry.constructors[name]
	registry.RUnlock()
	if ok {
		return c, nil
	}
	names := "none is linked into this program: import package platforms"
	if list := List(); len(list) > 0 {
		names = "use one of: " + strings.Join(list, ", ")
	}
	return nil, fmt.Errorf("unknown platform %q: %s", name, names)
}
