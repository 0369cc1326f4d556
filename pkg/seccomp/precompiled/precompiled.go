// Package precompiled holds seccomp programs that were compiled at build time,
// with variables that are filled in at run time.
//
// A Source describes a program: rules as a function of variables. Compile makes
// a Program of it, which package gen writes into a Go file as part of a Set; at
// run time Set.Get finds it and Program.Render fills in the variables.
// Source.Build compiles at run time what no Set has.
//
// It depends on pkg/bpf and pkg/seccomp only. The rules come from packages that
// import this one (pkg/platform and above), so it must never import those.
package precompiled

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/ringfence/ringfence/pkg/bpf"
)

// Values maps names of variables to their values. Variables have 32 bits, which
// is what one instruction compares; a 64-bit value takes two, see Names64,
// Set64 and Get64.
type Values map[string]uint32

// Names64 returns the names of the two variables that make up the 64-bit value
// called name: those of its high and its low half.
func Names64(name string) (high, low string) { return name + "_hi", name + "_lo" }

// Set64 sets the two variables of the 64-bit value called name.
func (v Values) Set64(name string, value uint64) {
	high, low := Names64(name)
	v[high], v[low] = uint32(value>>32), uint32(value)
}

// Get64 returns the 64-bit value called name.
func (v Values) Get64(name string) uint64 {
	high, low := Names64(name)
	return uint64(v[high])<<32 | uint64(v[low])
}

// Program is a compiled program whose variables have no values yet.
type Program struct {
	// Key names the configuration that the program is for.
	Key string
	// Variables are the variables in ascending order of their names.
	Variables []Variable
	// Code is the program, with zero for the variables.
	Code bpf.Program
}

// Variable says where a program has a variable.
type Variable struct {
	Name string
	// Uses are the indices of the instructions whose K it is. There are none
	// if the variable matters in other configurations only.
	Uses []uint16
}

// VariablesError says which values Render was not given, or too many.
type VariablesError struct {
	// Key is that of the program.
	Key string
	// Missing are variables without a value, Unknown values without a
	// variable; both in ascending order.
	Missing, Unknown []string
}

// Error implements error.
func (e *VariablesError) Error() string {
	var parts []string
	if len(e.Missing) > 0 {
		parts = append(parts, "no value for "+strings.Join(e.Missing, ", "))
	}
	if len(e.Unknown) > 0 {
		parts = append(parts, "it has no variable "+strings.Join(e.Unknown, ", "))
	}
	return fmt.Sprintf("precompiled seccomp program %q: %s", e.Key, strings.Join(parts, "; "))
}

// checkValues compares the names of values with names, which are sorted.
func checkValues(key string, names []string, values Values) error {
	e := VariablesError{Key: key}
	for _, name := range names {
		if _, ok := values[name]; !ok {
			e.Missing = append(e.Missing, name)
		}
	}
	if len(e.Missing) == 0 && len(values) == len(names) {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if _, ok := slices.BinarySearch(names, name); !ok {
			e.Unknown = append(e.Unknown, name)
		}
	}
	return &e
}

// Render returns the program with the given values of its variables: all of
// them and no others, or the error is a *VariablesError.
func (p *Program) Render(values Values) (bpf.Program, error) {
	code := slices.Clone(p.Code)
	found := 0
	for _, variable := range p.Variables {
		value, ok := values[variable.Name]
		if !ok {
			break
		}
		found++
		for _, i := range variable.Uses {
			code[i].K = value
		}
	}
	if found != len(p.Variables) || found != len(values) {
		return nil, checkValues(p.Key, p.variableNames(), values)
	}
	return code, nil
}

func (p *Program) variableNames() []string {
	names := make([]string, len(p.Variables))
	for i, v := range p.Variables {
		names[i] = v.Name
	}
	return names
}

// Set is programs for one architecture, in ascending order of their keys.
type Set []Program

// Get returns the program for the configuration called key.
func (s Set) Get(key string) (*Program, bool) {
	i, ok := slices.BinarySearchFunc(s, key, func(p Program, key string) int { return strings.Compare(p.Key, key) })
	if !ok {
		return nil, false
	}
	return &s[i], true
}
