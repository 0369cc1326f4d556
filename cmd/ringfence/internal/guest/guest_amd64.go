package guest

import "debug/elf"

const (
	machine = elf.EM_X86_64

	// saRestorer is SA_RESTORER: the action says where its handler returns to.
	saRestorer = 0x04000000
)

// textSymbols returns where this program's linker has put the text.
func textSymbols() (s symbols)
