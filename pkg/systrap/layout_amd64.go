package systrap

// More of the header (layout.go).
const (
	// The second line is only written when something in it changes, or with all state.
	headerR8  = 64
	headerR9  = 72
	headerRSP = 80

	// The third one the Sentry reads after a signal, or with all state.
	headerReturn = 128 // where the thread goes on
	headerFlags  = 136
	headerSP     = 144 // where the signal frame is
	headerFS     = 152 // segment bases, which a signal frame has not
	headerGS     = 160

	// The others go with the whole state of a thread that has made a call, both ways.
	headerRBX = 192
	headerRBP = 200
	headerR12 = 208
	headerR13 = 216
	headerR14 = 224
	headerR15 = 232
	headerRCX = 240
	headerR11 = 248

	headerRFlags = 264 // SAVE pushes them; those of arithmetic are in headerFlags
	// A stack for the thread's last instructions before it goes on: the segment bases of FS
	// and GS, RAX and what IRETQ takes, which is RIP, CS, flags, RSP and SS. A handler, of
	// a signal that comes first, does not write there.
	headerStack = 272

	// Values of headerKind: a signal; a call without one; a call, or one that was made
	// before, and all state; an interrupt that came before the thread went on after a
	// signal.
	kindFrame  = 0
	kindCall   = 1
	kindState  = 2
	kindNested = 3
)
