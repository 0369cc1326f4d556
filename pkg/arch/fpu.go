package arch

// NewFPState is replaced per architecture once cpuid says how large it is.
func NewFPState() FPState { return make(FPState, 4096) }
