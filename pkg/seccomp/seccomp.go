// Package seccomp turns rules about system calls into seccomp-BPF programs and
// installs them.
//
// Rules (SyscallRules, SyscallRule, ValueMatcher) say which calls a RuleSet
// matches; BuildProgram compiles rule sets, each with its Action, into a short
// and fast program; Install confines the process with it. Evaluate is the
// plain definition of what a program must answer.
//
// It depends on pkg/bpf and x/sys only. It must never know a platform or the
// Sentry: they bring their rules.
package seccomp
