package platformtest

// Programs that only arm64 has.
var (
	// progFPSIMD is the vectorState program, progSaveFPSIMD its second half.
	progFPSIMD, progSaveFPSIMD program

	// progExclusive loads arg1 from the word at arg0 with LDXR, and reports.
	progExclusive program

	// progPrivileged masks interrupts, and reports.
	progPrivileged program
)

// archPrograms returns the programs above.
func archPrograms() []program {
	return []program{
		progFPSIMD, progSaveFPSIMD, progExclusive, progPrivileged,
	}
}
