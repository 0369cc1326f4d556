package guest

// saRestorer is SA_RESTORER: the action says where its handler returns to.
const saRestorer = 0x04000000

// textSymbols returns where this program's linker has put the text.
func textSymbols() (s symbols)
