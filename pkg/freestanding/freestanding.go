// Package freestanding makes programs that need nothing but a kernel, no Go runtime
// and no file of the host: text of Go assembler, which must be position independent,
// becomes a static ELF in a sealed memory file. They start in a fraction of the time
// that a Go program takes, and have a few pages.
//
// It depends on abi/linux, hostarch and golang.org/x/sys, and not on debug/elf, which
// makes every program that links it larger and start later. What the programs do must
// never be in it.
package freestanding

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
)

// Segment is a part of a program's memory.
type Segment struct {
	// Addr is where it begins, at a multiple of 4096.
	Addr uint64
	// Data are its first bytes. Zeros follow up to Size bytes, a multiple of 4096, if
	// that is more.
	Data []byte
	Size uint64
	// Access is what the program can do with it.
	Access hostarch.AccessType
}

// Program returns a sealed memory file with a program that starts at entry, its stack
// not executable. It can be executed as /proc/self/fd/N. name is for those who look
// at descriptors and mappings.
func Program(name string, entry uint64, segments []Segment) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|mfdExec)
	if err == unix.EINVAL {
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		if err == unix.EACCES {
			return nil, fmt.Errorf("memfd_create of an executable memory file, %s: %w: set sysctl vm.memfd_noexec to 0 or 1", name, err)
		}
		return nil, fmt.Errorf("memfd_create of the memory file %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.Write(Image(entry, segments)); err != nil {
		f.Close()
		return nil, fmt.Errorf("writing a program to the memory file %s: %w", name, err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		f.Close()
		return nil, fmt.Errorf("sealing the memory file %s: %w", name, err)
	}
	return f, nil
}

// mfdExec is MFD_EXEC (linux/memfd.h), since Linux 6.3.
const mfdExec = 0x10

// Image returns the ELF file of a program (elf(5)), as Program: headers in a page of
// their own, then the segments.
func Image(entry uint64, segments []Segment) []byte {
	progs := []linux.ELFProgram{{Type: linux.PT_GNU_STACK, Flags: linux.PF_R | linux.PF_W, Align: 16}}
	size := hostarch.PageSize
	for _, s := range segments {
		size += len(s.Data) + -len(s.Data)&(hostarch.PageSize-1)
	}
	image := make([]byte, hostarch.PageSize, size)
	for _, s := range segments {
		n := uint64(len(s.Data))
		progs = append(progs, linux.ELFProgram{
			Type: linux.PT_LOAD, Flags: flags(s.Access), Off: uint64(len(image)),
			Vaddr: s.Addr, Paddr: s.Addr, Filesz: n, Memsz: max(n, s.Size), Align: hostarch.PageSize,
		})
		image = append(image, s.Data...)
		image = image[:len(image)+int(-n&(hostarch.PageSize-1))]
	}
	header := linux.ELFHeader{Type: linux.ET_EXEC, Machine: machine, Version: linux.EV_CURRENT, Entry: entry}
	headerSize, programSize := header.SizeBytes(), progs[0].SizeBytes()
	header.Phoff, header.Ehsize = uint64(headerSize), uint16(headerSize)
	header.Phentsize, header.Phnum = uint16(programSize), uint16(len(progs))
	copy(header.Ident[:], "\x7fELF")
	header.Ident[linux.EI_CLASS] = linux.ELFCLASS64
	header.Ident[linux.EI_DATA] = linux.ELFDATA2LSB
	header.Ident[linux.EI_VERSION] = linux.EV_CURRENT
	header.MarshalBytes(image)
	for i := range progs {
		progs[i].MarshalBytes(image[headerSize+i*programSize:])
	}
	return image
}

func flags(at hostarch.AccessType) (f uint32) {
	if at.Read {
		f |= linux.PF_R
	}
	if at.Write {
		f |= linux.PF_W
	}
	if at.Execute {
		f |= linux.PF_X
	}
	return f
}
