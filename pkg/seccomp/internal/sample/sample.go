// Package sample has precompiled programs, for tests and benchmarks: package
// rules describes them, and command gen writes them.
package sample

//go:generate go run ./gen -arch amd64 -package sample -o programs_amd64.go
//go:generate go run ./gen -arch arm64 -package sample -o programs_arm64.go
