package systrap

// More of the header (layout.go).
const (
	// The second line is only written when something in it changes.
	headerR8  = 64
	headerR9  = 72
	headerRSP = 80

	// Of the third one the Sentry reads a part after a signal alone.
	headerReturn = 128 // where the thread goes on
	headerFlags  = 136
	headerSP     = 144 // where the signal frame is
	headerFS     = 152 // segment bases, which a signal frame has not
	headerGS     = 160

	// Values of headerKind: a signal, and a call without one.
	kindFrame = 0
	kindCall  = 1

	// Values of headerOrder: to return from the call, and to get a signal.
	orderReturn = 0
	orderTrap   = 1
)
