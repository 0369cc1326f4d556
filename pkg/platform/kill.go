package platform

// Killer is implemented by AddressSpaces whose application can delay an interrupt for
// long.
type Killer interface {
	// Kill makes every Switch in the AddressSpace return a ContextError, those that are
	// under way included. All that is left to do with it is Release.
	Kill()
}
