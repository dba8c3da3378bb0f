#!/usr/bin/env bash
# Everything that is checked without running the code; all checks run, the exit code is their sum.
# Usage: tools/lint.sh [--fix] [FILE.cc ...]
#   LINT_SKIP="configure clang-tidy" leaves checks out by name, and says so
#   FILE.cc  only clang-tidy, only on these files
#   --fix    let clang-tidy and clang-format repair what they can in these files
set -uo pipefail
cd "$(dirname "$0")/.."

database=build/lint
failed=()

check() {  # <name> <command...>
  local name=$1 start=$SECONDS
  shift
  if [[ " ${LINT_SKIP:-} " == *" $name "* ]]; then
    echo "lint: $name left out (LINT_SKIP)"
    return
  fi
  if "$@"; then
    echo "lint: $name ok ($((SECONDS - start)) s)"
  else
    echo "lint: $name FAILED ($((SECONDS - start)) s)"
    failed+=("$name")
  fi
}

# Tracked and new files that git does not ignore.
files() {
  git ls-files -co --exclude-standard -- "$@" | while read -r file; do
    if [[ -f $file ]]; then echo "$file"; fi
  done
}

format() { files '*.cc' '*.h' | xargs clang-format-19 --dry-run -Werror; }

# A compilation database made by clang, so that both clang tools understand every flag. What is
# generated and included, by protobuf and of the kernels, must exist before a file that includes it
# is read.
configure() {
  local log="$database.log"
  {
    cmake --preset clang -B "$database" -DTRANSFUSE_PYTHON=ON -DTRANSFUSE_BENCH=ON \
      -DPython_EXECUTABLE="$PWD/.venv/bin/python" &&
      ninja -C "$database" -t targets all | sed -n 's/^\(generated\/.*\.\(pb\.h\|inc\)\):.*/\1/p' |
      xargs -r ninja -C "$database"
  } >"$log" 2>&1 || { tail -n 20 "$log"; return 1; }
}

clang_tidy() { nice .venv/bin/python tools/clang_tidy.py --database "$database" "$@"; }

if [[ $# -gt 0 ]]; then
  mkdir -p build
  configure || exit 1
  clang_tidy "$@"
  exit
fi

check tidy python3 tools/tidy.py
check ruff .venv/bin/ruff check --no-cache .
check ruff-format .venv/bin/ruff format --no-cache --check .
check mypy .venv/bin/mypy --cache-dir build/mypy
if command -v clang-tidy-19 clang-format-19 clang++-19 >/dev/null; then
  mkdir -p build
  check clang-format format
  check configure configure
  check clang-tidy clang_tidy
else
  echo "lint: clang 19 is not installed: formatting, clang-tidy and thread safety were left out"
  [[ -z "${CI:-}" ]] || failed+=("clang 19 is missing")
fi

if [[ ${#failed[@]} -gt 0 ]]; then
  echo "lint: failed: ${failed[*]}"
  exit 1
fi
echo "lint: clean"
