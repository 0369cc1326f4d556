package filter

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/freestanding"
	"github.com/ringfence/ringfence/pkg/hostarch"
)

// To wait for what does not happen needs no Go runtime, which takes 2 ms of CPU and
// megabytes: the Monitor begins as watch, a freestanding program that sleeps until a
// system call waits for the listener, and then executes monitorExe, with its own
// arguments and environment. It looks at the listener and leaves it in the socket.
//
// It ends with the Sentry. If it fails before, forbidden calls fail with ENOSYS.

const (
	//lint:ignore U1000 the assembler uses it
	watchFlags = unix.MSG_PEEK | unix.MSG_CMSG_CLOEXEC
	//lint:ignore U1000 the assembler uses it
	atEmptyPath = unix.AT_EMPTY_PATH
)

// watchBase is where the program is: any address does that is above
// vm.mmap_min_addr.
const watchBase = 1 << 20

func watchSymbols() (start, end uintptr)

// watchProgram returns the file of the program that watch is. Tests change it.
var watchProgram = func() (*os.File, error) {
	start, end := watchSymbols()
	if start >= end || end-start > hostarch.PageSize {
		return nil, fmt.Errorf("the monitor's text: the linker has put it from %#x to %#x", start, end)
	}
	return freestanding.Program("ringfence-monitor", watchBase, []freestanding.Segment{
		{Addr: watchBase, Data: freestanding.Text(start, end), Access: hostarch.ReadExec},
	})
}
