# shellcheck shell=bash
# Sourced by the loops, which call `cell` once for each cell of their grid and `finish` at the end.
# A cell is one or two scripts with the same flags; a finished one is found again, a failed one does not stop the others.
# The second script, which scores, waits for `score_waiting`: then it scores all cells since the last in one process. So
# does a single script where a loop says together=1.
# The loops' own flags, --budget_usd USD and --budget_hours H, end a loop before the cell that would exceed them.
# ONLY="3-8 11" has the numbers of the cells that this start does, 0 for none of them: on several machines each start has
# its own. Other cells are neither trained nor scored; they stand in the table as they are found at the end.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LAUNCH=${LAUNCH:-python} # the command in front of each script, e.g. "accelerate launch"
trap 'exit 130' INT # a launcher of several processes ends otherwise, and the loop would go on
cells=()
evaluations=() # the record of each cell's scoring
asked=() # the questions to study/dry_run.py: of a dry run, or of the cells that ONLY leaves to others
failed=()
left=()
count=0
waiting=()  # folders of the cells that wait to be scored by $scorer, with their flags, quoted, and how they stood
waiting_flags=()
waiting_state=()
scorer=
owed=0      # estimated seconds of their scoring
row=        # how the training went that serves the cells that follow: trained, failed or empty for none
budget=(inf inf)
dry_run=
ours=() # pairs of numbers, from and to
price= # what a look-up said of a price that it could not tell
spent_before=$SECONDS
read -r began _ </proc/uptime # a clock that nobody sets, as $SECONDS is not
flags=()
while (($#)); do
  for own in ${owns:-}; do # a loop says before it sources this which flags it sets itself
    if [[ ${1%%=*} == --* && $(tr - _ <<<"${1%%=*}") == "__${own%:*}" ]]; then
      echo "error: ${1%%=*} is what this loop goes through: set ${own#*:}=\"...\" before it instead" >&2
      exit 2
    fi
  done
  if [[ $1 == --budget[_-]*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
  case $1 in
    --budget[_-]hours | --budget[_-]usd)
      [[ ${2:-} =~ ^[0-9]*[.]?[0-9]+$ ]] || {
        echo "error: $1 ${2:-}: it takes a number" >&2
        exit 2
      }
      if [[ $1 == *hours ]]; then budget[0]=$(awk "BEGIN { print $2 * 3600 }"); else budget[1]=$2; fi
      shift
      ;;
    --predict[_-]file* | --predictions[_-]file*)
      echo "error: ${1%%=*}: a loop trains and scores; the inference script of a run takes it" >&2
      exit 2
      ;;
    -h | --help) # the comment that the loop opens with
      sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
      printf '%s\n' 'As all loops: --dry_run lists the cells with what is left to spend; --budget_usd USD and --budget_hours H' \
        'stop before the cell that would exceed them; LAUNCH="accelerate launch" stands in front of each script.'
      exit 0
      ;;
    --dry_run | --dry-run) dry_run=1 && flags+=("$1") ;;
    *) flags+=("$1") ;;
  esac
  shift
