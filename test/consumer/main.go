// Command consumer is a sandbox of its own on Ringfence: it runs machine code,
// lets it write and exit, and refuses every other system call.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/arch"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/platform"
	_ "github.com/ringfence/ringfence/pkg/platform/platforms"
)

// start is where the program and its data are mapped, size how much of it.
const start, size = hostarch.Addr(0x10000000), 0x10000

// memory is the application's memory: a memfd, all of it mapped here as well.
type memory struct {
	platform.MemoryManager // nil: nobody asks for more than the AddressSpace
	fd                     int
	bytes                  []byte
	as                     platform.AddressSpace
}

func (m *memory) IncRef(memmap.FileRange)             {}
func (m *memory) DecRef(memmap.FileRange)             {}
func (m *memory) FD() int                             { return m.fd }
func (m *memory) AddressSpace() platform.AddressSpace { return m.as }
func (m *memory) MapInternal(fr memmap.FileRange, _ hostarch.AccessType) ([][]byte, error) {
	return [][]byte{m.bytes[fr.Start:fr.End]}, nil
}

// run runs code on the named platform until it exits, and returns its status.
func run(name string, code []byte, out io.Writer) (status int, err error) {
	constructor, err := platform.Lookup(name)
	if err != nil {
		return 0, err
	}
	device, err := constructor.OpenDevice("")
	if err != nil {
		return 0, err
	}
	p, err := constructor.New(device)
	if err != nil {
		return 0, err
	}
	m := &memory{}
	if m.fd, err = unix.MemfdCreate("consumer", unix.MFD_CLOEXEC); err != nil {
		return 0, err
	}
	defer unix.Close(m.fd)
	if err := unix.Ftruncate(m.fd, size); err != nil {
		return 0, err
	}
	if m.bytes, err = unix.Mmap(m.fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return 0, err
	}
	defer unix.Munmap(m.bytes)
	copy(m.bytes, code)
	if m.as, _, err = p.NewAddressSpace(nil); err != nil {
		return 0, err
	}
	defer m.as.Release()
	if err := m.as.MapFile(start, m, memmap.FileRange{End: size}, hostarch.AnyAccess, false); err != nil {
		return 0, err
	}
	ctx := context.Background()
	thread, regs := p.NewContext(ctx), arch.New()
	defer thread.Release()
	regs.SetIP(uintptr(start))
	regs.SetStack(uintptr(start + size))
	for {
		info, access, err := thread.Switch(ctx, m, regs, -1)
		switch {
		case err == platform.ErrContextInterrupt:
			continue
		case err == platform.ErrContextSignal:
			return 0, fmt.Errorf("signal %d at %#x, access %v", info.Signo, regs.IP(), access)
		case err != nil:
			return 0, err
		}
		args, result := regs.SyscallArgs(), -int(unix.EPERM)
		switch regs.SyscallNo() {
		case unix.SYS_WRITE: // only what lies in the mapping, and a copy of it
			from, length := args[1].Pointer()-start, args[2].SizeT()
			if result = -int(unix.EFAULT); from < size && length <= size-uint(from) {
				result, _ = out.Write(append([]byte(nil), m.bytes[from:uint(from)+length]...))
			}
		case unix.SYS_EXIT_GROUP:
			return int(args[0].Int()), nil
		}
		regs.SetReturn(uintptr(result))
	}
}

func main() {
	status, err := run("ptrace", program, os.Stdout)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("exit status", status)
}
