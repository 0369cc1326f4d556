#!/usr/bin/env bash
# Unpacks Debian's Bazel (package bazel-bootstrap, of a newer suite than most
# machines run) into a private prefix that is then not to be moved. Nothing
# outside PREFIX is written: no chroot, no change to the machine's own packages.
#
# usage: prepare-bazel.sh PREFIX VERSION     gives PREFIX/bin/bazel
set -euo pipefail

prefix=${1:?usage: prepare-bazel.sh PREFIX VERSION}
version=${2:?usage: prepare-bazel.sh PREFIX VERSION}
stamp=$prefix/.installed
[[ ! -e $stamp ]] || exit 0

exec >&2
say() { echo "prepare-bazel.sh: $*"; }
die() {
	say "$@"
	exit 1
}

for tool in apt-get apt-cache dpkg dpkg-deb; do
	command -v "$tool" >/dev/null || die "$tool is missing: this needs a Debian-like machine; elsewhere install bazelisk, or set RINGFENCE_BAZEL to a bazel $version"
done
suite=${BAZEL_SUITE:-forky}
# The archive is the one that this machine's own apt configuration names.
# It may never have been used: `apt-get update` need not have run.
mirror=${BAZEL_MIRROR:-$(apt-get update --print-uris | sed -n "s#^'\([^']*/debian\)/dists/.*#\1#p" | sort -u | head -n 1)}
[[ -n $mirror ]] || die "this machine's apt configuration names no Debian archive: set BAZEL_MIRROR to the address of one"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[[ -e $keyring ]] || die "$keyring is missing: apt-get install debian-archive-keyring"
case $(dpkg --print-architecture) in
amd64) arch=amd64 triple=x86_64-linux-gnu loader=lib64/ld-linux-x86-64.so.2 ;;
arm64) arch=arm64 triple=aarch64-linux-gnu loader=lib/ld-linux-aarch64.so.1 ;;
*) die "Bazel is prepared on amd64 and arm64 only, this is $(dpkg --print-architecture)" ;;
esac

