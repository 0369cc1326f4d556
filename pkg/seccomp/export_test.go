package seccomp

// BuildNaive is buildNaive, for benchmarks outside the package.
var BuildNaive = buildNaive
