#!/usr/bin/env bash
# Load-test fine-tuned models behind every server: each is started on a free port, swept by serving/load_test.py, stopped.
#
#   ./serve_and_load.sh MODEL... [flags of serving/load_test.py]
#   SERVERS="fastapi vllm" ./serve_and_load.sh RUN RUN --rates 2,4,8,16 --seconds 30 --repeat_prompts --price_per_hour 4
#   ./serve_and_load.sh RUN --dry_run     # each cell: finished or not
# A MODEL is the folder of a finished run, of either task, or of its export. Servers that need an export get one, made
# once in --output_dir. The test split is that of the run, unless flags name another.
# SERVERS are fastapi, ray, transformers, vllm and tgi. One that can't start here is named at the end, with its log.
# START_SECONDS (900) is how long one may take to start, its installation included; WORKERS how many FastAPI gets.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
output=experiments/serving
models=() flags=()
dry_run=
force=()
server_pid= # of the server, whose process group has the same number
work_pid=   # of what this loop waits for, likewise
cells=0
gaps=()
failed=()
declare -A about=() # what cells.py says of each model

refuse() { # refuse WORD...
  echo "error: $*" >&2
  exit 2
}

read_flags() { # read_flags WORD...: models first, then flags
  while (($#)) && [[ $1 != -* ]]; do
    models+=("${1%/}")
    shift
  done
  while (($#)); do
    if [[ $1 == --output[_-]dir=* ]]; then set -- --output_dir "${1#*=}" "${@:2}"; fi
    case $1 in
      -h | --help) # the comment above
        sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
      --dry[_-]run) dry_run=1 ;;
      --force) force=(--force) ;;
      --output[_-]dir)
        output=${2:-}
        [[ $output ]] || refuse "$1: it takes a folder"
        shift
        ;;
      --url* | --api | --api=* | --model | --model=* | --server* | --task[_-]type*)
        refuse "${1%%=*} is what this loop sets itself: name servers by SERVERS=\"...\" before it, and models first"
        ;;
      *) flags+=("$1") ;;
    esac
    shift
  done
  ((${#models[@]})) || refuse "name at least one model, the folder of a run or of an export (--help says more)"
  [[ " ${flags[*]}" == *" --rates"* ]] || flags+=(--rates "1,2,4,8,16,32,64")
}

attend() { # attend COMMAND...: run it in a process group of its own, so that Ctrl-C comes to this loop, which ends it
  local status=0
  "$@" &
  work_pid=$!
  wait "$work_pid" || status=$?
  work_pid=
  return "$status"
}

end_group() { # end_group PID SECONDS: SIGTERM to the process, and after SECONDS SIGKILL to what is left of its group
  kill -TERM "$1" 2>/dev/null || true
  wait_for "$1" "$2" || true
  kill -KILL -- "-$1" 2>/dev/null || return 0
  wait_for "-$1" 2 || true # a killed process is gone a little later
}

wait_for() { # wait_for PID SECONDS: until there is no such process, or group
  local tenths=$(($2 * 10))
  while kill -0 -- "$1" 2>/dev/null; do
    ((tenths-- > 0)) || return 1
    sleep 0.1
  done
}

stop_server() {
  [[ $server_pid ]] || return 0
  end_group "$server_pid" 30
  server_pid=
}

# shellcheck disable=SC2329 # called by the trap
stop_all() { # on every way out
  trap '' INT TERM HUP
  [[ ! $work_pid ]] || end_group "$work_pid" 20
  stop_server
}

name_cell() { # name_cell SERVER MODEL: sets task, adapter, kind, flags_of (the test split), cell (its folder)
  local hash
  { read -r task && read -r adapter && read -r kind && read -r flags_of; } <<<"${about[$2]}"
  hash=$(printf '%s\0' "$1" "$adapter" "${WORKERS:-1}" "${flags[@]}" | sha256sum)
  cell=$output/$1/$(basename "$2")-${hash::8}
}

is_finished() { [[ ! ${force[*]} ]] && compgen -G "$cell/serve-*.json" >/dev/null && grep -q '"status": "finished"' "$cell"/serve-*.json; }

export_of() { # export_of MODEL: sets $served to the export to serve
  served=$1
  [[ $kind == run ]] || return 0
  served=$output/models/${adapter::12}/$(basename "$1")
  [[ ! -f $served/export.json ]] || return 0
  attend python "$root/serving/export.py" "$1" --output_dir "$served"
}

free_port() { # free_port WANTED: that, or one that the system names
  python -c '
import socket, sys

for port in (int(sys.argv[1]), 0):
    try:
        with socket.socket() as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(("127.0.0.1", port))
            print(listening.getsockname()[1])
        break
    except OSError:
        pass' "$1"
}

start() { # start SERVER PORT NAME: sets $server_pid; its words go to $cell/server.log
  local command=("$root/serving/serve_$1.sh" "$served" --port "$2")
  case $1 in
    fastapi)
      command=(python "$root/serving/serve_fastapi.py" "$served" --host 127.0.0.1 --port "$2" --served_model_name "$3")
      [[ ! ${WORKERS:-} ]] || command+=(--workers "$WORKERS")
      ;;
    ray) command=(python "$root/serving/serve_ray.py" "$served" --port "$2" --served_model_name "$3") ;;
  esac
  printf '$ %s\n' "${command[*]}" >"$cell/server.log"
  "${command[@]}" </dev/null >>"$cell/server.log" 2>&1 &
  server_pid=$!
  disown "$server_pid" # or the shell tells of its end
}