mkdir -p "$prefix"
prefix=$(cd "$prefix" && pwd -P)
tmp=$(mktemp -d "$prefix/tmp.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
root=$prefix/root
rm -rf "$root"
mkdir -p "$root" "$prefix/bin" "$tmp"/{lists/partial,cache/archives/partial,empty.d,debs}

# --- a package manager configuration of our own, with an empty dpkg status ---
: >"$tmp/status"
echo "deb [signed-by=$keyring] $mirror $suite main" >"$tmp/sources.list"
cat >"$tmp/apt.conf" <<E
Dir::Etc::sourcelist "$tmp/sources.list";
Dir::Etc::sourceparts "$tmp/empty.d";
Dir::Etc::preferences "$tmp/none";
Dir::Etc::preferencesparts "$tmp/empty.d";
Dir::State "$tmp";
Dir::State::Lists "$tmp/lists";
Dir::State::status "$tmp/status";
Dir::Cache "$tmp/cache";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
E
export APT_CONFIG=$tmp/apt.conf
say "reading the package lists of Debian $suite"
apt-get -qq update || die "cannot read the package lists of $mirror $suite"

# --- what to unpack: Bazel, its rule sets, the Java runtime, the C++ libraries
# of its client, and the jars its server loads; not the JDK, gcc, perl, ... ---
apt-get install -y --print-uris bazel-bootstrap bazel-rules-shell patchelf |
	sed -n "s/^'[^']*' \([^_]*\)_.*/\1/p" >"$tmp/resolved"
apt-cache depends --no-suggests bazel-bootstrap | sed -n 's/^ *Depends: //p' >"$tmp/direct"
{
	grep -E '^(bazel-.*|patchelf|libc6|libgcc-s1|libstdc\+\+6|zlib1g|libgrpc[+0-9.].*|libabsl[0-9].*|libprotobuf[0-9].*|libcares2|libre2-[0-9]+|openjdk-[0-9]+-jre-headless)$' "$tmp/resolved"
	grep -E '(-java|^velocity)$' "$tmp/direct" | grep -v '^async-profiler'
	grep -E '^lib(google-gson|guava|google-http-client|google-oauth-client|netty-common|netty-buffer|escapevelocity|commons-lang3|slf4j|perfmark|opencensus)-java$' "$tmp/resolved"
} | sort -u >"$tmp/packages"
say "downloading $(wc -l <"$tmp/packages") packages (about 150 MB)"
(cd "$tmp/debs" && xargs apt-get -qq download <"$tmp/packages") || die "the download from $mirror failed"
say "unpacking them (about 400 MB)"
for deb in "$tmp"/debs/*.deb; do
	dpkg-deb -x "$deb" "$root"
done
rm -rf "${root:?}"/usr/share/{doc,man,maven-repo,lintian,bash-completion}

# --- make it run from the prefix: its own libc, its own jars ---
lib=$root/usr/lib/$triple
ld=$root/usr/$loader
java=$(echo "$root"/usr/lib/jvm/java-[0-9]*-openjdk-"$arch" | tr ' ' '\n' | grep -v '/java-1\.')
base=$root/usr/share/bazel
find "$root/usr" "$root/etc" -type l -lname '/*' | while read -r link; do
	target=$root$(readlink "$link")
	if [[ -e $target ]]; then ln -sfn "$target" "$link"; fi
done
patchelf() { "$ld" --library-path "$lib" "$root/usr/bin/patchelf" "$@"; }
for f in "$java/bin/java" "$java/lib/jspawnhelper"; do
	patchelf --set-interpreter "$ld" --force-rpath --set-rpath "\$ORIGIN:\$ORIGIN/../lib:$lib" "$f"
done
for f in "$root/usr/bin/bazel" "$root/usr/libexec/$triple"/bazel/*; do
	patchelf --set-interpreter "$ld" --force-rpath --set-rpath "$lib" "$f"
done

# The client reads the server's class path from this file. Debian leaves the
# release out of the server; build-data.properties puts it back, so that
# bazel_compatibility and bazel_features see it.
label=$(tr -d '\n' <"$base/build-label.txt")
mkdir -p "$base/build-data"
echo "build.label=$label" >"$base/build-data/build-data.properties"
classpath=$base/bazel_classpath_debian_depends.txt
sed -i "s#^/usr/share/java#$root/usr/share/java#" "$classpath"
printf '%s\n' "$root"/usr/share/java/{perfmark-api,commons-lang3,slf4j-api}.jar "$base/build-data" >>"$classpath"

cat >"$prefix/bazelrc" <<E
startup --install_base=$base
startup --trust_install_base
startup --server_javabase=$java
startup --host_jvm_args=-Xmx3g
startup --host_jvm_args=-XX:+IgnoreUnrecognizedVMOptions
startup --host_jvm_args=--enable-native-access=ALL-UNNAMED
startup --host_jvm_args=--sun-misc-unsafe-memory-access=allow
E
cat >"$prefix/bin/bazel" <<E
#!/bin/sh
exec $root/usr/bin/bazel --nosystem_rc --bazelrc=$prefix/bazelrc "\$@"
E
chmod +x "$prefix/bin/bazel"

# --- prove it ---
mkdir "$tmp/ws"
touch "$tmp/ws/MODULE.bazel"
bazel() {
	(cd "$tmp/ws" && "$prefix/bin/bazel" --output_user_root="$tmp/out" "$@" 2>"$tmp/log") ||
		die "the unpacked Bazel does not run: $(tail -n 3 "$tmp/log")"
}
bazel version >"$tmp/version"
bazel shutdown
grep -q "^Build label: $label" "$tmp/version" || die "the unpacked Bazel calls itself: $(<"$tmp/version")"
[[ $label == "$version" ]] || say "warning: Debian $suite has Bazel $label, .bazelversion asks for $version; going on with $label"
mv "$tmp/version" "$stamp"
say "Bazel $label is ready in $prefix"
