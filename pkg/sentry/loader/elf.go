package loader

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"github.com/ringfence/ringfence/pkg/abi/linux"
	"github.com/ringfence/ringfence/pkg/hostarch"
	"github.com/ringfence/ringfence/pkg/memmap"
	"github.com/ringfence/ringfence/pkg/sentry/mm"
	"github.com/ringfence/ringfence/pkg/usermem"
)

// Limits and sizes of ELF files; the kernel's limits are the same.
const (
	headerSize     = 64
	programSize    = 56
	maxProgramSize = 64 << 10 // of all program headers
	maxInterp      = 4096
)

// program is an ELF file whose headers were checked.
type program struct {
	file   File
	header linux.ELFHeader
	loads  []linux.ELFProgram

	// span is from the first page to the last byte of the loads, before the bias.
	span hostarch.AddrRange
	// align is the largest alignment that a load asks for.
	align uint64

	interp    string
	execStack bool
	// phdrAddr is where the program headers are loaded, before the bias.
	phdrAddr uint64
}

// invalid says what is wrong with the file.
func invalid(f File, format string, args ...any) error {
	return fmt.Errorf("%s: %s: %w", f.Path(), fmt.Sprintf(format, args...), unix.ENOEXEC)
}

// readAll fills b from offset off of f.
func readAll(f File, b []byte, off uint64, what string) error {
	if off > uint64(1<<63-1-len(b)) {
		return invalid(f, "%s at offset %#x", what, off)
	}
	n, err := f.ReadAt(b, int64(off))
	if n == len(b) {
		return nil
	}
	if err == nil || err == io.EOF || err == io.ErrUnexpectedEOF {
		return invalid(f, "the file ends in the %s", what)
	}
	return fmt.Errorf("read %s: %w", f.Path(), err)
}

// readELF reads and checks the headers of f.
func readELF(f File) (*program, error) {
	var buf [headerSize]byte
	n, err := f.ReadAt(buf[:], 0)
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("read %s: %w", f.Path(), err)
	}
	if !bytes.HasPrefix(buf[:n], []byte("\x7fELF")) {
		return nil, invalid(f, "neither an ELF program nor a script that starts with #!")
	}
	if n < headerSize {
		return nil, invalid(f, "the file ends in the ELF header")
	}
	p := &program{file: f, align: hostarch.PageSize}
	h := &p.header
	h.UnmarshalBytes(buf[:])
	switch {
	case h.Ident[linux.EI_CLASS] == linux.ELFCLASS32:
		return nil, invalid(f, "a 32-bit program: only 64-bit ones can be run")
	case h.Ident[linux.EI_CLASS] != linux.ELFCLASS64 || h.Ident[linux.EI_DATA] != linux.ELFDATA2LSB:
		return nil, invalid(f, "not a 64-bit little-endian ELF file")
	case h.Machine != elfMachine:
		return nil, invalid(f, "a program for ELF machine %d: this is %d", h.Machine, elfMachine)
	case h.Type != linux.ET_EXEC && h.Type != linux.ET_DYN:
		return nil, invalid(f, "an ELF file of type %d: only programs can be run", h.Type)
	case h.Phentsize != programSize || h.Phnum == 0 || int(h.Phnum)*programSize > maxProgramSize:
		return nil, invalid(f, "%d program headers of %d bytes", h.Phnum, h.Phentsize)
	}
	table := make([]byte, int(h.Phnum)*programSize)
	if err := readAll(f, table, h.Phoff, "program headers"); err != nil {
		return nil, err
	}
	for ; len(table) > 0; table = table[programSize:] {
		var ph linux.ELFProgram
		ph.UnmarshalBytes(table)
		if err := p.add(ph); err != nil {
			return nil, err
		}
	}
	if len(p.loads) == 0 {
		return nil, invalid(f, "nothing to load")
	}
	return p, nil
}

// add takes note of a program header.
func (p *program) add(ph linux.ELFProgram) error {
	switch ph.Type {
	case linux.PT_INTERP:
		if p.interp != "" {
			return nil // the first one counts
		}
		if ph.Filesz < 2 || ph.Filesz > maxInterp {
			return invalid(p.file, "an interpreter's name of %d bytes", ph.Filesz)
		}
		name := make([]byte, ph.Filesz)
		if err := readAll(p.file, name, ph.Off, "interpreter's name"); err != nil {
			return err
		}
		if name[len(name)-1] != 0 {
			return invalid(p.file, "an interpreter's name without an end")
		}
		p.interp = string(name[:bytes.IndexByte(name, 0)])
		if p.interp == "" {
			return invalid(p.file, "an empty interpreter's name")
		}
	case linux.PT_GNU_STACK:
		p.execStack = ph.Flags&linux.PF_X != 0
	case linux.PT_LOAD:
		end := ph.Vaddr + ph.Memsz
		switch {
		case ph.Memsz == 0:
			return nil
		case ph.Filesz > ph.Memsz || end < ph.Vaddr || end > maxVaddr || ph.Off+ph.Filesz < ph.Off || ph.Off+ph.Filesz > 1<<63-1-hostarch.PageSize:
			return invalid(p.file, "a segment of %#x bytes at %#x from %#x bytes at offset %#x", ph.Memsz, ph.Vaddr, ph.Filesz, ph.Off)
		case (ph.Vaddr-ph.Off)&hostarch.PageMask != 0:
			return invalid(p.file, "a segment at %#x from offset %#x: not congruent", ph.Vaddr, ph.Off)
		}
		if len(p.loads) > 0 && hostarch.Addr(ph.Vaddr) < p.span.End {
			return invalid(p.file, "segments that overlap or are not in order")
		}
		if len(p.loads) == 0 {
			p.span.Start = hostarch.Addr(ph.Vaddr).RoundDown()
		}
		p.span.End = hostarch.Addr(end)
		if a := ph.Align; a > p.align && a&(a-1) == 0 {
			p.align = min(a, maxAlign)
		}
		if p.phdrAddr == 0 && ph.Off <= p.header.Phoff && p.header.Phoff-ph.Off < ph.Filesz {
			p.phdrAddr = p.header.Phoff - ph.Off + ph.Vaddr
		}
		p.loads = append(p.loads, ph)
	}
	return nil
}

