package platformtest

// program is machine code that runs as application code: a pointer to its first
// byte in the text of the test binary. The comments below say arg0 to arg5 for
// the registers that hold a system call's arguments. "Reports" means that it
// makes the system call nrReport, and starts over when that returns.
type program = *byte

// nrReport is the number of the system call by which programs report. It is
// none of the host's.
const nrReport = 0x5afe

// programEnd marks the end of a program in the text: an illegal instruction,
// then a pattern that occurs in none of them.
var programEnd = [16]byte{
	0x0f, 0x0b, 0xa5, 0x5a, 0xa5, 0x5a, 0xa5, 0x5a,
	0x3c, 0xc3, 0x3c, 0xc3, 0x3c, 0xc3, 0x3c, 0xc3,
}

// Programs of every architecture, in programs_GOARCH.s.
var (
	// progSyscall makes system calls for ever, and changes nothing itself.
	progSyscall program

	// progCount makes arg1 the last result, adds 1 to arg0, and reports.
	progCount program

	// progSpin jumps to itself: no register changes.
	progSpin program

	// progBeat counts the word at arg0 up for ever.
	progBeat program

	// progReadSpin reads the word at arg1 for ever, and counts that at arg0 up.
	progReadSpin program

	// progWriteSpin counts the words at arg1 and arg0 up for ever, in this order.
	progWriteSpin program

	// progReadCheck is progReadSpin that reports when the word at arg1 is neither
	// arg2 nor arg3; arg4 is what it was.
	progReadCheck program

	// progLoad loads arg1 from the word at arg0, and reports.
	progLoad program

	// progStore stores arg1 in the word at arg0, and reports.
	progStore program

	// progJump jumps to arg0.
	progJump program

	// progAtomicAdd adds 1 to the word at arg0 atomically, arg1 times, and
	// reports.
	progAtomicAdd program

	// progSum adds the words at arg0, arg0+arg2, ... below arg1 up in arg3, and
	// reports.
	progSum program

	// progFill stores their addresses in the words at arg0, arg0+arg2, ... below
	// arg1, and reports.
	progFill program

	// progTLS loads arg0 from the word that the thread pointer points to, and
	// reports.
	progTLS program

	// progNops is numNops instructions that do nothing, and a report.
	progNops program

	// progBreakpoint is a breakpoint instruction, and a report.
	progBreakpoint program

	// progIllegal is an illegal instruction, and a report.
	progIllegal program

	// progDekker waits until the word at arg2 changes, stores it in the word at
	// arg0, copies the word at arg1 to that at arg3, stores the round in the one
	// after, and starts over.
	progDekker program

	// progDump stores all general registers in the buffer that setDump gave it,
	// makes the system call that is in the registers, and starts over.
	progDump program
)

// numNops is the number of instructions at the start of progNops.
const numNops = 8

// allPrograms returns the programs above.
func allPrograms() []program {
	return []program{
		progSyscall, progCount, progSpin, progBeat, progReadSpin, progWriteSpin, progReadCheck, progLoad, progStore, progJump, progAtomicAdd, progSum, progFill, progTLS, progNops, progBreakpoint, progIllegal, progDekker, progDump,
	}
}
