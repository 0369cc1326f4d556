package main

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"
)

// version is what MODULE.bazel says; the linker sets it. The go command does
// not: then it is the version under which the module was fetched.
var version string

func versionMain(args []string) int {
	if len(args) > 0 {
		return fail(exitError, fmt.Errorf("version takes no arguments"))
	}
	fmt.Printf("ringfence %s %s/%s\n", versionName(), runtime.GOOS, runtime.GOARCH)
	return 0
}

func versionName() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return strings.TrimPrefix(info.Main.Version, "v")
	}
	return "(devel)"
}