why_down() { # the error in the server's log, or else its last line, or else what the waiting came to
  local said
  said=$(grep -aiE '(error|exception)\b.*[:a-z]' "$cell/server.log" | tail -n 1 || true)
  [[ $said ]] || said=$(tail -n +2 "$cell/server.log" | grep -a . | tail -n 1 || true)
  tr -d '\r' <<<"${said:-$(cat "$cell/why")}" | cut -c 1-200 | sed 's/^[Ee]rror: //'
}

gap() { # gap SERVER MODEL WHY: also as a record, so that tables show it
  printf 'gap: %s\n' "$3"
  gaps+=("$1, $2: $3 ($cell/server.log)")
  attend python "$root/serving/load_test.py" "${load[@]}" "${flags[@]}" --not_started="$3" || true
}

sweep() { # sweep SERVER MODEL: one cell
  local served=$2 port url flags_of task adapter kind cell load=()
  name_cell "$1" "$2"
  cells=$((cells + 1))
  printf '\n[%d] %s, %s of %s\n' "$cells" "$1" "$task" "$2"
  if is_finished; then
    printf 'finished  %s\n' "$cell"
    return
  elif [[ $dry_run ]]; then
    printf 'not yet   %s\n' "$cell"
    return
  fi
  mkdir -p "$cell" 2>/dev/null || refuse "--output_dir $output can't be written: name another"
  case $1 in transformers | vllm | tgi)
    export_of "$2" || {
      failed+=("$1, $2: its export failed (exit $?)")
      return 0
    }
    ;;
  esac
  port=$(free_port "$(cat "$cell/port" 2>/dev/null || echo 0)") # that which the cell had: its record has it in its name
  echo "$port" >"$cell/port"
  url=http://127.0.0.1:$port
  load=(--url "$url" --server "$1" --model "$(basename "$2")" --output_dir "$cell") # all serve it under that name
  [[ $1 != tgi ]] || load+=(--api tgi)
  eval "load+=($flags_of)" # quoted by cells.py
  start "$1" "$port" "$(basename "$2")"
  if ! attend python "$root/serving/cells.py" wait "$url/health" "$server_pid" "${START_SECONDS:-900}" 2>"$cell/why"; then
    stop_server
    gap "$1" "$2" "$(why_down)"
    return
  fi
  attend python "$root/serving/load_test.py" "${load[@]}" "${flags[@]}" "${force[@]}" || failed+=("$1, $2: its load test failed (exit $?)")
  stop_server
}

finish() {
  local part
  printf '\n%d cells, %d gaps, %d failed\n' "$cells" "${#gaps[@]}" "${#failed[@]}"
  ((${#gaps[@]} + ${#failed[@]})) || exit 0
  for part in "${gaps[@]}"; do printf 'gap: %s\n' "$part" >&2; done
  for part in "${failed[@]}"; do printf 'error: %s\n' "$part" >&2; done
  exit 1
}

read_flags "$@"
servers=${SERVERS:-fastapi ray transformers vllm tgi}
for server in $servers; do # all of them before the first, which takes minutes
  [[ " fastapi ray transformers vllm tgi " == *" $server "* ]] ||
    refuse "SERVERS: $server is none of fastapi, ray, transformers, vllm, tgi"
done
for model in "${models[@]}"; do
  about[$model]=$(python "$root/serving/cells.py" about "$model") || exit 2
done
set -m # every command in the background is a process group of its own
trap stop_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
for model in "${models[@]}"; do
  for server in $servers; do
    sweep "$server" "$model"
  done
done
finish
