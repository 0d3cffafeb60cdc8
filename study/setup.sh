# shellcheck shell=bash
# Sourced by demo.sh and test.sh: make .venv beside them, install the given requirements files into it, put it on PATH.
# What is installed already is not installed again.

find_python() {
  local name
  for name in python3 python python3.14 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: Python 3.11 or later is needed and not on PATH: install it" >&2
  return 1
}

set_up() { # set_up REQUIREMENTS_FILE...
  local python file missing=()
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none yet, or one that was interrupted
    python=$(find_python)
    "$python" -m venv .venv
  fi
  # An active environment of the user's must not leak in.
  unset PYTHONPATH PYTHONHOME
  PATH=$PWD/.venv/bin:$PATH
  export PATH
  for file in "$@"; do
    cmp -s "$file" ".venv/installed-${file//\//-}" || missing+=("$file")
  done
  ((${#missing[@]})) || return 0
  for file in "${missing[@]}"; do
    echo "installing $file into .venv (once)"
    python -m pip install --quiet --disable-pip-version-check --no-compile -r "$file"
  done
  # To bytecode on all cores, where pip takes one; files for other versions of Python fail and are not imported.
  python -m compileall -qq -j 0 .venv/lib >/dev/null || true
  for file in "${missing[@]}"; do # done only now: without bytecode every start would take twice as long
    cp "$file" ".venv/installed-${file//\//-}"
  done
}
