# shellcheck shell=bash
# Sourced by the loops, which call `cell` once for each cell of their grid and `finish` at the end.
# A cell is one or two scripts with the same flags; a finished one is found again, a failed one does not stop the others.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LAUNCH=${LAUNCH:-python} # the command in front of each script, e.g. "accelerate launch"
cells=()
failed=()
count=0
dry_run=
for flag in "$@"; do
  case $flag in
    --dry_run | --dry-run) dry_run=1 ;;
    -h | --help) # the comment that the loop opens with
      sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
  esac
done

look_up() { # look_up SCRIPT FLAG...: prints "status<TAB>folder" of the run that the flags name
  python "$@" --dry_run | tail -n 1
}

cell() { # cell SCRIPT [SCRIPT] -- FLAG...: train and score one cell; the last script is the one that scores
  local scripts=() script found status
  while [[ $1 != -- ]]; do
    scripts+=("$1")
    shift
  done
  shift
  count=$((count + 1))
  printf '\n[%d] %s\n' "$count" "$*"
  found=$(look_up "${scripts[-1]}" "$@") || {
    status=$?
    ((status != 2)) || exit 2 # bad usage: every cell would fail alike
    failed+=("${scripts[-1]} $* (exit $status)")
    return 0
  }
  cells+=("${found#*$'\t'}")
  if [[ $dry_run ]]; then
    printf '%s\n' "${found/$'\t'/  }"
    return
  fi
  for script in "${scripts[@]}"; do
    # shellcheck disable=SC2086 # LAUNCH is a command with its arguments
    $LAUNCH "$script" "$@" || {
      status=$?
      ((status != 130)) || exit 130
      failed+=("$script $* (exit $status)")
      return 0
    }
  done
}

finish() { # print the table of all cells and name those that failed
  printf '\n'
  local report=0
  if [[ ! $dry_run ]] && ((${#cells[@]})); then
    PYTHONPATH=$root python -m study.report "${cells[@]}" || report=$?
  fi
  if ((${#failed[@]})); then
    printf 'error: %d of %d cells failed:\n' "${#failed[@]}" "$count" >&2
    printf '  %s\n' "${failed[@]}" >&2
    exit 1
  fi
  exit "$report"
}
