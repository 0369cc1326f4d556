"""Precompiled seccomp programs."""

load("@bazel_skylib//rules:diff_test.bzl", "diff_test")

def seccomp_programs(name, generator, package, arch, checked_in = None):
    """A Go file with the seccomp programs of one architecture, made at build time.

    Args:
      name: name of the target, which is the Go file NAME.gen/programs_ARCH.go.
      generator: go_binary whose main function is gen.Main.
      package: Go package of the file.
      arch: amd64 or arm64; that of the build does not matter.
      checked_in: a file that must be the same, which the test NAME_test checks.
    """
    native.genrule(
        name = name,
        outs = ["{}.gen/programs_{}.go".format(name, arch)],
        cmd = "$(execpath {}) -arch {} -package {} -o $@".format(generator, arch, package),
        tools = [generator],
    )
    if checked_in:
        diff_test(
            name = name + "_test",
            size = "small",
            failure_message = "{} is stale: run go generate in its folder".format(checked_in),
            file1 = checked_in,
            file2 = name,
        )
