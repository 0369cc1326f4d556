package platformtest

// Programs that only amd64 has.
var (
	// progFX, progAVX and progAVX512 are the vectorState programs.
	progFX, progAVX, progAVX512             program
	progSaveFX, progSaveAVX, progSaveAVX512 program

	// progDivide divides arg0 by arg1 and reports.
	progDivide program

	// progX87Divide loads the control word at arg0, divides 1 by 0, and reports.
	progX87Divide program

	// progSSEDivide loads MXCSR from arg0, divides 1 by 0, and reports.
	progSSEDivide program

	// progPopf loads the flags from arg0, does nothing in numNops instructions,
	// and reports.
	progPopf program

	// progAlign loads the flags from arg0, arg2 from arg1, and reports.
	progAlign program

	// progICEBP, progInt (int $0x42), progHalt and progOut (to port arg2) are one
	// instruction, and a report.
	progICEBP, progInt, progHalt, progOut program

	// progLoadBP loads arg1 from (RBP), and reports.
	progLoadBP program

	// progCPUID executes CPUID with arg0 and arg1 in EAX and ECX, and reports
	// EAX, EBX, ECX and EDX in arg0 to arg3.
	progCPUID program

	// progGS loads arg0 from the word at GS:0, and reports.
	progGS program

	// progWriteBases sets the bases of FS and GS to arg0 and arg1, reports, reads
	// them back into arg0 and arg1, and reports.
	progWriteBases program

	// progInt80 and progSysenter enter the kernel with the number arg0, and
	// report the result.
	progInt80, progSysenter program

	// progVsyscall calls the function at arg2 with the return address arg4.
	progVsyscall program

	// progReportAX reports RAX.
	progReportAX program

	// progCompat goes to 32-bit code at arg0 with EAX arg1. The others are such
	// code: one instruction and ud2, or a jump to itself.
	progCompat                                             program
	progCompatInt80, progCompatSyscall, progCompatSysenter program
	progCompatSpin                                         program
)

// archPrograms returns the programs above.
func archPrograms() []program {
	return []program{
		progFX, progAVX, progAVX512, progSaveFX,
		progSaveAVX, progSaveAVX512, progDivide, progX87Divide,
		progSSEDivide, progPopf, progAlign, progICEBP,
		progInt, progHalt, progOut, progLoadBP,
		progCPUID, progGS, progWriteBases, progInt80, progSysenter,
		progVsyscall, progReportAX, progCompat, progCompatInt80,
		progCompatSyscall, progCompatSysenter, progCompatSpin,
	}
}
