package kernel

// minSigStackSize is MINSIGSTKSZ (asm/signal.h), in bytes.
const minSigStackSize = 5120
