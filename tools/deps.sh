#!/usr/bin/env bash
# Installs what the build and the tests need: packages of apt-packages.txt and a .venv with
# requirements.txt. Does nothing, quickly, where all of it is there.
set -euo pipefail
cd "$(dirname "$0")/.."

missing_packages() {  # <required|optional>
  local package kind
  while read -r package kind; do
    [[ -z "$package" || "$package" == \#* ]] && continue
    [[ "${kind:-required}" == "$1" ]] || continue
    [[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" == installed ]] ||
      echo "$package"
  done <tools/apt-packages.txt
}

as_root() {
  if [[ "$(id -u)" == 0 ]]; then "$@"; else sudo "$@"; fi
}

install_packages() {
  if ! command -v apt-get >/dev/null; then
    echo "no apt-get here: install what tools/apt-packages.txt lists by other means" >&2
    return
  fi
  local required optional package
  mapfile -t required < <(missing_packages required)
  mapfile -t optional < <(missing_packages optional)
  if [[ ${#required[@]} == 0 && ${#optional[@]} == 0 ]]; then return; fi
  echo "installing: ${required[*]} ${optional[*]}"
  export DEBIAN_FRONTEND=noninteractive
  as_root apt-get update -qq </dev/null
  if [[ ${#required[@]} != 0 ]]; then
    as_root apt-get install -y -qq --no-install-recommends "${required[@]}" </dev/null
  fi
  for package in "${optional[@]}"; do
    as_root apt-get install -y -qq --no-install-recommends "$package" </dev/null ||
      echo "no package $package here: make lint will say what it leaves out" >&2
  done
}

# The distribution's own Python first: python3-dev and python3-venv belong to it, and a python3 that
# comes earlier in PATH may lack either.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" /usr/bin/python3 python3; do
    [[ -n "$candidate" ]] || continue
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python 3.11 or newer with venv: install python3-venv or set PYTHON" >&2
  return 1
}

make_venv() {
  local stamp wanted python
  stamp=.venv/.requirements
  wanted="$(sha256sum tools/requirements.txt | cut -d' ' -f1)"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]] && .venv/bin/python -c '' 2>/dev/null; then
    return
  fi
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    echo "creating .venv with $python"
    "$python" -m venv --clear .venv
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r tools/requirements.txt
  echo "$wanted" >"$stamp"
}

install_packages
make_venv
