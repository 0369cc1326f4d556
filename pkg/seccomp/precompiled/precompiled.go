// Package precompiled holds seccomp programs that were compiled at build time,
// with variables that are filled in at run time.
//
// It depends on pkg/bpf and pkg/seccomp only. The rules come from packages that
// import this one (pkg/platform and above), so it must never import those.
package precompiled

// Values maps names of variables to their values. Variables have 32 bits, which
// is what one instruction compares; a 64-bit value takes two, see Set64 and
// Get64.
type Values map[string]uint32

// Set64 sets the two variables that make up the 64-bit value called name:
// name_hi and name_lo.
func (v Values) Set64(name string, value uint64) {
	v[name+"_hi"] = uint32(value >> 32)
	v[name+"_lo"] = uint32(value)
}

// Get64 returns the 64-bit value called name, made of name_hi and name_lo.
func (v Values) Get64(name string) uint64 {
	return uint64(v[name+"_hi"])<<32 | uint64(v[name+"_lo"])
}
