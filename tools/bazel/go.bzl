"""Go rules of this workspace: go_test with needs, and binaries for both architectures.

gazelle writes go_test from here by the map_kind directive in //:BUILD.bazel.
"""

load("@rules_go//go:def.bzl", "go_cross_binary", _go_test = "go_test")

# Tags that say what a test needs of its host; test/README.md describes them.
# They select tests (.bazelrc) and, as properties of the test action, the
# workers of a remote-execution service.
_NEEDS = [
    "qemu",
    "requires-kvm",
    "requires-ptrace",
    "requires-seccomp-notify",
]

_ARCH = {
    "arch-amd64": "@platforms//cpu:x86_64",
    "arch-arm64": "@platforms//cpu:aarch64",
}

def go_test(name, tags = [], exec_properties = {}, target_compatible_with = [], visibility = ["//test/qemu:__pkg__"], **kwargs):
    """rules_go's go_test, which also turns tags into properties and constraints.

    Args:
      name: name of the test.
      tags: the needs among them become exec_properties of the test action, the
        architectures become constraints on the target platform.
      exec_properties: more of them.
      target_compatible_with: more of them.
      visibility: by default, what runs tests in emulated machines.
      **kwargs: passed on.
    """
    _go_test(
        name = name,
        exec_properties = {"test." + t: "true" for t in tags if t in _NEEDS} | exec_properties,
        tags = tags,
        target_compatible_with = [_ARCH[t] for t in tags if t in _ARCH] + target_compatible_with,
        visibility = visibility,
        **kwargs
    )

_PLATFORM_TAGS = {
    "kvm": ["requires-kvm"],
    "ptrace": ["requires-ptrace"],
    "systrap": [],
}

def platform_go_test(name, platforms, tags = [], env = {}, **kwargs):
    """One go_test for each platform, NAME_PLATFORM, and a suite NAME of all.

    The test reads the platform's name from the variable RINGFENCE_PLATFORM.

    Args:
      name: name of the suite.
      platforms: names of platforms.
      tags: tags of every test, beside those of its platform.
      env: more variables.
      **kwargs: passed on to go_test.
    """
    tests = []
    for platform in platforms:
        test = "{}_{}".format(name, platform)
        go_test(
            name = test,
            env = env | {"RINGFENCE_PLATFORM": platform},
            tags = tags + _PLATFORM_TAGS[platform],
            **kwargs
        )
        tests.append(test)
    native.test_suite(
        name = name,
        tests = tests,
    )

def multiarch_go_binary(name, target, visibility = None):
    """Builds a go_binary for every supported platform in one build.

    Args:
      name: name of the filegroup of all of them; each is NAME_ARCH.
      target: the go_binary.
      visibility: of all of them.
    """
    binaries = []
    for arch in ["amd64", "arm64"]:
        binary = name + "_" + arch
        go_cross_binary(
            name = binary,
            platform = "//tools/platforms:linux_" + arch,
            target = target,
            visibility = visibility,
        )
        binaries.append(binary)
    native.filegroup(
        name = name,
        srcs = binaries,
        visibility = visibility,
    )

def _for_platform_impl(_settings, attr):
    return {"//command_line_option:platforms": str(attr.platform)}

_for_platform = transition(
    implementation = _for_platform_impl,
    inputs = [],
    outputs = ["//command_line_option:platforms"],
)

def _programs_for_impl(ctx):
    files = []
    for target, name in ctx.attr.programs.items():
        file = ctx.actions.declare_file(ctx.label.name + "/" + name)
        ctx.actions.symlink(output = file, target_file = target[DefaultInfo].files_to_run.executable, is_executable = True)
        files.append(file)
    return DefaultInfo(files = depset(files), runfiles = ctx.runfiles(files))

programs_for = rule(
    implementation = _programs_for_impl,
    attrs = {
        "platform": attr.label(doc = "what they are built for"),
        "programs": attr.label_keyed_string_dict(
            cfg = _for_platform,
            doc = "executables, tests among them, and their names in the folder",
        ),
    },
    doc = "A folder of executables that are built for one platform, whatever the rest is built for.",
)
