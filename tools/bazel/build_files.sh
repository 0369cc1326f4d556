#!/usr/bin/env bash
# Checks, or brings up to date, the BUILD files: gazelle for what they say and
# buildifier for how they look. The BUILD rules set GAZELLE and BUILDIFIER.
#
# usage: build_files.sh check|fix
set -uo pipefail

# In a test the workspace is where MODULE.bazel's link leads to.
export BUILD_WORKSPACE_DIRECTORY=${BUILD_WORKSPACE_DIRECTORY:-$(dirname "$(readlink -f MODULE.bazel)")}
export RUNFILES_DIR=${RUNFILES_DIR:-$(cd .. && pwd)}
gazelle=$PWD/$GAZELLE buildifier=$PWD/$BUILDIFIER
cd "$BUILD_WORKSPACE_DIRECTORY" || exit

mapfile -t files < <(find . \( -name .git -o -name out -o -name 'bazel-*' \) -prune -o \
	-type f \( -name BUILD.bazel -o -name MODULE.bazel -o -name '*.bzl' \) -print)

case $1 in
fix)
	"$gazelle" && "$buildifier" "${files[@]}"
	;;
check)
	status=0
	"$gazelle" -mode=diff || status=1
	"$buildifier" -mode=check "${files[@]}" || status=1
	((status == 0)) || printf '\nThe BUILD files are stale or not formatted.\nfix: tools/bazel/bazelw run //tools/bazel:fix\n'
	exit $status
	;;
esac