done
set -- "${flags[@]}"
for numbers in ${ONLY:-}; do
  [[ $numbers =~ ^([0-9]{1,9})(-([0-9]{1,9}))?$ ]] || {
    echo "error: ONLY=$ONLY: it takes numbers of cells, such as \"3-8 11\"" >&2
    exit 2
  }
  ours+=($((10#${BASH_REMATCH[1]})) $((10#${BASH_REMATCH[3]:-${BASH_REMATCH[1]}})))
done

is_ours() { # is_ours NUMBER: whether this start does that cell
  local i
  ((${#ours[@]})) || return 0
  for ((i = 0; i < ${#ours[@]}; i += 2)); do
    ((ours[i] > $1 || $1 > ours[i + 1])) || return 0
  done
  return 1
}

own_python() { # own_python WORD...: python that finds the modules of this folder, and then those of the user's
  PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} python "$@"
}

ask() { asked+=("$@" $'\x1e'); } # ask WHAT [WORD...]: a process for each cell would take most of a dry run's time

look_up() { # look_up SCRIPT FLAG...: sets state, folder, evaluation (its record), seconds, usd, and the seconds of its training
  local found
  found=$(PYTHONIOENCODING=utf-8 DATA_CHECKED=1 python "$@" --dry_run) || return # the scripts read the data themselves
  if [[ ! $price ]]; then # once for all cells
    price=$(grep '^price ' <<<"$found" || true)
    [[ ! $price ]] || echo "$price"
  fi
  evaluation=$(sed -n '$!s/^[^>]* -> //p' <<<"$found" | tail -n 1)
  IFS=$'\t' read -r state folder seconds usd training_seconds _ <<<"${found##*$'\n'}"
}

fail() { # fail HOW SCRIPT FLAG...: name the failed cell, and leave a record of it where the script left none
  failed+=("${*:2} ($1)")
  leave_failure "$@"
}

leave_failure() { # leave_failure HOW SCRIPT FLAG...; what it can't record is named at the end alone
  local left_in
  left_in=$(CELL_FAILED=$1 PYTHONIOENCODING=utf-8 python "${@:2}" --dry_run 2>/dev/null) || return 0
  cells+=("${left_in##*$'\n'}")
}

run_scripts() { # run_scripts FLAG...: the scripts of a cell, up to the first that fails
  local script status
  for script in "${scripts[@]}"; do
    # shellcheck disable=SC2086 # LAUNCH is a command with its arguments
    $LAUNCH "$script" "$@" || {
      status=$?
      ((status != 130)) || exit 130
      fail "exit $status" "$script" "$@"
      return 1
    }
  done
}

check_finished() { # check_finished STATUS SCRIPT FLAG...: a cell whose scripts ended has a record of it, or has failed
  local word words=() how="exit $1"
  (($1)) || how+=", but no finished record"
  for word in "${@:3}"; do [[ $word == --force ]] || words+=("$word"); done # which calls no run finished
  if ! look_up "$2" "${words[@]}" || [[ $state != finished ]]; then fail "$how" "${@:2}"; fi
}

say_estimate() { # say_estimate SECONDS USD: in hours or minutes, and dollars
  awk -v s="$1" -v usd="$2" 'BEGIN {
    if (s == "?") printf "unknown time"; else if (s < 3600) printf "%.1f min", s / 60; else printf "%.1f h", s / 3600
    if (usd == "?") printf ", unknown price"; else printf (usd < 0.1 ? ", $%.4f" : ", $%.2f"), usd }'
}

exceeds_budget() { # with the time this loop has taken so far, what waits, and the cell that look_up has found
  local now
  read -r now _ </proc/uptime
  awk -v spent="$spent_before" -v owed="$owed" -v began="$began" -v now="$now" -v s="$seconds" -v usd="$usd" \
    -v most="${budget[0]}" -v most_usd="${budget[1]}" 'BEGIN {
    spent += now - began + owed
    exit !((most != "inf" && spent + s > most + 0) || (most_usd != "inf" && s > 0 && (spent + s) * usd / s > most_usd + 0)) }'
}

calibrate() { # a short run of the cell's scripts in a hidden folder, so that the next look-up has a speed to go by
  local few=(--experiment_dir "$(dirname "$folder")/.calibration/$(basename "$folder")" --max_eval_samples 16)
  ((${#scripts[@]} == 1)) || few+=(--max_train_samples 64 --train_sample_fraction 1.0 --epochs 1)
  echo "nothing to estimate this cell from: a short run first"
  run_scripts "$@" "${few[@]}" || {
    leave_failure "a short run failed" "${scripts[0]}" "$@"
    return 1
  }
  if ! look_up "${scripts[-1]}" "$@" || [[ $seconds == '?' ]]; then
    fail "no estimate to hold against the budget" "${scripts[-1]}" "$@"
    return 1
  fi
}

within_budget() { # within_budget FLAG...: 0 where the run that look_up has found may be spent, 2 where it exceeds the budget
  [[ "${budget[*]}" != "inf inf" && $state != finished ]] || return 0
  [[ $seconds != '?' || ${left[*]} ]] || calibrate "$@" || return 1
  if [[ ${budget[1]} != inf && $usd == '?' && $seconds != '?' ]]; then
    echo "error: --budget_usd: this device has no known price, or several: give --price_per_hour or --gpu_name INSTANCE" >&2
    exit 1
  fi
  if [[ ${left[*]} ]] || exceeds_budget; then return 2; fi
}

died_before() { # died_before FOLDER: whether score_waiting's process ended before it could score what --force redoes there
  ((status)) && [[ ! -s $list && " ${flags[*]} " == *" --force "* ]] || return 1
  ! scored_since "$list" "$1"
}

scored_since() { [[ $(find "$2" -maxdepth 1 -name 'eval*.json' -newer "$1" 2>/dev/null) ]]; } # scored_since FILE FOLDER

score_waiting() { # score_waiting FLAG...: all cells that wait, with the flags that they share
  local i list flags status=0 before=${#failed[@]}
  local state folder evaluation seconds usd training_seconds
  [[ ! $dry_run ]] || ask score
  ((${#waiting[@]})) || return 0
  printf '\nscoring %s\n' "${waiting[*]}"
  list=$(mktemp)
  # shellcheck disable=SC2086 # LAUNCH is a command with its arguments
  if [[ ${together:-} ]]; then
    for i in "${!waiting[@]}"; do
      eval "flags=(${waiting_flags[i]})"
      printf '%s\0' "${flags[@]}" $'\x1e'
    done >"$list.runs"
    RUNS_TO_SCORE=$list.runs FAILED_RUNS=$list $LAUNCH "$scorer" "${flags[@]}" || status=$?
  else
    FAILED_RUNS=$list $LAUNCH "$scorer" --experiment_dir "${waiting[@]}" "$@" || status=$?
  fi
  ((status != 130)) || exit 130
  if ((status > 2 && ${#waiting[@]} > 1)) && [[ ! -s $list ]]; then # it died, of one that must not take the others with it
    score_one_by_one "$list" "$@"
    rm -f "$list" "$list.runs"
    return
  fi
  for i in "${!waiting[@]}"; do
    eval "flags=(${waiting_flags[i]})"
    if grep -qxF -- "${waiting[i]}" "$list" || died_before "${waiting[i]}"; then
      fail "exit $status" "$scorer" "${flags[@]}"
    elif [[ ${waiting_state[i]} != finished ]]; then
      check_finished "$status" "$scorer" "${flags[@]}"
    fi
  done
  ((!status || ${#failed[@]} > before)) || failed+=("$scorer, of finished cells alone (exit $status)")
  rm -f "$list" "$list.runs"
  waiting=() waiting_flags=() waiting_state=() owed=0
}

score_one_by_one() { # score_one_by_one FILE FLAG...: those of the cells that wait that have no record newer than FILE
  local i cells_left=("${waiting[@]}") all_flags=("${waiting_flags[@]}") all_states=("${waiting_state[@]}")
  for i in "${!cells_left[@]}"; do
    waiting=() waiting_flags=() waiting_state=() owed=0
    ! scored_since "$1" "${cells_left[i]}" || continue
    waiting=("${cells_left[i]}") waiting_flags=("${all_flags[i]}") waiting_state=("${all_states[i]}")
    score_waiting "${@:2}"
  done
  waiting=() waiting_flags=() waiting_state=() owed=0
}

score_best() { # score_best FLAG...: the cell that is best on the validation split, on the test split
  local folder best found state evaluation seconds usd training_seconds
  if [[ $dry_run ]]; then
    ask best
    return
  fi
  if ((${#left[@]} + ${#failed[@]} + ${#ours[@]})); then
    printf '\nthe best is chosen once no cell is left and none has failed\n'
    return
  fi
  best=$(own_python -m study.report --best "${evaluations[@]}") || {
    fail "no best cell" study.report --best
    return
  }
  printf '\nbest on the validation split, scored on the test split:\n%s\n' "$best"
  while IFS= read -r found; do
    look_up "$scorer" --experiment_dir "$found" "$@" || state=unknown
    if [[ "${budget[*]}" != "inf inf" && $state != finished ]] && { [[ ${seconds:-?} == '?' ]] || exceeds_budget; }; then
      left+=("$found, on the test split")
      continue
    fi
    waiting+=("$found") waiting_flags+=("$(printf '%q ' --experiment_dir "$found" "$@")") waiting_state+=("$state")
    [[ ${seconds:-?} == '?' ]] || owed=$(awk -v a="$owed" -v s="$seconds" 'BEGIN { print a + s }')
  done <<<"$best"
  score_waiting "$@"
}

train_row() { # train_row "EPOCHS..." SCRIPT SCORER -- FLAG...: in one training all cells that differ in --epochs alone
  local scripts=("$2" "$3") trainer=$2 state folder evaluation seconds usd training_seconds every flags mine=() i=$count
  row=
  [[ ! $dry_run ]] || ask row
  for every in $1; do
    i=$((i + 1))
    [[ ! $dry_run ]] && ! is_ours "$i" || mine+=("$every")
  done
  ((${#mine[@]} > 1)) || return 0
  mapfile -t every < <(printf '%s\n' "${mine[@]}" | sort -nu)
  shift 4
  ((${#every[@]} > 1)) || return 0
  flags=(--epochs "${every[-1]}" --also_epochs "${every[@]::${#every[@]}-1}" "$@")
  if [[ $dry_run ]]; then
    ask row "$trainer" "${flags[@]}"
    return
  fi
  look_up "$trainer" "${flags[@]}" || return 0 # the cells say why
  [[ $state != finished ]] || return 0
  row=trained
  within_budget --epochs "${every[-1]}" "$@" || {
    (($? == 2)) && row= && return 0 # the cells say so, and the shortest may fit
    row=failed
    unset 'failed[-1]' # the cells are named
    return 0
  }
  printf '\n[%d-%d] %s\n' $((count + 1)) $((count + ${#every[@]})) "${flags[*]}"
  scripts=("$trainer")
  run_scripts "${flags[@]}" || row=failed
}

cell() { # cell SCRIPT [SCRIPT] -- FLAG...: train and score one cell; the last script is the one that scores
  local scripts=() shares=${together:+loading} state folder evaluation seconds usd training_seconds status word words=()
  while [[ $1 != -- ]]; do
    scripts+=("$1")
    shift
  done
  shift
  count=$((count + 1))
  if [[ $dry_run ]]; then
    [[ ${#scripts[@]} == 1 ]] || shares=scoring # with others, once each is trained
    ask cell "$shares" "${scripts[-1]}" "$@"
    return
  elif ! is_ours "$count"; then
    for word in "$@"; do [[ $word == --force ]] || words+=("$word"); done # which calls no run finished
    ask cell '' "${scripts[-1]}" "${words[@]}" --dry_run
    return
  fi
  printf '\n[%d] %s\n' "$count" "$*"
  look_up "${scripts[-1]}" "$@" || {
    status=$?
    ((status != 2)) || exit 2 # bad usage: every cell would fail alike
    fail "exit $status" "${scripts[-1]}" "$@"
    return 0
  }
  cells+=("$folder") evaluations+=("$evaluation")
  if [[ $row == failed && $state != finished && $state != trained ]]; then
    fail "its training failed" "${scripts[-1]}" "$@"
    return 0
  fi
  within_budget "$@" || {
    status=$?
    ((status == 2)) || return 0
    printf 'left for lack of budget: %s\n' "$(say_estimate "$seconds" "$usd")"
    left+=("$folder")
    return 0
  }
  scorer=${scripts[-1]}
  if ((${#scripts[@]} == 2)); then
    scripts=("${scripts[0]}")
    [[ $row == trained ]] || run_scripts "$@" || return 0
  elif [[ ! ${together:-} ]]; then
    run_scripts "$@" || return 0
    [[ $state == finished ]] || check_finished 0 "$scorer" "$@"
    return 0
  fi
  local other
  for other in "${waiting[@]}"; do [[ $other != "$folder" ]] || return 0; done # listed twice
  waiting+=("$folder") waiting_flags+=("$(printf '%q ' "$@")") waiting_state+=("$state")
  [[ $seconds == '?' ]] || owed=$(awk -v a="$owed" -v s="$seconds" -v t="$training_seconds" 'BEGIN { print a + s - t }')
}

look_up_others() { # in one process: those that ONLY leaves to other starts
  local list state folder unfinished=0 others=0
  list=$(mktemp)
  printf '%s\0' "${asked[@]}" | LIST=$list DATA_CHECKED=1 PYTHONIOENCODING=utf-8 own_python -m study.dry_run >/dev/null || true
  while IFS=$'\t' read -r _ state folder _; do
    others=$((others + 1))
    [[ $state == finished ]] || unfinished=$((unfinished + 1))
    [[ ! $folder ]] || cells+=("$folder")
  done <"$list"
  rm -f "$list"
  printf '\nONLY=%s: of %d other cells %d are not finished\n' "$ONLY" "$others" "$unfinished"
}

finish() { # print the table of all cells and name those that failed or are left
  local report=0 folder path recorded=() i
  if [[ $dry_run ]]; then
    printf '%s\0' "${asked[@]}" | PYTHONIOENCODING=utf-8 own_python -m study.dry_run
    exit
  fi
  for ((i = 1; i < ${#ours[@]}; i += 2)); do
    ((ours[i] <= count)) || {
      echo "error: ONLY=$ONLY: the loop has $count cells" >&2
      exit 2
    }
  done
  [[ ! ${asked[*]} ]] || look_up_others
  printf '\n'
  for folder in "${cells[@]}"; do
    for path in "$folder"/train.json "$folder"/eval*.json; do
      [[ ! -e $path ]] || { recorded+=("$folder") && break; }
    done
  done
  if ((${#recorded[@]})); then
    own_python -m study.report "${recorded[@]}" || report=$?
  fi
  if ((${#left[@]})); then
    printf 'the budget ends here: %d of %d cells are left:\n' "${#left[@]}" "$count"
    printf '  %s\n' "${left[@]}"
  fi
  if ((${#failed[@]})); then
    printf 'error: %d of %d cells failed:\n' "${#failed[@]}" "$count" >&2
    printf '  %s\n' "${failed[@]}" >&2
    exit 1
  fi
  exit "$report"
}