const (
	// maxVaddr is well beyond any address space and keeps sums from wrapping.
	maxVaddr = 1 << 56
	// maxAlign is the largest alignment that is honoured.
	maxAlign = 1 << 30
)

// load maps p and returns its bias: what is to be added to its addresses. A
// program with addresses of its own has 0. Others lie at base, or with base 0
// wherever there is room.
func (p *program) load(ctx context.Context, m *mm.MemoryManager, base hostarch.Addr) (hostarch.Addr, error) {
	length, _ := hostarch.PageRoundUp(p.span.Length()) // span is far from wrapping
	slack := uint64(0)
	opts := memmap.MMapOpts{Length: length, Addr: p.span.Start, Fixed: true, Private: true, MaxPerms: hostarch.AnyAccess}
	if p.header.Type == linux.ET_DYN {
		slack = p.align - hostarch.PageSize
		opts.Length, opts.Addr, opts.Fixed = length+slack, base, false
	}
	// Find room for all of it, then map the parts there.
	start, err := m.MMap(ctx, opts)
	if err != nil {
		if errors.Is(err, unix.ENOMEM) {
			return 0, fmt.Errorf("%s: no room for %#x bytes at %v: %w", p.file.Path(), opts.Length, opts.Addr, err)
		}
		return 0, invalid(p.file, "%#x bytes cannot be mapped at %v (%v)", opts.Length, opts.Addr, err)
	}
	if err := m.MUnmap(ctx, start, opts.Length); err != nil {
		return 0, fmt.Errorf("%s: unmap: %w", p.file.Path(), err)
	}
	bias := hostarch.Addr(0)
	if p.header.Type == linux.ET_DYN {
		a := hostarch.Addr(p.align)
		bias = (start - p.span.Start + a - 1) &^ (a - 1)
	}
	for _, ph := range p.loads {
		if err := p.loadSegment(ctx, m, ph, bias); err != nil {
			return 0, fmt.Errorf("%s: map segment at %#x: %w", p.file.Path(), ph.Vaddr, err)
		}
	}
	return bias, nil
}

// loadSegment maps one segment: pages of the file, then pages of zeros.
func (p *program) loadSegment(ctx context.Context, m *mm.MemoryManager, ph linux.ELFProgram, bias hostarch.Addr) error {
	perms := hostarch.AccessType{Read: ph.Flags&linux.PF_R != 0, Write: ph.Flags&linux.PF_W != 0, Execute: ph.Flags&linux.PF_X != 0}
	start := bias + hostarch.Addr(ph.Vaddr)
	fileEnd, end := start+hostarch.Addr(ph.Filesz), start+hostarch.Addr(ph.Memsz)
	zeros := start.RoundDown()
	if ph.Filesz > 0 {
		zeros = fileEnd.MustRoundUp()
		opts := memmap.MMapOpts{
			Length: uint64(zeros - start.RoundDown()), Offset: hostarch.PageRoundDown(ph.Off),
			Addr: start.RoundDown(), Fixed: true, Unmap: true,
			Private: true, Perms: perms, MaxPerms: hostarch.AnyAccess,
		}
		if err := p.file.ConfigureMMap(ctx, &opts); err != nil {
			return err
		}
		if _, err := m.MMap(ctx, opts); err != nil {
			return err
		}
		// What follows the file's bytes in their last page is the program's zeros.
		if n := min(zeros, end) - fileEnd; end > fileEnd && perms.Write && n > 0 {
			if _, err := m.ZeroOut(ctx, fileEnd, int64(zeros-fileEnd), usermem.IOOpts{IgnorePermissions: true}); err != nil {
				return fmt.Errorf("zero the rest of a page: %w: %w", err, unix.ENOEXEC)
			}
		}
	}
	if length := end.MustRoundUp() - zeros; end > zeros {
		_, err := m.MMap(ctx, memmap.MMapOpts{
			Length: uint64(length), Addr: zeros, Fixed: true, Unmap: true,
			Private: true, Perms: perms, MaxPerms: hostarch.AnyAccess,
		})
		return err
	}
	return nil
}
