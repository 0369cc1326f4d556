package sysno

// Native is the architecture of this program.
const Native = ARM64
