// Package freestanding makes programs that need nothing but a kernel, no Go runtime
// and no file of the host: text of Go assembler, which must be position independent,
// becomes a static ELF in a sealed memory file. They start in a fraction of the time
// that a Go program takes, and have a few pages.
//
// It depends on golang.org/x/sys. What the programs do must never be in it.
package freestanding

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const pageSize = 4096

// Segment is a part of a program's memory.
type Segment struct {
	// Addr is where it begins, at a multiple of 4096.
	Addr uint64
	// Data are its first bytes. Zeros follow up to Size bytes, a multiple of 4096, if
	// that is more.
	Data []byte
	Size uint64
	// Flags are elf.PF_R and so on.
	Flags elf.ProgFlag
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
	if _, err := f.Write(image(entry, segments)); err != nil {
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

// image returns the ELF file: headers in a page of their own, then the segments.
func image(entry uint64, segments []Segment) []byte {
	progs := []elf.Prog64{{Type: uint32(elf.PT_GNU_STACK), Flags: uint32(elf.PF_R | elf.PF_W), Align: 16}}
	data := make([]byte, pageSize)
	for _, s := range segments {
		n := uint64(len(s.Data))
		progs = append(progs, elf.Prog64{
			Type: uint32(elf.PT_LOAD), Flags: uint32(s.Flags), Off: uint64(len(data)),
			Vaddr: s.Addr, Paddr: s.Addr, Filesz: n, Memsz: max(n, s.Size), Align: pageSize,
		})
		data = append(data, s.Data...)
		data = append(data, make([]byte, -n&(pageSize-1))...)
	}
	hdr := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: uint32(elf.EV_CURRENT),
		Entry: entry, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: uint16(len(progs)),
	}
	copy(hdr.Ident[:], elf.ELFMAG)
	hdr.Ident[elf.EI_CLASS] = byte(elf.ELFCLASS64)
	hdr.Ident[elf.EI_DATA] = byte(elf.ELFDATA2LSB)
	hdr.Ident[elf.EI_VERSION] = byte(elf.EV_CURRENT)
	var out bytes.Buffer
	// A Buffer takes everything.
	_ = binary.Write(&out, binary.LittleEndian, hdr)
	_ = binary.Write(&out, binary.LittleEndian, progs)
	copy(data, out.Bytes())
	return data
}
