"""Rules that make release artifacts with //tools/release, byte for byte reproducible."""

load("@rules_go//go:def.bzl", "GoArchive")

def _tar_gz_impl(ctx):
    out = ctx.actions.declare_file(ctx.label.name)
    args = ctx.actions.args()
    args.add("tar")
    args.add("-out", out)
    args.add("-prefix", ctx.attr.prefix)
    inputs = []
    for target, name in ctx.attr.files.items():
        for f in target.files.to_list():
            args.add(f, format = name + "=%s")
            inputs.append(f)
    for f in ctx.files.docs:
        args.add(f, format = f.basename + "=%s")
        inputs.append(f)
    for f in ctx.files.tree:
        name = f.path.partition("/files/")[2].removesuffix(".src")
        args.add(f, format = name.replace("%", "%%") + "=%s")
        inputs.append(f)
    args.use_param_file("@%s")
    args.set_param_file_format("multiline")
    ctx.actions.run(
        mnemonic = "ReleaseTar",
        executable = ctx.executable._tool,
        arguments = [args],
        inputs = inputs,
        outputs = [out],
    )
    return [DefaultInfo(files = depset([out]))]

tar_gz = rule(
    doc = "A tar archive; the target's name is the file's.",
    implementation = _tar_gz_impl,
    attrs = {
        "docs": attr.label_list(allow_files = True, doc = "Files that keep their names."),
        "files": attr.label_keyed_string_dict(allow_files = True, doc = "Files and their names in the archive."),
        "prefix": attr.string(mandatory = True, doc = "Folder that everything in the archive lies in."),
        "tree": attr.label(doc = "The //tools/release:source.bzl tree."),
        "_tool": attr.label(default = "//tools/release", executable = True, cfg = "exec"),
    },
)

def _sha256sums_impl(ctx):
    out = ctx.actions.declare_file(ctx.label.name)
    ctx.actions.run(
        mnemonic = "ReleaseSums",
        executable = ctx.executable._tool,
        arguments = ["sums", "-out", out.path] + [f.path for f in ctx.files.srcs],
        inputs = ctx.files.srcs,
        outputs = [out],
    )
    return [DefaultInfo(files = depset([out]))]

sha256sums = rule(
    doc = "A file that sha256sum --check reads.",
    implementation = _sha256sums_impl,
    attrs = {
        "srcs": attr.label_list(allow_files = True),
        "_tool": attr.label(default = "//tools/release", executable = True, cfg = "exec"),
    },
)

def _sbom_impl(ctx):
    out = ctx.actions.declare_file(ctx.label.name)
    imports = ctx.actions.declare_file(ctx.label.name + ".imports")
    archives = ctx.attr.binary[GoArchive].transitive.to_list()
    ctx.actions.write(imports, "".join([a.importpath + "\n" for a in archives]))
    ctx.actions.run(
        mnemonic = "ReleaseSbom",
        executable = ctx.executable._tool,
        arguments = [
            "sbom",
            "-out=" + out.path,
            "-version=" + ctx.attr.version,
            "-go=" + ctx.toolchains["@rules_go//go:toolchain"].sdk.version,
            "-gomod=" + ctx.file.go_mod.path,
            "-gosum=" + ctx.file.go_sum.path,
            "-imports=" + imports.path,
        ] + [f.path for f in ctx.files.artifacts],
        inputs = ctx.files.artifacts + [ctx.file.go_mod, ctx.file.go_sum, imports],
        outputs = [out],
    )
    return [DefaultInfo(files = depset([out]))]

sbom = rule(
    doc = "A CycloneDX bill of materials: the modules whose packages are linked into a binary.",
    implementation = _sbom_impl,
    attrs = {
        "artifacts": attr.label_list(allow_files = True, doc = "Files whose checksums it lists."),
        "binary": attr.label(mandatory = True, providers = [GoArchive]),
        "go_mod": attr.label(allow_single_file = True, default = "//:go.mod"),
        "go_sum": attr.label(allow_single_file = True, default = "//:go.sum"),
        "version": attr.string(mandatory = True),
        "_tool": attr.label(default = "//tools/release", executable = True, cfg = "exec"),
    },
    toolchains = ["@rules_go//go:toolchain"],
)

def artifacts(name, docs):
    """Everything that a release consists of.

    Args:
      name: name of the filegroup of all of it.
      docs: files that go into the archives beside the command.
    """
    version = native.module_version()
    stem = "ringfence-" + version
    files = []
    for arch in ["amd64", "arm64"]:
        archive = "{}-linux-{}.tar.gz".format(stem, arch)
        tar_gz(
            name = archive,
            files = {"//cmd/ringfence:ringfence_linux_" + arch: "ringfence"},
            docs = docs,
            prefix = "{}-linux-{}".format(stem, arch),
        )
        files.append(archive)

    # http_archive and a registry's source.json take it with
    # strip_prefix = "ringfence-VERSION".
    tar_gz(
        name = stem + ".tar.gz",
        prefix = stem,
        tree = "@ringfence_source//:files",
    )
    files.append(stem + ".tar.gz")
    sbom(
        name = stem + ".cdx.json",
        artifacts = files,
        binary = "//cmd/ringfence",
        version = version,
    )
    files.append(stem + ".cdx.json")
    sha256sums(
        name = "SHA256SUMS",
        srcs = files,
    )
    native.filegroup(
        name = name,
        srcs = files + ["SHA256SUMS"],
        visibility = ["//visibility:public"],
    )
