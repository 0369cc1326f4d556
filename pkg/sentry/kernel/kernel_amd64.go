package kernel

// minSigStackSize is MINSIGSTKSZ (asm/signal.h), in bytes.
const minSigStackSize = 2048

// restorerCode is what a signal handler returns to if its action names nothing
// (SA_RESTORER): Linux has no such code on amd64.
var restorerCode []byte
