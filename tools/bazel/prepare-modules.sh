#!/usr/bin/env bash
# Lets the Bazel of prepare-bazel.sh resolve the modules of MODULE.bazel without
# the Bazel Central Registry: rules_go and gazelle come through the Go module
# proxy in the versions that MODULE.bazel names, and so does the Go SDK that it
# pins; the rest are Debian's rule sets, and modules of which no Go build loads
# anything are empty stand-ins. The result is a bazelrc; the workspace is not
# touched.
#
# usage: prepare-modules.sh PREFIX MODULE.bazel     prints the bazelrc's path
set -euo pipefail

prefix=$(cd "${1:?usage: prepare-modules.sh PREFIX MODULE.bazel}" && pwd -P)
module=${2:?usage: prepare-modules.sh PREFIX MODULE.bazel}
debian=$prefix/root/usr/share/bazel

say() { echo "prepare-modules.sh: $*" >&2; }
die() {
	say "$@"
	exit 1
}

version() {
	sed -n "s/^ *bazel_dep(.*name = \"$1\".*version = \"\([^\"]*\)\".*/\1/p" "$module"
}
rules_go=$(version rules_go)
gazelle=$(version gazelle)
case $(uname -m) in
x86_64) arch=amd64 ;;
aarch64) arch=arm64 ;;
*) die "no Go SDK is pinned for a $(uname -m) host" ;;
esac
read -r sdk sha256 < <(tr -d ' \n' <"$module" | sed -n "s/.*\"linux_$arch\":\[\"\(v[^\"]*\)\.zip\",\"\([0-9a-f]*\)\".*/\1 \2\n/p")
[[ -n $rules_go && -n $gazelle && -n ${sha256:-} ]] || die "cannot read the versions of rules_go, gazelle and the Go SDK in $module"

# One folder for each set of versions and state of this script.
key=$({ echo "$rules_go $gazelle $sdk $sha256" && cat "$0"; } | sha256sum | cut -c1-12)
modules=$prefix/modules-$key
rc=$modules/offline.bazelrc
if [[ -e $rc ]]; then
	echo "$rc"
	exit 0
fi

