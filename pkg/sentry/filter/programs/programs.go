// Package programs has the Sentry's seccomp programs for every configuration of
// every platform, compiled at build time from the rules of package filter.
//
// It must hold nothing else: the generator must not depend on what it makes.
package programs

//go:generate go run ../../../../tools/seccompgen -arch amd64 -package programs -o programs_amd64.go
//go:generate go run ../../../../tools/seccompgen -arch arm64 -package programs -o programs_arm64.go
