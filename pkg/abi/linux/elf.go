package linux

// Parts of e_ident (elf(5)).
const (
	EI_NIDENT   = 16
	EI_CLASS    = 4
	EI_DATA     = 5
	EI_VERSION  = 6
	EI_OSABI    = 7
	ELFCLASS32  = 1
	ELFCLASS64  = 2
	ELFDATA2LSB = 1
	EV_CURRENT  = 1
)

// Types and machines of ELF files.
const (
	ET_NONE = 0
	ET_REL  = 1
	ET_EXEC = 2
	ET_DYN  = 3
	ET_CORE = 4

	EM_386     = 3
	EM_ARM     = 40
	EM_X86_64  = 62
	EM_AARCH64 = 183
)

// Types and flags of program headers.
const (
	PT_NULL         = 0
	PT_LOAD         = 1
	PT_DYNAMIC      = 2
	PT_INTERP       = 3
	PT_NOTE         = 4
	PT_SHLIB        = 5
	PT_PHDR         = 6
	PT_TLS          = 7
	PT_GNU_EH_FRAME = 0x6474e550
	PT_GNU_STACK    = 0x6474e551
	PT_GNU_RELRO    = 0x6474e552
	PT_GNU_PROPERTY = 0x6474e553
	PF_X            = 1
	PF_W            = 2
	PF_R            = 4
)

// Types of the auxiliary vector's entries (getauxval(3), linux/auxvec.h).
const (
	AT_NULL              = 0
	AT_IGNORE            = 1
	AT_EXECFD            = 2
	AT_PHDR              = 3
	AT_PHENT             = 4
	AT_PHNUM             = 5
	AT_PAGESZ            = 6
	AT_BASE              = 7
	AT_FLAGS             = 8
	AT_ENTRY             = 9
	AT_NOTELF            = 0xa
	AT_UID               = 0xb
	AT_EUID              = 0xc
	AT_GID               = 0xd
	AT_EGID              = 0xe
	AT_PLATFORM          = 0xf
	AT_HWCAP             = 0x10
	AT_CLKTCK            = 0x11
	AT_SECURE            = 0x17
	AT_BASE_PLATFORM     = 0x18
	AT_RANDOM            = 0x19
	AT_HWCAP2            = 0x1a
	AT_RSEQ_FEATURE_SIZE = 0x1b
	AT_RSEQ_ALIGN        = 0x1c
	AT_HWCAP3            = 0x1d
	AT_HWCAP4            = 0x1e
	AT_EXECFN            = 0x1f
	AT_SYSINFO_EHDR      = 0x21
	AT_MINSIGSTKSZ       = 0x33
)

// Register sets of PTRACE_GETREGSET (linux/elf.h).
const (
	NT_PRSTATUS        = 1
	NT_PRFPREG         = 2
	NT_X86_XSTATE      = 0x202
	NT_ARM_TLS         = 0x401
	NT_ARM_SYSTEM_CALL = 0x404
	NT_ARM_SVE         = 0x405
	NT_ARM_PAC_MASK    = 0x406
)

// ELFHeader is Elf64_Ehdr (elf(5)).
type ELFHeader struct {
	Ident     [16]byte
	Type      uint16
	Machine   uint16
	Version   uint32
	Entry     uint64
	Phoff     uint64
	Shoff     uint64
	Flags     uint32
	Ehsize    uint16
	Phentsize uint16
	Phnum     uint16
	Shentsize uint16
	Shnum     uint16
	Shstrndx  uint16
}

func (s *ELFHeader) fields(c *codec) {
	c.raw(s.Ident[:])
	c.u16(&s.Type)
	c.u16(&s.Machine)
	c.u32(&s.Version)
	c.u64(&s.Entry)
	c.u64(&s.Phoff)
	c.u64(&s.Shoff)
	c.u32(&s.Flags)
	c.u16(&s.Ehsize)
	c.u16(&s.Phentsize)
	c.u16(&s.Phnum)
	c.u16(&s.Shentsize)
	c.u16(&s.Shnum)
	c.u16(&s.Shstrndx)
}

// SizeBytes implements Struct.
func (s *ELFHeader) SizeBytes() int { return 64 }

// MarshalBytes implements Struct.
func (s *ELFHeader) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *ELFHeader) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }

// ELFProgram is Elf64_Phdr (elf(5)).
type ELFProgram struct {
	Type   uint32
	Flags  uint32
	Off    uint64
	Vaddr  uint64
	Paddr  uint64
	Filesz uint64
	Memsz  uint64
	Align  uint64
}

func (s *ELFProgram) fields(c *codec) {
	c.u32(&s.Type)
	c.u32(&s.Flags)
	c.u64(&s.Off)
	c.u64(&s.Vaddr)
	c.u64(&s.Paddr)
	c.u64(&s.Filesz)
	c.u64(&s.Memsz)
	c.u64(&s.Align)
}

// SizeBytes implements Struct.
func (s *ELFProgram) SizeBytes() int { return 56 }

// MarshalBytes implements Struct.
func (s *ELFProgram) MarshalBytes(dst []byte) { s.fields(&codec{dst, true}) }

// UnmarshalBytes implements Struct.
func (s *ELFProgram) UnmarshalBytes(src []byte) { s.fields(&codec{src, false}) }
