package platform

import (
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
)

// mmapMinAddrPath is the sysctl vm.mmap_min_addr (proc_sys_vm(5)).
const mmapMinAddrPath = "/proc/sys/vm/mmap_min_addr"

// defaultMMapMinAddr is used where the sysctl cannot be read: the kernel's own
// recommended value (CONFIG_DEFAULT_MMAP_MIN_ADDR).
const defaultMMapMinAddr = 65536

var systemMMapMinAddr = sync.OnceValue(func() hostarch.Addr {
	// Package os would have the network poller, which wakes a thread, look at it.
	fd, err := unix.Open(mmapMinAddrPath, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return defaultMMapMinAddr
	}
	defer unix.Close(fd)
	var buf [32]byte
	n, err := unix.Read(fd, buf[:])
	if err != nil {
		return defaultMMapMinAddr
	}
	return parseMMapMinAddr(string(buf[:n]))
})

func parseMMapMinAddr(s string) hostarch.Addr {
	v, err := strconv.ParseUint(strings.TrimSpace(s), 10, 64)
	if err != nil {
		return defaultMMapMinAddr
	}
	addr, ok := hostarch.Addr(v).RoundUp()
	if !ok {
		return defaultMMapMinAddr
	}
	return addr
}

// SystemMMapMinAddr returns the lowest address that the host allows a process
// to map: sysctl vm.mmap_min_addr rounded up to a page, or 64 KiB where that
// cannot be read.
func SystemMMapMinAddr() hostarch.Addr { return systemMMapMinAddr() }

// MMapMinAddr is embedded by Platforms that map through the host's mmap(2).
type MMapMinAddr struct{}

// MinUserAddress implements Platform.MinUserAddress.
func (*MMapMinAddr) MinUserAddress() hostarch.Addr { return SystemMMapMinAddr() }