rm -rf "$modules"
mkdir -p "$modules/dist"
tmp=$(mktemp -d "$prefix/tmp.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
export GOFLAGS=-mod=mod

download() { # path@version field
	(cd "$tmp" && go mod download -json "$1") >"$tmp/json" ||
		die "cannot download $1 through $(go env GOPROXY): $(sed -n 's/^\t"Error": "\(.*\)",*$/\1/p' "$tmp/json")"
	sed -n "s/^\t\"$2\": \"\(.*\)\",*\$/\1/p" "$tmp/json"
}

# A module zip has no executable bits, so rules_go's scripts get theirs back.
go_module() { # name, path, version
	local dir
	say "module $1 $3"
	dir=$(download "$2@v$3" Dir)
	cp -r "$dir" "$modules/$1"
	chmod -R u+w "$modules/$1"
	find "$modules/$1" -name '*.sh' -exec chmod +x {} +
}
go_module rules_go github.com/bazelbuild/rules_go "$rules_go"
go_module gazelle github.com/bazelbuild/bazel-gazelle "$gazelle"

# The SDK that rules_go would look up by default: the workspace names its own.
sed -i '/^go_sdk.from_file(/,/^)/d' "$modules/rules_go/MODULE.bazel"

# Nor has it a vendor directory, from which gazelle builds its own tools.
rm -rf "$modules/gazelle/tests"
(cd "$modules/gazelle" && go mod vendor -e 2>"$tmp/vendor.log") || die "cannot collect gazelle's dependencies: $(<"$tmp/vendor.log")"

# Bazel finds the pinned SDK by its checksum among the --distdir files.
say "Go SDK $sdk"
zip=$(download "golang.org/toolchain@$sdk" Zip)
[[ $(sha256sum <"$zip") == "$sha256 "* ]] || die "the proxy's golang.org/toolchain@$sdk has not the checksum that MODULE.bazel pins ($sha256)"
cp "$zip" "$modules/dist/$sdk.zip"

stub() { # name
	mkdir -p "$modules/$1"
	echo "module(name = \"$1\")" >"$modules/$1/MODULE.bazel"
	touch "$modules/$1/BUILD.bazel"
}
for m in apple_support buildozer protobuf zlib; do stub $m; done

cat >"$modules/buildozer/buildozer_binary.bzl" <<'E'
"""Stand-in without a buildozer: only `bazel mod tidy` would run it."""

def _repo_impl(ctx):
    ctx.file("BUILD.bazel", "exports_files([\"buildozer.exe\"])\n")
    ctx.file("buildozer.exe", "#!/bin/sh\necho 'no buildozer here' >&2\nexit 1\n", executable = True)

_repo = repository_rule(implementation = _repo_impl)

buildozer_binary = module_extension(implementation = lambda _ctx: _repo(name = "buildozer_binary"))
E

# gazelle declares a package_metadata target in every repository it generates.
stub package_metadata
mkdir "$modules/package_metadata/rules"
touch "$modules/package_metadata/rules/BUILD.bazel"
cat >"$modules/package_metadata/rules/package_metadata.bzl" <<'E'
"""Stand-in whose targets carry no metadata."""

_package_metadata = rule(
    implementation = lambda _ctx: [],
    attrs = {"purl": attr.string()},
)

def package_metadata(name, purl = "", visibility = None):
    # A repository's default_package_metadata must not apply to itself.
    _package_metadata(name = name, purl = purl, applicable_licenses = [], visibility = visibility)
E

# `bazel coverage`, and `bazel query` over tests, look at the coverage tools.
mkdir "$modules/remote_coverage_tools"
touch "$modules/remote_coverage_tools/WORKSPACE"
cat >"$modules/remote_coverage_tools/BUILD.bazel" <<'E'
sh_binary(
    name = "lcov_merger",
    srcs = ["merge.sh"],
    visibility = ["//visibility:public"],
)

alias(
    name = "coverage_report_generator",
    actual = ":lcov_merger",
    visibility = ["//visibility:public"],
)
E
cat >"$modules/remote_coverage_tools/merge.sh" <<'E'
#!/bin/bash
# Stand-in for Bazel's merger: rules_go writes LCOV, whose records just add up.
for a in "$@"; do
	case $a in
	--coverage_dir=*) dir=${a#*=} ;;
	--output_file=*) out=${a#*=} ;;
	--reports_file=*) reports=${a#*=} ;;
	esac
done
{
	if [[ -n ${dir:-} ]]; then find "$dir" -name '*.dat' ! -path "$out" -exec cat {} +; fi
	if [[ -n ${reports:-} ]]; then xargs cat <"$reports"; fi
} >"$out.tmp"
mv "$out.tmp" "$out"
E
chmod +x "$modules/remote_coverage_tools/merge.sh"

{
	echo "common --distdir=$modules/dist"
	for m in platforms:tools/platforms bazel_features:tools/features bazel_skylib:tools/skylib \
		rules_{cc:rules/cc,java:rules/java,license:rules/license,proto:rules/proto,python:rules/python,shell:rules/shell}; do
		echo "common --override_module=${m%%:*}=$debian/${m#*:}"
	done
	for m in rules_go gazelle apple_support buildozer package_metadata protobuf zlib; do
		echo "common --override_module=$m=$modules/$m"
	done
	# Bazel 8 writes canonical repository names with + where 7 has ~.
	case $(<"$debian/build-label.txt") in [1-7].*) s='~' ;; *) s=+ ;; esac
	echo "common --override_repository=bazel_tools${s}remote_coverage_tools_extension${s}remote_coverage_tools=$modules/remote_coverage_tools"
	# Go modules: through `go env`'s proxy, into the machine's own module cache.
	echo "common --repo_env=GO_REPOSITORY_USE_HOST_MODCACHE=1"
	echo "common --repo_env=GO_REPOSITORY_USE_HOST_CACHE=1"
} >"$rc.tmp"
mv "$rc.tmp" "$rc"
say "the modules are ready in $modules"
echo "$rc"
