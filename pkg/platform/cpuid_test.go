package platform

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// pages is a MemoryManager that holds pages and counts the bytes read.
type pages struct {
	MemoryManager
	mem  map[hostarch.Addr][]byte
	read int
}

func (p *pages) CopyIn(_ context.Context, addr hostarch.Addr, dst []byte, _ usermem.IOOpts) (n int, err error) {
	for n < len(dst) {
		a := addr + hostarch.Addr(n)
		page, ok := p.mem[a.RoundDown()]
		if !ok {
			return n, fmt.Errorf("%v: %w", a, unix.EFAULT)
		}
		c := copy(dst[n:], page[a.PageOffset():])
		n += c
		p.read += c
	}
	return n, nil
}
