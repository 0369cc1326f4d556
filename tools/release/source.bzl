"""A repository with a link to every file of this workspace.

A glob ends at package boundaries, so no single target of the workspace can name
all of its files, BUILD files included. Here BUILD files carry another name,
which the archive takes off again, and one glob sees the whole tree.
"""

# Not part of the sources, by path from the root.
_EXCLUDED = [".git", "out", "user.bazelrc"]

# Folders in which Bazel leaves links of its own.
_WORKSPACES = ["", "test/consumer/"]

def _source_tree_impl(ctx):
    root = ctx.path(ctx.attr.anchor).dirname
    pending = [("", root)]

    # Starlark has neither recursion nor while: each round goes one level down.
    for _ in range(100):
        below = []
        for prefix, directory in pending:
            for path in directory.readdir():
                name = prefix + path.basename
                if name in _EXCLUDED or (path.basename.startswith("bazel-") and prefix in _WORKSPACES):
                    continue
                if path.is_dir:
                    below.append((name + "/", path))
                else:
                    ctx.symlink(path, "files/" + name + ".src")
        pending = below
    if pending:
        fail("directories nest too deeply:", pending)
    ctx.file("BUILD.bazel", """\
filegroup(
    name = "files",
    srcs = glob(["files/**"]),
    visibility = ["//visibility:public"],
)
""")

_source_tree = repository_rule(
    implementation = _source_tree_impl,
    attrs = {"anchor": attr.label(default = "//:MODULE.bazel")},
    # The directories that it lists are watched, the files are links.
)

source = module_extension(implementation = lambda _ctx: _source_tree(name = "ringfence_source"))
