// Package sample has precompiled programs, for tests and benchmarks: package
// rules describes them, and command gen writes them.
//
// It depends on package precompiled. It must hold nothing else: command gen must not
// depend on what it makes.
package sample

//go:generate go run ./gen -arch amd64 -package sample -o programs_amd64.go
//go:generate go run ./gen -arch arm64 -package sample -o programs_arm64.go
