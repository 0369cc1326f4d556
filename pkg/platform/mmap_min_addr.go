package platform

import (
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/ringfence/ringfence/pkg/hostarch"
)

// mmapMinAddrPath is the sysctl vm.mmap_min_addr (proc_sys_vm(5)).
const mmapMinAddrPath = "/proc/sys/vm/mmap_min_addr"

// defaultMMapMinAddr is used where the sysctl cannot be read: the kernel's own
// recommended value (CONFIG_DEFAULT_MMAP_MIN_ADDR).
const defaultMMapMinAddr = 65536

var systemMMapMinAddr = sync.OnceValue(func() hostarch.Addr {
	b, err := os.ReadFile(mmapMinAddrPath)
	if err != nil {
		return defaultMMapMinAddr
	}
	return parseMMapMinAddr(string(b))
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
