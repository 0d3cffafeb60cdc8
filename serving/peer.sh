# shellcheck shell=bash
# Sourced by serve_vllm.sh, serve_transformers.sh and serve_tgi.sh: reads what they have in common, FOLDER [--port P]
# [--host H] [--api_key_file FILE], into $folder, $name, $port, $host and $key; other flags, for the server, into $flags.
# What is wrong with them is said in one line, with exit status 2.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=study/setup.sh
source "$root/study/setup.sh"

refuse() { # refuse WORD...: say why the server can't start
  echo "error: $*" >&2
  exit 2
}

read_flags() { # read_flags FLAG...
  local word value
  folder='' port=8000 host=127.0.0.1 key='' flags=()
  while (($#)); do
    word=$1
    if [[ $word == --*=* ]]; then
      set -- "${word%%=*}" "${word#*=}" "${@:2}"
      word=$1
    fi
    case $word in
      -h | --help) # the comment that the script opens with
        sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
      --port | --host | --api[_-]key[_-]file)
        value=${2:-}
        [[ $value ]] || refuse "$word: it takes a value"
        shift
        # shellcheck disable=SC2034 # key is read by the scripts
        case $word in
          --port) port=$value ;;
          --host) host=$value ;;
          *) key=$(key_in "$value") || exit 2 ;;
        esac
        ;;
      *)
        if [[ ! $folder && $word != -* ]]; then folder=$word; else flags+=("$word"); fi
        ;;
    esac
    shift
  done
  check_folder
  [[ $port =~ ^[1-9][0-9]{0,4}$ && $port -le 65535 ]] || refuse "--port $port: it is a number from 1 to 65535"
  check_port
}

key_in() { # key_in FILE: the key that it holds
  local found
  [[ -f $1 && -r $1 ]] || refuse "--api_key_file $1 can't be read: name a file that holds the key and nothing else"
  found=$(tr -d '[:space:]' <"$1")
  [[ $found ]] || refuse "--api_key_file $1 is empty: write the key into it"
  echo "$found"
}

check_folder() { # is it a model that a server loads? sets $name and makes $folder absolute
  [[ $folder ]] || refuse "name the folder of an exported model (serving/export.py writes one)"
  [[ -d $folder ]] || refuse "$folder is no folder: name an exported model (serving/export.py writes one)"
  [[ ! -f $folder/train.json ]] ||
    refuse "$folder is a run, which servers do not load: python serving/export.py $folder --output_dir MODEL makes a model of it"
  [[ -f $folder/config.json ]] || refuse "$folder is no exported model: it has no config.json (serving/export.py writes one)"
  compgen -G "$folder/*.safetensors" >/dev/null || refuse "$folder is no exported model: it has no weights (*.safetensors)"
  folder=$(cd "$folder" && pwd)
  name=$(basename "$folder")
}

check_port() {
  local python why
  python=$(find_python) || exit 2
  why=$("$python" -c '
import socket, sys

host, port = sys.argv[1], int(sys.argv[2])
try:
    family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
except OSError as error:
    print(error.strerror or error)' "$host" "$port")
  [[ ! $why ]] || refuse "--port $port: can't listen on $host:$port (${why,}): name another --port"
}

has_gpu() { # an NVIDIA GPU that this command may use
  [[ ${CUDA_VISIBLE_DEVICES-all} ]] && command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU
}

own_environment() { # own_environment FOLDER REQUIREMENT... [-- UNWANTED...]: makes it once; sets $python to its interpreter
  local venv=$1 wanted=() found lock
  shift
  while (($#)) && [[ $1 != -- ]]; do
    wanted+=("$1")
    shift
  done
  python=$venv/bin/python
  [[ "$(cat "$venv/installed" 2>/dev/null)" != "${wanted[*]}" ]] || return 0
  mkdir -p "$venv" 2>/dev/null && [[ -w $venv ]] || refuse "$venv can't be written: make it writable, or move this project"
  exec {lock}>"$venv.lock"
  flock "$lock" # another start may be installing it
  if [[ "$(cat "$venv/installed" 2>/dev/null)" != "${wanted[*]}" ]]; then
    echo "installing ${wanted[*]} into $venv (once)"
    found=$(find_python) || exit 2
    { "$found" -m venv --clear "$venv" &&
      "$python" -m pip install --quiet --disable-pip-version-check "${wanted[@]}" &&
      { (($# < 2)) || "$python" -m pip uninstall --quiet --yes "${@:2}"; }; } ||
      refuse "${wanted[*]} can't be installed into $venv: see above"
    echo "${wanted[*]}" >"$venv/installed"
  fi
  exec {lock}>&-
}
